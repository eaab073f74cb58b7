"""Several workers on one port, as real processes: ready together, replaced when they die, stopped together."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.model.artifact import open_artifact
from service.settings import Settings


def workers_of(server: Any) -> dict[int, int]:
    """Process ids by the workers' index."""
    lines = {each.pid: each.as_dict(["cmdline"])["cmdline"] for each in psutil.Process(server.process.pid).children()}
    return {int(line[-1].split(":")[0]): pid for pid, line in lines.items() if line and "--worker" in line}


def user_time(pid: int) -> int:
    """Clock ticks of user time (proc_pid_stat(5), field 14)."""
    return int(Path(f"/proc/{pid}/stat").read_text().split()[13])


def until(condition: Any, limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.fixture(scope="module")
def pair(artifact: Path, start_server: Any) -> Any:
    with start_server(artifact, CLASSIFIER_WORKERS="2") as running:
        yield running


def test_ping_is_200_only_when_every_worker_is_ready(pair: Any) -> None:
    log = pair.log.read_text()
    assert "layout: 2 workers, each with" in log
    first_200 = log.count("ready: http://")
    assert first_200 == 2


def test_both_workers_answer(artifact: Path, pair: Any) -> None:
    body = open_artifact(artifact).read("example")
    before = {pid: user_time(pid) for pid in workers_of(pair).values()}
    for _ in range(60):  # each on a connection of its own, spread by the kernel
        assert pair.ask("POST", "/invocations", body).status == 200
    assert len(before) == 2
    assert all(user_time(pid) > spent for pid, spent in before.items())


def test_a_worker_that_dies_is_replaced_while_the_other_answers(artifact: Path, pair: Any) -> None:
    body = open_artifact(artifact).read("example")
    before = workers_of(pair)
    os.kill(before[1], signal.SIGKILL)
    until(lambda: workers_of(pair).get(1) not in (None, before[1]))
    until(lambda: pair.log.read_text().count("ready: http://") == 3)
    assert workers_of(pair)[0] == before[0]
    assert "worker 1 died (signal SIGKILL)" in pair.log.read_text()
    for _ in range(20):
        assert pair.ask("POST", "/invocations", body).status == 200


def test_sigterm_ends_all_with_status_0(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, CLASSIFIER_WORKERS="2") as server:
        pids = workers_of(server).values()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert "Traceback" not in server.log.read_text()


def test_workers_end_when_their_supervisor_is_killed(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, CLASSIFIER_WORKERS="2", CLASSIFIER_EXIT_WITH_PARENT="false") as server:
        pids = workers_of(server).values()
        server.process.kill()
        until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()])


def test_a_model_that_cannot_be_served_ends_all_with_status_1(
    artifact: Path, tmp_path: Path, start_server: Any
) -> None:
    shutil.copytree(artifact, tmp_path / "model")
    open_artifact(tmp_path / "model").path("weights").write_bytes(b"damaged")
    with start_server(tmp_path / "model", CLASSIFIER_WORKERS="2", ready=False) as server:
        assert server.process.wait(60) == 1
    log = server.log.read_text()
    assert "The model cannot be served." in log
    assert "ended before it was ready (exit status 1); its lines above say why" in log


def test_a_port_in_use_is_refused_though_workers_share_theirs(artifact: Path, pair: Any) -> None:
    command = ["-m", "service", "--model", str(artifact), "--host", "127.0.0.1", "--port", str(pair.port)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "CLASSIFIER_WORKERS": "2"}
    result = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert f"Cannot listen on 127.0.0.1 port {pair.port}: Address already in use" in result.stdout
    with socket.create_connection(("127.0.0.1", pair.port), 5):
        pass


def test_what_is_shared_is_divided() -> None:
    share = Settings(engine_threads=8, decode_threads=2, max_requests=256).share(4)
    assert (share.engine_threads, share.decode_threads, share.max_requests) == (2, 1, 64)
