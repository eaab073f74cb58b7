"""SIGTERM and SIGINT: ask the loop to stop after the step it is in, so that it can save.

SageMaker sends SIGTERM when it takes a spot instance back or a job is stopped, SIGKILL 120 s later
(https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_StopTrainingJob.html).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop; a checkpoint is written. `signal_number` says by what."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Interruption:
    """Whether a signal has come."""

    signal_number: int | None = None


@contextmanager
def watched() -> Iterator[Interruption]:
    """Catch SIGTERM and SIGINT while the context lasts; a second one acts as if it were not caught."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # signals reach the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def notice(number: int, frame: FrameType | None) -> None:
        interruption.signal_number = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, notice)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
