"""Tells the layouts of data folders apart and opens either."""

from pathlib import Path

from service.model.images import MEDIA_TYPES
from training.data import folder
from training.data.dataset import Dataset
from training.data.folder import BrokenFiles
from training.errors import DataError

CIFAR100 = "cifar-100-python"
"""The folder of CIFAR-100's files."""
SAMPLE = "sample"
"""The folder below the data folder where the starter keeps the generated sample."""


def open_dataset(
    root: Path,
    *,
    validation_fraction: float,
    seed: int,
    broken_files: BrokenFiles,
    validation_root: Path | None = None,
) -> Dataset:
    """The data set in `root`: CIFAR-100 (or that very folder), else class folders.

    The other arguments are for class folders, see `folder.read`.

    Raises: DataError.
    """
    require_layout(root, validation_root)
    above = root.parent if root.name == CIFAR100 else root
    if (above / CIFAR100).is_dir():
        from training.data import cifar100  # torchvision, which takes seconds and which folders do without

        return cifar100.read(above)
    return folder.read(root, validation_fraction, seed, broken_files, validation_root)


def require_layout(root: Path, validation_root: Path | None = None) -> None:
    """The folders look like data of a layout; no image is read. Raises: DataError."""
    if root.is_file():
        raise DataError(f"--data {root} is a file; give a folder that holds one folder of images per class.")
    if not root.is_dir():
        raise DataError(f"--data {root}: there is no such folder.")
    if validation_root is not None and not validation_root.exists():
        raise DataError(f"--validation {validation_root}: there is no such folder.")
    if root.name == CIFAR100:
        root = root.parent
    if (root / CIFAR100).is_dir():
        if validation_root is not None:
            raise DataError(f"--validation {validation_root}: {CIFAR100} brings its own; leave it out.")
        return
    if (root / SAMPLE / CIFAR100).is_dir():
        raise DataError(f"--data {root} holds the generated sample; say --data {root / SAMPLE}.")
    if validation_root is not None and not folder.has_classes(validation_root):
        raise DataError(f"--validation {validation_root} holds no class folders.")
    if folder.has_classes(root):
        return
    images = sum(1 for entry in root.iterdir() if entry.suffix.lower() in MEDIA_TYPES)
    if images:
        raise DataError(
            f"--data {root} holds {images} images directly; give the folder above it, which holds one folder per class."
        )
    from training.data import cifar100

    empty = "" if any(root.iterdir()) else "is empty: it "
    raise DataError(
        f"--data {root} {empty}holds neither {CIFAR100}/ nor one folder of images per class "
        f"({root / 'cat' / '001.jpg'}, ...). For CIFAR-100: "
        f"python -m training.data.cifar100 --output {root}; without network: {cifar100.by_hand(root)}"
    )
