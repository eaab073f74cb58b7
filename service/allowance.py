"""How long decoder processes may work for one image, or for all images of one request."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import Overloaded
from service.model.errors import ImageTooCostly

SLOWER_BY_THE_CLOCK = 1.5
"""An image may take so many times its processor time by the clock, on a machine that has other things to do."""

SEVERAL_SLOWER = 4.0
"""And the images of one request so many times theirs, which they have together."""

HARDLY_ANY = 0.2
"""Of its processor time: what had no more when its time by the clock was over is not to blame for that."""

LEAST_S = 0.02
"""Less is nothing: /proc counts processor time in steps of 0.01 s."""

NO_PLACE = "What decodes such images is busy with others; try again in a moment."


class Allowance:
    """What one image, or all of one request, may take of decoder processes."""

    def __init__(self, limit_s: float, several: bool) -> None:
        """`limit_s` of processor time; by the clock more, for other things run beside it."""
        self.several = several
        self._limit_s = limit_s
        self.processor_s = limit_s
        """What is left."""
        self.clock_s = (SEVERAL_SLOWER if several else SLOWER_BY_THE_CLOCK) * limit_s

    @contextmanager
    def spent(self, processor_s: Callable[[], float | None]) -> Iterator[None]:
        """Count what passes inside, of images that are decoded side by side each.

        `processor_s`: the processor time that the process has taken so far, None where that is not known.
        """
        started_s, before_s = time.monotonic(), processor_s()
        try:
            yield
        finally:
            took_s, after_s = time.monotonic() - started_s, processor_s()
            self.clock_s -= took_s
            self.processor_s -= took_s if before_s is None or after_s is None else after_s - before_s

    def is_spent(self) -> bool:
        """Whether nothing is left that an image could be decoded in."""
        return self.processor_s <= LEAST_S or self.clock_s <= 0

    def require_some(self) -> None:
        """Raises: ImageTooCostly where it is spent; Overloaded where others had the processor meanwhile."""
        if self.is_spent():
            raise self.exhausted()

    def exhausted(self) -> ImageTooCostly | Overloaded:
        """Why an image is not decoded to its end."""
        if self.processor_s > (1 - HARDLY_ANY) * self._limit_s:
            return Overloaded(NO_PLACE)
        if self.several:
            return ImageTooCostly(
                f"The images of this request take more than {self._limit_s:g} s to decode; send fewer at once, smaller "
                "ones, or baseline JPEGs."
            )
        return ImageTooCostly(
            f"The image takes more than {self._limit_s:g} s to decode; save it anew, smaller or as a baseline JPEG."
        )
