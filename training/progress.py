"""Progress for people: a bar in a terminal, a plain line now and then elsewhere (logs, CloudWatch)."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

T = TypeVar("T")

LINE_EVERY_S = 10.0
"""How often a plain line is written."""


def in_terminal() -> bool:
    """Whether someone looks at a terminal that can draw a bar."""
    return sys.stderr.isatty()


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Pass `items` on, showing how many of `total` went by."""
    if in_terminal():
        with logging_redirect_tqdm():
            yield from tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True)
        return
    last_s = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last_s >= LINE_EVERY_S:
            last_s = time.monotonic()
            log.info("%s: %d of %d", what, count, total)
