"""Ctrl-C while a command starts: it ends at once and without a word, with the status that shells know it by.

A command imports for seconds before it can catch anything, and Python would print where among the imports it was.
"""

import os
import signal
import sys
from types import FrameType


def quit_on_ctrl_c() -> None:
    """For a package that is being imported: does nothing unless `python -m` is looking for a module in it.

    Nothing that would have to be closed has begun then. A command with something to save or to say catches the signal
    while it runs. A signal that is ignored stays so (`nohup`, `command &` in a script).
    """
    # "While the module file is being located" (https://docs.python.org/3/using/cmdline.html#cmdoption-m).
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def leave(number: int, frame: FrameType | None) -> None:
    """End this process as a signal that nobody catches would; process 1 of a container hears it too."""
    os._exit(128 + number)
