"""Standstills of the machine: virtual machines are paused for seconds or minutes while their clocks run on.

A pause in a measurement looks like a slow server, one in a wait like a timeout. `undisturbed` notices by a thread that
should wake 20 times a second, and measures again.
"""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

log = logging.getLogger("bench")

T = TypeVar("T")
TICK_S = 0.05
PAUSE_S = 1.0
"""A later wake-up than this is a pause; busy cores delay one by tenths of a second at most."""


class Disturbed(Exception):
    """Every try was interrupted by a standstill."""


class Watch:
    """`with Watch() as watch: ...` sums up in `watch.lost_s` how long the machine stood still."""

    def __init__(self) -> None:
        self.lost_s = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True, name="watch")

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _tick(self) -> None:
        last_s, ended = time.perf_counter(), False
        while not ended:
            ended = self._end.wait(TICK_S)
            now_s = time.perf_counter()
            if now_s - last_s > PAUSE_S:
                self.lost_s += now_s - last_s
            last_s = now_s


def undisturbed(what: Callable[[], T], tries: int = 4) -> T:
    """The result or exception of the first call of `what` in which the machine did not stand still.

    Raises: Disturbed after `tries` calls.
    """
    for _ in range(tries):
        error: Exception | None = None
        with Watch() as watch:
            try:
                result = what()
            except Exception as exc:  # handed on below, unless it is the pause's fault
                error = exc
        if not watch.lost_s:
            if error is not None:
                raise error
            return result
        log.warning("the machine stood still for %.1f s: measuring again", watch.lost_s)
    raise Disturbed(f"the machine stood still in each of {tries} tries")
