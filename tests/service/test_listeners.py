"""The port: shared by the workers of one service, never by two services."""

import errno
import socket
import threading
from contextlib import ExitStack
from itertools import chain

import pytest

from service.listeners import main, open_port
from tests.conftest import free_port


def test_each_worker_has_a_socket_and_all_get_connections() -> None:
    port = free_port()
    with ExitStack() as stack:
        listeners = [stack.enter_context(each) for each in open_port("127.0.0.1", port, 2)]
        for _ in range(64):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        accepted = [_accept_all(listener, stack) for listener in listeners]
    assert sum(accepted) == 64
    assert min(accepted) > 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_port_in_use_is_not_shared(count: int) -> None:
    port = free_port()
    listeners = open_port("127.0.0.1", port, count)
    try:
        for others in (1, 2):
            with pytest.raises(OSError, match="in use"):
                open_port("127.0.0.1", port, others)
    finally:
        for listener in listeners:
            listener.close()


def test_whether_a_port_can_be_had_is_asked_before_a_starter_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert main(["127.0.0.1", str(port)]) == 0
    with socket.create_server(("127.0.0.1", port)):
        assert main(["127.0.0.1", str(port)]) == 1
    said = capsys.readouterr().err
    assert f"in use; stop what uses it or choose another port (make serve PORT={port + 1}; " in said
    with pytest.raises(SystemExit):
        main(["127.0.0.1", "99999"])


def test_of_services_started_in_the_same_moment_one_gets_the_port() -> None:
    for _ in range(200):
        port, together = free_port(), threading.Barrier(4)
        opened: list[list[socket.socket]] = []
        refused: list[int | None] = []

        def start(port: int = port, together: threading.Barrier = together) -> None:
            together.wait()
            try:
                opened.append(open_port("127.0.0.1", port, 2))  # noqa: B023  # the threads end within the round
            except OSError as exc:
                refused.append(exc.errno)  # noqa: B023

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for listener in chain.from_iterable(opened):
            listener.close()
        assert len(opened) == 1
        assert refused == [errno.EADDRINUSE] * 3


def _accept_all(listener: socket.socket, stack: ExitStack) -> int:
    listener.setblocking(False)
    count = 0
    while True:
        try:
            stack.enter_context(listener.accept()[0])
        except BlockingIOError:
            return count
        count += 1
