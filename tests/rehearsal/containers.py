"""What runs a job or a service: the product's image in Docker, or the same code as a process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[2]
STOP_S = {"train": 120, "serve": 30}
"""What SageMaker gives after SIGTERM."""

LABEL = "resnet34-sagemaker.rehearsal"
"""Of every container: `docker ps --all --filter label=resnet34-sagemaker.rehearsal` shows what a killed one left."""

OnLine = Callable[[str], None]


class Running(Protocol):
    """Something that was started."""

    port: int

    def wait(self) -> int: ...
    def stop(self) -> None: ...
    def is_alive(self) -> bool: ...


class Engine(Protocol):
    """Starts what SageMaker would start."""

    name: str

    def train(self, folder: Path, env: Mapping[str, str], on_line: OnLine) -> Running:
        """`IMAGE train` with `folder` as /opt/ml."""
        ...

    def serve(self, model: Path, env: Mapping[str, str], on_line: OnLine) -> Running:
        """`IMAGE serve` with `model` as /opt/ml/model, read-only."""
        ...

    def close(self) -> None:
        """Remove what is left of it."""
        ...


class _Process:
    """A process whose output goes line by line to `on_line`."""

    def __init__(self, command: list[str], env: Mapping[str, str], on_line: OnLine, what: str, port: int = 0) -> None:
        self.port, self._what = port, what
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    def _read(self, on_line: OnLine) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            on_line(line.rstrip("\n"))

    def wait(self) -> int:
        status = self._process.wait()
        self._reader.join(10)
        return status

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        if self.is_alive():
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S[self._what])
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class ProcessEngine:
    """`python -m training` and `python -m service` of this checkout."""

    name = "processes of this checkout (no container engine)"

    def train(self, folder: Path, env: Mapping[str, str], on_line: OnLine) -> Running:
        """See `Engine`. SAGEMAKER_BASE_DIR is what AWS's training toolkit calls the folder that is else /opt/ml."""
        given = {**_kept(), **env, "SAGEMAKER_BASE_DIR": str(folder)}
        return _Process([sys.executable, "-m", "training"], given, on_line, "train")

    def serve(self, model: Path, env: Mapping[str, str], on_line: OnLine) -> Running:
        """See `Engine`."""
        port = free_port()
        given = {**_kept(), "CLASSIFIER_WORKERS": "1", **env}
        command = [sys.executable, "-m", "service", "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        return _Process(command, given, on_line, "serve", port)

    def close(self) -> None:
        """See `Engine`: `stop` has ended each process."""


class DockerEngine:
    """The image that container/ builds. Files are copied in and out: nothing is mounted, so none belongs to root."""

    def __init__(self, train_image: str, serve_image: str) -> None:
        self.name = f"containers: {train_image} train, {serve_image} serve"
        self._train, self._serve = train_image, serve_image
        self._label = f"{LABEL}={uuid.uuid4().hex}"

    def train(self, folder: Path, env: Mapping[str, str], on_line: OnLine) -> Running:
        """See `Engine`."""
        name = f"rehearsal-{uuid.uuid4().hex[:12]}"
        _docker(
            "create", "--name", name, "--label", self._label, "--shm-size", "1g", *_flags(env), self._train, "train"
        )
        _docker("cp", f"{folder}/.", f"{name}:/opt/ml")

        def bring_out() -> None:
            for part in ("model", "output", "checkpoints"):
                shutil.rmtree(folder / part, ignore_errors=True)
                _docker("cp", f"{name}:/opt/ml/{part}", str(folder), check=False)

        return _Container(name, on_line, "train", bring_out)

    def serve(self, model: Path, env: Mapping[str, str], on_line: OnLine) -> Running:
        """See `Engine`."""
        name, port = f"rehearsal-{uuid.uuid4().hex[:12]}", free_port()
        _docker(
            "create", "--name", name, "--label", self._label, "--publish", f"127.0.0.1:{port}:8080",
            *_flags({"CLASSIFIER_WORKERS": "1", **env}),
            self._serve, "serve",
        )  # fmt: skip
        _docker("cp", f"{model}/.", f"{name}:/opt/ml/model")
        return _Container(name, on_line, "serve", lambda: None, port)

    def close(self) -> None:
        """See `Engine`. A training's container is else removed by the thread that waits for it."""
        left = _docker("ps", "--all", "--quiet", "--filter", f"label={self._label}", check=False).split()
        if left:
            _docker("rm", "--force", *left, check=False)


class _Container:
    """A container that was created: started here, removed when it is stopped or waited for."""

    def __init__(
        self, name: str, on_line: OnLine, what: str, bring_out: Callable[[], None], port: int = 0
    ) -> None:  # fmt: skip
        self.port, self._name, self._what, self._bring_out = port, name, what, bring_out
        self._client = _Process(["docker", "start", "--attach", name], os.environ, on_line, what)

    def wait(self) -> int:
        self._client.wait()
        try:
            state = json.loads(_docker("inspect", "--format", "{{json .State}}", self._name))
            self._bring_out()
            return int(state["ExitCode"])
        finally:
            _docker("rm", "--force", self._name, check=False)

    def is_alive(self) -> bool:
        return self._client.is_alive()

    def stop(self) -> None:
        _docker("stop", "--time", str(STOP_S[self._what]), self._name, check=False)
        if self._what == "serve":
            _docker("rm", "--force", self._name, check=False)


def _docker(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"docker {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def _flags(env: Mapping[str, str]) -> list[str]:
    return [part for name, value in env.items() for part in ("--env", f"{name}={value}")]


def _kept() -> dict[str, str]:
    """This process's environment without settings, and without the credentials: a job has its own."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CLASSIFIER_", "SAGEMAKER_", "SM_", "AWS_"))
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def has_docker() -> bool:
    """Whether an engine answers."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0


def has_compose() -> bool:
    """Whether docker compose is there, in either of the forms in which the SageMaker SDK takes it."""
    if shutil.which("docker-compose") is not None:
        return True
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
