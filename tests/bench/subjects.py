"""What is measured: our service per engine, each peer with each model, the in-process limits, and an empty route.

A subject is measured once a round and side by `measure`, which returns plain JSON: what it cost and reached, or
why not.
"""

import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from service.model.artifact import open_artifact
from service.model.errors import ArtifactError
from service.model.machine import cores
from service.model.manifest import FORMAT_VERSION
from service.settings import names
from tests.bench import limit, load
from tests.bench.pauses import Disturbed, undisturbed
from tests.bench.peers.catalogue import MODELS, PEERS, Site, Skipped, raw
from tests.bench.pictures import ROOT
from tests.bench.processes import NotStarted, Server, clean_environment, tail

START_LIMIT_S = 180
FIRST_ANSWER_LIMIT_S = 60
"""After the server has called itself ready."""
WARMUP_S = 2.0
Kind = Literal["ours", "peer", "limit", "empty"]


@dataclass(frozen=True)
class Subject:
    """One thing to measure."""

    kind: Kind
    model: str
    """The engine, or the model a peer runs."""
    peer: str = ""
    workers: int = 1

    @property
    def name(self) -> str:
        """As in the tables."""
        if self.kind == "empty":
            return "empty route"
        start = {"ours": "this service", "limit": "in process", "peer": self.peer}[self.kind]
        return f"{start}, {self.model}" + (f", {self.workers} workers" if self.workers > 1 else "")


@dataclass(frozen=True)
class Setting:
    """What one measurement needs to know."""

    side_px: int
    model_dir: Path
    cache: Path
    concurrency: tuple[int, ...]
    seconds: float
    bodies: Sequence[bytes]


@dataclass(frozen=True)
class Plan:
    """How a server is started and asked."""

    command: list[str]
    environment: dict[str, str]
    port: int
    ready_path: str
    path: str
    make_request: Callable[[bytes], tuple[bytes, str]] = raw
    headers: Mapping[str, str] = field(default_factory=dict)


def engines() -> tuple[str, ...]:
    """The engines our service can be set to; torch alone before there was a setting."""
    return limit.engines() if "CLASSIFIER_ENGINE" in names() else ("torch",)


def subjects(peers: Sequence[str], chosen: Sequence[str], workers: Mapping[tuple[str, str], int]) -> list[Subject]:
    """All subjects with these peers and engines; `workers` by peer and model, 1 where it says nothing."""
    found = [Subject("empty", "none")]
    for engine in chosen:
        found.append(Subject("limit", engine))
        if engine in engines():
            found.append(Subject("ours", engine))
    found += [Subject("peer", model, name, workers.get((name, model), 1)) for name in peers for model in MODELS]
    return found


def measure(subject: Subject, setting: Setting) -> dict[str, Any]:
    """Run one subject: its figures, or {"skipped": why} of a peer, or {"failed": why}."""
    try:
        if subject.kind == "limit":
            return undisturbed(lambda: _limit(subject, setting))
        return _served(subject, setting)
    except Skipped as exc:
        return {"skipped": str(exc)}
    except NotStarted as exc:
        return {"skipped" if subject.kind == "peer" else "failed": f"cannot be started: {exc}"}
    except (Disturbed, OSError, subprocess.SubprocessError) as exc:
        return {"failed": f"{type(exc).__name__}: {exc}"}


def _served(subject: Subject, setting: Setting) -> dict[str, Any]:
    with ExitStack() as stack:
        server, plan, figures = undisturbed(lambda: _started(subject, setting, stack))
        requests = [plan.make_request(body) for body in setting.bodies]
        url = f"http://127.0.0.1:{plan.port}{plan.path}"
        loads = {
            str(count): asdict(
                undisturbed(
                    lambda count=count: load.run(url, requests, count, setting.seconds, WARMUP_S, plan.headers)
                )
            )
            for count in setting.concurrency
        }  # fmt: skip
        return {"load": loads, "memory": asdict(server.memory()), **figures}


def _started(subject: Subject, setting: Setting, stack: ExitStack) -> tuple[Server, Plan, dict[str, Any]]:
    """A server that has answered; `stack` stops it, or the one that a standstill of the machine spoilt."""
    stack.close()
    folder = tempfile.TemporaryDirectory(prefix="run-", dir=setting.cache, ignore_cleanup_errors=True)
    scratch = Path(stack.enter_context(folder))
    plan = _plan(subject, setting, scratch)
    logs = setting.cache / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{subject.name.replace(', ', '-').replace(' ', '-')}-{setting.side_px}.log"
    address = f"http://127.0.0.1:{plan.port}"
    cwd = ROOT if subject.kind in ("ours", "empty") else scratch
    server = Server(plan.command, plan.environment, address + plan.ready_path, log, cwd)
    stack.callback(server.stop)
    started_s = time.perf_counter()
    server.start(START_LIMIT_S)
    answer = _first_answer(server, address + plan.path, *plan.make_request(setting.bodies[0]), plan.headers)
    first_answer_s = time.perf_counter() - started_s
    return server, plan, {"startup_s": server.startup_s, "first_answer_s": first_answer_s, "answer": answer[:200]}


def _first_answer(server: Server, url: str, body: bytes, kind: str, headers: Mapping[str, str]) -> str:
    """Ask until the first 200: some servers call themselves ready before their workers are. Raises: NotStarted."""
    assert server.process is not None
    until_s = time.perf_counter() + FIRST_ANSWER_LIMIT_S
    reason = "does not answer"
    while time.perf_counter() < until_s and server.process.poll() is None:
        request = urllib.request.Request(url, body, {"Content-Type": kind, **headers}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=FIRST_ANSWER_LIMIT_S) as answer:
                return str(answer.read().decode("utf-8", "replace"))
        except urllib.error.HTTPError as exc:
            reason = f"answers {exc.code}: {exc.read()[:300].decode('utf-8', 'replace')}"
            if exc.code < 500:
                break
        except OSError as exc:
            reason = f"does not answer: {exc}"
        time.sleep(0.1)
    raise NotStarted(f"{reason}; {tail(server.log)}")


def _plan(subject: Subject, setting: Setting, scratch: Path) -> Plan:
    port = free_ports()
    if subject.kind == "empty":
        return Plan([sys.executable, "-m", "tests.bench.empty_route", str(port)], {}, port, "/ping", "/invocations")
    if subject.kind == "ours":
        flags = ["--model", str(setting.model_dir / "artifact"), "--host", "127.0.0.1", "--port", str(port)]
        environment = {"CLASSIFIER_LOG_LEVEL": "warning"}
        if "CLASSIFIER_ENGINE" in names():
            environment["CLASSIFIER_ENGINE"] = subject.model
        return Plan([sys.executable, "-m", "service", *flags], environment, port, "/ping", "/invocations")
    peer = PEERS[subject.peer]
    threads = max(1, cores() // subject.workers)
    bin_folder = peer.install(setting.cache)
    site = Site(
        bin_folder, peer.folder, setting.model_dir, subject.model, port, threads, subject.workers, scratch.absolute()
    )
    command, environment = peer.launch(site)
    return Plan(command, environment, port, peer.ready_path, peer.path, peer.make_request, peer.headers)


def _limit(subject: Subject, setting: Setting) -> dict[str, Any]:
    flags = ["--engine", subject.model, "--model", str(setting.model_dir), "--cache", str(setting.cache)]
    command = [sys.executable, "-m", "tests.bench.limit", *flags, "--seconds", str(setting.seconds)]
    limit_s = START_LIMIT_S + 10 * setting.seconds
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=limit_s
    )  # fmt: skip
    if done.returncode:
        return {"failed": " ".join(done.stderr.split())[-600:]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def free_ports(count: int = 5) -> int:
    """The first of `count` free ports in a row, below those the system gives to clients (and MMS refuses)."""
    for _ in range(1000):
        first = random.randrange(20000, 32000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise OSError("no free ports between 20000 and 32000")


def _is_of_today(artifact: Path) -> bool:
    try:
        return open_artifact(artifact).manifest.format_version == FORMAT_VERSION
    except ArtifactError:
        return False


def models(side_px: int, cache: Path) -> Path:
    """The folder of the side's models, made in a process of its own unless it is there. Raises: CalledProcessError.

    What an older version of ours made, whose artifact is of another format, is made again.
    """
    folder = cache / "models" / f"side{side_px}"
    if not (folder / "facts.json").is_file() or not _is_of_today(folder / "artifact"):
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--side", str(side_px), "--output", str(folder), "--cache", str(cache)]
        subprocess.run([sys.executable, "-m", "tests.bench.models", *flags], cwd=ROOT, check=True)
    return folder
