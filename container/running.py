"""A container of any image, run as SageMaker runs it, and requests to it. Standard library and the docker command."""

import contextlib
import http.client
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from container.engine import ContainerError, docker

LABEL = "resnet34.contract"
"""On everything we start, so that it can be found and removed."""


@dataclass(frozen=True)
class Answer:
    """A response, and how long it took."""

    status: int
    body: bytes
    seconds: float
    headers: dict[str, str]
    """By their names in lower case."""


@dataclass(frozen=True)
class Stopped:
    """What became of a container, and of the requests under way, once it was told to stop."""

    code: int | None
    """None where it still ran when the time was over."""
    seconds: float
    under_way: int
    statuses: list[int]
    """Of all requests that were sent before; 0 for one without an answer."""


class Running:
    """A container that runs."""

    def __init__(self, name: str, host: str, port: int) -> None:
        self.name, self.host, self.port = name, host, port
        self.stopped: Stopped | None = None

    def ask(self, method: str, path: str, body: bytes | None = None, timeout_s: float = 60, **headers: str) -> Answer:
        """One request on a connection of its own; header names with _ for -. Raises: OSError, HTTPException."""
        started_s = time.monotonic()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            given = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, response.read(), time.monotonic() - started_s, given)
        finally:
            connection.close()

    def wait_until_ready(self, limit_s: float) -> tuple[float, set[int]]:
        """Ask /ping until it answers 200, as SageMaker does. Returns: seconds until then, other statuses seen before.

        Raises: ContainerError when the container ends, or the time is over.
        """
        started_s, seen = time.monotonic(), set[int]()
        while time.monotonic() < started_s + limit_s:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status = self.ask("GET", "/ping", timeout_s=2).status
                if status == 200:
                    return time.monotonic() - started_s, seen
                seen.add(status)
            code = self.exit_code()
            if code is not None:
                raise ContainerError(f"it ended with exit code {code}: {telling_line(self.log())}")
            time.sleep(0.05)
        raise ContainerError(f"/ping was not 200 within {limit_s:.0f} s: {telling_line(self.log())}")

    def wait_for_exit(self, limit_s: float) -> int | None:
        """Its exit code; None when it still runs after `limit_s`."""
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            code = self.exit_code()
            if code is not None:
                return code
            time.sleep(0.05)
        return None

    def exit_code(self) -> int | None:
        """Its exit code; None while it runs."""
        state = json.loads(docker("inspect", "--format", "{{json .State}}", self.name))
        return None if state["Running"] else int(state["ExitCode"])

    def signal(self, name: str) -> None:
        """Send a signal to its first process."""
        docker("kill", "--signal", name, self.name)

    def log(self) -> str:
        """What it has written to stdout and stderr."""
        return _logs(self.name)


def telling_line(log: str) -> str:
    """The first line of a container's log that speaks of an error, else the last; 300 characters of it at most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["(it wrote nothing)"]
    return next((line for line in lines if re.search(r"error\b", line, re.IGNORECASE)), lines[-1])[:300]


@contextmanager
def running(
    image: str, command: Sequence[str] = ("serve",), model: Path | None = None, port: int = 8080,
    environment: dict[str, str] | None = None, options: Sequence[str] = (), network: str | None = None,
    read_only: bool = True,
) -> Iterator[Running]:  # fmt: skip
    """Run the image until the block ends, with the model read-only at /opt/ml/model.

    `read_only` is about the root file system, with /tmp to write to. With `network` it is reached at its own address
    there, else over a published port of this machine.
    """
    name = f"contract-{uuid.uuid4().hex[:12]}"
    flags = ["run", "--detach", "--name", name, "--label", LABEL]
    flags += [*(("--read-only", "--tmpfs", "/tmp") if read_only else ()), *options]  # noqa: S108
    flags += ["--network", network] if network else ["--publish", f"127.0.0.1::{port}"]
    for key, value in (environment or {}).items():
        flags += ["--env", f"{key}={value}"]
    if model is not None:
        flags += ["--volume", f"{model.resolve()}:/opt/ml/model:ro"]
    try:
        docker(*flags, image, *command)
        yield Running(name, *_address(name, port, network))
    finally:
        _remove("rm", "--force", "--volumes", name)


def direct_network() -> str | None:
    """docker's own network, with a way out, on which this machine reaches containers; None where not (no Linux)."""
    host = os.environ.get("DOCKER_HOST", "unix://")
    return "bridge" if sys.platform == "linux" and host.startswith("unix://") else None


@contextmanager
def isolated_network() -> Iterator[str | None]:
    """A network without a way out, on which this machine reaches containers; None where it could not."""
    if direct_network() is None:
        yield None
        return
    name = f"contract-{uuid.uuid4().hex[:12]}"
    try:
        docker("network", "create", "--internal", "--label", LABEL, name)
        yield name
    finally:
        _remove("network", "rm", name)


def _remove(*arguments: str) -> None:
    """Twice, for what the engine is still making where `docker run` was ended."""
    try:
        docker(*arguments)
    except ContainerError:
        time.sleep(1)
        with contextlib.suppress(ContainerError):
            docker(*arguments)


def picture(pixels_across: int = 64) -> bytes:
    """A PNG of noise, which compresses badly: about 3 bytes a pixel (https://www.w3.org/TR/png-3/)."""
    noise = os.urandom(pixels_across * 3)
    rows = b"".join(b"\0" + noise[y % 97 :] + noise[: y % 97] for y in range(pixels_across))
    header = struct.pack(">IIBBBBB", pixels_across, pixels_across, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


class Load:
    """Clients that send the same request again and again until the block ends."""

    def __init__(self, container: Running, body: bytes, content_type: str, clients: int) -> None:
        self._stop = threading.Event()
        self.statuses: list[int] = []
        self.slowest_s = 0.0
        self._threads = [
            threading.Thread(target=self._client, args=(container, body, content_type), daemon=True)
            for _ in range(clients)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(70)

    def _client(self, container: Running, body: bytes, content_type: str) -> None:
        while not self._stop.is_set():
            try:
                answer = container.ask("POST", "/invocations", body, Content_Type=content_type)
                self.statuses.append(answer.status)
                self.slowest_s = max(self.slowest_s, answer.seconds)
            except (OSError, http.client.HTTPException):
                self.statuses.append(0)


def _address(name: str, port: int, network: str | None) -> tuple[str, int]:
    if network is not None:
        ip = docker("inspect", "--format", f'{{{{(index .NetworkSettings.Networks "{network}").IPAddress}}}}', name)
        return ip.strip() or "127.0.0.1", port
    with contextlib.suppress(ContainerError):  # it may have ended already, which its exit code will say
        published = docker("port", name, f"{port}/tcp").splitlines()[0]
        return "127.0.0.1", int(published.rpartition(":")[2])
    return "127.0.0.1", port


def _logs(name: str) -> str:
    """Both streams; docker writes each to its own."""
    result = subprocess.run(  # noqa: S603
        ["docker", "logs", name],  # noqa: S607
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=60, check=False,
    )  # fmt: skip
    return result.stdout
