"""What clients do to a connection: slow, silent, malformed, too much, half way through an upgrade."""

import gc
import json
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from service import lifeline, protocol, server
from service.engines.base import Logits
from service.engines.fake import FakeEngine
from service.model.resize import PixelBatch
from service.record import RequestRecord
from tests.service.served import Served, assert_error, jpeg, png, serve


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with serve(FakeEngine(256)) as served:
        yield served


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=30)


def request(body: bytes = b"", *headers: str, line: str = "POST /invocations HTTP/1.1") -> bytes:
    return "\r\n".join([line, "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


def until_closed(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def answer(client: socket.socket) -> bytes:
    """One answer with its body, as it came."""
    received = b""
    while not (match := re.search(rb"content-length: (\d+)\r\n(.*\r\n)?\r\n(.*)", received, re.DOTALL)) or (
        len(match[3]) < int(match[1])
    ):
        piece = client.recv(65536)
        assert piece, received
        received += piece
    return received


def refusal(received: bytes) -> tuple[int, str]:
    """Status and code of an answer in the one shape of errors, which must be all there is."""
    head, _, body = received.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert f"x-request-id: {error['request_id']}".encode() in head
    assert error["message"].endswith(".")
    return int(head.split()[1]), error["code"]


def statuses(received: bytes) -> list[int]:
    """Of all answers in it."""
    return [int(status) for status in re.findall(rb"^HTTP/1.1 (\d+) ", received.replace(b"}HTTP", b"}\nHTTP"), re.M)]


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"hello\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n",
     b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
     b"POST /invocations HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"GET /ping HTTP/1.1\r\nno colon\r\n\r\n",
     b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET http://x:y/ping HTTP/1.1\r\nHost: x\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_gets_the_one_shape_of_errors(service: Served, sent: bytes) -> None:
    with connect(service) as client:
        client.sendall(sent)
        assert refusal(until_closed(client)) == (400, "malformed_http")


@pytest.mark.parametrize("head", ["", "Expect: 100-continue\r\n"])
def test_a_body_that_is_no_http_is_told_and_counted_once_as_what_it_is(
    head: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with serve(FakeEngine(256)) as served, connect(served) as client:
        start = (
            f"POST /invocations HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n{head}Transfer-Encoding: chunked\r\n\r\n"
        )
        client.sendall(start.encode() + b"20000\r\n" + b"y" * 0x20000 + b"\r\nzz\r\n")
        client.sendall(b"y" * 300_000)  # is read and thrown away
        received = until_closed(client).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert refusal(received) == (400, "malformed_http")
        assert b'"request_id": "mine"' in received
        counts = served.ask("GET", "/metrics").body.decode()
    assert re.findall(r'classifier_requests_total\{path="/invocations",status="(\d+)"\} 1\.0', counts) == ["400"]
    assert 'classifier_rejected_requests_total{reason="malformed_http"} 1.0' in counts
    (line,) = [record.getMessage() for record in caplog.records if record.name == "service.requests"]
    assert "request_id=mine method=POST path=/invocations status=400 code=malformed_http" in line
    assert "Traceback" not in caplog.text


def test_a_head_without_end_is_refused(service: Served) -> None:
    with connect(service) as client:
        client.sendall(b"GET /ping HTTP/1.1\r\n")
        for number in range(5_000):
            client.sendall(b"X-%d: %s\r\n" % (number, b"y" * 1000))
        assert refusal(until_closed(client)) == (431, "headers_too_large")
    with connect(service) as client:
        client.sendall(b"GET /ping HTTP/1.1\r\nX: " + b"y" * protocol.MAX_HEAD_BYTES)
        assert refusal(until_closed(client)) == (431, "headers_too_large")
    with connect(service) as client:
        client.sendall(b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert refusal(until_closed(client)) == (431, "headers_too_large")
    with connect(service) as client:  # in one piece, and whole
        client.sendall(b"GET /ping HTTP/1.1\r\nX: " + b"y" * (protocol.MAX_HEAD_BYTES + 1) + b"\r\n\r\n")
        assert refusal(until_closed(client)) == (431, "headers_too_large")


def test_a_head_of_very_many_headers_is_refused_however_short_they_are(service: Served) -> None:
    few = b"".join(b"a%d:b\r\n" % number for number in range(protocol.MAX_HEADERS))
    with connect(service) as client:
        client.sendall(b"GET /ping HTTP/1.1\r\n" + few + b"\r\n")
        assert b" 200 " in answer(client)
    with connect(service) as client:
        client.sendall(b"GET /ping HTTP/1.1\r\n" + few + b"one:more\r\n\r\nGET /ping HTTP/1.1\r\n\r\n")
        assert refusal(until_closed(client)) == (431, "headers_too_large")


def test_large_bodies_do_not_count_as_heads(service: Served) -> None:
    assert_error(service.ask("POST", "/invocations", b"x" * 2_000_000), 400, "unreadable_image")


@pytest.mark.parametrize(
    "upgrade", ["Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk", "Upgrade: websocket\r\nSec-WebSocket-Key: x"]
)
@pytest.mark.parametrize("in_pieces", [False, True])
def test_an_offered_upgrade_is_ignored_and_the_body_read(service: Served, upgrade: str, in_pieces: bool) -> None:
    sent = request(png(42), "Connection: Upgrade, HTTP2-Settings", *upgrade.split("\r\n"))
    with connect(service) as client:
        for _ in range(2):  # the connection stays usable
            for piece in [sent[:20], sent[20:200], sent[200:]] if in_pieces else [sent]:
                client.sendall(piece)
                time.sleep(0.02 * in_pieces)
            answered = answer(client)
            assert answered.startswith(b"HTTP/1.1 200")
            assert b'"grey 42"' in answered


def test_pipelined_requests_are_answered_in_order(service: Served) -> None:
    with connect(service) as client:
        client.sendall(b"".join(request(png(grey)) for grey in range(9)) + request(png(9), "Connection: close"))
        answers = until_closed(client)
    labels = [part.split(b'"')[0].decode() for part in answers.split(b'"predictions": [{"label": "')[1:]]
    assert labels == [f"grey {grey}" for grey in range(10)]


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the system does not tell how many packets came")
def test_an_answer_is_one_packet(service: Served) -> None:
    with connect(service) as client:
        for sent in (request(png(7)), request(b"no image"), request(line="GET /ping HTTP/1.1")):
            before = packets(client)
            client.sendall(sent)
            answer(client)
            assert packets(client) - before == 1


def packets(client: socket.socket) -> int:
    """Packets with data that have come (tcpi_data_segs_in of struct tcp_info, linux/tcp.h)."""
    (count,) = struct.unpack_from("I", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 152)
    return int(count)


def test_an_answer_without_a_body_leaves_before_the_next_one_and_before_the_end(service: Served) -> None:
    with connect(service) as client:
        head = request(line="HEAD /ping HTTP/1.1")
        client.sendall(head + request(line="GET /ping HTTP/1.1") + head + b"no HTTP\r\n\r\n")
        assert statuses(until_closed(client)) == [200, 200, 200, 400]
    with connect(service) as client:
        client.sendall(request(b"", "Connection: close", line="HEAD /ping HTTP/1.1"))
        assert statuses(until_closed(client)) == [200]


@pytest.mark.parametrize("expect", ["Expect: 100-continue", "X-Nothing: x"])
def test_pipelined_requests_of_a_client_that_resets_leave_no_error(
    service: Served, expect: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(10):
        with connect(service) as client:
            client.sendall(request(png(), expect) + request(png()))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    service.until(lambda: service.app.state.runtime.admission.requests == 0)
    assert service.ask("GET", "/ping").status == 200
    time.sleep(protocol.SWEEP_S / 2)  # what a task raises that nobody awaits is told when it is collected
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


def test_a_client_that_sends_nothing_or_half_a_head_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.5)
    monkeypatch.setattr(protocol, "SWEEP_S", 0.05)
    with serve(FakeEngine(256)) as served, connect(served) as silent, connect(served) as dribbling:
        dribbling.sendall(b"POST /invocations HTTP/1.1\r\nX: ")
        time.sleep(0.2)
        dribbling.sendall(b"y")
        assert until_closed(silent) == b""
        assert refusal(until_closed(dribbling)) == (408, "head_timeout")
        with connect(served) as kept:  # one that was answered may be idle longer
            kept.sendall(request(png(1)))
            assert answer(kept).startswith(b"HTTP/1.1 200")
            time.sleep(1)
            kept.sendall(request(png(1)))
            assert answer(kept).startswith(b"HTTP/1.1 200")


def test_slow_bodies_hold_no_place_and_are_given_up() -> None:
    with serve(FakeEngine(256), max_images=2, body_timeout_s=3) as served, ExitStack() as stack:
        slow = [stack.enter_context(closing(connect(served))) for _ in range(50)]
        for client in slow:
            client.sendall(request(png())[:-10])
        served.until(lambda: served.app.state.runtime.admission.requests == 50)
        for _ in range(10):
            assert served.ask("POST", "/invocations", png()).status == 200
        for client in slow[:5]:
            answered = answer(client)
            assert b" 408 " in answered
            assert b"body_timeout" in answered
        served.until(lambda: served.app.state.runtime.admission.bytes_held == 0)


def test_bodies_over_the_bound_of_bytes_are_refused_and_free_it_when_they_end() -> None:
    with serve(FakeEngine(256), max_payload_bytes=1000, max_body_bytes=1500) as served, connect(served) as holder:
        served.until(lambda: served.ask("POST", "/invocations", b"z").status == 400)  # a decoder process has started
        holder.sendall(request(b"x" * 900)[:-1])
        served.until(lambda: served.app.state.runtime.admission.bytes_held > 800)
        refused = served.ask("POST", "/invocations", b"y" * 700)
        assert "1,500 are allowed" in assert_error(refused, 503, "overloaded")
        chunked = served.ask("POST", "/invocations", iter([b"y" * 400, b"y" * 300]))
        assert_error(chunked, 503, "overloaded")
        holder.sendall(b"x")
        assert b" 400 " in answer(holder)
        assert_error(served.ask("POST", "/invocations", b"y" * 700), 400, "unreadable_image")


@contextmanager
def full(**settings: Any) -> Iterator[Served]:
    """The one place is taken, until the block ends."""
    engine = FakeEngine(256)
    with serve(engine, max_images=1, **settings) as served, ThreadPoolExecutor(1) as others:
        goes_on = threading.Event()
        infer = engine.infer

        def infer_then(batch: PixelBatch) -> Logits:
            assert goes_on.wait(60)
            return infer(batch)

        engine.infer = infer_then  # type: ignore[method-assign]
        held = others.submit(served.ask, "POST", "/invocations", jpeg())
        served.until(lambda: served.app.state.runtime.admission.under_way == 1)
        try:
            yield served
        finally:
            goes_on.set()
            assert held.result().status == 200


@pytest.mark.parametrize("status", [503, 429])
def test_a_request_for_which_there_is_no_place_is_refused_by_its_head(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.requests")
    with full(overload_status=status) as served, connect(served) as client:
        headers = ["X-Request-Id: mine", "X-Amzn-SageMaker-Custom-Attributes: trace=1"]
        sent = request(b"x" * 8_000_000, *headers)
        client.sendall(sent[:-1000])
        received = answer(client)  # though the body is not there yet
        assert refusal(received) == (status, "overloaded")
        for line in [b"retry-after: 1", b"x-request-id: mine", b"x-amzn-sagemaker-custom-attributes: trace=1"]:
            assert line in received
        assert b"server-timing: total;dur=" in received
        assert b"1 images are under way, as many as allowed" in received
        (record,) = [record.msg for record in caplog.records if isinstance(record.msg, RequestRecord)]
        assert (record.path, record.status, record.code) == ("/invocations", status, "overloaded")
        counts = served.ask("GET", "/metrics").body.decode()
        assert f'requests_total{{path="/invocations",status="{status}"}} 1.0' in counts
        assert 'rejected_requests_total{reason="overloaded"} 1.0' in counts
        client.sendall(sent[-1000:] + b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")  # the connection stays usable
        assert b"HTTP/1.1 200 OK" in answer(client)


def test_requests_for_which_there_is_no_place_are_answered_in_order_with_others() -> None:
    with full() as served, connect(served) as client:
        ping = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
        refused = request(b"x" * 10)
        client.sendall(ping + refused + refused + ping + request(b"x" * 10, "Connection: close"))
        assert statuses(until_closed(client)) == [200, 503, 503, 200, 503]


@pytest.mark.parametrize("connection", [[], ["Connection: keep-alive"]])
def test_a_client_of_http_1_0_for_which_there_is_no_place_reads_to_the_end(connection: list[str]) -> None:
    with full() as served, connect(served) as client:
        client.sendall(request(b"x" * 10, *connection, line="POST /invocations HTTP/1.0"))
        assert refusal(until_closed(client)) == (503, "overloaded")


def test_an_upgrade_offered_where_there_is_no_place_is_ignored() -> None:
    with full() as served, connect(served) as client:
        client.sendall(
            request(b"x" * 10, "Connection: Upgrade", "Upgrade: h2c") + b"GET /ping HTTP/1.0\r\nHost: x\r\n\r\n"
        )
        assert statuses(until_closed(client)) == [503, 200]


def test_where_there_is_no_place_who_waits_for_100_continue_is_refused_before_sending() -> None:
    with full() as served, connect(served) as client:
        client.sendall(request(b"x" * 10, "Expect: 100-continue")[:-10])
        assert refusal(answer(client)) == (503, "overloaded")


@pytest.mark.parametrize("broken", [b"none\r\n", b"0\r\n" + b"a: b\r\n" * 20_000])
def test_a_broken_body_of_a_request_that_was_refused_ends_the_connection_without_a_second_answer(
    broken: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.3)
    monkeypatch.setattr(protocol, "SWEEP_S", 0.05)
    caplog.set_level(logging.INFO, "service.requests")
    with full() as served, connect(served) as client:
        client.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + broken)
        assert statuses(until_closed(client)) == [503]
        assert len([record for record in caplog.records if isinstance(record.msg, RequestRecord)]) == 1


def test_the_rest_of_a_refused_body_is_no_request_that_a_dying_worker_leaves_without_an_answer() -> None:
    with full() as served, connect(served) as client:
        client.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in answer(client)
        address = client.getsockname()
        (connection,) = [c for c in served.connections() if c.transport.get_extra_info("peername") == address]
        noted: list[int] = []  # in place of the page that the supervisor reads
        connection.lifeline = SimpleNamespace(note=lambda _, state: noted.append(state), closed=lambda _: None)
        connection._slot = 0
        sent = request(b"x" * 2000)
        client.sendall(sent[:-1000])
        assert refusal(answer(client)) == (503, "overloaded")
        served.until(lambda: len(noted) >= 2)
        assert noted[-1] == lifeline.WRITING  # the connection would be closed, and nothing said
        client.sendall(sent[-1000:])
        served.until(lambda: noted[-1] == lifeline.IDLE)


def test_requests_behind_one_another_for_which_there_is_no_place_take_turns_with_other_connections() -> None:
    with full() as served, connect(served) as greedy, ThreadPoolExecutor(1) as reader:
        others, count = 0, 20_000
        answered = reader.submit(until_closed, greedy)
        sender = threading.Thread(target=greedy.sendall, args=(request() * count + request(b"", "Connection: close"),))
        sender.start()
        while not answered.done():
            assert served.ask("GET", "/ping").status == 200
            others += 1
        sender.join()
        assert statuses(answered.result()) == [503] * (count + 1)
        assert others > 50  # one or two, were they refused in one go


def test_a_body_without_end_is_cut_off_where_there_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.3)
    monkeypatch.setattr(protocol, "SWEEP_S", 0.05)
    with full() as served, connect(served) as client:
        client.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(10_000):
                client.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
                time.sleep(0.001)


def test_a_client_that_reads_no_refusal_fills_no_memory() -> None:
    with full() as served, connect(served) as client:
        client.settimeout(1)
        sent = 0
        full_up: list[Any] = []
        while not full_up:
            try:
                sent += client.send(request() * 1000)
            except TimeoutError:  # nothing is read of it any more, or the machine is busy
                full_up = [each for each in served.connections() if each.transport.get_write_buffer_size()]
            assert sent < 200_000_000
        (connection,) = full_up
        assert connection.transport.get_write_buffer_size() < 2**17


def test_uploads_of_large_bodies_leave_memory_for_photographs() -> None:
    large = 3 * 2**20
    with serve(FakeEngine(256), max_payload_bytes=large, max_body_bytes=4 * 2**20) as served, connect(served) as slow:
        slow.sendall(request(b"x" * large)[:-1])
        served.until(lambda: served.app.state.runtime.admission.bytes_held == large - 1)
        refused = served.ask("POST", "/invocations", b"y" * 2**20 + b"y")
        assert "3,670,016 are allowed" in assert_error(refused, 503, "overloaded")
        assert_error(served.ask("POST", "/invocations", b"y" * (2**20 - 10)), 400, "unreadable_image")
        assert served.ask("POST", "/invocations", png()).status == 200


def test_a_refusal_is_read_though_the_body_is_still_being_sent() -> None:
    with serve(FakeEngine(256), max_payload_bytes=1000) as served, connect(served) as client:
        client.sendall(request(b"x" * 8_000_000)[:200])
        assert b" 413 " in answer(client)
        client.sendall(request(b"x" * 8_000_000)[200:])
        client.sendall(request(png(5)))  # the connection stays usable
        assert b'"grey 5"' in answer(client)


def test_a_refused_body_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.3)
    monkeypatch.setattr(protocol, "SWEEP_S", 0.05)
    with serve(FakeEngine(256), max_payload_bytes=1000) as served, connect(served) as client:
        client.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(10_000):
                client.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
                time.sleep(0.001)


def test_who_waits_for_100_continue_is_refused_before_sending(service: Served) -> None:
    with connect(service) as client:
        client.sendall(request(b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 99999999"))
        assert b" 413 " in answer(client)
    with connect(service) as client:
        body = png(3)
        client.sendall(request(body, "Expect: 100-continue")[: -len(body)])
        assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert b'"grey 3"' in answer(client)


def test_hundreds_of_idle_connections_hurt_nobody(service: Served) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(closing(connect(service))) for _ in range(500)]
        for client in idle[:250]:
            client.sendall(request(jpeg(1)))
            assert b" 200 " in answer(client)
        with ThreadPoolExecutor(8) as clients:
            replies = list(clients.map(lambda grey: service.ask("POST", "/invocations", jpeg(grey)), range(40)))
        assert [reply.json["predictions"][0]["index"] for reply in replies] == list(range(40))


def test_heads_that_dribble_by_the_hundred_hurt_nobody(service: Served) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(closing(connect(service))) for _ in range(300)]
        for n, client in enumerate(slow):
            client.sendall(b"POST /invocations HTTP/1.1\r\nX: "[: 1 + n % 30])
        with ThreadPoolExecutor(8) as clients:
            replies = list(clients.map(lambda grey: service.ask("POST", "/invocations", jpeg(grey)), range(40)))
        assert service.ask("GET", "/ping").status == 200
        assert [reply.json["predictions"][0]["index"] for reply in replies] == list(range(40))


def test_beyond_the_bound_of_connections_the_longest_idle_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 100)
    with serve(FakeEngine(256)) as served, ExitStack() as stack:
        idle = []
        for _ in range(100):
            idle.append(stack.enter_context(closing(connect(served))))
            idle[-1].sendall(request(line="GET /ping HTTP/1.1"))
            assert b" 200 " in answer(idle[-1])
        assert served.ask("POST", "/invocations", png()).status == 200
        assert until_closed(idle[0]) == b""
        idle[-1].sendall(request(png(8)))
        assert b'"grey 8"' in answer(idle[-1])


@pytest.mark.parametrize("status", [503, 429])
def test_beyond_the_bound_of_busy_connections_new_ones_are_told(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(256)
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 10)
    with serve(engine, overload_status=status) as served, ExitStack() as stack:
        engine.delay_s = 3
        busy = [stack.enter_context(closing(connect(served))) for _ in range(10)]
        for client in busy:
            client.sendall(request(jpeg(1)))
        served.until(lambda: served.app.state.runtime.admission.under_way == 10)
        with connect(served) as late:
            assert refusal(until_closed(late)) == (status, "overloaded")
        assert all(b'"grey 1"' in answer(client) for client in busy)


def test_a_client_that_never_reads_its_answers_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "UNREAD_S", 0.5)
    monkeypatch.setattr(protocol, "SWEEP_S", 0.05)
    with serve(FakeEngine(256)) as served, connect(served) as client:
        client.setblocking(False)
        ask = request(png(1), line="POST /invocations?top_k=256 HTTP/1.1")
        unsent = ask
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(100_000):
                try:
                    unsent = unsent[client.send(unsent) :] or ask
                except BlockingIOError:
                    time.sleep(0.01)
        assert served.ask("POST", "/invocations", png()).status == 200


def early(served: Served) -> socket.socket:
    """A connection whose first request was answered before its body was there, which then came."""
    client = connect(served)
    client.sendall(b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
    assert b" 200 " in answer(client)
    client.sendall(b"x")
    time.sleep(0.05)
    return client


def test_after_an_early_answer_the_next_head_is_bounded_too(service: Served) -> None:
    with early(service) as client:
        client.sendall(b"GET /ping HTTP/1.1\r\n")
        for _ in range(5_000):
            client.sendall(b"a: " + b"y" * 1000 + b"\r\n")
        assert refusal(until_closed(client)) == (431, "headers_too_large")


def test_trailers_are_bounded_and_never_become_headers(service: Served) -> None:
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"%x\r\n%b\r\n0\r\n" % (len(png(3)), png(3))
    with connect(service) as client:
        client.sendall(head + body + b"Accept: text/csv\r\nX-Request-Id: mine\r\n\r\n")
        answered = answer(client)
        assert b"application/json" in answered
        assert b"x-request-id: mine" not in answered
    with connect(service) as client:
        client.sendall(head + body)
        for number in range(5_000):
            client.sendall(b"X-%d: " % number + b"y" * 1000 + b"\r\n")
        assert refusal(until_closed(client)) == (431, "headers_too_large")


def test_connections_are_closed_when_idle_whatever_was_on_them_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "KEEP_ALIVE_S", 0.5)
    monkeypatch.setattr(protocol, "SWEEP_S", 0.05)
    with serve(FakeEngine(256)) as served, early(served) as client, connect(served) as kept:
        kept.sendall(request(line="GET /ping HTTP/1.1"))
        assert b" 200 " in answer(kept)
        assert until_closed(client) == b""
        assert until_closed(kept) == b""


def test_a_pipelined_upload_has_the_time_of_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.2)
    monkeypatch.setattr(protocol, "SWEEP_S", 0.05)
    sent = request(png(7))
    with serve(FakeEngine(256)) as served, connect(served) as client:
        client.sendall(request(line="GET /ping HTTP/1.1") + sent[:-10])
        assert b" 200 " in answer(client)
        time.sleep(1)
        client.sendall(sent[-10:])
        assert b'"grey 7"' in answer(client)


@pytest.mark.parametrize("body", [b"zz\r\n", b"-1\r\n", b"0x5\r\n", b"fffffffffffffffff\r\n", b"1\r\nabc\r\n"])
def test_a_broken_chunk_gets_a_sentence(service: Served, body: bytes) -> None:
    with connect(service) as client:
        client.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        assert refusal(until_closed(client)) == (400, "malformed_http")


def test_a_valid_request_is_answered_though_garbage_follows(service: Served) -> None:
    with connect(service) as client:
        client.sendall(request(png(5)) + b"\x00garbage\r\n\r\n")
        received = until_closed(client)
    first, _, second = received.partition(b"HTTP/1.1 400")
    assert b'"grey 5"' in first
    assert b"malformed_http" in second


def test_a_thousand_offered_upgrades_in_one_packet_are_answered(service: Served) -> None:
    one = request(line="GET /ping HTTP/1.1").replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    with connect(service) as client:
        client.sendall(one * 1000 + request(b"", "Connection: close", line="GET /ping HTTP/1.1"))
        assert until_closed(client).count(b"HTTP/1.1 200") == 1001
