"""Files of a run before this one, in a folder that both use: they must not be taken for this one's."""

import logging
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove the files that are there; one that cannot be removed costs a warning."""
    for name in names:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as exc:
            log.warning("%s is of a run before this one, and cannot be removed: %s", folder / name, exc.strerror)
