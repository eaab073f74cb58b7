"""What is counted, over all workers: one page of numbers that they share, one row each. `exposition` shows it.

A row belongs to a worker's number, not to its process: the replacement of a worker that died goes on in the same row,
so no count ever falls. Only the event loop of its own process writes to a row; the last row is the supervisor's.

prometheus_client writes the text of a scrape, but does not count: its files for several processes cost 19 us for what a
request counts, these cells 1.6 us (Python 3.11, prometheus_client 0.26, one EPYC core, best of 7 x 20,000).
"""

import mmap
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.errors import CONNECTION_ERRORS, HTTP_ERRORS

if TYPE_CHECKING:
    from service.record import RequestRecord

INVOCATIONS = "/invocations"
OTHER = "other"
"""Whatever is not in the lists below: a client must not be able to add series."""

PATHS = (INVOCATIONS, "/ping", "/metrics", "/execution-parameters", "/", "/docs", "/openapi.json", OTHER)
STATUSES = (
    *sorted({200, 404, 405, 429, 500, *CONNECTION_ERRORS.values()} | {status for status, _ in HTTP_ERRORS.values()}),
    0,
)
"""0: any other, and requests whose client left before there was an answer."""
REASONS = (
    *sorted({"client_gone", "internal_error", *CONNECTION_ERRORS} | {code for _, code in HTTP_ERRORS.values()}),
    OTHER,
)
OUTCOMES = ("answered", "refused", "failed", "gone")
"""Of an invocation: 2xx, 4xx, 5xx."""
STATES = ("loading", "warming_up", "ready", "failing", "stuck", "stopping", "failed")
CAUSES = ("out_of_memory", "stood_still", "sigkill", "sigsegv", "sigabrt", "sigbus", "other_signal", "exit_status")
"""Of a worker's death (`service.deaths`)."""

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

BEAT_S = 1.0
"""How often a worker writes down its gauges, which another one shows; it shows its own as they are."""


@dataclass(frozen=True)
class Histogram:
    """Where a histogram's cells are in a row: one for each bound, one above, then the sum."""

    at: int
    bounds: tuple[float, ...]

    @property
    def end(self) -> int:
        """The cell after its last."""
        return self.at + len(self.bounds) + 2


# The cells of a row. Every process runs the same code, and so agrees on them.
PID, STATE, QUEUE_DEPTH, UNDER_WAY, CPU_SECONDS, BYTES_IN, REQUESTS = range(7)
_REJECTED = REQUESTS + len(PATHS) * len(STATUSES)
DECODE = Histogram(_REJECTED + len(REASONS), SECONDS)
QUEUE = Histogram(DECODE.end, SECONDS)
INFER = Histogram(QUEUE.end, SECONDS)
STAGES = {"decode": DECODE, "queue": QUEUE, "infer": INFER}
_TOTAL = [Histogram(INFER.end + number * (len(SECONDS) + 2), SECONDS) for number in range(len(OUTCOMES))]
TOTAL = dict(zip(OUTCOMES, _TOTAL, strict=True))
BATCH = Histogram(_TOTAL[-1].end, IMAGES)
_DEATHS = BATCH.end
CELLS = _DEATHS + len(CAUSES)


def request_cell(path: str, status: int) -> int:
    """Where requests for `path` that were answered with `status` are counted."""
    return REQUESTS + PATHS.index(path) * len(STATUSES) + STATUSES.index(status)


def rejected_cell(reason: str) -> int:
    """Where invocations, and connections, that ended with the error code `reason` are counted."""
    return _REJECTED + REASONS.index(reason)


def death_cell(cause: str) -> int:
    """Where workers that died of `cause` are counted, in the supervisor's row."""
    return _DEATHS + CAUSES.index(cause)


class Page:
    """The rows, float64 `[count + 1, CELLS]`, in memory that processes share through `fd`, or in this one's own."""

    def __init__(self, count: int = 1, fd: int = -1) -> None:
        """`fd`: a file of at least `size(count)` bytes, all zero at first; -1 for memory of this process alone."""
        self.count = count
        self.cells: memoryview[float] = memoryview(mmap.mmap(fd, self.size(count))).cast("d")

    @staticmethod
    def size(count: int) -> int:
        """Bytes for `count` workers and their supervisor."""
        return (count + 1) * CELLS * 8

    def value(self, cell: int) -> float:
        """Of all rows together."""
        return sum(self.cells[row * CELLS + cell] for row in range(self.count + 1))

    def died(self, index: int, cause: str) -> None:
        """Worker `index` died of `cause`; what it was at is over, what it counted stays. For the supervisor."""
        self.cells[self.count * CELLS + death_cell(cause)] += 1
        for cell in (PID, STATE, QUEUE_DEPTH, UNDER_WAY):
            self.cells[index * CELLS + cell] = 0

    def answered_for_another(self, code: str) -> None:
        """A client was told, with 503, why its request has no answer. For the supervisor."""
        for cell in (request_cell(OTHER, 503), rejected_cell(code)):
            self.cells[self.count * CELLS + cell] += 1


@dataclass(frozen=True)
class Gauges:
    """What the service is at, asked when it is to be shown."""

    state: Callable[[], str]
    queue_depth: Callable[[], int]
    under_way: Callable[[], int]
    model: Callable[[], tuple[str, str, str] | None]
    """Name and version of the model, and the engine; None while there is none."""


class Metrics:
    """Counts what this process does in its row of the page."""

    def __init__(self, page: Page | None = None, index: int = 0) -> None:
        """`index`: which worker this process is; without a page, it is the only one."""
        self.page = page or Page()
        self.gauges: Gauges | None = None
        self._row = index * CELLS
        self._cpu_before_s = self.page.cells[self._row + CPU_SECONDS]  # of those that had this number before
        # On the hot path one dictionary takes the place of the searches above.
        self._requests = {
            (path, status): self._row + request_cell(path, status) for path in PATHS for status in STATUSES
        }
        self._reasons = {reason: self._row + rejected_cell(reason) for reason in REASONS}
        self._totals = {status: self._row + TOTAL[_outcome(status)].at for status in STATUSES}
        self._decode, self._queue, self._infer = (self._row + stage.at for stage in STAGES.values())

    def record(self, request: "RequestRecord") -> None:
        """Count a request that is over; on the event loop."""
        cells, status = self.page.cells, request.status
        try:
            cells[self._requests[request.path, status]] += 1
        except KeyError:
            path = request.path if request.path in PATHS else OTHER
            status = status if status in STATUSES else 0
            cells[self._requests[path, status]] += 1
        if request.path != INVOCATIONS:
            if not request.path:  # no request at all, but a connection that was refused
                cells[self._reasons.get(request.code) or self._reasons[OTHER]] += 1
            return
        cells[self._row + BYTES_IN] += request.bytes_in
        if status != 200:
            cells[self._reasons.get(request.code) or self._reasons[OTHER]] += 1
        _observe(cells, self._totals[status], request.total_ms)
        if request.decode_ms is not None:
            _observe(cells, self._decode, request.decode_ms)
        if request.infer_ms is not None:
            _observe(cells, self._infer, request.infer_ms)
        if request.queue_ms is not None:
            _observe(cells, self._queue, request.queue_ms)
        if request.batch_size is not None:
            at = self._row + BATCH.at
            cells[at + bisect_left(IMAGES, request.batch_size)] += 1
            cells[at + len(IMAGES) + 1] += request.batch_size

    @contextmanager
    def watching(self, gauges: Gauges) -> Iterator[None]:
        """Write `gauges` down every second, on the running event loop, for the worker that is asked for them."""
        import asyncio  # here, because a supervisor begins without

        self.gauges = gauges
        loop = asyncio.get_running_loop()
        self.page.cells[self._row + PID] = os.getpid()

        async def beat() -> None:
            while True:
                self.write_gauges()
                await asyncio.sleep(BEAT_S)

        beating = loop.create_task(beat(), name="gauges")
        try:
            yield
        finally:
            beating.cancel()
            self.write_gauges()

    def write_gauges(self) -> None:
        """Bring this process's own row up to date."""
        if self.gauges is None:
            return
        cells, row = self.page.cells, self._row
        state = self.gauges.state()
        cells[row + STATE] = 1 + STATES.index(state) if state in STATES else 0
        cells[row + QUEUE_DEPTH] = self.gauges.queue_depth()
        cells[row + UNDER_WAY] = self.gauges.under_way()
        cells[row + CPU_SECONDS] = self._cpu_before_s + time.process_time()


def _observe(cells: "memoryview[float]", at: int, duration_ms: float) -> None:
    duration_s = duration_ms / 1000
    cells[at + bisect_left(SECONDS, duration_s)] += 1
    cells[at + len(SECONDS) + 1] += duration_s


def _outcome(status: int) -> str:
    if status == 0:  # nobody was there any more to be answered
        return "gone"
    return "answered" if status < 400 else "refused" if status < 500 else "failed"
