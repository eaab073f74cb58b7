"""Training jobs: the request, start or find again, wait with the log's lines, bring the model home."""

import fcntl
import glob
import gzip
import json
import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.model.archive import unpack
from service.model.artifact import open_artifact
from service.model.errors import ArtifactError
from service.model.manifest import Manifest
from training.errors import ConfigError
from training.interruption import held_off
from training.launch import data, debugger, places
from training.launch.errors import JobFailed, LaunchError, failure_advice
from training.launch.logs import TRAINING, LogTail
from training.launch.names import Project, digest
from training.launch.session import Aws
from training.launch.wait import POLL_S, wait
from training.metric_lines import METRIC_DEFINITIONS

log = logging.getLogger("training")

INSTANCE = "ml.g5.xlarge"
"""One A10G, which trains in bfloat16, as ml.g6.xlarge (L4) does, which is cheaper; ml.g4dn.xlarge (T4) costs half."""
OVER = ("Completed", "Failed", "Stopped")


@dataclass(frozen=True)
class Machines:
    """What a job runs on."""

    instance: str = INSTANCE
    count: int = 1
    volume_gb: int = 50
    max_hours: float = 24.0
    spot: bool = False
    """Spare capacity: cheaper, may be taken away; the job goes on from its checkpoint then."""
    wait_hours: float = 24.0
    """How long a spot job may wait for capacity, besides."""
    keep_warm_minutes: int = 0
    """The instance is kept (and billed) after the job, for the next to start in seconds."""
    retries: int = 1
    """How often AWS starts the job again after a failure of its own."""

    def __post_init__(self) -> None:
        if self.spot and self.keep_warm_minutes:
            raise ConfigError("--keep-warm-minutes is not for --spot: AWS keeps no spare capacity; leave one out.")


@dataclass(frozen=True)
class Training:
    """A training as it is asked for; the same values are the same job."""

    image: str
    role: str
    channels: Mapping[str, str]
    """Name -> s3:// folder."""
    hyperparameters: Mapping[str, str]
    machines: Machines = field(default_factory=Machines)
    debugger: bool = False
    mlflow: str | None = None
    """ARN of a SageMaker MLflow app or tracking server."""


def definition(project: Project, training: Training, region: str) -> dict[str, Any]:
    """What CreateTrainingJob and a tuning job's TrainingJobDefinition have in common."""
    machines = training.machines
    resources: dict[str, Any] = {
        "InstanceType": machines.instance, "InstanceCount": machines.count, "VolumeSizeInGB": machines.volume_gb
    }  # fmt: skip
    stopping: dict[str, Any] = {"MaxRuntimeInSeconds": max(1, int(machines.max_hours * 3600))}
    if machines.spot:
        stopping["MaxWaitTimeInSeconds"] = max(1, int((machines.max_hours + machines.wait_hours) * 3600))
    return {
        "AlgorithmSpecification": {
            "TrainingImage": training.image,
            "TrainingInputMode": "File",
            "MetricDefinitions": METRIC_DEFINITIONS,
            "EnableSageMakerMetricsTimeSeries": True,  # off by default for images that are not AWS's
        },
        "RoleArn": training.role,
        "InputDataConfig": [
            {
                "ChannelName": name,
                "DataSource": {
                    "S3DataSource": {
                        "S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"
                    }
                },
            }
            for name, uri in sorted(training.channels.items())
        ],
        "OutputDataConfig": {"S3OutputPath": project.uri("jobs")},
        "ResourceConfig": resources,
        "StoppingCondition": stopping,
        "EnableManagedSpotTraining": machines.spot,
        "EnableInterContainerTrafficEncryption": False,
        "EnableNetworkIsolation": False,
        "RetryStrategy": {"MaximumRetryAttempts": machines.retries},
    }  # fmt: skip


def request(project: Project, training: Training, region: str) -> dict[str, Any]:
    """CreateTrainingJob's arguments but for the name, which `start` gives. Their digest is the name's."""
    whole = definition(project, training, region)
    whole["HyperParameters"] = dict(sorted(training.hyperparameters.items()))
    if training.machines.keep_warm_minutes:
        whole["ResourceConfig"]["KeepAlivePeriodInSeconds"] = 60 * training.machines.keep_warm_minutes
    # Where the next attempt of the same request finds what this one saved. Without the slash AWS would also bring
    # back what lies below longer names that begin so (https://github.com/syne-tune/syne-tune/pull/363).
    whole["CheckpointConfig"] = {"S3Uri": project.uri("checkpoints", digest(whole)) + "/"}
    if training.debugger:
        whole |= debugger.request(project, region)
    else:
        # Copied while the job runs; all of the run's folder comes in output.tar.gz at its end.
        whole["TensorBoardOutputConfig"] = {
            "LocalPath": "/opt/ml/output/data/tensorboard", "S3OutputPath": project.uri("tensorboard")
        }  # fmt: skip
    if training.mlflow:
        whole["MlflowConfig"] = {"MlflowResourceArn": training.mlflow, "MlflowExperimentName": project.name}
    whole["Tags"] = project.tags
    return whole


def describe(aws: Aws, name: str) -> dict[str, Any]:
    """DescribeTrainingJob. Raises: AwsError."""
    return dict(aws.client("sagemaker").describe_training_job(TrainingJobName=name))


def wait_for(aws: Aws, name: str, poll_s: float = POLL_S) -> dict[str, Any]:
    """Until the job ends, with its log's lines; those of one that has ended are not told again.

    Returns: its description. Raises: JobFailed; StoppedWaiting; AwsError.
    """
    tail = LogTail(aws, TRAINING, f"{name}/")
    job = wait(
        lambda: describe(aws, name), _state, lambda job: job["TrainingJobStatus"] in OVER, f"job {name}", tail,
        poll_s, f"stop {name}",
    )  # fmt: skip
    debugger.tell_verdicts(job)
    if job["TrainingJobStatus"] != "Completed":
        reason = job.get("FailureReason") or job["TrainingJobStatus"]
        raise JobFailed(f"Job {name}", reason, tail.last_lines(), failure_advice(reason))
    figures = ", ".join(f"{m['MetricName']} {m['Value']:.4g}" for m in job.get("FinalMetricDataList", ()))
    billed = job.get("BillableTimeInSeconds")
    log.info("job %s: %s%s", name, figures or "no metrics", f"; {billed} s are billed" if billed else "")
    return job


def bring_home(aws: Aws, job: Mapping[str, Any], output: Path) -> Path:
    """Download and unpack the job's model.tar.gz into `output`, verified; the run's files beside it (`OUTPUT-run`).
    What is there already stays until all of the new is here.

    Raises: LaunchError where the artifact is damaged; ConfigError where `output` holds something else; AwsError.
    """
    places.require_output(output)
    output = places.resolved(output)
    uri, archive = str(job["ModelArtifacts"]["S3ModelArtifacts"]), output.with_name(f"{output.name}.tar.gz")
    try:
        with _beside(output) as scratch:
            packed = data.fetch(aws, uri, scratch / archive.name)
            manifest = _unpacked(packed, scratch / "new")
            _replace(output, scratch, {packed: archive})
    except ArtifactError as exc:
        if isinstance(exc.__cause__, OSError) and exc.__cause__.errno:  # of this machine; gzip's have no number
            why = exc.__cause__.strerror or exc.__cause__
            raise LaunchError(
                f"{output} cannot be written: {why}. Mend that (is there room on the disk?), and repeat the command."
            ) from exc
        raise LaunchError(
            f"{uri}: {exc} Where the object is damaged, remove it, and the same command runs the job again."
        ) from exc
    except OSError as exc:
        raise LaunchError(f"{output} cannot be written: {exc.strerror or exc}.") from exc
    run = uri.rsplit("/", 1)[0] + "/output.tar.gz"
    try:
        files = output.with_name(f"{output.name}-run")
        places.require_replaceable(files, of_run=True)
        with _beside(output) as scratch:
            unpack(data.fetch(aws, run, scratch / "output.tar.gz"), _made(scratch / "new"))
            _replace(files, scratch)
    except (ConfigError, LaunchError, ArtifactError, OSError) as exc:
        # The model is here; curves and report are a bonus. --debugger on fills more than is unpacked.
        log.warning("the run's files (%s) were not brought home: %s", run, exc)
    log.info("%s version %s is in %s (packed: %s)", manifest.name, manifest.version, output, archive)
    return output


class _NotPutBack(Exception):
    """Files that lay in `folder` are in the scratch folder still."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A scratch folder on the same disk; in the end those that killed commands left are removed.

    Raises: LaunchError where files of before could not be put back, and names the place where they are kept; OSError.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        with _held(scratch, must=False):
            yield scratch
    except _NotPutBack as exc:
        why = getattr(exc.__cause__, "strerror", None) or type(exc.__cause__).__name__
        raise LaunchError(
            f"{exc.folder} cannot be written: {why}. What lay there could not all be put back: the rest is in "
            f"{_kept(scratch, exc.folder, output)}, and stays there."
        ) from exc
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)
    for left in output.parent.glob(f".{glob.escape(output.name)}-{'[a-z0-9_]' * 8}"):
        with suppress(OSError):  # another user's, say
            names = {path.name.removesuffix(".part") for path in left.iterdir()}
            others = {name for name in names if name not in ("new", "old") and not name.endswith(".tar.gz")}
            if others or not names:
                continue
            with _held(left):
                shutil.rmtree(left)


def _kept(scratch: Path, folder: Path, output: Path) -> Path:
    """Where the scratch folder's files of before are now: beside `folder`, by a name that shows."""
    shutil.rmtree(scratch / "new", ignore_errors=True)
    place = folder.with_name(f"{folder.name}.before{scratch.name.removeprefix(f'.{output.name}')}")
    try:
        return scratch.rename(place)
    except OSError:
        return scratch


@contextmanager
def _held(scratch: Path, must: bool = True) -> Iterator[None]:
    """Hold the folder, which the operating system lets go of with the process. Raises: OSError where it `must` be, and
    another holds it, or the disk knows no locks.
    """
    folder = os.open(scratch, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if must:
                raise
        yield
    finally:
        os.close(folder)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _unpacked(archive: Path, folder: Path) -> Manifest:
    """Raises: ArtifactError where it is no artifact, or damaged."""
    unpack(archive, _made(folder))
    artifact = open_artifact(folder)
    artifact.verify()
    return artifact.manifest


def _replace(folder: Path, scratch: Path, also: Mapping[Path, Path] | None = None) -> None:
    """What is in `scratch`/new takes the place of its like in `folder`; what else lies there (.git, notes) is not
    touched. Where it breaks off, what was there is put back; signals wait meanwhile. `also`: new file -> its place.

    Raises: _NotPutBack where that could not be, which `_beside` tells; OSError.
    """
    old, new = _made(scratch / "old"), scratch / "new"
    moves: list[tuple[Path, Path]] = []
    for source, target in (also or {}).items():
        if target.exists():
            moves.append((target, scratch / f"old-{target.name}"))
        moves.append((source, target))
    if folder.exists():
        # The manifest goes first and comes last: without it, what a kill leaves half is taken for no model.
        coming = sorted(new.iterdir(), key=lambda path: path.name == "manifest.json")
        names = {path.name for path in coming}
        going = [path for path in folder.iterdir() if path.name in names or path.name.startswith(places.OURS)]
        moves += [(path, old / path.name) for path in sorted(going, key=lambda path: path.name != "manifest.json")]
        moves += [(path, folder / path.name) for path in coming]
    else:
        moves.append((new, folder))
    done: list[tuple[Path, Path]] = []
    with held_off():
        try:
            for source, target in moves:
                done.append((source, target))
                source.rename(target)
        except BaseException as exc:
            for source, target in reversed(done):
                with suppress(OSError):  # what ended it must be told
                    if not os.path.lexists(source):
                        target.rename(source)
            if any(os.path.lexists(target) for _, target in done if target.is_relative_to(scratch)):
                raise _NotPutBack(folder) from exc
            raise


def pack(folder: Path, archive: Path) -> Path:
    """model.tar.gz of an artifact's folder: plain files at its top, the same bytes for the same files."""
    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                entry = tar.gettarinfo(str(path), path.name)
                entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
                with path.open("rb") as file:
                    tar.addfile(entry, file)
    return archive


def _state(job: Mapping[str, Any]) -> str:
    transitions = job.get("SecondaryStatusTransitions") or [{}]
    message = transitions[-1].get("StatusMessage", "")
    status = job.get("SecondaryStatus") or job["TrainingJobStatus"]
    return f"{status}: {message}" if message else str(status)


def as_text(hyperparameters: Mapping[str, object]) -> dict[str, str]:
    """Values as SageMaker carries them: strings. Tuples become comma-separated, as flags are."""

    def one(value: object) -> str:
        if isinstance(value, list | tuple):
            return ",".join(map(str, value)) or "none"
        return json.dumps(value) if isinstance(value, bool) else str(value)

    return {name: one(value) for name, value in hyperparameters.items() if value is not None}
