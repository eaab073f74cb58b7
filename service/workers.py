"""What one worker knows of the others: its number, its socket, and whether they are ready."""

import fcntl
import mmap
import os
import socket
from dataclasses import dataclass

from service.lifeline import Lifeline
from service.metrics import Page


@dataclass(frozen=True)
class Worker:
    """What a worker is told: its number, its socket, and where the workers tell each other."""

    index: int
    count: int
    supervisor_pid: int
    socket_fd: int
    states_fd: int
    metrics_fd: int
    lifeline_fd: int
    slots_fd: int

    @property
    def files(self) -> tuple[int, ...]:
        """The descriptors among these."""
        return self.socket_fd, self.states_fd, self.metrics_fd, self.lifeline_fd, self.slots_fd

    def share(self, total: int) -> int:
        """This worker's share of `total` threads: at least one, and no thread is left over."""
        return max(1, total // self.count + (self.index < total % self.count))

    def listener(self) -> socket.socket:
        """The socket to accept connections from."""
        return socket.socket(fileno=self.socket_fd)

    def lifeline(self) -> Lifeline:
        """Where this worker tells which connections it has."""
        return Lifeline(self.lifeline_fd, self.slots_fd)

    def states(self) -> "States":
        """Where this worker tells that it is ready."""
        return States(self.states_fd)

    def is_replaced(self) -> bool:
        """Whether another process takes this one's place when it ends: not where the service is told to stop."""
        states = self.states()
        return os.getppid() == self.supervisor_pid and states.is_ready(self.index) and not states.is_stopping()

    def page(self) -> Page:
        """Where all workers count."""
        return Page(self.count, self.metrics_fd)


class States:
    """Bytes shared by all: one per worker, 1 while it is ready; 1 once all have been ready together; 1 once one of them
    has said why it cannot start; 1 once the service is told to stop.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bytes = mmap.mmap(fd, 0)

    @staticmethod
    def size(count: int) -> int:
        """Of the file that `count` workers share."""
        return count + 3

    def tell_ready(self, index: int) -> None:
        """Worker `index` can answer."""
        self._bytes[index] = 1

    def forget(self, index: int) -> None:
        """A process that is not ready yet takes the place of worker `index`."""
        self._bytes[index] = 0

    def is_ready(self, index: int) -> bool:
        """Whether the process that is worker `index` now has been ready."""
        return self._bytes[index] == 1

    def all_were_ready(self) -> bool:
        """Whether all have been ready together: from then on each answers for itself."""
        if self._bytes[-3] == 0 and b"\0" not in self._bytes[:-3]:
            self._bytes[-3] = 1
        return self._bytes[-3] == 1

    def fails_first(self) -> bool:
        """Whether the worker that asks, which cannot start, is the first: the others would only repeat its sentence."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            first, self._bytes[-2] = self._bytes[-2] == 0, 1
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return first

    def tell_stopping(self) -> None:
        """No worker that ends from now on is replaced."""
        self._bytes[-1] = 1

    def is_stopping(self) -> bool:
        """Whether the service is told to stop."""
        return self._bytes[-1] == 1
