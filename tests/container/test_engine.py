"""How the commands of `container` end: a sentence and a status, by whatever signal, and handlers as they were."""

import os
import signal
from collections.abc import Iterator

import pytest

from container.engine import ENDING, exit_status


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Whoever runs the tests in the background of a shell, or under nohup, has some of the signals ignored."""
    before = {each: signal.getsignal(each) for each in ENDING}
    for each in ENDING:
        signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_a_command_once_and_its_cleanup_is_left_alone(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    before = [signal.getsignal(each) for each in ENDING]
    cleaned = []

    def command() -> int:
        try:
            os.kill(os.getpid(), number)
            return 0
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(number)

    assert exit_status(command, "; it is removed") == 128 + number
    assert cleaned == [number]
    assert caplog.messages == [f"ended by {number.name}; it is removed"]
    assert [signal.getsignal(each) for each in ENDING] == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def command() -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    assert exit_status(command) == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
