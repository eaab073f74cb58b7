"""The batcher: single items in, batches to the engine, single results out.

The engine's thread takes what is waiting whenever it is free, so that batches form by themselves under load and a
lone request never waits for company (unless `max_wait_ms` asks for it). It takes it from the queue itself: were it
given batches by the event loop, it would stand still whenever the loop is busy with requests. Only while items come in
one after the other, turn by turn of the event loop, it lets them: a batch of one that was started a moment sooner than
its neighbours arrived would cost nearly as much as all of them together. The batcher knows neither HTTP nor torch:
`run` is any function from a list to a list.

No item is ever left waiting: it gets its result, the failure of its batch, or a refusal at once.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service.errors import EngineFailure, NotReady, Overloaded

log = logging.getLogger(__name__)

QUIET_TURNS = 2
"""Turns of the event loop without a new item after which what waits is a batch: some 20 us for a lone one. A request
that has arrived takes two until it is submitted."""

GATHER_S = 0.005
"""How long a lane that is free lets items go on coming in; the event loop may be in a turn that takes longer."""

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Batched(Generic[Out]):
    """One item's result, and what its batch was like."""

    value: Out
    queue_ms: float
    infer_ms: float
    batch_size: int


@dataclass(eq=False)  # found again by identity: items such as images have no truth value of equality
class _Waiting(Generic[In, Out]):
    item: In
    future: "asyncio.Future[Batched[Out]]"
    since_s: float = field(default_factory=time.perf_counter)


class Batcher(Generic[In, Out]):
    """Collects items for `run`. To be opened and closed on the event loop that submits to it."""

    def __init__(
        self,
        run: Callable[[list[In]], list[Out]],
        threads: ThreadPoolExecutor,
        *,
        lanes: int = 1,
        max_batch: int,
        max_queue: int,
        max_wait_ms: float = 0.0,
        on_failure: Callable[[int], None] = lambda failures: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """`run` returns one result per item, in order, called in `lanes` of the `threads` (the caller's to shut down).

        `max_queue` bounds the items that wait for the engine. `on_failure` is told, on the event loop, on how many
        batches in a row it has failed; `on_lost`, that a lane has ended by a fault of ours.
        """
        self._run = run
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._max_wait_s = max_wait_ms / 1000
        self._queue: deque[_Waiting[In, Out]] = deque()  # appended to by the loop, emptied by the thread
        self._arrived = threading.Condition()
        self._asleep = 0
        self._gathering = False
        """Whether lanes let more items come in before they begin."""
        self._idle_since_s = 0.0
        """Since when a lane has had nothing to do, the last one that came to it."""
        self._settling = False
        self._submitted = 0
        self._closing = False
        self._threads = threads
        self._lanes = lanes
        self._on_failure = on_failure
        self._on_lost = on_lost
        self.failures = 0
        """Batches in a row on which `run` failed, up to now."""
        self._running_since_s: dict[int, float] = {}  # by thread
        self._free = lanes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: list[asyncio.Future[None]] = []

    @property
    def waiting(self) -> int:
        """Items that wait for the engine."""
        return len(self._queue)

    def busy_s(self) -> float:
        """How long the longest of the batches that are running has been running; 0 when there is none."""
        started_s = list(self._running_since_s.values())
        return time.perf_counter() - min(started_s) if started_s else 0.0

    def open(self) -> None:
        """Start taking batches."""
        self._loop = asyncio.get_running_loop()
        self._work = [self._loop.run_in_executor(self._threads, self._serve) for _ in range(self._lanes)]
        for lane in self._work:
            lane.add_done_callback(self._note_end)

    async def close(self) -> None:
        """Refuse new items, answer those that wait, then stop."""
        self._closing = True
        self._wake()
        await asyncio.gather(*self._work, return_exceptions=True)  # a fault of theirs has been told

    async def submit(self, item: In) -> Batched[Out]:
        """Wait for the item's result. A cancelled submit frees its place before the engine works for it.

        Raises: Overloaded, NotReady (closing), EngineFailure.
        """
        if self._closing or self._loop is None:
            raise NotReady("The service is stopping and takes no more requests; try another instance.")
        if len(self._queue) >= self._max_queue:
            raise Overloaded(f"All {self._max_queue} places in the queue are taken; try again in a moment.")
        waiting: _Waiting[In, Out] = _Waiting(item, self._loop.create_future())
        self._queue.append(waiting)
        self._submitted += 1
        self._gather()
        try:
            return await waiting.future
        except asyncio.CancelledError:
            with suppress(ValueError):  # the thread has just taken it
                self._queue.remove(waiting)
            raise

    def _note_end(self, lane: asyncio.Future[None]) -> None:
        if lane.cancelled() or (self._closing and lane.exception() is None):
            return
        log.error("a lane of the engine ended", exc_info=lane.exception())  # a fault of ours: nobody answers there now
        self._on_lost()

    def _gather(self) -> None:
        """Let more items come in, unless the lanes that are free have all they can take."""
        assert self._loop is not None
        if len(self._queue) >= self._max_batch * max(1, self._free) or self._is_overdue():
            self._begin()
            return
        self._gathering = True
        if not self._settling:
            self._settling = True
            self._loop.call_soon(self._settle, self._submitted, 0)

    def _settle(self, submitted: int, quiet: int) -> None:
        """Once a turn of the event loop while items gather. `submitted`: as many there had been, `quiet` turns ago."""
        assert self._loop is not None
        self._settling = False
        if not self._gathering:
            return
        quiet = quiet + 1 if submitted == self._submitted else 0
        if quiet >= QUIET_TURNS or self._is_overdue():
            self._begin()
        else:
            self._settling = True
            self._loop.call_soon(self._settle, self._submitted, quiet)

    def _begin(self) -> None:
        self._gathering = False
        if self._asleep:
            self._wake()

    def _is_overdue(self) -> bool:
        """Whether an item and a lane have waited for each other for GATHER_S."""
        try:
            since_s = max(self._queue[0].since_s, self._idle_since_s)
        except IndexError:  # its client has just left
            return False
        return time.perf_counter() - since_s > GATHER_S

    def _wake(self) -> None:
        with self._arrived:
            self._arrived.notify(self._lanes)

    # From here on: in the engine's threads.

    def _serve(self) -> None:
        while self._wait_for_some():
            self._wait_for_company()
            batch = self._take()
            try:
                if batch:
                    self._answer(batch)
            finally:
                with self._arrived:
                    self._free += 1

    def _take(self) -> list[_Waiting[In, Out]]:
        """This lane's share of what waits, the other free ones get theirs; all of it where it waited for company."""
        with self._arrived:
            share = -(-len(self._queue) // self._free) if not self._max_wait_s else self._max_batch
            batch: list[_Waiting[In, Out]] = []
            while self._queue and len(batch) < min(self._max_batch, share):
                with suppress(IndexError):  # its client has just left
                    waiting = self._queue.popleft()
                    if not waiting.future.cancelled():
                        batch.append(waiting)
            self._free -= 1
        return batch

    def _wait_for_some(self) -> bool:
        """Wait until items wait that may be taken; False when there will be none."""
        self._idle_since_s = time.perf_counter()
        while self._idles():
            with self._arrived:
                self._asleep += 1
                if self._idles():  # `_begin` looks at `_asleep` after it has let them begin
                    self._arrived.wait(GATHER_S if self._queue else None)  # the loop may be busy for longer
                self._asleep -= 1
        return bool(self._queue) or not self._closing

    def _idles(self) -> bool:
        return not self._closing and (not self._queue or (self._gathering and not self._is_overdue()))

    def _wait_for_company(self) -> None:
        """Wait until the batch is full or its first item has waited `max_wait_ms`."""
        if not self._max_wait_s:
            return
        with self._arrived:
            self._asleep += 1
            while len(self._queue) < self._max_batch and not self._closing:
                try:
                    left_s = self._queue[0].since_s + self._max_wait_s - time.perf_counter()
                except IndexError:  # its client has just left
                    break
                if left_s <= 0 or not self._arrived.wait(left_s):
                    break
            self._asleep -= 1

    def _answer(self, batch: list[_Waiting[In, Out]]) -> None:
        started_s = self._running_since_s[threading.get_ident()] = time.perf_counter()
        values: list[Out] | Exception
        try:
            values = self._run([waiting.item for waiting in batch])
            if len(values) != len(batch):
                raise ValueError(f"{len(values)} results for {len(batch)} items")
        except Exception as exc:  # handed to everyone who waits for this batch
            log.exception("the engine failed on a batch of %d", len(batch))
            values = exc
        del self._running_since_s[threading.get_ident()]
        infer_ms = (time.perf_counter() - started_s) * 1000
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, batch, values, started_s, infer_ms)

    # On the event loop again, to which the futures belong.

    def _deliver(
        self, batch: list[_Waiting[In, Out]], values: list[Out] | Exception, started_s: float, infer_ms: float
    ) -> None:
        self.failures = self.failures + 1 if isinstance(values, Exception) else 0
        if self.failures:
            self._on_failure(self.failures)
        for index, waiting in enumerate(batch):
            if waiting.future.done():  # cancelled
                continue
            if isinstance(values, Exception):
                failure = EngineFailure("The model failed on this request; the cause is in the service's log.")
                failure.__cause__ = values
                waiting.future.set_exception(failure)
            else:
                queue_ms = (started_s - waiting.since_s) * 1000
                waiting.future.set_result(Batched(values[index], queue_ms, infer_ms, len(batch)))
