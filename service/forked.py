"""A process that is a copy of this one (fork(2)): what was imported here need not be imported there.

Workers are such copies of the supervisor: a Python of its own would import for 0.9 s of a core in each, and share no
memory with the others.
"""

import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from service.model.interrupts import leave

log = logging.getLogger("service")

STOPPING = (signal.SIGTERM, signal.SIGINT)

DESCRIPTORS = Path("/dev/fd")
"""A name for each descriptor that is open (proc(5))."""

MOST_DESCRIPTORS = 2**20
"""So many are tried one by one where they cannot be listed."""


class Forked:
    """Runs `main` in a copy of this process, which ends with what that returns. Asked as a `subprocess.Popen` is."""

    def __init__(self, main: Callable[[], int], files: Collection[int] = (), name: str | None = None) -> None:
        """Start it.

        The copy has a session of its own, no terminal's Ctrl-C, none of our handlers of SIGTERM and SIGINT, and of the
        threads only this one: none of the others may hold a lock then that it would wait for.

        Args:
            main: returns the exit status.
            files: descriptors that it keeps, beside 0, 1 and 2.
            name: of the process, as `ps -o comm` shows it; the kernel keeps 15 bytes.

        Raises: OSError, where no process or memory is left (fork(2)).
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # our handler would run in the copy

        def begin() -> int:
            _become_another(mask, files, name)
            return main()

        try:
            self.pid = os.fork()
            if self.pid == 0:
                run_and_exit(begin)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """How it ended: its exit status, or the negative number of the signal; None while it runs."""
        if self.returncode is None:
            self._reap(os.WNOHANG)
        return self.returncode

    def wait(self) -> int:
        """Wait for its end; see `poll`."""
        while self.returncode is None:
            self._reap(0)
        return self.returncode

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self._send(signal.SIGKILL)

    def _reap(self, options: int) -> None:
        pid, status = os.waitpid(self.pid, options)
        if pid == self.pid:
            self.returncode = os.waitstatus_to_exitcode(status)

    def _send(self, number: signal.Signals) -> None:
        if self.returncode is None:  # until it is waited for, its id is no other process's
            with suppress(ProcessLookupError):  # it was, before the signal came that had this called
                os.kill(self.pid, number)


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Run `main`, then end this process with the status it returns, 1 on an error, which is logged.

    At once: a thread that is still in the engine must not hold it, nor anything be closed that is another process's.
    """
    status = 1
    try:
        status = main()
    except SystemExit as exc:  # settings that are not allowed
        status = exc.code if isinstance(exc.code, int) else 1
    except Exception:
        log.exception("the process ends on an error of its own")
    finally:
        try:  # where the disk of the log is full, a copy of a process must end all the same, not go on as if it was it
            logging.shutdown()
            if sys.stdout is not None:  # it may have been closed when we were started
                sys.stdout.flush()
        finally:
            os._exit(status)


def _become_another(mask: Collection[int], files: Collection[int], name: str | None) -> None:
    """What `subprocess` does in a process that it starts, and what tells this one from its parent.

    Nothing here is closed by its object, which is the copied process's affair: its number may be another's by then.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, leave)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _close_all_but({0, 1, 2, *files})
    if name is not None and sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/comm").write_text(name)


def _close_all_but(kept: Collection[int]) -> None:
    try:
        others = {int(entry.name) for entry in DESCRIPTORS.iterdir()}.difference(kept)
    except OSError:  # no /proc is mounted, or no descriptor is left to read it with
        for before, after in itertools.pairwise([*sorted(kept), min(MOST_DESCRIPTORS, os.sysconf("SC_OPEN_MAX"))]):
            os.closerange(before + 1, after)
        return
    for descriptor in others:
        with suppress(OSError):  # the folder's own, closed by now
            os.close(descriptor)
