"""Services that wait or fail while a file tells them to: behind the contract of the artifact's engine, or before."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOADS, FAILS = "loads", "fails"
"""Names of files: while it is there, the engine is not there yet, or fails on every batch."""


def staged(folder: Path) -> str:
    """A program for `start_server`: the service, with another way to make an engine."""
    return f"from tests.service.staged import main; raise SystemExit(main({str(folder)!r}))"


def importing_after(gate: Path) -> str:
    """A program for `start_server`: the service, whose libraries are found once the file `gate` is there."""
    return (
        "import os, sys, time, service.__main__ as m\n"
        "class Slow:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        while name == 'fastapi' and not os.path.exists({str(gate)!r}): time.sleep(0.05)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "raise SystemExit(m.main())"
    )


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


def main(folder: str) -> int:
    """What the program runs."""
    from service.__main__ import main as run_service
    from service.engines import choose

    create = choose.create

    def create_staged(*given: Any) -> Any:
        while (Path(folder) / LOADS).exists():
            time.sleep(0.01)
        return Staged(create(*given), Path(folder))

    choose.create = create_staged
    return run_service()
