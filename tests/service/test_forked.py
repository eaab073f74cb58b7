"""Workers' processes: copies of the supervisor's that share what it imported, and nothing else."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from service import layout
from service.forked import Forked
from service.record import new_request_id
from tests.conftest import ROOT
from tests.service.staged import importing_after
from tests.service.test_faults import until

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
"""Of Python from 3.12 on: this process has threads of the libraries that tests use; none of ours waits for them."""

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


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


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
@pytest.mark.parametrize("descriptors", ["/dev/fd", "/nowhere"])
def test_a_process_has_the_files_it_was_given_and_a_name_and_session_of_its_own(
    descriptors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they cannot be listed, as without /proc."""
    monkeypatch.setattr("service.forked.DESCRIPTORS", Path(descriptors))

    def say(write: Any) -> int:
        write(json.dumps({
            "files": [entry for entry in range(256) if is_open(entry)],
            "name": Path("/proc/self/comm").read_text().strip(),
            "session": os.getsid(0) == os.getpid(),
        }))  # fmt: skip
        return 0

    with socket.socket() as kept, socket.socket():
        status, said = told(say, files=[kept.fileno()], name="worker-3")
        given = json.loads(said)
        assert status == 0
        assert {0, 1, 2, kept.fileno()} < set(given["files"])
        assert len(given["files"]) == 5  # and the one to say it with
        assert (given["name"], given["session"]) == ("worker-3", True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_process_whose_log_is_on_a_full_disk_ends_all_the_same() -> None:
    """What it left in a buffer cannot be written; it must not go on in its parent's code."""
    program = """if True:
        import os
        from service.forked import Forked
        try:
            said = Forked(lambda: print("left", end="") or 3).wait()
        except OSError as exc:
            said = exc
        os.write(2, f"{said}\\n".encode())
        os._exit(0)"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        seen = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True,
            check=True,
        )  # fmt: skip
    assert seen.stderr == "3\n"


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
def test_workers_share_memory_and_no_socket(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, CLASSIFIER_WORKERS="2") as server, ExitStack() as clients:
        for _ in range(20):  # held by the supervisor too, when the one that takes another's place begins
            client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
            client.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        os.kill(server.workers()[0], signal.SIGKILL)
        until(lambda: server.log.read_text().count("ready: http://") == 3)
        pids = server.workers().values()
        first, second = (
            {
                link
                for entry in Path(f"/proc/{pid}/fd").iterdir()
                if (link := str(entry.readlink())).startswith("socket")
            }
            for pid in pids
        )
        assert first
        assert not first & second
        for pid in pids:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            shared_kb = re.search(r"Shared_Dirty: +(\d+) kB", rollup)
            assert shared_kb is not None
            assert int(shared_kb[1]) > 10 * 2**10  # objects of numpy, FastAPI and so on that are there once


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not glibc")
@pytest.mark.parametrize(("variables", "most"), [({}, 3), ({"MALLOC_ARENA_MAX": "5"}, 5)])
def test_a_worker_has_few_heaps(variables: dict[str, str], most: int, tmp_path: Path) -> None:
    """Unless the user has chosen how many."""
    program = f"""if True:
        import ctypes, threading
        from service.forked import Forked
        from service.model.machine import few_arenas
        from service.settings import heaps_are_chosen
        libc = ctypes.CDLL(None)
        libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
        def worker():
            if not heaps_are_chosen():
                few_arenas()
            all_here = threading.Barrier(12)
            def allocate():
                all_here.wait()
                libc.malloc(1000)
                all_here.wait()
            threads = [threading.Thread(target=allocate) for _ in range(12)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            file = ctypes.c_void_p(libc.fopen({str(tmp_path / "heaps")!r}.encode(), b"w"))
            libc.malloc_info(0, file)
            libc.fclose(file)
            return 0
        raise SystemExit(Forked(worker).wait())"""
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**environment, **variables}, check=True)
    heaps = (tmp_path / "heaps").read_text().count("<heap nr=")
    assert 1 < heaps <= most
    assert ("MALLOC_ARENA_MAX" in variables) == (heaps == 5)


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
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    seen = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert seen.stdout.split() == ["2", "0"]


def test_a_process_that_dies_counting_gpus_has_counted_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "has_driver", lambda: True)
    monkeypatch.setattr(layout, "gpus", lambda: os.abort())
    layout.count_gpus.cache_clear()
    try:
        assert layout.count_gpus() == 0
    finally:
        layout.count_gpus.cache_clear()
