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
    if not root.is_dir():
        raise DataError(f"--data {root}: there is no such folder.")
    if root.name == CIFAR100:
        root = root.parent
    if (root / CIFAR100).is_dir():
        if validation_root is not None:
            raise DataError(f"--validation {validation_root}: {CIFAR100} brings its own; leave it out.")
        from training.data import cifar100  # torchvision, which takes seconds and which folders do without

        return cifar100.read(root)
    if (root / SAMPLE / CIFAR100).is_dir():
        raise DataError(f"--data {root} holds the generated sample; say --data {root / SAMPLE}.")
    if validation_root is not None and not folder.has_classes(validation_root):
        raise DataError(f"--validation {validation_root} holds no class folders.")
    if folder.has_classes(root):
        return folder.read(root, validation_fraction, seed, broken_files, validation_root)
    images = sum(1 for entry in root.iterdir() if entry.suffix.lower() in MEDIA_TYPES)
    if images:
        raise DataError(
            f"--data {root} holds {images} images directly; give the folder above it, which holds one folder per class."
        )
    from training.data import cifar100

    raise DataError(
        f"--data {root} holds neither {CIFAR100}/ nor one folder of images per class. For CIFAR-100: "
        f"python -m training.data.cifar100 --output {root}; without network: {cifar100.by_hand(root)}"
    )
