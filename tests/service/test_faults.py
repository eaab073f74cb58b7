"""What the platform and the machine do to the service: stop it, kill its workers, break its engine. Real processes."""

import asyncio
import http.client
import io
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from service.admission import LEAST_PLACES, Admission
from service.engines.fake import FakeEngine
from service.errors import DeadlineExceeded, NotReady, Overloaded
from service.model.artifact import open_artifact
from service.runtime import ENDS_AFTER, FAILING_AFTER
from service.supervisor import MAX_DEATHS
from tests.service.served import assert_error, jpeg, png, serve
from tests.service.staged import FAILS, LOADS, held, importing_after, staged


def until(condition: Any, limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def worker_of(server: Any) -> int:
    (pid,) = server.workers().values()
    return int(pid)


def read_answer(client: socket.socket) -> tuple[int, Any]:
    with closing(http.client.HTTPResponse(client)) as response:
        response.begin()
        return response.status, json.loads(response.read())


def raw_request(body: bytes) -> bytes:
    return b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def connections_of(pid: int) -> int:
    return len([c for c in psutil.Process(pid).net_connections("tcp") if c.status == "ESTABLISHED"])


# The start.


def test_ping_is_red_from_the_first_connection_on_until_the_model_is_loaded(
    artifact: Path, tmp_path: Path, start_server: Any
) -> None:
    def answers() -> bool:
        assert server.process.poll() is None, server.log.read_text()
        with suppress(ConnectionRefusedError):
            seen.append(server.ask("GET", "/ping"))
        return bool(seen)

    seen: list[Any] = []
    with ExitStack() as loading:
        loading.enter_context(held(tmp_path, LOADS))
        with start_server(artifact, ready=False, program=staged(tmp_path)) as server:
            until(answers)
            seen += [server.ask(method, "/ping") for method in ("GET", "POST")]
            assert [(ping.status, ping.json["status"]) for ping in seen] == [(503, "loading")] * 3
            assert "being loaded" in seen[0].json["message"]
            refused = server.ask("POST", "/invocations", jpeg())
            assert (refused.status, refused.json["error"]["code"]) == (503, "not_ready")
            loading.close()
            until(lambda: server.ask("GET", "/ping").status == 200)


def refused_in_time(server: Any, method: str, path: str, body: bytes = b"") -> Any:
    """The answer to a request that no worker accepts; to /ping within the platform's limit."""
    started_s = time.monotonic()
    answer = server.ask(method, path, body)
    assert path != "/ping" or time.monotonic() - started_s < 2
    assert_error(answer, 503, "not_ready")
    assert answer.headers["retry-after"] == "1"
    assert "(state: loading)" in answer.json["message"]
    assert answer.json["status"] == "loading"  # as /ping tells it otherwise
    return answer


def test_a_service_whose_worker_takes_long_to_begin_says_so(artifact: Path, tmp_path: Path, start_server: Any) -> None:
    """Before its worker accepts connections: as on a machine that is busy, or reads the libraries from a slow disk."""
    gate = tmp_path / "gate"
    with start_server(artifact, ready=False, program=importing_after(gate)) as server:
        until(lambda: "listening on" in server.log.read_text())
        for method, path in (("GET", "/ping"), ("POST", "/ping"), ("POST", "/invocations")):
            refused_in_time(server, method, path)
        gate.touch()
        until(lambda: server.ask("GET", "/ping").status == 200)


# SIGTERM.


def test_sigterm_turns_ping_red_answers_what_was_accepted_and_ends_with_0(artifact: Path, start_server: Any) -> None:
    body = open_artifact(artifact).read("example")
    with start_server(artifact, CLASSIFIER_MAX_WAIT_MS="10000") as server, ThreadPoolExecutor(8) as clients:
        accepted = [clients.submit(server.ask, "POST", "/invocations", body) for _ in range(4)]
        until(lambda: connections_of(worker_of(server)) >= 4)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/ping").status == 503)
        assert server.ask("GET", "/ping").json["status"] == "stopping"
        late = server.ask("POST", "/invocations", body)  # nothing is lost, even what comes after
        assert late.status == 200
        assert late.headers["connection"] == "close"
        assert [request.result().status for request in accepted] == [200] * 4
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log.read_text()


def test_a_machine_that_stands_still_at_the_end_loses_no_request(artifact: Path, start_server: Any) -> None:
    """As virtual ones do. The time that connections get to send their request is made longer, to stop within it."""
    program = "from service import server, __main__ as m; server.SETTLE_S = 2; raise SystemExit(m.main())"
    with start_server(artifact, program=program) as server:
        with socket.create_connection(("127.0.0.1", server.port), 30) as client:
            until(lambda: connections_of(worker_of(server)) >= 1)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            worker = worker_of(server)
            os.kill(worker, signal.SIGSTOP)
            time.sleep(2.5)
            os.kill(worker, signal.SIGCONT)
            time.sleep(0.2)
            client.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            status, said = read_answer(client)
            assert (status, said["status"]) == (503, "stopping")
        assert server.process.wait(60) == 0


def test_sigterm_under_load_loses_no_request(artifact: Path, start_server: Any) -> None:
    """Half of the clients keep their connection, as SageMaker does, the others make one for each request."""
    body = jpeg()  # decoded without a process, for which it would be waited, and 503 be answered, on a busy machine
    statuses: dict[bool, list[int]] = {True: [], False: []}
    connected: dict[bool, list[int]] = {True: [], False: []}
    with start_server(artifact, CLASSIFIER_WORKERS="2") as server:

        def ask_until_refused(keeps: bool) -> None:
            with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as client:
                while True:
                    if client.sock is None:  # the last answer said that it would be closed
                        try:
                            client.connect()
                        except ConnectionRefusedError:
                            return
                        connected[keeps].append(1)
                    client.request("POST", "/invocations", body)
                    response = client.getresponse()
                    response.read()
                    statuses[keeps].append(response.status)
                    if not keeps:
                        client.close()

        with ThreadPoolExecutor(8) as clients:
            running = [clients.submit(ask_until_refused, keeps) for keeps in (True, False) * 4]
            until(lambda: min(map(len, statuses.values())) > 50)
            server.process.send_signal(signal.SIGTERM)
            for client in running:
                client.result()  # raises what a client that lost its request saw
        assert server.process.wait(30) == 0
    assert set(statuses[True] + statuses[False]) == {200}
    assert len(connected[True]) < len(statuses[True]) / 2
    assert len(connected[False]) == len(statuses[False])


def test_drain_s_keeps_answering_for_that_long_while_ping_is_red(artifact: Path, start_server: Any) -> None:
    body = open_artifact(artifact).read("example")
    with start_server(artifact, CLASSIFIER_DRAIN_S="8") as server:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/ping").status == 503)
        assert server.ask("POST", "/invocations", body).status == 200
        assert server.process.wait(30) == 0


def test_a_stop_shortens_the_deadlines_of_what_is_under_way() -> None:
    async def scenario() -> None:
        admission = Admission(1, 1, deadline_s=60)

        async def request() -> None:
            async with admission.deadline():
                await asyncio.sleep(60)

        early = asyncio.create_task(request())
        await asyncio.sleep(0)
        admission.stop_within(0.1)
        with pytest.raises(NotReady, match="stopped before it could answer"):
            await early
        with pytest.raises(NotReady):
            await request()
        assert admission.requests == 0
        slow = Admission(1, 1, deadline_s=0.05)
        with pytest.raises(DeadlineExceeded):
            async with slow.deadline():
                await asyncio.sleep(60)

    asyncio.run(scenario())


def test_a_stop_at_the_moment_of_a_deadline_leaves_both_as_they_are() -> None:
    async def scenario() -> None:
        admission = Admission(1, 1, deadline_s=0.05)

        async def request() -> None:
            async with admission.deadline():
                await asyncio.sleep(60)

        loop = asyncio.get_running_loop()
        waits = asyncio.create_task(request())
        await asyncio.sleep(0)
        loop.call_later(0.05, admission.stop_within, 10)
        time.sleep(0.2)  # both timers fire in the same round of the loop
        with pytest.raises(DeadlineExceeded):
            await waits

    asyncio.run(scenario())


def test_before_any_answer_no_more_are_let_in_than_the_warm_up_promises() -> None:
    """224 px in float32 where it takes 0.06 s an image: 256 would wait for a quarter of a minute."""
    admission = Admission(256, 1, deadline_s=60, max_queue_s=2.4)
    assert admission.allowed == 256
    admission.expect(0.06)
    assert admission.allowed == 40
    admission.expect(0.002)
    assert admission.allowed == 256


def test_no_more_are_let_in_than_are_answered_in_time_at_the_rate_seen_of_late() -> None:
    now_s = 0.0
    admission = Admission(256, 1, deadline_s=60, max_queue_s=2, clock=lambda: now_s)

    def answer(took_s: float, others: int = 19) -> None:
        nonlocal now_s
        with ExitStack() as stack:
            for _ in range(others):
                stack.enter_context(admission.place())
            with admission.place():
                now_s += took_s

    assert admission.allowed == 256
    answer(3, others=0)  # of one that is alone, nothing follows for many
    assert admission.allowed == 256
    for _ in range(60):
        answer(0.4)  # 50 a second, twenty together
    assert 80 <= admission.allowed <= 105
    allowed = admission.allowed
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(admission.place())
        places = stack.enter_context(admission.place())
        places.take_more(99)  # a request of a hundred images leaves some for others
        assert admission.under_way == allowed - LEAST_PLACES // 2
        for _ in range(LEAST_PLACES // 2):
            stack.enter_context(admission.place())
        with pytest.raises(Overloaded, match="one more would wait for longer than 2 s"), admission.place():
            pass
    for _ in range(60):
        answer(0)
    assert admission.allowed == 256
    answer(60)
    assert admission.allowed == LEAST_PLACES


# Dead workers.


def test_requests_of_a_killed_worker_get_a_sentence_and_the_next_ones_an_answer(
    artifact: Path, start_server: Any
) -> None:
    body = open_artifact(artifact).read("example")
    with start_server(artifact, CLASSIFIER_MAX_WAIT_MS="20000") as server:
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(5)]
        whole, also, half, idle, silent = clients
        whole.sendall(raw_request(body))
        also.sendall(raw_request(body))
        half.sendall(raw_request(body)[:-5])
        idle.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(idle)[0] == 200
        before = worker_of(server)
        until(lambda: connections_of(before) >= 5)
        time.sleep(0.5)
        os.kill(before, signal.SIGKILL)
        for client in (whole, also, half):
            status, answer = read_answer(client)
            assert (status, answer["error"]["code"]) == (503, "worker_died")
            assert answer["error"]["message"].endswith("send the request again.")
        assert idle.recv(100) == b""
        assert silent.recv(100) == b""
        for client in clients:
            client.close()
        until(lambda: "worker 0 died (signal SIGKILL" in server.log.read_text())
        assert server.log.read_text().count("status=503 code=worker_died") == 3
        refused = r'classifier_rejected_requests_total\{reason="worker_died"\} 3\.0'
        until(lambda: re.search(refused, server.ask("GET", "/metrics").body.decode()) is not None)
        assert server.ask("GET", "/ping").status == 200  # of the new one
        assert worker_of(server) != before
        assert server.process.poll() is None


def test_while_a_worker_is_replaced_requests_are_refused_in_time(
    artifact: Path, tmp_path: Path, start_server: Any
) -> None:
    with ExitStack() as loading, start_server(artifact, program=staged(tmp_path)) as server:
        files = psutil.Process(server.process.pid).num_fds()
        before = server.log.read_text().count("code=not_ready")  # of a start that took a while
        loading.enter_context(held(tmp_path, LOADS))
        os.kill(worker_of(server), signal.SIGKILL)
        for _ in range(3):
            refused_in_time(server, "GET", "/ping")
            refused_in_time(server, "POST", "/invocations", b"x" * 20_000_000)  # read away, else it would be a reset
        with ThreadPoolExecutor(40) as clients:
            for asked in [clients.submit(refused_in_time, server, "GET", "/ping") for _ in range(40)]:
                asked.result()
        until(lambda: server.log.read_text().count("status=503 code=not_ready") == before + 46)
        refused = psutil.Process(server.process.pid)
        until(lambda: refused.num_fds() <= files + 1, 10)  # clients that have closed are let go
        loading.close()
        until(lambda: server.ask("GET", "/ping").status == 200)
        assert server.ask("POST", "/invocations", jpeg()).status == 200
        counted = re.search(
            r'rejected_requests_total\{reason="not_ready"\} (\d+)', str(server.ask("GET", "/metrics").body)
        )
        assert counted is not None
        assert int(counted[1]) >= 46


def test_of_two_workers_the_share_of_one_that_is_replaced_does_not_wait(
    artifact: Path, tmp_path: Path, start_server: Any
) -> None:
    with ExitStack() as loading, start_server(artifact, program=staged(tmp_path), CLASSIFIER_WORKERS="2") as server:
        loading.enter_context(held(tmp_path, LOADS))
        os.kill(psutil.Process(server.process.pid).children()[0].pid, signal.SIGKILL)

        def ping() -> int:
            started_s = time.monotonic()
            status = server.ask("GET", "/ping").status
            assert time.monotonic() - started_s < 2
            return status

        with ThreadPoolExecutor(8) as clients:
            statuses = [asked.result() for asked in [clients.submit(ping) for _ in range(64)]]
        assert set(statuses) == {200, 503}
        loading.close()
        until(lambda: server.log.read_text().count("ready: http://") == 3)
        until(lambda: {ping() for _ in range(20)} == {200})


def test_no_request_is_lost_while_workers_die_and_begin(artifact: Path, start_server: Any) -> None:
    """Whoever accepts a connection answers it, the supervisor or a worker that begins in that moment. Lost is at most
    the one of each client that a worker had just accepted when it was killed, before the supervisor had heard of it.
    """
    body = jpeg()
    lost: list[ConnectionError] = []
    with start_server(artifact) as server, ThreadPoolExecutor(8) as clients:
        ended = threading.Event()

        def ask() -> list[int]:
            statuses = []
            while not ended.is_set():
                try:
                    statuses.append(server.ask("POST", "/invocations", body).status)
                except ConnectionError as exc:
                    lost.append(exc)
            return statuses

        try:
            asking = [clients.submit(ask) for _ in range(8)]
            for deaths in range(1, MAX_DEATHS - 1):
                time.sleep(0.5)
                os.kill(worker_of(server), signal.SIGKILL)
                until(lambda deaths=deaths: server.log.read_text().count("ready: http://") == deaths + 1)
            until(lambda: server.ask("GET", "/ping").status == 200)
        finally:
            ended.set()
        answered = [status for client in asking for status in client.result()]
    assert set(answered) <= {200, 503}
    assert set(answered) >= {200}
    assert len(lost) <= deaths * 8, lost


def test_connections_that_close_are_let_go_by_the_supervisor(artifact: Path, start_server: Any) -> None:
    body = open_artifact(artifact).read("example")
    with start_server(artifact) as server:
        supervisor = psutil.Process(server.process.pid)
        before = supervisor.num_fds()
        for _ in range(300):
            assert server.ask("POST", "/invocations", body).status == 200
        until(lambda: supervisor.num_fds() <= before, 10)
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            client.sendall(b"GET /ping HTTP/1.0\r\n\r\n")
            assert b"".join(iter(lambda: client.recv(4096), b"")).startswith(b"HTTP/1.1 200")  # the end is seen


# The engine.


def test_an_engine_that_keeps_failing_turns_ping_red_until_it_succeeds() -> None:
    engine = FakeEngine(256)
    with serve(engine) as served:
        engine.failure = RuntimeError("broken")
        for _ in range(FAILING_AFTER):
            assert served.ask("GET", "/ping").status == 200
            assert_error(served.ask("POST", "/invocations", png()), 500, "engine_failure")
        assert served.ask("GET", "/ping").json["status"] == "failing"
        engine.failure = None
        assert served.ask("POST", "/invocations", png()).status == 200
        assert served.ask("GET", "/ping").status == 200


def test_an_engine_that_does_not_come_back_turns_ping_red_and_requests_get_504(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    engine = FakeEngine(256)
    with serve(engine, deadline_s=1, max_batch=1) as served:
        before = len(engine.batch_sizes)
        engine.delay_s = 5
        assert_error(served.ask("POST", "/invocations", jpeg()), 504, "deadline_exceeded")
        served.until(lambda: served.ask("GET", "/ping").json["status"] == "stuck")
        assert_error(served.ask("POST", "/invocations", jpeg()), 504, "deadline_exceeded")  # in the queue
        engine.delay_s = 0
        served.until(lambda: served.ask("GET", "/ping").status == 200)
        assert len(engine.batch_sizes) == before + 1  # what waited in the queue never was the engine's
        served.until(lambda: "the engine has come back" in caplog.text)
    assert "the engine has not come back from a batch for " in caplog.text


def test_an_engine_that_fails_ten_times_in_a_row_ends_its_process() -> None:
    engine, failed = FakeEngine(256), threading.Event()
    with serve(engine, on_failure=failed.set) as served:
        engine.failure = RuntimeError("broken")
        for _ in range(ENDS_AFTER):
            assert not failed.is_set()
            assert_error(served.ask("POST", "/invocations", jpeg()), 500, "engine_failure")
        assert failed.is_set()


def test_a_worker_whose_engine_failed_ten_times_ends_and_a_new_one_answers(
    artifact: Path, tmp_path: Path, start_server: Any
) -> None:
    with start_server(artifact, program=staged(tmp_path)) as server:
        was = worker_of(server)
        with held(tmp_path, FAILS):
            for failures in range(1, ENDS_AFTER):
                answer = server.ask("POST", "/invocations", jpeg())
                assert (answer.status, answer.json["error"]["code"]) == (500, "engine_failure")
                ping = server.ask("GET", "/ping")
                state = (503, "failing") if failures >= FAILING_AFTER else (200, "ready")
                assert (ping.status, ping.json["status"]) == state
            assert server.ask("POST", "/invocations", jpeg()).status == 500
        until(lambda: server.log.read_text().count("ready: http://") == 2)
        assert worker_of(server) != was
        assert server.ask("GET", "/ping").status == 200
        assert server.ask("POST", "/invocations", jpeg()).status == 200
        log = server.log.read_text()
    assert "ERROR service.runtime the engine failed on 3 batches in a row: /ping answers 503 until one succeeds" in log
    assert "the engine failed on 10 batches in a row; this process ends, so that a new one begins" in log
    assert "worker 0 died (exit status 1; the lines above say why)" in log
    assert "RuntimeError: CUDA error: an illegal memory access" in log


def test_an_engine_error_reaches_every_request_of_its_batch() -> None:
    engine = FakeEngine(256)
    with serve(engine, max_wait_ms=500) as served, ThreadPoolExecutor(8) as clients:
        engine.failure = RuntimeError("broken")
        for reply in clients.map(lambda _: served.ask("POST", "/invocations", png()), range(8)):
            assert_error(reply, 500, "engine_failure")
        assert len(engine.batch_sizes) <= 8


# Load.


def test_ping_answers_within_sagemakers_two_seconds_under_full_load(artifact: Path, start_server: Any) -> None:
    """The limit is the platform's: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html"""
    buffer = io.BytesIO()
    Image.effect_mandelbrot((1200, 900), (-2, -1, 1, 1), 60).convert("RGB").save(buffer, "JPEG")
    with start_server(artifact, CLASSIFIER_MAX_IMAGES="64") as server, ThreadPoolExecutor(96) as clients:
        ended = threading.Event()

        def ask() -> set[int]:
            statuses = set()
            while not ended.is_set():
                statuses.add(server.ask("POST", "/invocations", buffer.getvalue()).status)
            return statuses

        busy = [clients.submit(ask) for _ in range(96)]
        time.sleep(1)
        took_s = []
        for method in ("GET", "POST") * 5:
            started_s = time.monotonic()
            assert server.ask(method, "/ping").status == 200
            took_s.append(time.monotonic() - started_s)
            time.sleep(0.2)
        ended.set()
        statuses = set().union(*[client.result() for client in busy])
    assert max(took_s) < 2
    assert statuses == {200, 503}
