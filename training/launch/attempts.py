"""Jobs by name, and attempts of the same request: `BASE-1`, `BASE-2`, ... in the order they were made."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from training.launch import cost, data, roles
from training.launch.errors import AwsError
from training.launch.logs import TRAINING, TRANSFORM
from training.launch.names import Project
from training.launch.session import Aws
from training.launch.wait import POLL_S, wait

log = logging.getLogger("training")

Summary = dict[str, Any]
RUNNING = ("InProgress", "Stopping")
"""A job that is being stopped still writes, for 120 s at most."""


def _model(_: Aws, job: Summary) -> str | None:
    return (job.get("ModelArtifacts") or {}).get("S3ModelArtifacts")


def _best_model(aws: Aws, job: Summary) -> str | None:
    best = job.get("BestTrainingJob")
    return _model(aws, TRAINING_JOBS.describe(aws, best["TrainingJobName"])) if best else None


def _answers(_: Aws, job: Summary) -> str | None:
    return (job.get("TransformOutput") or {}).get("S3OutputPath")


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
    output: Callable[[Aws, Summary], str | None]
    """The s3:// address, or its beginning, of what a job of this description has written."""
    group: str
    """CloudWatch's group with the lines of such jobs: of a tuning job its trials'."""

    def start(self, aws: Aws, project: Project, wanted: dict[str, Any], poll_s: float = POLL_S) -> str:
        """The name of the job for this request: one that runs, or ended well and has its output, is taken, else the
        next attempt made. One that is being stopped is waited for: two would write to the same checkpoints.

        `wanted`: the arguments of its Create operation but for the name. Raises: AwsError; StoppedWaiting.
        """
        base, last, state = self._last(aws, project, wanted)
        if last:
            name = f"{base}-{last}"
            if state == "Stopping":
                state = self.wait_until_over(aws, name, poll_s)
            if state == "InProgress" or (state == "Completed" and self.has_output(aws, name)):
                log.info("%s %s for this very request is there: %s", self.what, name, state)
                return name
            if state == "Completed":
                log.info("%s %s ended well, but what it wrote is no longer in S3: it is made again", self.what, name)
        fresh = f"{base}-{last + 1}"
        create = getattr(aws.client("sagemaker"), f"create_{self.operation}")
        try:
            roles.until_role_is_known(lambda: create(**{f"{self.field}Name": fresh}, **wanted))
        except AwsError as exc:
            if not exc.is_there_already:
                raise
            log.info(
                "%s %s for this very request was started by another command, or by this one whose answer was lost",
                self.what, fresh,
            )  # fmt: skip
            return fresh
        log.info("%s %s is started", self.what, fresh)
        return fresh

    def planned(self, aws: Aws, project: Project, wanted: Mapping[str, Any]) -> str:
        """What `start` would make or take, in words. Raises: AwsError."""
        base, last, state = self._last(aws, project, wanted)
        if state in RUNNING or (state == "Completed" and self.has_output(aws, f"{base}-{last}")):
            return f"{base}-{last}, which is there: {state}"
        return f"{base}-{last + 1}"

    def _last(self, aws: Aws, project: Project, wanted: Mapping[str, Any]) -> tuple[str, int, str]:
        """What all attempts of this request are called, the number of the last (0: there is none) and its state."""
        base = project.of(self.part, {name: value for name, value in wanted.items() if name != "Tags"})
        attempts = {
            int(name.rsplit("-", 1)[1]): state
            for name, state in self.states(aws, project).items()
            if name.startswith(f"{base}-")
        }
        last = max(attempts, default=0)
        return base, last, attempts.get(last, "")

    def listed(self, aws: Aws, project: Project) -> list[Summary]:
        """Summaries, all pages, of the project's jobs of this kind. Raises: AwsError."""
        call = getattr(aws.client("sagemaker"), f"list_{self.operation}s")
        given: dict[str, Any] = {"NameContains": f"{project.name}-{self.part}-"}
        found: list[Summary] = []
        while True:
            page = call(**given)
            found += [
                each for each in page[f"{self.field}Summaries"] if project.owns(self.part, each[f"{self.field}Name"])
            ]
            if not page.get("NextToken"):
                return found
            given["NextToken"] = page["NextToken"]

    def states(self, aws: Aws, project: Project) -> dict[str, str]:
        """The state of each of the project's jobs of this kind, by name. Raises: AwsError."""
        return {each[f"{self.field}Name"]: each[f"{self.field}Status"] for each in self.listed(aws, project)}

    def describe(self, aws: Aws, name: str) -> dict[str, Any]:
        """What AWS knows of the job. Raises: AwsError."""
        return dict(getattr(aws.client("sagemaker"), f"describe_{self.operation}")(**{f"{self.field}Name": name}))

    def has_output(self, aws: Aws, name: str) -> bool:
        """Whether what the job wrote is in S3 still: `delete --data` removes it. Raises: AwsError."""
        place = self.output(aws, self.describe(aws, name))
        try:
            return place is not None and any(True for _ in data.listed(aws, place))
        except AwsError as exc:
            if exc.is_missing:  # the bucket
                return False
            raise

    def stop(self, aws: Aws, name: str) -> None:
        """Ask for the job's end, which takes up to two minutes; one that has ended is no error. Raises: AwsError."""
        try:
            getattr(aws.client("sagemaker"), f"stop_{self.operation}")(**{f"{self.field}Name": name})
        except AwsError:
            if self.describe(aws, name)[f"{self.field}Status"] == "InProgress":
                raise

    def wait_until_over(self, aws: Aws, name: str, poll_s: float = POLL_S) -> str:
        """Returns: the state the job ended in. Raises: AwsError; StoppedWaiting."""
        status = f"{self.field}Status"
        job = wait(
            lambda: self.describe(aws, name), lambda job: str(job[status]), lambda job: job[status] not in RUNNING,
            f"{self.what} {name}", None, poll_s, f"stop {name}",
        )  # fmt: skip
        return str(job[status])


TRAINING_JOBS = Jobs("TrainingJob", "training_job", "train", "job", _model, TRAINING)
TUNING_JOBS = Jobs("HyperParameterTuningJob", "hyper_parameter_tuning_job", "t", "tuning job", _best_model, TRAINING)
TRANSFORM_JOBS = Jobs("TransformJob", "transform_job", "batch", "job", _answers, TRANSFORM)
KINDS = (TUNING_JOBS, TRAINING_JOBS, TRANSFORM_JOBS)
"""In the order to stop them: a tuning job starts training jobs."""


@dataclass(frozen=True)
class Job:
    """A job of the project's."""

    kind: Jobs
    name: str
    state: str
    created: datetime
    machines: str = ""
    """`1 x ml.g5.xlarge`, where its description was asked for."""
    price: str = ""
    """Of that, as a line."""

    @property
    def runs(self) -> bool:
        """Whether it costs still."""
        return self.state in RUNNING


def every(aws: Aws, project: Project) -> list[Job]:
    """The project's jobs of all kinds, trials not, newest first. Raises: AwsError."""
    found = [
        Job(kind, each[f"{kind.field}Name"], each[f"{kind.field}Status"], each["CreationTime"])
        for kind in KINDS
        for each in kind.listed(aws, project)
    ]
    return sorted(found, key=lambda job: job.created.timestamp(), reverse=True)


def running(aws: Aws, project: Project, but: str = "") -> list[Job]:
    """Those that cost still, with what they run on; `but`: without the one of this name. Raises: AwsError."""
    asked = [found(aws, project, job.name) for job in every(aws, project) if job.runs and job.name != but]
    return [job for job in asked if job is not None]


def found(aws: Aws, project: Project, name: str) -> Job | None:
    """The project's job of this name, a trial too; None where there is none. Raises: AwsError."""
    search = re.sub(r"-\d{3}-[0-9a-f]+$", "", name)
    if search != name and project.owns(TUNING_JOBS.part, search):
        kind = TRAINING_JOBS
    else:
        owner = next((kind for kind in KINDS if project.owns(kind.part, name)), None)
        if owner is None:
            return None
        kind = owner
    try:
        told = kind.describe(aws, name)
    except AwsError as exc:
        if exc.is_missing:
            return None
        raise
    return Job(kind, name, told[f"{kind.field}Status"], told["CreationTime"], *_machines(told))


def _machines(told: Summary) -> tuple[str, str]:
    """What a job runs on, and the price of that, in words."""
    inner = told.get("TrainingJobDefinition") or told
    resources = inner.get("ResourceConfig") or inner.get("TransformResources") or {}
    count, instance = resources.get("InstanceCount", 1), resources.get("InstanceType", "unknown")
    limits = (told.get("HyperParameterTuningJobConfig") or {}).get("ResourceLimits")
    at_once = limits["MaxParallelTrainingJobs"] if limits else 1
    each = f"{count} x {instance}"
    return f"{at_once} trials at once, each {each}" if limits else each, cost.hourly(instance, at_once * count)
