"""Requests at a fixed rate, whether the server keeps up or not: what overload looks like to it.

Each request is due at its own time; if no connection is idle then, a new one is opened. `load` waits for each answer
instead, and so slows down with the server.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.bench.load import parse, percentile

TICK_S = 0.002


@dataclass
class Outcome:
    """What became of the requests of one run."""

    seconds: float
    latencies_ms: dict[str, list[float]] = field(default_factory=dict)
    """By "200", "503" and so on, "closed" and "refused" for connections that ended."""
    done_s: list[tuple[float, str]] = field(default_factory=list)
    """When each was over, in seconds from the start."""

    def add(self, kind: str, at_s: float, latency_ms: float) -> None:
        """One request is over."""
        self.latencies_ms.setdefault(kind, []).append(latency_ms)
        self.done_s.append((at_s, kind))

    def counts(self) -> dict[str, int]:
        """Requests by kind."""
        return dict(Counter({kind: len(values) for kind, values in self.latencies_ms.items()}))

    def rate(self, kind: str = "200") -> float:
        """So many a second."""
        return len(self.latencies_ms.get(kind, ())) / self.seconds

    def quantile_ms(self, share: float, kind: str = "200") -> float:
        """A percentile of the latencies."""
        return percentile(sorted(self.latencies_ms.get(kind, ())), share)


class _Connection(asyncio.Protocol):
    def __init__(self, pool: "_Pool") -> None:
        self.pool = pool
        self.received = b""
        self.sent_s: float | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, request: bytes, due_s: float) -> None:
        assert self.transport is not None
        self.received, self.sent_s = b"", due_s
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        answer = parse(self.received)
        if answer is None:
            return
        status, stays = answer
        self._over(str(status))
        if stays:
            self.pool.idle.append(self)
        elif self.transport is not None:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._over("closed")

    def _over(self, kind: str) -> None:
        if self.sent_s is not None:
            self.pool.over(kind, self.sent_s)
            self.sent_s = None


class _Pool:
    def __init__(self, port: int, outcome: Outcome) -> None:
        self.port = port
        self.outcome = outcome
        self.idle: list[_Connection] = []
        self.all: list[_Connection] = []
        self.under_way = 0
        self.begin_s = time.perf_counter()
        self.opening: set[asyncio.Task[None]] = set()

    def over(self, kind: str, sent_s: float) -> None:
        now_s = time.perf_counter()
        self.under_way -= 1
        self.outcome.add(kind, now_s - self.begin_s, 1000 * (now_s - sent_s))

    def send(self, request: bytes) -> None:
        self.under_way += 1
        due_s = time.perf_counter()
        while self.idle:
            connection = self.idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                connection.ask(request, due_s)
                return
        task = asyncio.create_task(self._open(request, due_s))
        self.opening.add(task)
        task.add_done_callback(self.opening.discard)

    async def _open(self, request: bytes, due_s: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self.port)
        except OSError:
            self.over("refused", due_s)
            return
        self.all.append(connection)
        connection.ask(request, due_s)


def run(port: int, requests: Sequence[bytes], rate: float, seconds: float, wait_s: float = 70.0) -> Outcome:
    """Send whole HTTP requests in turn, `rate` a second for `seconds`; wait for the answers."""
    outcome = Outcome(seconds)

    async def go() -> None:
        pool = _Pool(port, outcome)
        sent = 0
        while (now_s := time.perf_counter() - pool.begin_s) < seconds:
            while sent < now_s * rate:
                pool.send(requests[sent % len(requests)])
                sent += 1
            await asyncio.sleep(TICK_S)
        until_s = time.perf_counter() + wait_s
        while pool.under_way and time.perf_counter() < until_s:
            await asyncio.sleep(0.01)
        for connection in pool.all:
            if connection.transport is not None:
                connection.transport.abort()

    asyncio.run(go())
    return outcome


def built(body: bytes, content_type: str = "image/jpeg") -> bytes:
    """A whole request."""
    head = (
        f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
