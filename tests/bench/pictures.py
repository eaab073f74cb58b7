"""Real pictures for benchmarks: the 50,000 training images of CIFAR-10 as JPEG files, where they are at hand."""

import random
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10-train-jpeg.tar.gz"


def unpacked(folder: Path) -> Path | None:
    """The folder of class folders, unpacked below `folder` once; None where the archive is not at hand."""
    train = folder / "cifar10" / "train"
    if not train.is_dir():
        if not ARCHIVE.is_file():
            return None
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(folder / "cifar10.part")  # our own archive
        (folder / "cifar10.part").rename(folder / "cifar10")
    return train


def selection(train: Path, folder: Path, classes: Sequence[str], per_class: int, skip: int = 0, seed: int = 0) -> Path:
    """Copies of `per_class` images of each of `classes`, from place `skip` on of the order that `seed` shuffles."""
    for name in classes:
        files = sorted((train / name).iterdir())
        random.Random(seed).shuffle(files)  # no secret
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in files[skip : skip + per_class]:
            shutil.copy(file, folder / name / file.name)
    return folder
