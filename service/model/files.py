"""A model's folder: where it is, and files in it that are there whole or not at all. Imports next to nothing."""

import os
from pathlib import Path

from service.model.errors import ArtifactError
from service.model.machine import SAGEMAKER_MODEL

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20


def find_home(folder: Path) -> Path:
    """Where the manifest lies: `folder`, or the one folder inside it that has one. Raises: ArtifactError."""
    try:
        return _home(folder)
    except OSError as exc:
        raise ArtifactError(f"{str(folder)[:200]} cannot be read: {exc.strerror}.") from exc


def _home(folder: Path) -> Path:
    if (folder / MANIFEST).is_file():
        return folder
    if not folder.is_dir():
        raise ArtifactError(
            f"There is no model at {folder}: name another folder, or train one as the README tells "
            f"(python -m training.train_model --output {folder} ...)."
        )
    inside = sorted(entry.name for entry in folder.iterdir())
    homes = [folder / name for name in inside if (folder / name / MANIFEST).is_file()]
    for home in homes:
        if home.is_symlink():  # the folder that was given may be one, what it holds may not
            raise ArtifactError(f"{str(home)!r} is a link; copy the folder itself.")
    if len(homes) == 1:
        return homes[0]
    if not inside:
        mount = f", or mount it there (docker run -v ...:{folder}:ro)" if folder == SAGEMAKER_MODEL else ""
        raise ArtifactError(f"The folder {folder} is empty; name the folder that training wrote{mount}.")
    found = ", ".join(name if name.isprintable() else ascii(name) for name in inside[:10])
    raise ArtifactError(
        f"There is no {MANIFEST} among what {folder} holds ({found}); name the folder that training wrote."
    )


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
