"""Tuning jobs: trials in parallel at SageMaker, a live table of them, the best one's settings and model home."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.config import TrainingConfig
from training.launch.errors import JobFailed, LaunchError, failure_advice
from training.launch.jobs import OVER, Training, definition, describe
from training.launch.logs import TRAINING, LogTail
from training.launch.names import Project
from training.launch.session import Aws
from training.launch.wait import POLL_S, wait
from training.metric_lines import OBJECTIVE
from training.tuning.best import settings_of, write_best
from training.tuning.config import SOURCES, TuningConfig

log = logging.getLogger("training")

Strategy = Literal["Bayesian", "Random"]
"""Not Grid, for which a learning rate is no list; not Hyperband, which would choose the epochs itself."""


@dataclass(frozen=True)
class Search:
    """How to look for the best hyperparameters."""

    settings: TuningConfig
    parallel: int = 2
    """Trials at once; a Bayesian search learns less from each the more there are."""
    strategy: Strategy = "Bayesian"
    early_stopping: bool = True
    """Stop trials that fall behind the median of the others."""
    seed: int = 0


def ranges(settings: TuningConfig, fixed: Mapping[str, object]) -> dict[str, list[dict[str, Any]]]:
    """CreateHyperParameterTuningJob's ParameterRanges, without what is `fixed`."""
    found: dict[str, list[dict[str, Any]]] = {
        "ContinuousParameterRanges": [], "IntegerParameterRanges": [], "CategoricalParameterRanges": []
    }  # fmt: skip
    if "learning_rate" not in fixed:
        low, high = settings.learning_rate_range
        found["ContinuousParameterRanges"].append(
            {"Name": "learning_rate", "MinValue": str(low), "MaxValue": str(high), "ScalingType": "Logarithmic"}
        )
    if "epochs" not in fixed:
        first, last = settings.epochs_range
        found["IntegerParameterRanges"].append(
            {"Name": "epochs", "MinValue": str(first), "MaxValue": str(last), "ScalingType": "Auto"}
        )
    if "batch_size" not in fixed:
        sizes = [str(size) for size in settings.batch_sizes]
        found["CategoricalParameterRanges"].append({"Name": "batch_size", "Values": sizes})
    if not any(found.values()):
        raise LaunchError("learning_rate, batch_size and epochs are all given, so nothing is left to tune.")
    return found


def request(project: Project, training: Training, search: Search, region: str) -> dict[str, Any]:
    """CreateHyperParameterTuningJob's arguments but for the name, which `start` gives."""
    fixed = dict(training.hyperparameters)
    job = definition(project, training, region)
    job["AlgorithmSpecification"].pop("EnableSageMakerMetricsTimeSeries")  # not a field of trials
    job["StaticHyperParameters"] = {"entry": "hpo", **fixed}
    # No checkpoints: all trials would share one S3 folder, and none goes on from another's. A trial that spot capacity
    # is taken from begins anew.
    return {
        "HyperParameterTuningJobConfig": {
            "Strategy": search.strategy,
            "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": OBJECTIVE},
            "ResourceLimits": {
                "MaxNumberOfTrainingJobs": search.settings.trials,
                "MaxParallelTrainingJobs": min(search.parallel, search.settings.trials),
            },
            "ParameterRanges": ranges(search.settings, fixed),
            "TrainingJobEarlyStoppingType": "Auto" if search.early_stopping else "Off",
            "RandomSeed": search.seed,
        },
        "TrainingJobDefinition": job,
        "Tags": project.tags,
    }


def trials(aws: Aws, name: str) -> list[dict[str, Any]]:
    """The trials so far, best first, those without a figure last."""
    client, given, found = aws.client("sagemaker"), {"HyperParameterTuningJobName": name, "MaxResults": 100}, []
    while True:
        page = client.list_training_jobs_for_hyper_parameter_tuning_job(**given)
        found += page["TrainingJobSummaries"]
        if not page.get("NextToken"):
            return sorted(found, key=lambda t: -(value_of(t) if value_of(t) is not None else -1.0))  # type: ignore[operator]
        given["NextToken"] = page["NextToken"]


def value_of(trial: Mapping[str, Any]) -> float | None:
    """The objective a trial reached, None until it has ended."""
    metric = trial.get("FinalHyperParameterTuningJobObjectiveMetric")
    return None if metric is None else float(metric["Value"])


def number_of(trial: Mapping[str, Any]) -> str:
    """The number that SageMaker gave a trial, which its job's name has before the last part: `...-003-1f2e3d4c`."""
    found = re.search(r"-(\d+)-[^-]+$", trial["TrainingJobName"])
    return str(int(found[1])) if found else "-"


def table(found: list[dict[str, Any]]) -> str:
    """The trials as lines of text."""
    rows = []
    for trial in found:
        value, tuned = value_of(trial), trial.get("TunedHyperParameters", {})
        shown = "       -" if value is None else f"{100 * value:6.2f} %"
        settings = " ".join(f"{name}={str(text).strip(chr(34))}" for name, text in sorted(tuned.items()))
        rows.append(f"    {number_of(trial):>5}  {shown}  {trial['TrainingJobStatus']:<10} {settings}")
    return "\n".join(["    trial  accuracy  state      settings", *rows])


class _TrialsTail:
    """The log's lines of one trial at a time: of one that runs, or, where none does, of the one that ran."""

    def __init__(self, aws: Aws) -> None:
        self._aws = aws
        self._shown, self._number = "", ""
        self._tail: LogTail | None = None
        self._last: list[str] = []
        """Of the trial that was shown before, and not told yet."""

    def look_at(self, found: Sequence[Mapping[str, Any]]) -> None:
        """`found`: the trials as they are now."""
        running = {trial["TrainingJobName"]: trial for trial in found if trial["TrainingJobStatus"] == "InProgress"}
        if running and self._shown not in running:
            self._last += self.new_lines()
            self._shown = min(running)  # the one that was started first
            self._number = number_of(running[self._shown])
            self._tail = LogTail(self._aws, TRAINING, f"{self._shown}/")

    def new_lines(self) -> list[str]:
        """See `LogTail`; each with its trial's number."""
        lines, self._last = self._last, []
        return lines + [f"{self._number}: {line}" for line in self._tail.new_lines()] if self._tail else lines


def wait_for(aws: Aws, name: str, poll_s: float = POLL_S) -> dict[str, Any]:
    """Until the tuning job ends, with a table whenever a trial changes and the lines of one that runs.

    Returns: its description.

    Raises: JobFailed with the log of a trial that failed; StoppedWaiting; AwsError.
    """
    client, shown, tail = aws.client("sagemaker"), "", _TrialsTail(aws)

    def ask() -> dict[str, Any]:
        nonlocal shown
        found = trials(aws, name)
        if found and table(found) != shown:
            shown = table(found)
            log.info("trials of %s:\n%s", name, shown)
        tail.look_at(found)
        return dict(client.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name))

    job = wait(
        ask, _state, lambda job: job["HyperParameterTuningJobStatus"] in OVER, f"tuning job {name}", tail, poll_s,
        f"stop {name}",
    )  # fmt: skip
    failed = [trial for trial in trials(aws, name) if trial["TrainingJobStatus"] == "Failed"]
    if job["HyperParameterTuningJobStatus"] != "Completed" or not best_of(job):
        reason = job.get("FailureReason") or job["HyperParameterTuningJobStatus"]
        if not failed:
            raise JobFailed(f"Tuning job {name}", reason, [])
        trial = describe(aws, failed[0]["TrainingJobName"])
        lines = LogTail(aws, TRAINING, f"{trial['TrainingJobName']}/").last_lines()
        said = trial.get("FailureReason", "")
        raise JobFailed(
            f"Tuning job {name}", f"{reason.rstrip('.')}; trial {trial['TrainingJobName']}: {said}", lines,
            failure_advice(said),
        )  # fmt: skip
    for trial in failed:
        log.warning("trial %s failed: %s", trial["TrainingJobName"], trial.get("FailureReason", "no reason given"))
    return job


def best_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """BestTrainingJob, empty where no trial has ended well."""
    return dict(job.get("BestTrainingJob") or {})


def write_best_of(job: Mapping[str, Any], config: TrainingConfig, path: Path) -> Path:
    """best.json for `--from-tuning`, of `training.launch train` and of `training.train_model` alike."""
    best = best_of(job)
    tuned = {
        name: _number(str(value).strip('"')) for name, value in best["TunedHyperParameters"].items() if name in SOURCES
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_best(
        path, tuned, settings_of(config, tuned),
        {
            "metric": "validation_accuracy", "value": value_of(best), "trial": best["TrainingJobName"],
            "tuning_job": job["HyperParameterTuningJobName"],
        },
    )  # fmt: skip
    log.info("best trial %s: %s; written to %s", best["TrainingJobName"], tuned, path)
    return path


def _number(text: str) -> float | int:
    return int(text) if text.isdigit() else float(text)


def _state(job: Mapping[str, Any]) -> str:
    counters = job.get("TrainingJobStatusCounters", {})
    done, running = counters.get("Completed", 0), counters.get("InProgress", 0)
    failed = counters.get("NonRetryableError", 0) + counters.get("Stopped", 0)
    trials_done = f"{done} trial{'' if done == 1 else 's'} done"
    return f"{job['HyperParameterTuningJobStatus']}, {trials_done}, {running} running, {failed} failed or stopped"
