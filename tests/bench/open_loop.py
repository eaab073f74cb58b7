"""Requests at a fixed rate, whether the server keeps up or not: what overload looks like to it.

Each request is due at its own time; if no connection is idle then, a new one is opened. `load` waits for each answer
instead, and so slows down with the server.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import uvloop

from tests.bench.load import parse, percentile

TICK_S = 0.002


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    kind: str
    """"200", "503" and so on, "closed" and "refused" for connections that ended."""
    due_s: float
    """When it was sent, in seconds from the start, and when it was over."""
    over_s: float

    @property
    def latency_ms(self) -> float:
        return 1000 * (self.over_s - self.due_s)


@dataclass
class Outcome:
    """What became of the requests of one run, or of a part of it."""

    answers: list[Answer] = field(default_factory=list)

    def sent(self, begin_s: float, end_s: float = math.inf) -> "Outcome":
        """Of the requests that were due from `begin_s` until before `end_s`."""
        return Outcome([answer for answer in self.answers if begin_s <= answer.due_s < end_s])

    def counts(self) -> dict[str, int]:
        """Requests by kind."""
        return dict(Counter(answer.kind for answer in self.answers))

    def rate(self, begin_s: float, end_s: float, kind: str = "200") -> float:
        """So many were over a second, from `begin_s` until before `end_s`."""
        return sum(a.kind == kind and begin_s <= a.over_s < end_s for a in self.answers) / (end_s - begin_s)

    def quantile_ms(self, share: float, kind: str = "200") -> float:
        """A percentile of the latencies; not a number where there are none."""
        return percentile(sorted(a.latency_ms for a in self.answers if a.kind == kind), share)


class _Connection(asyncio.Protocol):
    def __init__(self, pool: "_Pool") -> None:
        self.pool = pool
        self.received = b""
        self.sent_s: float | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

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
        self.outcome.answers.append(Answer(kind, sent_s - self.begin_s, now_s - self.begin_s))

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


def run(port: int, requests: Sequence[bytes], phases: Sequence[tuple[float, float]], wait_s: float = 70.0) -> Outcome:
    """Send whole HTTP requests in turn; wait for the answers.

    `phases`: so many requests a second for so many seconds each, without a pause in between.
    """
    outcome = Outcome()

    async def go() -> None:
        pool = _Pool(port, outcome)
        sent, begin_s = 0, pool.begin_s
        for rate, seconds in phases:
            sent_before, end_s = sent, begin_s + seconds
            while (now_s := time.perf_counter()) < end_s:
                while sent - sent_before < (now_s - begin_s) * rate:
                    pool.send(requests[sent % len(requests)])
                    sent += 1
                await asyncio.sleep(TICK_S)
            begin_s = end_s
        until_s = time.perf_counter() + wait_s
        while pool.under_way and time.perf_counter() < until_s:
            await asyncio.sleep(0.01)
        for connection in pool.all:
            if connection.transport is not None:
                connection.transport.abort()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # half the processor time of asyncio's own
        runner.run(go())
    return outcome


def built(body: bytes, content_type: str = "image/jpeg") -> bytes:
    """A whole request."""
    head = (
        f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
