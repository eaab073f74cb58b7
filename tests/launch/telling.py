"""Commands in this process: what they tell, and something that happens the moment they say a thing."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from training.launch.__main__ import main

DENIED = {"code": "AccessDeniedException", "message": "no", "times": 1}
EXPIRED = {
    "code": "ExpiredTokenException", "message": "The security token included in the request is expired", "times": 1
}  # fmt: skip


def told(caplog: pytest.LogCaptureFixture, *arguments: object, status: int = 0) -> str:
    """What `python -m training.launch ...` tells; it must end with `status`, and asks AWS often."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "training"):
        ended = main([*map(str, arguments), "--poll-seconds", "0.1"])
    assert ended == status, caplog.text
    return "\n".join(record.getMessage() for record in caplog.records)


def shown(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0
) -> str:
    """What a command writes to stdout."""
    capsys.readouterr()
    told(caplog, *arguments, status=status)
    return capsys.readouterr().out


def problem(caplog: pytest.LogCaptureFixture, *arguments: object, status: int = 1) -> str:
    """The error that a command ends with: one, and nothing after it."""
    told(caplog, *arguments, status=status)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1 and errors[0] is caplog.records[-1], caplog.text
    return errors[0].getMessage()


@contextmanager
def when(said: str, do: Callable[[], object]) -> Iterator[None]:
    """`do` the moment a command says this, once, in the midst of its work. It must be said."""
    waiting = [do]

    class Listens(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if waiting and said in record.getMessage():
                waiting.pop()()

    handler, logger = Listens(logging.INFO), logging.getLogger("training")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert not waiting, f"nobody said {said!r}"


def ctrl_c() -> None:
    """As if someone pressed it, also where a shell started the tests in the background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def sigterm() -> None:
    """The system, or a scheduler, ends the command."""
    signal.raise_signal(signal.SIGTERM)
