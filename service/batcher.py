"""The batcher: single items in, batches to the engine, single results out.

It takes what is waiting whenever the engine is free, so that batches form by themselves under load and a
lone request never waits for company (unless `max_wait_ms` asks for it). It knows neither HTTP nor torch:
`run` is any function from a list to a list, called in a thread, never on the event loop.

No item is ever left waiting: it gets its result, the failure of its batch, or a refusal at once.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service.errors import EngineFailure, NotReady, Overloaded

log = logging.getLogger(__name__)

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
        thread: ThreadPoolExecutor,
        *,
        max_batch: int,
        max_queue: int,
        max_wait_ms: float = 0.0,
    ) -> None:
        """`run` returns one result per item, in order, called in `thread` (one worker, the caller's to shut down).

        `max_queue` bounds the items that wait for the engine.
        """
        self._run = run
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._max_wait_s = max_wait_ms / 1000
        self._queue: deque[_Waiting[In, Out]] = deque()
        self._arrived = asyncio.Event()
        self._closing = False
        self._thread = thread
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start taking batches."""
        self._task = asyncio.get_running_loop().create_task(self._serve(), name="batcher")

    async def close(self) -> None:
        """Refuse new items, answer those that wait, then stop."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await self._task

    async def submit(self, item: In) -> Batched[Out]:
        """Wait for the item's result. A cancelled submit frees its place before the engine works for it.

        Raises: Overloaded, NotReady (closing), EngineFailure.
        """
        if self._closing or self._task is None:
            raise NotReady("The service is stopping and takes no more requests; try another instance.")
        if len(self._queue) >= self._max_queue:
            raise Overloaded(f"All {self._max_queue} places in the queue are taken; try again in a moment.")
        waiting: _Waiting[In, Out] = _Waiting(item, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._arrived.set()
        try:
            return await waiting.future
        except asyncio.CancelledError:
            if waiting in self._queue:
                self._queue.remove(waiting)
            raise

    async def _serve(self) -> None:
        while True:
            while not self._queue:
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
            await self._wait_for_company()
            count = min(self._max_batch, len(self._queue))
            batch = [waiting for _ in range(count) if not (waiting := self._queue.popleft()).future.done()]
            if batch:
                await self._answer(batch)

    async def _wait_for_company(self) -> None:
        """Wait until the batch is full or its first item has waited `max_wait_ms`."""
        while self._queue and len(self._queue) < self._max_batch and not self._closing:
            left_s = self._queue[0].since_s + self._max_wait_s - time.perf_counter()
            if left_s <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left_s)
            except TimeoutError:
                return

    async def _answer(self, batch: list[_Waiting[In, Out]]) -> None:
        started_s = time.perf_counter()
        try:
            values = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._run, [waiting.item for waiting in batch]
            )
            if len(values) != len(batch):
                raise ValueError(f"{len(values)} results for {len(batch)} items")
        except Exception as exc:  # handed to everyone who waits for this batch
            log.exception("the engine failed on a batch of %d", len(batch))
            for waiting in batch:
                if not waiting.future.done():
                    failure = EngineFailure("The model failed on this request; the cause is in the service's log.")
                    failure.__cause__ = exc
                    waiting.future.set_exception(failure)
            return
        infer_ms = (time.perf_counter() - started_s) * 1000
        for waiting, value in zip(batch, values, strict=True):
            if not waiting.future.done():
                queue_ms = (started_s - waiting.since_s) * 1000
                waiting.future.set_result(Batched(value, queue_ms, infer_ms, len(batch)))
