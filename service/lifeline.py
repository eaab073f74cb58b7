"""What is left of a worker that dies: its connections, and which of them wait for an answer.

The supervisor holds a duplicate of every connection of its workers (SCM_RIGHTS, unix(7)) and closes it when the worker
does. When a worker dies instead, the connections live on in the supervisor, which answers those whose request the
worker had, so that their clients read a sentence and not a reset. It also answers connections that no worker accepts.
"""

import ctypes
import errno
import mmap
import os
import resource
import select
import socket
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from service.errors import RETRY_AFTER_S, error_body
from service.record import new_request_id

MAX_CONNECTIONS = 4096
"""Of a worker. Beyond it, those that have been idle longest are closed for new ones."""

MOST_FILES = 65536
FILES_BESIDES = 256
"""File descriptors that are no connections, at most."""

SO_ATTACH_FILTER = 26
"""asm-generic/socket.h; Python has no name for it."""

LINGER_S = 2.0
"""How long a connection stays after it was told of the death: closed at once, what the client still sends would be
answered with a reset, which may overtake the answer (RFC 9112, 9.6)."""

UPLOAD_S = 10.0
"""The same of a connection that nobody has read from: its client may have begun to send a large body."""

DIED = "The process that had this request died before it could answer; send the request again."

MEANING = {
    "loading": "The service is not ready (state: loading): a process starts, the model is being loaded; try again.",
    "stopping": "The service has stopped (state: stopping); send the request to another instance.",
}
"""What connections are told that no worker accepts, by the state."""

REFUSED_AT_ONCE = 4096
"""So many are told before the supervisor looks after its workers again: more than can wait (`listeners.BACKLOG`)."""

Told = Callable[[str, str], None]
"""Takes in that a client was answered with 503: the request id and the code."""

_MESSAGE = struct.Struct("=?I")
"""Opened (with the connection) or closed, and its slot."""

IDLE, WAITING, WRITING = 0, 1, 2
"""What a worker notes of a connection: no request on it; one that has no part of an answer; an answer being written,
after which nothing may be put."""

_BEAT = struct.Struct("=d")
"""After the slots: when the worker's event loop last went round (CLOCK_MONOTONIC, which all processes share)."""

_BUSY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)
"""The supervisor has yet to read what it was sent before (unix(7)): it is said later."""

_KIND = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM


def pair() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end and a worker's end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, _KIND)
    ours.setblocking(False)
    return ours, theirs


def shared(size: int) -> int:
    """A new file descriptor of `size` bytes of zeros in memory, which processes can share."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("classifier")  # never a file on disk: a full one would end the process that writes
        os.truncate(fd, size)
        return fd
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return os.dup(file.fileno())


def slots(count: int) -> int:
    """A file descriptor of the bytes, one for each of `count` connections, in which a worker notes its requests."""
    return shared(count + _BEAT.size)


def take_no_more(listener: socket.socket) -> None:
    """Let no further connection be made: one that waited to be accepted when the socket is closed would be reset.

    By a filter that drops every packet to the listening socket (SO_ATTACH_FILTER, socket(7)): who connects now tries
    again after a second, and is refused then. Elsewhere than on Linux the last ones may be reset.
    """
    if sys.platform != "linux":
        return
    drop_all = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0 bytes
    with suppress(OSError):
        program = struct.pack("@HP", 1, ctypes.addressof(drop_all))
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def allow_files() -> int:
    """Let this process open as many files as it may. Returns: how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MOST_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class Lifeline:
    """A worker's end: says which connections it has, and which of them wait. Used from the event loop alone."""

    def __init__(self, socket_fd: int, slots_fd: int) -> None:
        self._socket = socket.socket(fileno=socket_fd)
        self._socket.setblocking(False)
        self._notes = mmap.mmap(slots_fd, 0)
        self._count = len(self._notes) - _BEAT.size
        self._free = list(range(self._count - 1, -1, -1))
        # What could not be said while the supervisor was busy. A slot is free again only once it is told as closed.
        self._unsent_closed: deque[int] = deque()
        self._unsent_opened: dict[int, int] = {}  # file descriptors by slot

    @property
    def capacity(self) -> int:
        """Connections that the supervisor can hold of this worker."""
        return self._count

    def opened(self, fd: int) -> int | None:
        """A connection was accepted. Returns: its slot, None where it cannot be held."""
        self._send_unsent()
        if not self._free:
            return None
        slot = self._free.pop()
        self._notes[slot] = IDLE
        self._unsent_opened[slot] = fd
        self._send_unsent()
        return slot

    def note(self, slot: int, what: int) -> None:
        """IDLE, WAITING or WRITING."""
        self._notes[slot] = what

    def closed(self, slot: int) -> None:
        """The connection is closed here; the client sees it when the supervisor has closed its duplicate too."""
        self._notes[slot] = IDLE
        if self._unsent_opened.pop(slot, None) is not None:  # the supervisor has not heard of it
            self._free.append(slot)
            return
        self._unsent_closed.append(slot)
        self._send_unsent()

    def _send_unsent(self) -> None:
        while self._unsent_closed and self._is_said(self._unsent_closed[0]):
            self._free.append(self._unsent_closed.popleft())
        while self._unsent_opened:
            slot, fd = next(iter(self._unsent_opened.items()))
            if not self._is_said(slot, fd):
                return
            del self._unsent_opened[slot]

    def _is_said(self, slot: int, opened_fd: int | None = None) -> bool:
        """Tell the supervisor that the slot's connection was closed, or opened; whether it need not be told again."""
        try:
            if opened_fd is None:
                self._socket.send(_MESSAGE.pack(False, slot))
            else:
                socket.send_fds(self._socket, [_MESSAGE.pack(True, slot)], [opened_fd])
        except OSError as exc:
            return exc.errno not in _BUSY  # else the supervisor is gone
        return True

    def beat(self) -> None:
        """Say that the event loop goes round, and what could not be said before."""
        _BEAT.pack_into(self._notes, self._count, time.monotonic())
        self._send_unsent()


class Held:
    """The supervisor's end for one worker."""

    def __init__(self, ours: socket.socket, slots_fd: int) -> None:
        self.socket = ours
        self._notes = mmap.mmap(slots_fd, 0)
        self._connections: dict[int, socket.socket] = {}

    def read(self) -> bool:
        """Take in what the worker has said. Returns: whether it may say more; not once it has died."""
        with suppress(OSError):
            while True:
                message, fds, _, _ = socket.recv_fds(self.socket, _MESSAGE.size, 1)
                if not message:
                    return False
                opened, slot = _MESSAGE.unpack(message)
                if opened and fds:
                    self._connections[slot] = socket.socket(fileno=fds[0])
                elif slot in self._connections:
                    self._connections.pop(slot).close()
        return True

    def silent_s(self) -> float:
        """For how long the worker's event loop has not gone round; 0 while it has not begun."""
        (beat_s,) = _BEAT.unpack_from(self._notes, len(self._notes) - _BEAT.size)
        return time.monotonic() - beat_s if beat_s else 0.0

    def has_begun(self) -> bool:
        """Whether the worker accepts connections, or did before it began to stop."""
        return any(self._notes[-_BEAT.size :])

    def answer(self, told: Told) -> list[socket.socket]:
        """Of a worker that has died: answer the requests it had. Returns: their connections, to be closed later."""
        self.read()
        lingering = []
        for slot, connection in self._connections.items():
            connection.setblocking(False)
            waits = self._notes[slot] == WAITING or (self._notes[slot] == IDLE and _has_input(connection))
            if waits and _tell(connection, "worker_died", DIED, told):
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
        self._notes.close()


class Lingering:
    """Connections that were answered here, until their clients have closed them or time is up."""

    def __init__(self, most: int = MAX_CONNECTIONS) -> None:
        """`most`: beyond it, the first are closed before their time."""
        self._most = most
        self._until_s: dict[socket.socket, float] = {}

    def add(self, connections: Iterable[socket.socket], for_s: float = LINGER_S) -> None:
        """Keep these a while."""
        self._until_s |= dict.fromkeys(connections, time.monotonic() + for_s)
        for connection in list(self._until_s)[: max(0, len(self._until_s) - self._most)]:
            _is_over(connection)  # what is unread would make its end a reset
            connection.close()
            del self._until_s[connection]

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


def is_waited_for(listener: socket.socket) -> bool:
    """Whether connections wait to be accepted."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def refuse_waiting(listener: socket.socket, state: str, told: Told) -> list[socket.socket]:
    """Answer all connections that wait to be accepted, however shortly. Returns: these, to be closed later."""
    listener.setblocking(False)
    lingering = []
    with suppress(OSError):
        for _ in range(REFUSED_AT_ONCE):
            connection, _ = listener.accept()
            connection.setblocking(False)
            if _tell(connection, "not_ready", MEANING[state], told, state):
                lingering.append(connection)
            else:
                connection.close()
    return lingering


def _tell(connection: socket.socket, code: str, message: str, told: Told, state: str | None = None) -> bool:
    """Send an answer; whether that could be done. With a `state`, it is one to GET /ping too: what was asked has not
    been read.
    """
    request_id = new_request_id()
    body = error_body(503, code, message, request_id, {"status": state, "message": message} if state else {})
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
    told(request_id, code)
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
