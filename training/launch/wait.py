"""Waiting for AWS: progress and the log's new lines while something runs. Ctrl-C ends the waiting, not the thing."""

import logging
import time
from collections.abc import Callable
from typing import Any

from training.launch.errors import THROTTLED, AwsError
from training.launch.logs import LogTail

log = logging.getLogger("training")

POLL_S = 10.0
"""How often AWS is asked by default."""
SHOW_EVERY_S = 60.0
"""How often a state that does not change is said again."""


class StoppedWaiting(KeyboardInterrupt):
    """Someone pressed Ctrl-C while AWS was at work; the message says what goes on there and how to come back."""


def wait(
    describe: Callable[[], dict[str, Any]],
    state: Callable[[dict[str, Any]], str],
    is_over: Callable[[dict[str, Any]], bool],
    what: str,
    tail: LogTail | None = None,
    poll_s: float = POLL_S,
) -> dict[str, Any]:
    """Ask until `is_over`; returns the last description. `state`: a few words about where it stands.

    Raises: AwsError; StoppedWaiting.
    """
    shown, shown_s, start_s = "", 0.0, time.monotonic()
    try:
        while True:
            try:
                described = describe()
            except AwsError as exc:
                if exc.code not in THROTTLED:
                    raise
                time.sleep(poll_s)  # others ask too; what runs goes on meanwhile
                continue
            now_s = time.monotonic()
            if state(described) != shown or now_s - shown_s > SHOW_EVERY_S:
                shown, shown_s = state(described), now_s
                log.info("%s: %s (%s)", what, shown, duration(now_s - start_s))
            for line in tail.new_lines() if tail else ():
                log.info("  | %s", line)
            if is_over(described):
                return described
            time.sleep(poll_s)
    except KeyboardInterrupt as exc:
        raise StoppedWaiting(
            f"Stopped waiting. {what} goes on at AWS, and costs what it costs; the same command waits for it again, "
            "`python -m training.launch delete` ends it."
        ) from exc


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
