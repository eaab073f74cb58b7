"""Which processes work on a study, told by locks of the operating system on one file in its folder.

Byte 0 is held by whoever reads or changes the study, so that one process at a time does: two claim two trials, and
SQLite never finds its database locked. Byte n + 1 is held by the process that runs trial n. The system lets a lock go
however its process ends, kill -9 too: a trial whose byte is free has nobody who runs it. Nothing has to be waited for,
unlike with a heartbeat. What is in the file is the name of the study that it was made for.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import ConfigError


class StudyLock:
    """POSIX record locks (man 2 fcntl): of the process, not inherited by loader workers, free again when it ends.

    They hold between processes, not between threads or objects of one: a process opens a study once.
    """

    def __init__(self, path: Path) -> None:
        """Raises: ConfigError where the file system has no locks, or nothing can be written."""
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            with self.exclusive():
                pass
        except OSError as exc:
            raise ConfigError(
                f"--output {path.parent}: {path.name} cannot be locked ({exc.strerror}); give a folder on a local disk."
            ) from exc

    def name(self) -> str:
        """The name of the study that was noted last; empty where none was."""
        return os.pread(self._file, 100, 0).decode(errors="replace")

    def note(self, name: str) -> None:
        """Note the name of the study. Raises: OSError."""
        os.truncate(self._file, os.pwrite(self._file, name.encode(), 0))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the only process in this block; waits for the others."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, 0)

    def hold(self, trial: int) -> None:
        """Say that this process runs trial number `trial`."""
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, trial + 1)

    def release(self, trial: int) -> None:
        """Say that it does no longer."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, trial + 1)

    def is_held_elsewhere(self, trial: int) -> bool:
        """Whether another process runs the trial; to be asked about trials that this one does not run."""
        try:
            self.hold(trial)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes
            return True
        self.release(trial)
        return False

    def close(self) -> None:
        """Let everything go."""
        os.close(self._file)
