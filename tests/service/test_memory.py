"""No request leaves memory or open files behind: after many more the service holds what it held before."""

import base64
import http.client
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from tests.hostile.bombs import encoded, picture
from tests.service.served import form, png

WARM, MEASURED, CLIENTS = 400, 1600, 4
PHOTOGRAPH = encoded(picture(640, 480), "JPEG")
GROWS_MIB = 12
"""Of some 360. A leak of 8 KiB a request is seen; the photograph has 14, decoded 900."""
GROWS_FILES = 8


def requests() -> list[tuple[bytes, str, int]]:
    """Body, type, status: what is answered here and in decoder processes, by one image and by several, and refused."""
    many, kind = form(png(), PHOTOGRAPH, PHOTOGRAPH[:2000])
    coded = [base64.b64encode(image).decode() for image in (PHOTOGRAPH, png(9))]
    return [
        (PHOTOGRAPH, "image/jpeg", 200), (png(), "image/png", 200), (many, kind, 200),
        (json.dumps({"images": coded}).encode(), "application/json", 200), (PHOTOGRAPH[:2000], "image/jpeg", 400),
        (b"no image" * 4000, "application/octet-stream", 400), (b'{"images": 3}', "application/json", 400),
    ]  # fmt: skip


def held(pid: int) -> tuple[int, float, int]:
    """Processes, memory in MiB with shared pages counted once, and open files, of a process and its descendants."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    pss = sum(each.memory_full_info().pss for each in processes)
    return len(processes), pss / 2**20, sum(each.num_fds() for each in processes)


def send(server: Any, count: int) -> None:
    def some(_: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for body, kind, status in itertools.islice(itertools.cycle(requests()), count // CLIENTS):
            connection.request("POST", "/invocations", body, {"Content-Type": kind})
            answer = connection.getresponse()
            assert answer.read() and answer.status == status, (kind, answer.status)
        connection.close()

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(some, range(CLIENTS)))


def test_requests_leave_no_memory_and_no_open_file_behind(artifact: Any, start_server: Any) -> None:
    with start_server(artifact, CLASSIFIER_DECODE_THREADS="2") as server:
        send(server, WARM)
        processes, before_mib, before_files = held(server.process.pid)
        assert processes == 4  # supervisor, worker, and both that decode
        send(server, MEASURED)
        processes, after_mib, after_files = held(server.process.pid)
        assert processes == 4
        assert after_mib < before_mib + GROWS_MIB, (before_mib, after_mib)
        assert after_files < before_files + GROWS_FILES, (before_files, after_files)
