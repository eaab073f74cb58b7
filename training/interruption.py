"""SIGTERM and SIGINT: a command is ended by an exception, the loop is asked to stop after the step it is in and saves.

SageMaker sends SIGTERM when it takes a spot instance back or a job is stopped, SIGKILL 120 s later
(https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_StopTrainingJob.html).
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from service.model.interrupts import leave

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


class Interrupted(Exception):
    """The run was asked to stop; a checkpoint is written. `signal_number` says by what."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Terminated(KeyboardInterrupt):
    """A signal that ends a command as Ctrl-C does."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


@contextmanager
def raised(*more: int) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, SIGTERM `Terminated` while the context lasts, where nobody else catches them;
    so do `more` signals. One that is ignored stays so (nohup).

    Process 1 of a container does not hear a SIGTERM that it has no handler for. Before and after, Ctrl-C ends the
    process of a command at once (`service.model.interrupts`): there is nothing to save or to say.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    ours: dict[int, tuple[Handler, Handler]] = {
        signal.SIGINT: (leave, signal.default_int_handler),
        **dict.fromkeys((signal.SIGTERM, *more), (signal.SIG_DFL, _end)),
    }
    before = {number: old for number, (old, _) in ours.items() if signal.getsignal(number) == old}
    for number in before:
        signal.signal(number, ours[number][1])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


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
