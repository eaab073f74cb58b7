"""Jobs by name, and attempts of the same request: `BASE-1`, `BASE-2`, ... in the order they were made."""

import logging
from dataclasses import dataclass
from typing import Any

from training.launch.names import Project
from training.launch.session import Aws

log = logging.getLogger("training")

Summary = dict[str, Any]


@dataclass(frozen=True)
class Jobs:
    """One kind of SageMaker's jobs."""

    field: str
    """What the names of its fields begin with: TrainingJob, of TrainingJobName."""
    operation: str
    """The same in boto3's methods: training_job, of create_training_job."""
    part: str
    """What stands for the kind in the names of jobs, after the project."""
    what: str
    """The same in sentences."""

    def start(self, aws: Aws, project: Project, wanted: dict[str, Any]) -> str:
        """The name of the job for this request: one that runs or has ended well is taken, else the next attempt made.

        `wanted`: the arguments of its Create operation but for the name. Raises: AwsError.
        """
        base = project.of(self.part, {name: value for name, value in wanted.items() if name != "Tags"})
        name, status = f"{self.field}Name", f"{self.field}Status"
        attempts = sorted(self.listed(aws, base), key=lambda each: int(each[name].rsplit("-", 1)[1]))
        if attempts and attempts[-1][status] in ("InProgress", "Completed"):
            taken = str(attempts[-1][name])
            log.info("%s %s for this very request is there: %s", self.what, taken, attempts[-1][status])
            return taken
        fresh = f"{base}-{len(attempts) + 1}"
        getattr(aws.client("sagemaker"), f"create_{self.operation}")(**{name: fresh}, **wanted)
        log.info("%s %s is started", self.what, fresh)
        return fresh

    def listed(self, aws: Aws, prefix: str) -> list[Summary]:
        """Summaries, all pages, of the jobs whose name begins so. Raises: AwsError."""
        call = getattr(aws.client("sagemaker"), f"list_{self.operation}s")
        given: dict[str, Any] = {"NameContains": prefix}
        found: list[Summary] = []
        while True:
            page = call(**given)
            found += [each for each in page[f"{self.field}Summaries"] if each[f"{self.field}Name"].startswith(prefix)]
            if not page.get("NextToken"):
                return found
            given["NextToken"] = page["NextToken"]


TRAINING_JOBS = Jobs("TrainingJob", "training_job", "train", "job")
TUNING_JOBS = Jobs("HyperParameterTuningJob", "hyper_parameter_tuning_job", "t", "tuning job")
TRANSFORM_JOBS = Jobs("TransformJob", "transform_job", "batch", "job")
