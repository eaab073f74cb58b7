"""Progress for people: a bar in a terminal, a plain line now and then elsewhere (logs, CloudWatch)."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from training.metric_lines import batch_line, remaining

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


class BatchLines:
    """Shows batch loss and batch accuracy, and the time left where it is told: in a bar, or in plain lines, every
    LINE_EVERY_S seconds and at the end.
    """

    def __init__(self, title: str, total: int, seen: float, quiet: bool) -> None:
        self._title, self._total, self._seen, self._quiet = title, total, int(seen), quiet
        self._last_s = time.monotonic()
        self._bar = tqdm(
            desc=title, total=total, initial=self._seen, unit="img", leave=False, dynamic_ncols=True,
            disable=quiet or not in_terminal(),
        )  # fmt: skip
        self._redirect = logging_redirect_tqdm()

    def __enter__(self) -> "BatchLines":
        self._redirect.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
        self._redirect.__exit__(None, None, None)

    def add(self, count: int, loss: float, accuracy: float) -> None:
        """Show a batch of `count` images more."""
        self.show(self._seen + count, loss, accuracy)

    def show(self, seen: float, loss: float, accuracy: float, left_s: float | None = None) -> None:
        """Show the last batch's figures; `seen` images are done, and the whole run takes about `left_s` more."""
        left = "" if left_s is None else f" {remaining(left_s)}"
        self._bar.update(int(seen) - self._seen)
        self._seen = int(seen)
        self._bar.set_postfix_str(f"batch_loss={loss:.4f} batch_accuracy={accuracy:.4f}{left}", refresh=False)
        due = time.monotonic() - self._last_s >= LINE_EVERY_S or self._seen == self._total
        if self._bar.disable and not self._quiet and due:
            self._last_s = time.monotonic()
            log.info("%s%s", batch_line(self._title, self._seen, self._total, loss, accuracy), left)
