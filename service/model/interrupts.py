"""Ctrl-C and SIGTERM while a command starts: it ends at once and without a word, with the status shells know it by.

A command imports for seconds before it can catch anything. Python would print where among the imports it was, and the
first process of a container would not hear SIGTERM at all: the kernel keeps from it what it has no handler for
(pid_namespaces(7)). The container's entry point holds SIGTERM back until here.
"""

import os
import signal
import sys
from types import FrameType


def end_on_signals() -> None:
    """For a package that is being imported: does nothing unless `python -m` is looking for a module in it.

    Nothing that would have to be closed has begun then. A command with something to save or to say catches the signal
    while it runs. A signal that is ignored stays so (`nohup`, `command &` in a script).
    """
    # "While the module file is being located" (https://docs.python.org/3/using/cmdline.html#cmdoption-m).
    if sys.argv[:1] != ["-m"]:
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, leave)
    if os.getpid() == 1:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def leave(number: int, frame: FrameType | None) -> None:
    """End this process as a signal that nobody catches would; process 1 of a container hears it too."""
    os._exit(128 + number)
