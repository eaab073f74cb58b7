"""Several workers on one port, as real processes: ready together, replaced when they die, stopped together."""

import asyncio
import errno
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from service import supervisor
from service.engines.base import EngineUnavailable
from service.layout import WORKER_BYTES
from service.lifeline import FILES_BESIDES, shared
from service.model.artifact import open_artifact
from service.runtime import Runtime
from service.settings import Settings
from service.workers import States, Worker
from tests.conftest import ROOT, environment, free_port, workers_of
from tests.service.served import jpeg, png


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


def test_the_start_waits_for_both_workers(pair: Any) -> None:
    log = pair.log.read_text()
    assert "layout: 2 workers, " in log
    assert log.count("ready: http://") >= 2


def test_both_workers_answer(artifact: Path, pair: Any) -> None:
    body = open_artifact(artifact).read("example")
    before = {pid: user_time(pid) for pid in pair.workers().values()}
    for _ in range(60):  # each on a connection of its own, spread by the kernel
        assert pair.ask("POST", "/invocations", body).status == 200
    assert len(before) == 2
    assert all(user_time(pid) > spent for pid, spent in before.items())


def test_two_workers_and_their_decoders_take_less_memory_than_is_reckoned_for_them(pair: Any) -> None:
    assert pair.ask("POST", "/invocations", png()).status == 200  # a decoder process is there
    processes = [psutil.Process(pair.process.pid), *psutil.Process(pair.process.pid).children(recursive=True)]
    took = [process.memory_full_info().pss / 2**20 for process in processes]
    assert len(took) >= 4
    assert sum(took) < 2 * WORKER_BYTES / 2**20, took  # MiB; 440 were measured


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_is_replaced_while_the_other_answers(pair: Any, number: signal.Signals) -> None:
    body = jpeg()  # decoded without a process, for which it would be waited, and 503 be answered, on a busy machine
    before, starts = pair.workers(), pair.log.read_text().count("ready: http://")
    os.kill(before[1], number)  # the latter as an operator may, to one worker alone
    until(lambda: pair.workers().get(1) not in (None, before[1]))
    for method, path in (("POST", "/invocations"), ("GET", "/ping")) * 20:  # while the new one loads
        # Its share is answered by it within a second, or else by the supervisor.
        assert (answer := pair.ask(method, path, body)).status == 200 or answer.json["status"] == "loading"
    until(lambda: pair.log.read_text().count("ready: http://") == starts + 1)
    assert pair.workers()[0] == before[0]
    how = "signal SIGKILL: " if number == signal.SIGKILL else "exit status 0"
    assert f"worker 1 died ({how}" in pair.log.read_text()


def test_a_replacement_that_is_killed_before_it_is_ready_is_replaced_too(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, CLASSIFIER_WORKERS="2") as server:
        was = server.workers()
        os.kill(was[1], signal.SIGKILL)
        until(lambda: server.workers().get(1) not in (None, was[1]))
        os.kill(server.workers()[1], signal.SIGKILL)
        until(lambda: server.log.read_text().count("ready: http://") == 3)
        assert "worker 1 died (signal SIGKILL: " in server.log.read_text()
        assert ") before it was ready; its requests are answered with 503" in server.log.read_text()
        assert server.workers()[0] == was[0]
        assert server.ask("POST", "/invocations", jpeg()).status == 200


def test_sigterm_ends_all_with_status_0(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, CLASSIFIER_WORKERS="2") as server:
        pids = server.workers().values()
        assert len(pids) == 2
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert "Traceback" not in server.log.read_text()


def test_workers_end_when_their_supervisor_is_killed(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, CLASSIFIER_WORKERS="2", CLASSIFIER_EXIT_WITH_PARENT="false") as server:
        pids = server.workers().values()
        assert len(pids) == 2
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
    (error,) = [line for line in log.splitlines() if " ERROR " in line]
    assert "The model cannot be served." in error
    assert "ended before it was ready (exit status 1; the lines above say why)" in log


def test_of_workers_that_cannot_start_the_first_says_why() -> None:
    fd = shared(States.size(2))
    first, second = States(fd), States(fd)
    assert [second.fails_first(), first.fails_first(), second.fails_first()] == [True, False, False]
    assert not first.all_were_ready()
    os.close(fd)


def test_a_port_in_use_is_refused_though_workers_share_theirs(artifact: Path, pair: Any) -> None:
    command = ["-m", "service", "--model", str(artifact), "--host", "127.0.0.1", "--port", str(pair.port)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "CLASSIFIER_WORKERS": "2"}
    result = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert f"Cannot listen on 127.0.0.1 port {pair.port}: Address already in use" in result.stdout
    assert pair.ask("GET", "/ping").status == 200


def test_threads_are_shared_out_and_none_is_left_over() -> None:
    for total, count, expected in ((8, 4, [2, 2, 2, 2]), (7, 4, [2, 2, 2, 1]), (1, 2, [1, 1])):
        assert [Worker(index, count, 1, 0, 0, 0, 0, 0).share(total) for index in range(count)] == expected


@pytest.mark.parametrize(
    ("gpus", "workers", "expected"), [(4, 4, [0, 1, 2, 3]), (2, 5, [0, 1, 0, 1, 0]), (0, 2, [0, 0])]
)
def test_each_worker_runs_on_a_gpu_of_its_own(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, workers: int, expected: list[int]
) -> None:
    def require(device: int) -> None:
        asked.append(device)
        raise EngineUnavailable("This machine has none.")

    async def start(index: int) -> None:
        worker = Worker(index, workers, 1, 0, shared(States.size(workers)), 0, 0, 0)
        runtime = Runtime(Settings(model=artifact, engine="torch-cuda"), worker=worker)
        await runtime.open()
        await runtime.close()
        os.close(worker.states_fd)

    asked: list[int] = []
    monkeypatch.setattr("service.runtime.gpus", lambda: gpus)
    monkeypatch.setattr("service.engines.choose.has_gpu", lambda: True)
    monkeypatch.setattr("service.engines.cuda.require_gpu", require)  # where the engine first names its GPU
    for index in range(workers):
        asyncio.run(start(index))
    assert asked == expected


def test_a_worker_that_stands_still_is_killed_when_it_does_not_stop(artifact: Path, start_server: Any) -> None:
    """In 3 s instead of 28: the process runs our code with another constant."""
    program = "from service import supervisor, __main__ as m; supervisor.STOP_S = 3; raise SystemExit(m.main())"
    with start_server(artifact, program=program, CLASSIFIER_WORKERS="2") as server:
        for pid in server.workers().values():
            os.kill(pid, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 1
        killed = [line.split()[0] for line in server.log.read_text().splitlines() if "did not stop within 3 s" in line]
        assert len(killed) == 2
        first, second = map(datetime.fromisoformat, killed)
        assert second - first < timedelta(seconds=2)  # in one go


def test_a_worker_that_stands_still_is_replaced(artifact: Path, start_server: Any) -> None:
    """With the limits made short: the process runs our code with other constants."""
    at_most_s = supervisor.SILENT_S + supervisor.SEEN_TWICE_S + supervisor.PATIENCE_S  # and a second, of the last beat
    assert at_most_s + 1 < Settings().deadline_s  # a client reads a sentence before the platform gives it up
    program = "from service import supervisor, __main__ as m; supervisor.SILENT_S = 2; supervisor.SEEN_TWICE_S = 0.5"
    with start_server(artifact, program=f"{program}; raise SystemExit(m.main())") as server:
        was = server.workers()[0]
        os.kill(was, signal.SIGSTOP)
        answer = server.ask("GET", "/ping")  # never accepted by that one; a worker's own where it begins soon
        assert answer.status == 200 or answer.json["status"] == "loading"
        until(lambda: server.log.read_text().count("ready: http://") == 2)
        log = server.log.read_text()
    assert re.search(r"worker 0 has not answered for \d+ s; it is killed", log)
    assert "worker 0 died (signal SIGKILL, from the supervisor: it did not answer any more)" in log


def test_a_worker_that_is_killed_while_the_service_stops_is_told(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, CLASSIFIER_WORKERS="2", CLASSIFIER_DRAIN_S="3") as server:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/ping").status == 503)
        os.kill(server.workers()[0], signal.SIGKILL)
        assert server.process.wait(60) == 1
        assert "worker 0 died (signal SIGKILL" in server.log.read_text()
        assert "while the service stopped; what it had is not answered" in server.log.read_text()


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare(1)")
def test_the_first_process_of_a_container_keeps_no_zombies(artifact: Path, tmp_path: Path) -> None:
    """What a worker that dies had started, its decoder process, is the first process's then."""
    port, log = free_port(), tmp_path / "log"
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "service"]
    command += ["--model", str(artifact), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out, subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out) as process:
        try:
            until(lambda: psutil.Process(process.pid).children())
            (first,) = psutil.Process(process.pid).children()
            for death in (1, 2):
                until(lambda death=death: log.read_text().count("ready: http://") == death)
                (worker,) = workers_of(first.pid).values()
                until(lambda worker=worker: psutil.Process(worker).children())
                os.kill(worker, signal.SIGKILL)
            until(lambda: log.read_text().count("ready: http://") == 3)
            until(lambda: all(each.status() != psutil.STATUS_ZOMBIE for each in first.children()))
            first.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_workers_that_die_again_and_again_end_the_service(artifact: Path, start_server: Any) -> None:
    with start_server(artifact) as server:
        for death in range(supervisor.MAX_DEATHS):
            until(lambda death=death: server.log.read_text().count("ready: http://") == death + 1)
            os.kill(server.workers()[0], signal.SIGSEGV)
        assert server.process.wait(60) == 1
        assert "5 workers died within " in server.log.read_text()
        assert "giving up" in server.log.read_text()


def test_a_start_that_fails_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    supervising = supervisor.Supervisor([socket.create_server(("127.0.0.1", 0))], lambda worker: 0, 60)
    files = psutil.Process().num_fds()
    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(BlockingIOError):
        supervising._start_process(0)
    assert psutil.Process().num_fds() == files
    assert not supervising._talk.get_map()
    supervising._sockets[0].close()
    supervising._talk.close()


def test_a_worker_that_cannot_be_started_ends_the_service_whose_clients_are_told(
    artifact: Path, tmp_path: Path, start_server: Any
) -> None:
    """Where no process or memory is left, which fork(2) tells: here while a file is there, as root has no limit."""
    full = tmp_path / "full"
    program = (
        "import errno, os, service.__main__ as m\n"
        "fork = os.fork\n"
        "def limited():\n"
        f"    if os.path.exists({str(full)!r}): raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))\n"
        "    return fork()\n"
        "os.fork = limited\n"
        "raise SystemExit(m.main())"
    )
    with start_server(artifact, program=program) as server:
        full.touch()
        os.kill(server.workers()[0], signal.SIGKILL)
        until(lambda: "worker 0 cannot be started (Resource temporarily unavailable)" in server.log.read_text())
        for method, path in (("GET", "/ping"), ("POST", "/invocations")):
            answer = server.ask(method, path)
            assert (answer.status, answer.json["status"]) == (503, "loading")
            assert answer.json["error"]["code"] == "not_ready"
        assert server.process.wait(60) == 1
        assert server.log.read_text().count("worker 0 cannot be started") == 5


def test_workers_have_no_more_connections_than_the_supervisor_can_hold(artifact: Path, start_server: Any) -> None:
    """Else it could not answer for them all; with as few files as are allowed."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)); import service.__main__ as m; "
        "raise SystemExit(m.main())"
    )
    most = (1024 - FILES_BESIDES) // 2
    with start_server(artifact, program=program, CLASSIFIER_WORKERS="2") as server, ExitStack() as stack:
        for _ in range(850):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
            client.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            client.recv(4096)
        counts: list[int] = []

        def all_are_held() -> bool:
            processes = [psutil.Process(pid) for pid in (server.process.pid, *server.workers().values())]
            counts[:] = [
                sum(c.laddr.port == server.port and bool(c.raddr) for c in process.net_connections("tcp"))
                for process in processes
            ]
            return counts[0] == sum(counts[1:])

        until(all_are_held)
        assert counts[0] > most  # of both
        assert max(counts[1:]) <= most
        assert server.ask("GET", "/ping").status == 200


def test_a_replacement_starts_though_the_supervisor_holds_many_connections(artifact: Path, start_server: Any) -> None:
    """With the soft limit that login shells have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        with start_server(artifact, CLASSIFIER_WORKERS="2") as server, ExitStack() as stack:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for _ in range(1500):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
            was = server.workers()
            until(lambda: psutil.Process(server.process.pid).num_fds() > 1400)
            os.kill(was[0], signal.SIGKILL)
            until(lambda: server.workers().get(0) not in (None, was[0]))
            until(lambda: server.log.read_text().count("ready: http://") == 3)
            assert server.ask("GET", "/ping").status == 200
            assert server.workers()[1] == was[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
