"""The load generator against tiny real servers: counts, latencies, errors, ways to state a length."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.bench.load import LoadResult, generate, parse, percentile, run

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BODIES = [(b"a" * 10, "image/jpeg"), (b"b" * 300_000, "image/png")]


class Tiny:
    """A server of threads that reads whole requests and answers what `answer` gives; None closes the connection."""

    def __init__(self, answer: Callable[[int], bytes | None]) -> None:
        self.answer, self.seen, self.lock = answer, [], threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/invocations"
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as stream:
                while line := stream.readline():
                    headers = {}
                    while (header := stream.readline()) not in (b"\r\n", b""):
                        name, _, value = header.decode().partition(":")
                        headers[name.lower()] = value.strip()
                    body = stream.read(int(headers["content-length"]))
                    with self.lock:
                        self.seen.append((line, headers, body))
                        number = len(self.seen)
                    answer = self.answer(number)
                    if answer is None:
                        connection.shutdown(socket.SHUT_RDWR)
                        return
                    connection.sendall(answer)
        except OSError:
            pass

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.open:
            connection.close()


@contextmanager
def tiny(answer: Callable[[int], bytes | None]) -> Iterator[Tiny]:
    server = Tiny(answer)
    try:
        yield server
    finally:
        server.close()


def measured(answer: Callable[[int], bytes | None], concurrency: int = 2, **options: float) -> LoadResult:
    with tiny(answer) as server:
        return generate(server.url, BODIES, concurrency, 0.3, 0.0, **options)


def test_whole_requests_arrive_in_turn_and_answers_are_counted() -> None:
    with tiny(lambda _: OK) as server:
        result = generate(server.url, BODIES, 1, 0.3, 0.0, {"X-One": "1"})
        line, headers, _ = server.seen[0]
        assert line == b"POST /invocations HTTP/1.1\r\n"
        assert headers["x-one"] == "1"
        assert headers["content-type"] == "image/jpeg"
        assert [body for _, _, body in server.seen[:4]] == [BODIES[0][0], BODIES[1][0]] * 2
    assert result.errors == {}
    assert result.n > 10
    assert len(server.seen) - 1 <= result.n <= len(server.seen)
    assert result.throughput == pytest.approx(result.n / 0.3)
    assert 0 < result.p50_ms <= result.p99_ms < 300


def test_latency_is_the_server_s_and_concurrency_is_kept() -> None:
    def slow(_: int) -> bytes:
        time.sleep(0.02)
        return OK

    result = measured(slow, concurrency=4)
    assert 20 <= result.p50_ms < 100
    assert result.throughput * result.p50_ms / 1000 == pytest.approx(4, rel=0.5)


def test_the_warm_up_is_not_counted() -> None:
    with tiny(lambda _: OK) as server:
        result = generate(server.url, BODIES[:1], 1, 0.2, 0.4)
        assert result.n < 0.7 * len(server.seen)


def test_a_process_of_its_own_measures_the_same() -> None:
    with tiny(lambda _: OK) as server:
        result = run(server.url, BODIES, 2, 0.2, 0.1)
    assert result.n > 0
    assert result.errors == {}
    assert result.client_us > 0


def test_refusals_are_errors_with_the_first_body() -> None:
    busy = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nfull"
    result = measured(lambda number: busy if number % 2 else OK)
    assert result.errors["status 503"] > 0
    assert result.n > 0
    assert result.first_error == "status 503: full"


def test_connections_closed_before_the_answer_are_errors_and_are_opened_again() -> None:
    result = measured(lambda number: None if number % 3 == 0 else OK)
    assert set(result.errors) == {"closed"}
    assert result.n > 1


def test_connections_closed_in_the_middle_of_an_answer_are_errors() -> None:
    half = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 20\r\n\r\nhalf"
    with tiny(lambda _: half) as server:
        threading.Timer(0.1, lambda: [one.shutdown(socket.SHUT_RDWR) for one in list(server.open)]).start()
        result = generate(server.url, BODIES[:1], 1, 0.2, 0.0)
    assert result.n == 0
    assert result.errors.get("closed", 0) >= 1
    assert "half" in result.first_error


def test_a_silent_server_times_out() -> None:
    def silent(_: int) -> bytes:
        time.sleep(5)
        return OK

    with tiny(silent) as server:
        result = generate(server.url, BODIES[:1], 1, 1.2, 0.0, timeout_s=0.2)
    assert result.errors["timeout"] >= 1
    assert result.n == 0


def test_a_dead_server_is_refused_without_a_tight_loop() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = generate(f"http://127.0.0.1:{port}/", BODIES[:1], 2, 0.3, 0.0)
    assert 0 < result.errors["refused"] < 100
    assert result.n == 0


def test_a_server_that_closes_after_each_answer_is_served_by_new_connections() -> None:
    result = measured(lambda _: b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")
    assert result.errors == {}
    assert result.n > 1


def test_chunked_answers_are_whole_at_the_last_chunk() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n3;x=1\r\nyes\r\n0\r\n\r\n"
    assert parse(chunked) == (200, True)
    assert all(parse(chunked[:end]) is None for end in range(len(chunked)))
    assert parse(chunked[:-2] + b"A: b\r\n\r\n") == (200, True)
    result = measured(lambda _: chunked)
    assert result.errors == {}
    assert result.n > 1


def test_the_length_is_read_in_any_case_and_an_unstated_one_ends_with_the_connection() -> None:
    assert parse(OK.replace(b"Content-Length", b"content-length")) == (200, True)
    assert parse(OK[:-1]) is None
    assert parse(OK.replace(b"1.1", b"1.0")) == (200, False)
    endless = b"HTTP/1.1 200 OK\r\n\r\nok"
    assert parse(endless) is None
    assert parse(endless, ended=True) == (200, False)
    assert parse(b"HTTP/1.1 204 No Content\r\n\r\n") == (204, True)
    with pytest.raises(ValueError, match="no HTTP"):
        parse(b"SSH-2.0\r\n\r\n")


def test_percentiles_are_nearest_ranks() -> None:
    values = [float(i) for i in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (50, 99, 7)
    assert percentile([], 0.5) != percentile([], 0.5)  # NaN
