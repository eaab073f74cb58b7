"""How much may be under way at once: requests, their bodies' bytes, and how long each may take.

What is over a bound is refused at once, so that those who were let in are answered in time and memory stays bounded.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from service.errors import DeadlineExceeded, NotReady, Overloaded

LEAST_PLACES = 32
"""However slow the answers: batches are to be full."""

SMALL_BODY_BYTES = 2**20
"""For bodies that say they have no more, a part of the memory is kept, which others, however slow, leave alone."""

WEIGHT = 0.1
"""Of the newest answer in the moving average of the rate."""


class Admission:
    """The bounds, and what is held of them. Used from the event loop alone."""

    def __init__(
        self,
        max_images: int,
        max_bytes: int,
        deadline_s: float,
        max_queue_s: float = math.inf,
        kept_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_images` predictions, and no more than are answered in `max_queue_s` at the rate seen of late;
        `max_bytes` of bodies, `kept_bytes` of them for small ones; `deadline_s` for each request.
        """
        self.under_way = 0
        """Predictions that hold a place, the further images of a request included."""
        self.bytes_held = 0
        self.bytes_peak = 0
        """The most that were held since somebody set it last."""
        self._max_images = max_images
        self._max_bytes = max_bytes
        self._kept_bytes = kept_bytes
        self._deadline_s = deadline_s
        self._max_queue_s = max_queue_s
        self._clock = clock
        self._seconds_each = 0.0
        self._stops_at_s: float | None = None
        self._deadlines: set[asyncio.Timeout] = set()

    def expect(self, seconds_each: float) -> None:
        """What lies between two answers, as far as it is known before there was any."""
        self._seconds_each = seconds_each

    @property
    def requests(self) -> int:
        """Requests that are being read or answered."""
        return len(self._deadlines)

    @property
    def allowed(self) -> int:
        """Predictions that may be under way now.

        In a queue of N that is answered one after the other, an answer takes N times the seconds between two answers
        (Little's law); these are taken from what the last answers took and from how many were under way with them.
        """
        if self._seconds_each * self._max_images <= self._max_queue_s:
            return self._max_images
        return min(self._max_images, max(LEAST_PLACES, int(self._max_queue_s / self._seconds_each)))

    def overload(self) -> str | None:
        """Why there is no place for one image more, None when there is one."""
        if self.under_way >= self._max_images:
            return f"{self.under_way} images are under way, as many as allowed; try again in a moment."
        if self.under_way >= self.allowed:
            return (
                f"{self.under_way} images are under way, and one more would wait for longer than "
                f"{self._max_queue_s:g} s; try again in a moment."
            )
        return None

    def require_room(self) -> None:
        """Raises: Overloaded, when a body need not be read because there is no place for it."""
        if (sentence := self.overload()) is not None:
            raise Overloaded(sentence)

    @contextmanager
    def place(self) -> Iterator["Places"]:
        """Hold one place for a prediction. Raises: Overloaded."""
        self.require_room()
        others, started_s = self.under_way, self._clock()
        places = Places(self, 1)
        self.under_way += 1
        try:
            yield places
        finally:
            self.under_way -= places.held
        together = others + places.images
        if together >= LEAST_PLACES // 2:  # of fewer, it is not known how many more would have been answered meanwhile
            self._seconds_each += WEIGHT * ((self._clock() - started_s) / together - self._seconds_each)

    @contextmanager
    def memory(self) -> Iterator["Memory"]:
        """Account for the bytes of one body."""
        memory = Memory(self)
        try:
            yield memory
        finally:
            self.bytes_held -= memory.held

    @asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """Cancel what is awaited inside when the request is not answered in time.

        Raises: DeadlineExceeded, or NotReady where the service stops before.
        """
        loop = asyncio.get_running_loop()
        at_s = loop.time() + self._deadline_s
        timeout = asyncio.timeout_at(at_s if self._stops_at_s is None else min(at_s, self._stops_at_s))
        try:
            async with timeout:
                self._deadlines.add(timeout)
                try:
                    yield
                finally:
                    self._deadlines.discard(timeout)
        except TimeoutError as exc:
            if self._stops_at_s is not None and self._stops_at_s < at_s:
                raise NotReady("The service stopped before it could answer; send the request again.") from exc
            raise DeadlineExceeded(
                f"The request was not answered within {self._deadline_s:g} s; try again, or send less."
            ) from exc

    async def all_done(self) -> None:
        """Wait until what is under way now is over; not for what comes meanwhile."""
        waited_for = self._deadlines.copy()
        while waited_for & self._deadlines:
            await asyncio.sleep(0.02)

    def stop_within(self, seconds: float) -> None:
        """Let no request, of those under way and those to come, take longer than until `seconds` from now."""
        self._stops_at_s = asyncio.get_running_loop().time() + seconds
        for timeout in self._deadlines:
            if not timeout.expired() and (when := timeout.when()) is not None:
                timeout.reschedule(min(when, self._stops_at_s))


class Places:
    """The places that one request holds."""

    def __init__(self, admission: Admission, held: int) -> None:
        self.held = held
        self.images = 1
        """Of the request; more than it has places take turns."""
        self._admission = admission

    def take_more(self, wanted: int) -> None:
        """Hold up to `wanted` more: they say how many of its images are under way at once. Some stay for others."""
        allowed = self._admission.allowed
        for_others = min(allowed, LEAST_PLACES) // 2
        more = max(0, min(wanted, allowed - for_others - self._admission.under_way))
        self._admission.under_way += more
        self.held += more


class Memory:
    """The bytes that one request holds."""

    def __init__(self, admission: Admission) -> None:
        self.held = 0
        self._admission = admission
        self._small = False

    def declare(self, size: int) -> None:
        """The body is to have `size` bytes, which nothing is held for yet. Raises: Overloaded."""
        self._small = size <= SMALL_BODY_BYTES
        self._require(size)

    def take(self, count: int) -> None:
        """Hold `count` bytes more. Raises: Overloaded."""
        self._require(count)
        self._admission.bytes_held += count
        self._admission.bytes_peak = max(self._admission.bytes_peak, self._admission.bytes_held)
        self.held += count

    def _require(self, count: int) -> None:
        admission = self._admission
        allowed = admission._max_bytes - (0 if self._small else admission._kept_bytes)
        if admission.bytes_held + count > allowed:
            raise Overloaded(
                f"The requests under way hold {admission.bytes_held:,} bytes, {allowed:,} are allowed; "
                "try again in a moment."
            )
