"""What is left of a worker that dies: its connections, and which of them wait for an answer.

The supervisor holds a duplicate of every connection of its workers (SCM_RIGHTS, unix(7)) and closes it when the worker
does. When a worker dies instead, the connections live on in the supervisor, which answers those whose request the
worker had, so that their clients read a sentence and not a reset.
"""

import json
import mmap
import os
import socket
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from service.errors import RETRY_AFTER_S

MAX_CONNECTIONS = 8192
"""Of a worker that are held; one beyond is served all the same, and reset if the worker dies."""

LINGER_S = 2.0
"""How long a connection stays after it was told of the death: closed at once, what the client still sends would be
answered with a reset, which may overtake the answer (RFC 9112, 9.6)."""

_MESSAGE = struct.Struct("=?I")
"""Opened (with the connection) or closed, and its slot."""

_KIND = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM


def pair() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end and a worker's end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, _KIND)
    ours.setblocking(False)
    return ours, theirs


def slots() -> int:
    """A new file descriptor of the bytes, one a connection, in which a worker notes the requests it has."""
    with tempfile.TemporaryFile() as file:
        file.truncate(MAX_CONNECTIONS)
        return os.dup(file.fileno())


class Lifeline:
    """A worker's end: says which connections it has, and which of them wait. Used from the event loop alone."""

    def __init__(self, socket_fd: int, slots_fd: int) -> None:
        self._socket = socket.socket(fileno=socket_fd)
        self._socket.setblocking(False)
        self._waits = mmap.mmap(slots_fd, MAX_CONNECTIONS)
        self._free = list(range(MAX_CONNECTIONS - 1, -1, -1))
        self._unsent: deque[int] = deque()  # slots that were closed while the supervisor was busy

    def opened(self, fd: int) -> int | None:
        """A connection was accepted. Returns: its slot, None where it cannot be held."""
        self._send_unsent()
        if not self._free or self._unsent:
            return None
        slot = self._free.pop()
        self._waits[slot] = 0
        try:
            socket.send_fds(self._socket, [_MESSAGE.pack(True, slot)], [fd])
        except OSError:  # the supervisor is busy, or gone
            self._free.append(slot)
            return None
        return slot

    def waits(self, slot: int, waiting: bool) -> None:
        """Whether a request on the connection waits for its answer."""
        self._waits[slot] = waiting

    def closed(self, slot: int) -> None:
        """The connection is closed here; the client sees it when the supervisor has closed its duplicate too."""
        self._waits[slot] = 0
        self._unsent.append(slot)
        self._send_unsent()

    def _send_unsent(self) -> None:
        while self._unsent:
            try:
                self._socket.send(_MESSAGE.pack(False, self._unsent[0]))
            except BlockingIOError:
                return
            except OSError:  # the supervisor is gone
                pass
            self._free.append(self._unsent.popleft())

    def flush(self) -> None:
        """Say what could not be said before."""
        self._send_unsent()


class Held:
    """The supervisor's end for one worker."""

    def __init__(self, ours: socket.socket, slots_fd: int) -> None:
        self.socket = ours
        self._waits = mmap.mmap(slots_fd, MAX_CONNECTIONS)
        self._connections: dict[int, socket.socket] = {}

    def read(self) -> None:
        """Take in what the worker has said."""
        with suppress(OSError):
            while True:
                message, fds, _, _ = socket.recv_fds(self.socket, _MESSAGE.size, 1)
                if not message:
                    return
                opened, slot = _MESSAGE.unpack(message)
                if opened and fds:
                    self._connections[slot] = socket.socket(fileno=fds[0])
                elif slot in self._connections:
                    self._connections.pop(slot).close()

    def answer(self) -> list[socket.socket]:
        """Of a worker that has died: answer the requests it had. Returns: their connections, to be closed later."""
        self.read()
        lingering = []
        for slot, connection in self._connections.items():
            connection.setblocking(False)
            if (self._waits[slot] or _has_input(connection)) and _told(connection):
                lingering.append(connection)
            else:
                connection.close()
        self._connections.clear()
        self.close()
        return lingering

    def close(self) -> None:
        """Let everything go."""
        for connection in self._connections.values():
            connection.close()
        self.socket.close()
        self._waits.close()


class Lingering:
    """Connections that were told of a worker's death, until their clients have closed them or time is up."""

    def __init__(self) -> None:
        self._until_s: dict[socket.socket, float] = {}

    def add(self, connections: Iterable[socket.socket]) -> None:
        """Keep these a while."""
        self._until_s |= dict.fromkeys(connections, time.monotonic() + LINGER_S)

    def __len__(self) -> int:
        return len(self._until_s)

    def sweep(self) -> None:
        """Read away what clients still send, close what is over."""
        for connection, until_s in list(self._until_s.items()):
            if time.monotonic() >= until_s or _is_over(connection):
                connection.close()
                del self._until_s[connection]


def _has_input(connection: socket.socket) -> bool:
    """Whether there is a request that the worker has not read."""
    with suppress(OSError):
        return bool(connection.recv(1, socket.MSG_PEEK))
    return False


def _told(connection: socket.socket) -> bool:
    """Send the answer; whether that could be done."""
    request_id = os.urandom(16).hex()
    message = "The process that had this request died before it could answer; send the request again."
    body = json.dumps({"error": {"code": "worker_died", "message": message, "request_id": request_id}}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nretry-after: {RETRY_AFTER_S}\r\nx-request-id: {request_id}\r\n"
        "connection: close\r\n\r\n"
    )
    try:
        connection.send(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
    except OSError:  # its client is gone
        return False
    return True


def _is_over(connection: socket.socket) -> bool:
    try:
        for _ in range(64):
            if not connection.recv(65536):
                return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False
