"""Waiting for AWS: progress and the log's new lines while something runs. Ctrl-C ends the waiting, not the thing."""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from training.launch.errors import THROTTLED, AwsError

log = logging.getLogger("training")

POLL_S = 10.0
"""How often AWS is asked by default."""
SHOW_EVERY_S = 60.0
"""How often a state that does not change is said again."""


class StoppedWaiting(KeyboardInterrupt):
    """Someone pressed Ctrl-C while AWS was at work; the message says what goes on there and how to come back."""

    def __init__(self, *said: object, ends: str = "") -> None:
        """`ends`: the command, after `python -m training.launch`, that ends what goes on."""
        super().__init__(*said)
        self.ends = ends


class Tail(Protocol):
    """A log that is followed."""

    def new_lines(self) -> list[str]:
        """What came since the last call."""
        ...


def wait(
    describe: Callable[[], dict[str, Any]],
    state: Callable[[dict[str, Any]], str],
    is_over: Callable[[dict[str, Any]], bool],
    what: str,
    tail: Tail | None = None,
    poll_s: float = POLL_S,
    ends: str = "delete",
) -> dict[str, Any]:
    """Ask until `is_over`; returns the last description. `state`: a few words about where it stands. `tail`: the log to
    show, but of something that was over before anyone waited. `ends`: see StoppedWaiting.

    Raises: AwsError; StoppedWaiting.
    """
    shown, shown_s, start_s, waited = "", 0.0, time.monotonic(), False
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
            over = is_over(described)
            for line in tail.new_lines() if tail and (waited or not over) else ():
                log.info("  | %s", line)
            if over:
                return described
            waited = True
            time.sleep(poll_s)
    except KeyboardInterrupt as exc:
        raise StoppedWaiting(
            f"Stopped waiting. {what} goes on at AWS, and costs what it costs; the same command waits for it again.",
            ends=ends,
        ) from exc


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def age(moment: datetime) -> str:
    """`12 min ago`, of a time that AWS tells."""
    past_s = max(0, int((datetime.now(UTC) - moment.astimezone()).total_seconds()))
    for unit, seconds in (("days", 86400), ("h", 3600), ("min", 60)):
        if past_s >= 2 * seconds:
            return f"{past_s // seconds} {unit} ago"
    return f"{past_s} s ago"


def moment_of(moment: datetime) -> str:
    """`2026-11-23 04:10 UTC`."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
