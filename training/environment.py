"""What SageMaker and torchrun say inside a training job: the only place of `training` that reads the environment.

Under AWS's training toolkit SM_* variables tell it, in a plain container the files below /opt/ml do
(https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html).
Elsewhere there is neither, and nothing is assumed.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import ConfigError
from training.flags import parse_hyperparameters

log = logging.getLogger(__name__)

ROOT = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))
"""/opt/ml in a container; SAGEMAKER_BASE_DIR is how AWS's training toolkit is told of another place."""
TRAIN_CHANNELS = ("training", "train")
VALIDATION_CHANNELS = ("validation", "val", "valid", "test")
WEIGHTS_CHANNELS = ("weights", "pretrained")
ENTRY = "entry"
"""The hyperparameter that names what the container runs (`python -m training`); no setting of a run."""
FAILURE_SHOWN_BYTES = 1024
"""How much of the failure file AWS shows as the job's FailureReason."""
FAILURE_FILE_BYTES = 64 * 1024


@dataclass(frozen=True)
class SageMakerJob:
    """The job this process belongs to, as its container is told."""

    name: str | None
    """TRAINING_JOB_NAME, which the platform sets."""
    current_host: str
    hosts: tuple[str, ...]
    """All hosts, sorted; the first is the one the others meet at."""
    network_interface: str | None
    model_folder: Path
    """What is packed into model.tar.gz."""
    output_folder: Path
    """What is packed into output.tar.gz: files of the run that are no model."""
    checkpoint_folder: Path | None
    """The folder that is synced to S3 while the job runs; None where the job has no checkpoints configured."""
    debug_hook_config: Path | None
    """What `smdebug.pytorch.Hook.create_from_json_file` reads; None where there is none, or USE_SMDEBUG is off."""
    hyperparameters: Mapping[str, object]
    """Unquoted, without the names that SageMaker adds for itself."""

    @property
    def host_rank(self) -> int:
        """The place of this host among the hosts, from 0."""
        return self.hosts.index(self.current_host)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that train together; alone unless torchrun started it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes of this host: the number of its GPU."""
    local_world_size: int = 1
    """Processes on this host, which share its memory and cores."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and log lines."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1


def sagemaker_values(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> dict[str, object]:
    """The settings that a SageMaker job implies; empty elsewhere.

    `data` and `validation`: the channels of that name. `weights`: the folder of that channel. `output`: the model
    folder. `run_folder`: that of the output data. `checkpoints`: the folder that is synced. And the job's
    hyperparameters.

    Raises: ConfigError when hyperparameters.json or inputdataconfig.json cannot be read, or a channel is a pipe.
    """
    if not _in_job(root, environ):
        return {}
    _refuse_pipes(root, environ)
    values: dict[str, object] = {"output": str(_model_folder(root, environ))}
    for name, channels in (("data", TRAIN_CHANNELS), ("validation", VALIDATION_CHANNELS)):
        folder = _channel(channels, root, environ)
        if folder is not None:
            values[name] = str(folder)
    weights = _channel(WEIGHTS_CHANNELS, root, environ)
    if weights is not None:
        values["weights"] = str(weights)
    job = sagemaker_job(root, environ)
    assert job is not None
    values["run_folder"] = str(job.output_folder)
    if job.checkpoint_folder is not None:
        values["checkpoints"] = str(job.checkpoint_folder)
    given = _hyperparameters(root, environ)
    return values | {name: value for name, value in given.items() if name != ENTRY}


def require_channel(values: Mapping[str, object], root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> None:
    """A job has data to train on: a channel of it, or what `values` name. Raises: ConfigError."""
    if _in_job(root, environ) and "data" not in values:
        channels = root / "input" / "data"
        there = sorted(each.name for each in channels.iterdir() if each.is_dir()) if channels.is_dir() else []
        raise ConfigError(
            f"The job has no channel {' or '.join(TRAIN_CHANNELS)} with data to train on; it has: "
            f"{', '.join(there) or 'none'} (in {channels})."
        )


def sagemaker_job(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> SageMakerJob | None:
    """The SageMaker job this process runs in; None elsewhere. Raises: ConfigError when a file of it is damaged."""
    if not _in_job(root, environ):
        return None
    config = root / "input" / "config"
    resources = _json_object(config / "resourceconfig.json")
    host = environ.get("SM_CURRENT_HOST") or str(resources.get("current_host", "algo-1"))
    hosts = _json("SM_HOSTS", environ["SM_HOSTS"]) if environ.get("SM_HOSTS") else resources.get("hosts", [host])
    if not isinstance(hosts, list) or host not in hosts:
        raise ConfigError(f"{config / 'resourceconfig.json'}: the hosts {hosts} do not hold the current host {host}.")
    interface = environ.get("SM_NETWORK_INTERFACE_NAME") or resources.get("network_interface_name")
    local = _json_object(config / "checkpointconfig.json").get("LocalPath") or str(root / "checkpoints")
    if not isinstance(local, str):
        raise ConfigError(f"{config / 'checkpointconfig.json'}: LocalPath must be text, given: {local!r}.")
    checkpoints = Path(local)
    hook = Path(environ.get("SMDEBUG_CONFIG_FILE_PATH", str(config / "debughookconfig.json")))
    hook_wanted = environ.get("USE_SMDEBUG", "true").lower() not in ("false", "0", "no", "off")
    return SageMakerJob(
        name=environ.get("TRAINING_JOB_NAME") or None,
        current_host=host,
        hosts=tuple(sorted((str(each) for each in hosts), key=_by_number)),
        network_interface=str(interface) if interface else None,
        model_folder=_model_folder(root, environ),
        output_folder=Path(environ.get("SM_OUTPUT_DATA_DIR", str(root / "output" / "data"))),
        checkpoint_folder=checkpoints if checkpoints.is_dir() else None,
        debug_hook_config=hook if hook_wanted and hook.is_file() else None,
        hyperparameters=_hyperparameters(root, environ),
    )


def ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """What torchrun says about this process (https://docs.pytorch.org/docs/stable/elastic/run.html).

    Raises: ConfigError when only a part of it is there.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: environ[name] for name in names if environ.get(name)}
    if "WORLD_SIZE" not in given and "RANK" not in given:
        return Ranks()
    try:
        rank, world_size, local_rank = (int(given[name]) for name in names)
    except (KeyError, ValueError) as exc:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, all three; given: {given}.") from exc
    if not 0 <= rank < world_size or local_rank < 0:
        raise ConfigError(f"RANK {rank} must be below WORLD_SIZE {world_size}, LOCAL_RANK {local_rank} at least 0.")
    try:
        beside = int(environ.get("LOCAL_WORLD_SIZE") or 1)
    except ValueError as exc:
        raise ConfigError(f"LOCAL_WORLD_SIZE must be a number; given: {environ['LOCAL_WORLD_SIZE']}.") from exc
    return Ranks(rank, world_size, local_rank, max(1, beside))


def ask_for_determinism() -> None:
    """What cuBLAS wants to be told before it starts, to give the same results each time
    (https://docs.nvidia.com/cuda/cublas/#results-reproducibility)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def environment_with(extra: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a child process: this one's and `extra`, which gives way to what is set already."""
    return {**extra, **environ}


def quiet_profiler_library() -> None:
    """Keep the library under torch's profiler from writing lines of its own to stderr, unless asked for."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def write_failure(
    sentence: str,
    trace: str = "",
    root: Path = ROOT,
    environ: Mapping[str, str] = os.environ,
    *,
    instead: bool = False,
) -> None:
    """Say why the job failed where SageMaker looks for it: the sentence first, then the trace.

    Outside of a job nothing is written. The first failure stays: those of other processes follow from it; `instead`
    takes its place. Never raises, since it is called where something failed already.
    """
    if not _in_job(root, environ):
        return
    shown = sentence.strip().encode(errors="replace")
    if len(shown) > FAILURE_SHOWN_BYTES:
        shown = shown[: FAILURE_SHOWN_BYTES - 3].decode(errors="ignore").encode() + b"..."
    rest = trace.strip().encode(errors="replace")
    content = (shown + b"\n\n" + rest)[:FAILURE_FILE_BYTES] if rest else shown
    folder = root / "output"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".failure-") as file:
            file.write(content)
            file.flush()
            if instead:
                (folder / "failure").unlink(missing_ok=True)
            os.link(file.name, folder / "failure")  # unlike a rename it leaves one that is there
    except FileExistsError:
        pass
    except OSError as exc:
        log.warning("%s could not be written: %s", folder / "failure", exc)


def _in_job(root: Path, environ: Mapping[str, str]) -> bool:
    return (root / "input" / "config" / "hyperparameters.json").is_file() or "SM_MODEL_DIR" in environ


def _model_folder(root: Path, environ: Mapping[str, str]) -> Path:
    return Path(environ.get("SM_MODEL_DIR", str(root / "model")))


def _hyperparameters(root: Path, environ: Mapping[str, str]) -> dict[str, object]:
    """From the platform's file; without one from the training toolkit's variable."""
    path = root / "input" / "config" / "hyperparameters.json"
    if path.is_file():
        given = _json_object(path)
    else:
        given = _json("SM_HPS", environ.get("SM_HPS") or "{}")
        if not isinstance(given, dict):
            raise ConfigError(f"SM_HPS must be a JSON object; given: {environ['SM_HPS'][:200]}")
    return parse_hyperparameters({str(name): str(value) for name, value in given.items()})


def _refuse_pipes(root: Path, environ: Mapping[str, str]) -> None:
    if environ.get("SM_INPUT_DATA_CONFIG"):
        channels = _json("SM_INPUT_DATA_CONFIG", environ["SM_INPUT_DATA_CONFIG"])
    else:
        channels = _json_object(root / "input" / "config" / "inputdataconfig.json")
    for name, channel in channels.items() if isinstance(channels, dict) else ():
        if isinstance(channel, dict) and channel.get("TrainingInputMode") == "Pipe":
            raise ConfigError(
                f"Channel {name} is in Pipe mode, which has no files to read; give it the input mode FastFile or File."
            )


def _channel(names: tuple[str, ...], root: Path, environ: Mapping[str, str]) -> Path | None:
    for name in names:
        folder = Path(environ.get(f"SM_CHANNEL_{name.upper()}", str(root / "input" / "data" / name)))
        if folder.is_dir():
            return folder
    return None


def _by_number(host: str) -> tuple[str, int]:
    """Puts algo-2 before algo-10."""
    name, _, number = host.rpartition("-")
    return (name, int(number)) if number.isdecimal() else (host, 0)


def _json_object(path: Path) -> dict[str, Any]:
    """What the file says; nothing where there is none. Raises: ConfigError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as exc:
        raise ConfigError(f"{path} cannot be read as a JSON object: {exc}.") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{path} cannot be read as a JSON object: it holds {type(value).__name__}.")
    return value


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"The variable {name} cannot be read as JSON: {exc}.") from exc
