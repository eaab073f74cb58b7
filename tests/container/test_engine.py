"""How the commands of `container` end: a sentence and a status, by whatever signal, and handlers as they were."""

import os
import signal

import pytest

from container.engine import ENDING, exit_status


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


def test_a_signal_that_is_ignored_stays_so(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))

    def command() -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    assert exit_status(command) == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
