"""Workers' processes: copies of the supervisor's that share what it imported, and nothing else."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.forked import Forked
from service.record import new_request_id
from tests.conftest import ROOT
from tests.service.test_faults import importing_after, until

NEEDS_PROC = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def told(main: Any, **given: Any) -> tuple[int, str]:
    """The status of a forked process, and what `main`, given a function to say it with, said there."""
    reading, writing = os.pipe()
    try:
        process = Forked(
            lambda: main(lambda text: os.write(writing, text.encode())), (writing, *given.pop("files", ())), **given
        )
        os.close(writing)
        with os.fdopen(reading, closefd=False) as lines:
            return process.wait(), lines.read()
    finally:
        os.close(reading)


def waits() -> int:
    time.sleep(60)
    return 0


def test_a_process_ends_with_what_its_function_returns() -> None:
    assert Forked(lambda: 7).wait() == 7


def test_how_a_process_ended_is_told_as_popen_tells_it() -> None:
    process = Forked(waits)
    assert process.poll() is None
    process.kill()
    assert process.wait() == process.poll() == -signal.SIGKILL
    process.terminate()  # of one that has ended: nobody


def test_an_error_is_logged_and_ends_it_with_1() -> None:
    program = (
        "from service.forked import Forked\n"
        "def fail(): raise RuntimeError('broken')\n"
        "raise SystemExit(10 + Forked(fail).wait())"
    )
    seen = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert seen.returncode == 11
    assert seen.stderr.count("RuntimeError: broken") == 1


@NEEDS_PROC
def test_a_process_has_the_files_it_was_given_and_a_name_and_session_of_its_own() -> None:
    def say(write: Any) -> int:
        open_files = sorted(int(entry.name) for entry in Path("/proc/self/fd").iterdir())[:-1]  # without the folder's
        write(f"{open_files} {Path('/proc/self/comm').read_text().strip()} {os.getsid(0) == os.getpid()}")
        return 0

    with socket.socket() as kept, socket.socket():
        status, said = told(say, files=[kept.fileno()], name="worker-3")
        assert status == 0
        files, rest = said.split("] ")
        assert str(kept.fileno()) in files
        assert files.count(",") == 4  # 0, 1, 2, the one that was kept, the one to say it with
        assert rest == "worker-3 True"


def test_a_signal_that_comes_at_once_does_not_run_our_handler_there() -> None:
    handled: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: handled.append(os.getpid()))
    try:
        for _ in range(20):
            process = Forked(waits)
            process.terminate()
            assert process.wait() == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handled == []


def test_request_ids_of_two_processes_differ() -> None:
    ids = [told(lambda write: write(new_request_id()) and 0)[1] for _ in range(2)]
    assert ids[0] != ids[1]
    assert len(ids[0]) == 32


@NEEDS_PROC
def test_workers_share_memory_and_no_connection_of_each_other(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, CLASSIFIER_WORKERS="2") as server:
        os.kill(server.workers()[0], signal.SIGKILL)  # the one in its place began beside one that has connections
        until(lambda: server.log.read_text().count("ready: http://") == 3)
        for pid in server.workers().values():
            process = psutil.Process(pid)
            listening = {c.fd for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
            inodes = {Path(f"/proc/{pid}/fd/{fd}").stat().st_ino for fd in listening}
            assert len(inodes) == 1
            memory = process.memory_full_info()
            assert memory.rss - memory.uss > 20 * 2**20  # numpy, FastAPI and OpenVINO are there once


def test_a_service_that_is_told_to_stop_while_it_imports_stops(
    artifact: Path, tmp_path: Path, start_server: Any
) -> None:
    with start_server(artifact, ready=False, program=importing_after(tmp_path / "never")) as server:
        until(lambda: "listening on" in server.log.read_text())
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0


def test_a_service_that_cannot_import_in_time_says_so(artifact: Path, tmp_path: Path, start_server: Any) -> None:
    program = importing_after(tmp_path / "never")
    with start_server(artifact, ready=False, program=program, CLASSIFIER_START_TIMEOUT_S="2") as server:
        assert server.process.wait(30) == 1
        assert "was not imported within 2 s; CLASSIFIER_START_TIMEOUT_S allows more." in server.log.read_text()


def test_gpus_are_counted_without_initialising_cuda_here(tmp_path: Path) -> None:
    """No fork of a process that has can use it. With a stand-in for NVIDIA's driver, compiled, as no GPU is here."""
    (tmp_path / "cuda.c").write_text(
        "static int begun; int cuInit(unsigned flags) { begun = 1; return 0; }\n"
        "int cuDeviceGetCount(int *count) { *count = 2; return begun ? 0 : 3; }\n"
        "int has_begun(void) { return begun; }\n"
    )
    library = tmp_path / "libcuda.so.1"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "cuda.c")], check=True)
    except FileNotFoundError:
        pytest.skip("no C compiler here to make a stand-in for the driver with")
    program = (
        "import ctypes, pathlib, service.layout as layout\n"
        "print(layout.choose_count(pathlib.Path('/nowhere'), 'auto'), ctypes.CDLL('libcuda.so.1').has_begun())"
    )
    seen = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert seen.stdout.split() == ["2", "0"]
