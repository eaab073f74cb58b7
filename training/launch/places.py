"""Places on this machine that flags name: what lies there, and whether a result can be put there.

Asked before anything costs: the hours of a job are paid when its model comes home.
"""

import os
import tarfile
import zlib
from pathlib import Path
from typing import Literal, get_args

from service.model.manifest import Role
from training.errors import ConfigError

ARTIFACT = ("manifest", ".", *(f"{role}." for role in get_args(Role)))
"""What the names in an artifact's folder begin with."""
OURS = tuple(f"{dot}{name}." for dot in ("", ".") for name in ("manifest", *get_args(Role)))
"""What the names of its own files begin with, and of those that are being written."""
RUN = ("metrics.jsonl", "settings.json")
"""What a run's folder has."""


def kind_at(place: Path) -> Literal["folder", "file"] | None:
    """What lies there; None: nothing. Raises: ConfigError where that cannot be told."""
    try:
        return "folder" if place.is_dir() else "file" if place.is_file() else None
    except OSError as exc:  # a name longer than any may be, a folder that may not be entered
        raise ConfigError(f"{place}: {exc.strerror}; give another place.") from exc


def require_output(output: Path) -> None:
    """Where a job's model is to go: OUTPUT and OUTPUT.tar.gz. Raises: ConfigError where it cannot."""
    if output.name in ("", ".."):
        raise ConfigError(f"--output {output}: give a folder with a name of its own, such as artifacts/sagemaker.")
    require_replaceable(output)
    real = resolved(output)
    if os.path.ismount(real):
        raise ConfigError(
            f"--output {output} is where a disk is mounted, in whose place nothing can be put; give a folder in it, "
            f"such as {output / 'model'}."
        )
    archive = real.with_name(f"{real.name}.tar.gz")
    if kind_at(archive) and not _is_model(archive):
        raise ConfigError(
            f"--output {output}: {archive}, where its archive goes, is another file; name another folder."
        )
    require_writable(real)


def resolved(output: Path) -> Path:
    """Where a link leads, which stays one: the model and all that lies beside it go there."""
    return Path(os.path.realpath(output)) if output.is_symlink() else output


def require_replaceable(folder: Path, of_run: bool = False) -> None:
    """Nothing is there, or an artifact; `of_run`: what a run left. Raises: ConfigError."""
    kind = kind_at(folder)
    if kind is None and not folder.is_symlink():
        return
    if kind != "folder":
        raise ConfigError(f"--output {folder} is no folder; name another one.")
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as exc:
        raise ConfigError(f"--output {folder} cannot be read: {exc.strerror}.") from exc
    others = [name for name in names if of_run or not name.startswith(ARTIFACT)]
    if others and not (of_run and set(RUN) & set(names)):
        raise ConfigError(
            f"--output {folder} holds other things ({', '.join(others[:3])}); name a folder of its own, which may be "
            "new, empty, or such a one to be replaced."
        )


def require_writable(output: Path) -> None:
    """A file or folder can be made there. Raises: ConfigError."""
    above = output.absolute().parent
    while kind_at(above) is None and above != above.parent:
        above = above.parent
    if kind_at(above) != "folder":
        raise ConfigError(f"--output {output} cannot be written: {above} is no folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {output} cannot be written: nothing may be put into {above}.")


def _is_model(archive: Path) -> bool:
    try:
        with tarfile.open(archive) as tar:
            return any(Path(member.name).name == "manifest.json" for member in tar)
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        return False
