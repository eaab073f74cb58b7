"""What many tests share: small real data, a small real artifact, the service as a real process."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from training.data import sample
from training.train_model import main as train_main

ROOT = Path(__file__).parent.parent
START_LIMIT_S = 120
PARALLEL = (
    "container", "launch", "model", "service/engines", "service/test_inference.py", "service/test_openapi.py",
    "service/test_requests.py", "service/test_schemathesis.py", "test_boundaries.py", "test_docs.py",
    "test_supply_chain.py", "training",
)  # fmt: skip
"""Folders and files whose tests wait for no clock, so that others may run beside them."""


@pytest.hookimpl(tryfirst=True)  # before marks choose among the tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(ROOT / "tests").as_posix().startswith(PARALLEL):
            item.add_marker("parallel")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads of so small operations mostly wait for each other, twenty times as long on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated sample in the genuine CIFAR-100 format: 200 training and 100 test images of 100 classes."""
    root = tmp_path_factory.mktemp("sample")
    sample.write(root, train_per_class=2, test_per_class=1)
    return root


@pytest.fixture(scope="session")
def artifact(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real artifact, trained for one epoch on the small sample. Copy it before changing it."""
    output = tmp_path_factory.mktemp("artifact") / "model"
    flags = ["--weights", "none", "--freeze", "none", "--epochs", "1", "--batch-size", "50", "--model-name", "tiny"]
    flags += ["--quantize", "off"]
    assert train_main(["--data", str(sample_root), "--output", str(output), *flags]) == 0
    return output


@pytest.fixture(scope="session")
def int8_artifact(artifact: Path, sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same artifact with its int8 network. Copy it before changing it."""
    from training.quantize import main as quantize_main

    output = shutil.copytree(artifact, tmp_path_factory.mktemp("int8") / "model", copy_function=os.link)
    assert quantize_main(["--model", str(output), "--data", str(sample_root), "--device", "cpu"]) == 0
    return output


@dataclass
class Answer:
    """A response to a request over a real socket."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def workers_of(supervisor_pid: int) -> dict[int, int]:
    """Process ids of a service's workers, by their index."""
    names = {each.pid: each.as_dict(["name"])["name"] for each in psutil.Process(supervisor_pid).children()}
    return {int(name.split("-")[1]): pid for pid, name in names.items() if name and name.startswith("worker-")}


@dataclass
class Server:
    """A service that runs as a process of its own."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def workers(self) -> dict[int, int]:
        """The workers' process ids by their index."""
        return workers_of(self.process.pid)

    def wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, f"the service ended:\n{self.log.read_text()}"
            try:
                if self.ask("GET", "/ping").status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"the service was not ready in {START_LIMIT_S} s:\n{self.log.read_text()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def answered_by(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """`with answered_by(Handler) as url:` has a server of ours answer there until the block ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without settings of the service but one worker, plus `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CLASSIFIER_", "SAGEMAKER_", "SM_"))}
    return {**kept, "CLASSIFIER_WORKERS": "1", **extra}


Start = Callable[..., Any]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`with start_server(model, CLASSIFIER_X="...") as server:` runs `python -m service` until the block ends.

    `program`: Python to run in its place, with the same flags.
    """

    @contextmanager
    def start(model: Path, *flags: str, ready: bool = True, program: str | None = None, **env: str) -> Iterator[Server]:
        port = free_port()
        log = tmp_path_factory.mktemp("server") / "log"
        python = [sys.executable, *(("-m", "service") if program is None else ("-c", program))]
        command = [*python, "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, *flags], cwd=ROOT, env=environment(**env), stdout=out, stderr=out, text=True
            )
        server = Server(process, port, log)
        try:
            if ready:
                server.wait_until_ready()
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

    return start


@pytest.fixture(scope="session")
def server(artifact: Path, start_server: Start) -> Iterator[Server]:
    """One service with the small artifact, for all tests that do not break it."""
    with start_server(artifact) as running:
        yield running
