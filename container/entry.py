"""The image's entry point: `serve` runs the service, `train` a training; anything else is refused, but for TIDY_UP.

SageMaker starts a container with one of these words, AWS's toolkits look for executables of these names
(https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html). What runs takes this process's
place, so that signals reach it. Flags are passed on: `docker run IMAGE serve --port 9000`.

Exit status: 2 for another command, 1 when the GPU is there and its driver too old, else that of what runs.
"""

import importlib.util
import json
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from container.drivers import DEVICES, Fit, driver_version, fit, has_gpu, torch_cuda

COMMANDS = {"serve": "service", "train": "training"}
TIDY_UP = ["chmod", "-R", "777", "/delete"]
"""What local mode of AWS's SDK runs in an image that it has trained with, so that a user who is not root can remove
what was written."""
OUTPUT = Path("/opt/ml/output")
"""Where SageMaker looks for what became of a training job; not there otherwise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start what is asked for; returns the exit status only when that cannot be."""
    if os.getpid() == 1:  # has no handler yet, so SIGTERM would be lost: kept for what runs (service.model.interrupts)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    given = list(sys.argv[1:] if arguments is None else arguments)
    if Path(sys.argv[0]).name in COMMANDS and arguments is None:  # called as `serve`, as AWS's toolkits do
        given.insert(0, Path(sys.argv[0]).name)
    command, flags = (given[0], given[1:]) if given else ("", [])
    there = [name for name, module in COMMANDS.items() if importlib.util.find_spec(module) is not None]
    if given == TIDY_UP:
        os.execvp(given[0], given)  # noqa: S606  # as AWS's SDK calls it
    if command not in COMMANDS:
        return _refuse(f"{command!r} is no command of this image; it understands: {', '.join(there)}.")
    if command not in there:
        return _refuse(
            f"This image cannot {command}; it understands: {', '.join(there)}. Build the one that can: "
            f"docker build --file container/Dockerfile --target {command} ."
        )
    found = look(Path(sysconfig.get_path("purelib")))
    wanted = _gpu_wanted(command)
    _say("INFO" if found.usable or not wanted else "ERROR", found.sentence)
    if not found.usable and wanted:
        if command == "train":
            _write_failure(found.sentence)
        return 1
    environment = dict(os.environ)
    if found.library_path is not None:
        environment["LD_LIBRARY_PATH"] = ":".join(
            part for part in (found.library_path, environment.get("LD_LIBRARY_PATH")) if part
        )
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", COMMANDS[command], *flags], environment)  # noqa: S606  # ours


def look(site_packages: Path, devices: Path = DEVICES) -> Fit:
    """Driver against CUDA and engines of this image; the driver counts where there is a GPU for it."""
    engines = [
        engine for package, engine in (("torch", "torch"), ("openvino", "OpenVINO"))
        if (site_packages / package).is_dir()
    ]  # fmt: skip
    cuda = torch_cuda(site_packages)
    driver = driver_version() if has_gpu(devices) else None
    if cuda is None:
        ignored = f" NVIDIA driver {driver} is not used: the image of the target serve would." if driver else ""
        return Fit(True, f"image without CUDA, engines: {', '.join(engines)}.{ignored}")
    found = fit(driver, cuda)
    return Fit(found.usable, f"{found.sentence.rstrip('.')}; engines: {', '.join(engines)}.", found.library_path)


def _gpu_wanted(command: str) -> bool:
    """Whether a GPU that cannot be used is an error: not where the user turned it off."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    engine = os.environ.get("CLASSIFIER_ENGINE") or "auto"
    return command == "train" or engine in ("auto", "torch-cuda")


def _say(level: str, sentence: str) -> None:
    """A line as the service's log has them: as text, or as JSON where CLASSIFIER_LOG_FORMAT asks for that."""
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
    line = f"{stamp} {level} container {sentence}"
    if os.environ.get("CLASSIFIER_LOG_FORMAT") == "json":
        line = json.dumps({"time": stamp, "level": level, "logger": "container", "message": sentence})
    print(line, flush=True)  # noqa: T201  # no logging here: it would cost the start time


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)  # noqa: T201
    return 2


def _write_failure(sentence: str) -> None:
    """Tell SageMaker why the training failed (`training.environment.write_failure` is not imported yet)."""
    if OUTPUT.is_dir():
        (OUTPUT / "failure").write_text(sentence[:1024])


if __name__ == "__main__":
    sys.exit(main())
