"""SIGTERM and SIGINT: a command is ended by an exception, the loop is asked to stop after the step it is in and saves.

SageMaker sends SIGTERM when it takes a spot instance back or a job is stopped, SIGKILL 120 s later
(https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_StopTrainingJob.html).
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from service.model.interrupts import leave

Handler = Callable[[int, FrameType | None], object] | signal.Handlers
HANGUP = (signal.SIGHUP,) if sys.platform != "win32" else ()


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

    Before and after, they end the process of a command at once, that of a container too (`service.model.interrupts`):
    there is nothing to save or to say.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    ours: dict[int, Handler] = dict.fromkeys((signal.SIGTERM, *more), _end)
    ours[signal.SIGINT] = signal.default_int_handler
    defaults = (leave, signal.SIG_DFL)
    before = {number: old for number in ours if (old := signal.getsignal(number)) in defaults}
    for number in before:
        signal.signal(number, ours[number])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


@contextmanager
def held_off() -> Iterator[None]:
    """What ends a command waits until the block is done: for a moment's work that must not be torn. An error in it goes
    first, and ends the command as well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    numbers = (signal.SIGINT, signal.SIGTERM, *HANGUP)
    before = {each: old for each in numbers if (old := signal.getsignal(each)) not in (signal.SIG_IGN, None)}
    came: list[int] = []
    try:
        for number in before:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


class Interruption:
    """Whether a signal has come."""

    signal_number: int | None = None


@contextmanager
def watched() -> Iterator[Interruption]:
    """Catch SIGTERM and SIGINT while the context lasts; a second one acts as if it were not caught.

    One that is ignored stays so (nohup, and what a script's shell starts in the background).
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # signals reach the main thread alone
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: old for number in numbers if (old := signal.getsignal(number)) != signal.SIG_IGN}

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
