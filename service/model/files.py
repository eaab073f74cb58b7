"""Files that are there whole or not at all."""

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write `path` so that a reader finds what was there before or all of `content` (fsync, then rename: rename(2))."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
