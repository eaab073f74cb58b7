"""Workers whose engine waits or fails while a file tells it to: the artifact's own engine, behind the contract."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOADS, FAILS = "loads", "fails"
"""Names of files: while it is there, the engine is not there yet, or fails on every batch."""


def staged(folder: Path) -> str:
    """A program for `start_server`: the supervisor, which starts its workers by a script in place of Python."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.service.staged {folder} "$@"\n')
    script.chmod(0o755)
    return f"import sys; sys.executable = {str(script)!r}; import service.__main__ as m; raise SystemExit(m.main())"


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """While this lasts, the engine does what the name says."""
    (folder / what).touch()
    try:
        yield
    finally:
        (folder / what).unlink()


class Staged:
    """The engine `inner`."""

    def __init__(self, inner: Any, folder: Path) -> None:
        self._inner = inner
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def infer(self, batch: Any) -> Any:
        if (self._folder / FAILS).exists():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self._inner.infer(batch)


def main(folder: Path, arguments: list[str]) -> int:
    """What a worker runs."""
    from service.__main__ import main as run_worker
    from service.engines import choose

    create = choose.create

    def create_staged(*given: Any) -> Any:
        while (folder / LOADS).exists():
            time.sleep(0.01)
        return Staged(create(*given), folder)

    choose.create = create_staged
    return run_worker(arguments)


if __name__ == "__main__":
    os._exit(main(Path(sys.argv[1]), sys.argv[4:]))  # without "-m service"
