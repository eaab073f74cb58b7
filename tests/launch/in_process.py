"""The rehearsed account in this process: tests can see and set AWS's own records, and when a container gets ready.

The containers are fakes, the rest is not: /ping of a service is answered, a training waits to be stopped or ends at
once. What a test needs a model for, it trains and serves elsewhere, in processes (`Rehearsal`).
"""

import io
import json
import logging
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from werkzeug.serving import make_server

from tests.rehearsal.cloud import Cloud
from tests.rehearsal.containers import OnLine, Running
from tests.rehearsal.control_plane import REGION
from tests.rehearsal.start import IMAGE
from training.launch import data, endpoint, jobs
from training.launch.hosting import Hosting
from training.launch.names import Project
from training.launch.session import Aws, connect

ROLE = "arn:aws:iam::123456789012:role/r"
POLL_S = 0.1
LIMIT_S = 30


ANSWER = {"model": {"name": "fake", "version": "1"}, "predictions": [{"label": "a", "index": 0, "probability": 0.9}]}
"""What a service here says of every image."""


class _Ping(BaseHTTPRequestHandler):
    def _say(self, what: object) -> None:
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._say({})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(ANSWER)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class _Service:
    def __init__(self, healthy: bool) -> None:
        self._healthy = healthy
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Ping)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def wait(self) -> int:
        return 0

    def is_alive(self) -> bool:
        return self._healthy

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Training:
    port = 0

    def __init__(self, folder: Path, artifact: Path | None, over: threading.Event) -> None:
        if artifact is None:
            (folder / "model" / "manifest.json").write_text("{}")
        else:
            shutil.copytree(artifact, folder / "model", dirs_exist_ok=True)
        self._over, self._stopped = over, threading.Event()

    def wait(self) -> int:
        deadline_s = time.monotonic() + LIMIT_S
        while self.is_alive() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return 0

    def is_alive(self) -> bool:
        return not (self._over.is_set() or self._stopped.is_set())

    def stop(self) -> None:
        time.sleep(1)  # it writes its checkpoint
        self._stopped.set()


@dataclass
class Containers:
    """The engine: what its containers do is what the test says."""

    name: str = "fakes"
    artifact: Path | None = None
    """What a training makes; None: a file that is no model."""
    ready: threading.Event = field(default_factory=threading.Event)
    """Services start while it is set."""
    over: threading.Event = field(default_factory=threading.Event)
    """Trainings end while it is set; else each goes on until it is stopped."""

    @property
    def runs(self) -> bool:
        return not self.over.is_set()

    @runs.setter
    def runs(self, on: bool) -> None:
        (self.over.clear if on else self.over.set)()

    def train(self, folder: Path, env: Mapping[str, str], on_line: OnLine) -> Running:
        on_line("epoch=1/1 train_loss=1 train_accuracy=0.5 validation_loss=1 validation_accuracy=0.5")
        return _Training(folder, self.artifact, self.over)

    def serve(self, model: Path, env: Mapping[str, str], on_line: OnLine) -> Running:
        on_line(f"starts with {env.get('SAYS', 'nothing')}")
        self.ready.wait(LIMIT_S)
        return _Service("SICK" not in env)

    def close(self) -> None:
        """Nothing is left of them."""


@dataclass(frozen=True)
class Account:
    """An account of AWS's in this process."""

    cloud: Cloud
    containers: Containers
    aws: Aws

    @property
    def records(self) -> Any:
        """moto's."""
        return self.cloud.plane.backend

    def client(self, service: str) -> Any:
        return self.aws.client(service)

    def order(self, **fault: Any) -> None:
        """One fault to come; see `cloud`."""
        self.cloud._faults.append(fault)

    @property
    def calls(self) -> set[str]:
        """The operations that were asked for so far: `sagemaker CreateModel`."""
        return set(self.cloud._answers)

    def model(self, project: Project, **env: str) -> str:
        """A Model of the project's."""
        packed, s3 = io.BytesIO(), self.client("s3")
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            tar.addfile(tarfile.TarInfo("manifest.json"))
        data.ensure_bucket(self.aws, project)
        s3.put_object(Bucket=project.bucket, Key="model.tar.gz", Body=packed.getvalue())
        name = project.of("model", env)
        container = {"Image": IMAGE, "ModelDataUrl": f"s3://{project.bucket}/model.tar.gz", "Environment": env}
        self.client("sagemaker").create_model(
            ModelName=name, ExecutionRoleArn=ROLE, Containers=[container], Tags=project.tags
        )
        return name

    def training(self, project: Project, **hyperparameters: str) -> dict[str, Any]:
        """What CreateTrainingJob is given but for the name; the data is there."""
        data.ensure_bucket(self.aws, project)
        self.client("s3").put_object(Bucket=project.bucket, Key=project.key("data", "x"), Body=b"x")
        wanted = jobs.Training(IMAGE, ROLE, {"train": project.uri("data") + "/"}, hyperparameters)
        return jobs.request(project, wanted, REGION)

    def settle(self, project: Project, wanted: Mapping[str, Any], hosting: Hosting | None = None) -> str:
        """`create_or_update`, with containers that come up."""
        self.containers.ready.set()
        return endpoint.create_or_update(self.aws, project, wanted, hosting or Hosting(), POLL_S)

    def status(self, project: Project) -> str:
        """The endpoint's."""
        found = endpoint.find(self.aws, project.endpoint)
        return str(found["EndpointStatus"]) if found else "gone"


@contextmanager
def account(work: Path, variables: Callable[[str, str], None]) -> Iterator[Account]:
    """An account until the block ends. `variables` sets what boto3 reads in the environment."""
    containers = Containers()
    containers.ready.set()
    containers.over.set()
    cloud = Cloud(containers, work)
    server = make_server("127.0.0.1", 0, cloud, threaded=True)
    url = f"http://127.0.0.1:{server.server_port}"
    cloud.plane.connect(url, cloud.take_fault)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "rehearsal", "AWS_SECRET_ACCESS_KEY": "rehearsal",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": REGION,
    }.items():  # fmt: skip
        variables(name, value)
    try:
        yield Account(cloud, containers, connect(REGION))
    finally:
        containers.ready.set()
        containers.over.set()
        cloud.plane.close()
        for job in cloud.plane.jobs._threads:
            job.join(LIMIT_S)
        server.shutdown()
        thread.join()
        server.server_close()


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for it, within bounds."""
    deadline_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {LIMIT_S} s: {what}"
        time.sleep(0.05)


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[list[BaseException]]:
    """`work` in a thread of its own; at the end of the block it is waited for. Gives: what it raised, if anything."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except Exception as exc:  # handed to the test
            raised.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield raised
    thread.join(LIMIT_S)
    assert not thread.is_alive(), f"still at work after {LIMIT_S} s"
