"""What the supervisor does with the connections of a dead worker, over real sockets."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from service.lifeline import IDLE, WAITING, WRITING, Held, Lifeline, Lingering, pair, refuse_waiting, slots


class Pair:
    """A worker's end and the supervisor's, and connections between a client and the worker."""

    def __init__(self, count: int = 4) -> None:
        ours, theirs = pair()
        fd = slots(count)
        self.held = Held(ours, fd)
        self.worker = Lifeline(theirs.detach(), fd)
        os.close(fd)

    def connection(self) -> tuple[socket.socket, socket.socket, int | None]:
        client, served = socket.socketpair()
        client.settimeout(10)
        return client, served, self.worker.opened(served.fileno())


@pytest.fixture
def both() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.worker._socket.close()
    made.worker._notes.close()


def until_closed(client: socket.socket) -> bytes:
    with closing(client):
        return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize(
    ("note", "unread", "told"),
    [(IDLE, b"", False), (IDLE, b"GET", True), (WAITING, b"", True), (WRITING, b"", False), (WRITING, b"GET", False)],
)
def test_only_who_has_no_part_of_an_answer_is_told(both: Pair, note: int, unread: bytes, told: bool) -> None:
    client, served, slot = both.connection()
    assert slot is not None
    both.worker.note(slot, note)
    client.sendall(unread)
    served.close()  # the worker dies
    noted: list[tuple[str, str]] = []
    lingering = both.held.answer(lambda *what: noted.append(what))
    assert len(lingering) == len(noted) == told
    if told:
        received = b"".join([client.recv(65536)])
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        error = json.loads(body)["error"]
        assert (error["code"], error["retry_after_s"]) == ("worker_died", 1)
        assert noted == [(error["request_id"], "worker_died")]
    for connection in lingering:
        connection.close()
    client.close()


def test_a_connection_that_the_worker_closed_is_closed_for_its_client(both: Pair) -> None:
    client, served, slot = both.connection()
    assert slot is not None
    both.held.read()
    served.close()
    both.worker.closed(slot)
    both.held.read()
    assert until_closed(client) == b""
    both.held.close()


def test_more_connections_than_can_be_held_are_served_all_the_same(both: Pair) -> None:
    made = [both.connection() for _ in range(6)]
    assert [slot is None for _, _, slot in made] == [False] * 4 + [True] * 2
    for client, served, _ in made:
        client.close()
        served.close()
    both.held.close()


def test_connections_made_while_the_supervisor_is_busy_are_held_later() -> None:
    """More than the socket between them takes in, which the supervisor does not read meanwhile."""
    both = Pair(60)
    both.worker._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel makes it its least
    made = [both.connection() for _ in range(60)]
    assert 10 < len(both.worker._unsent_opened) < 60
    for _, served, slot in [*made[:10], *made[-10:]]:  # of the last ten it has not heard, and never does
        assert slot is not None
        served.close()
        both.worker.closed(slot)
    living = [*made[10:50], *(both.connection() for _ in range(10))]
    for _ in range(30):
        both.held.read()
        both.worker.beat()
    assert len(both.held._connections) == 50
    for client, _, _ in [*made[:10], *made[-10:]]:
        assert until_closed(client) == b""
    for _, served, slot in living:
        assert slot is not None
        both.worker.note(slot, WAITING)
        served.close()
    lingering = both.held.answer(lambda *what: None)
    assert len(lingering) == 50
    for connection in lingering:
        connection.close()
    for client, _, _ in living:
        assert b"worker_died" in until_closed(client)
    both.worker._socket.close()
    both.worker._notes.close()


def test_a_worker_that_goes_round_is_not_silent(both: Pair) -> None:
    assert both.held.silent_s() == 0
    both.worker.beat()
    assert 0 <= both.held.silent_s() < 60
    both.held.close()


def test_connections_that_nobody_accepts_any_more_are_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients = [socket.create_connection(listener.getsockname(), timeout=10) for _ in range(3)]
        lingering = Lingering()
        lingering.add(refuse_waiting(listener, "stopping", lambda *what: None))
        assert len(lingering) == 3
        for client in clients:
            client.sendall(b"GET /ping HTTP/1.1\r\n\r\n")
            assert b'"code": "not_ready"' in until_closed(client)
        lingering.sweep()
        assert len(lingering) == 0


def test_of_more_connections_than_may_linger_the_first_are_closed_without_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients = [socket.create_connection(listener.getsockname(), timeout=10) for _ in range(5)]
        for client in clients:
            client.sendall(b"x" * 1000)
        lingering = Lingering(most=2)
        lingering.add(refuse_waiting(listener, "loading", lambda *what: None))
        assert len(lingering) == 2
        for client in clients:
            assert b"(state: loading)" in until_closed(client)
        lingering.sweep()
        assert len(lingering) == 0
