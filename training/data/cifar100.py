"""CIFAR-100 in its genuine Python format, downloaded and verified by torchvision.

The files are pickles (https://www.cs.toronto.edu/~kriz/cifar.html). They are read only when their checksums
are right, and then by an unpickler that can build arrays and nothing else.

    python -m training.data.cifar100 --output data
"""

import argparse
import hashlib
import json
import pickle
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from service.model.manifest import GENERATED_SAMPLE
from training.command_line import run_command
from training.data.dataset import ArrayImages, Dataset
from training.download import downloading
from training.errors import DataError

FOLDER = CIFAR100.base_folder  # "cifar-100-python"
FILES = ("train", "test", "meta")
SAMPLE_CHECKSUMS = "sample.json"
"""Written beside the files by `training.data.sample`: their sha256, as the official files have their md5."""

OFFICIAL_MD5 = dict([*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"])])
"""torchvision's checksums of the official files."""


def download(root: Path) -> None:
    """Download CIFAR-100 (161 MiB) into `root`, verified, with progress, unless it is there already.

    Raises: DataError saying what to fetch by hand and where to put it.
    """
    if all(check_integrity(root / FOLDER / name, md5) for name, md5 in OFFICIAL_MD5.items()):
        return
    with downloading("CIFAR-100", by_hand(root), DataError):
        download_and_extract_archive(CIFAR100.url, root, filename=CIFAR100.filename, md5=CIFAR100.tgz_md5)


def by_hand(root: Path) -> str:
    """How to get the files without this program's network."""
    return (
        f"Fetch {CIFAR100.url} (md5 {CIFAR100.tgz_md5}) on a machine that has network, "
        f"and unpack it so that {root / FOLDER / 'train'} exists."
    )


def read(root: Path) -> Dataset:
    """Read `root/cifar-100-python`: 100 classes, `train` to train on, `test` to validate on.

    Takes the official files or those of the generated sample; everything else is refused before it is unpickled.

    Raises: DataError.
    """
    folder = root / FOLDER
    contents = {name: _bytes(folder / name, root) for name in FILES}
    name = _verified(folder, contents)
    train, test, meta = (_unpickled(folder / file, contents[file]) for file in FILES)
    try:
        classes = tuple(str(label) for label in meta["fine_label_names"])
        dataset = Dataset(
            name, classes, _images(train), _images(test), {"folder": FOLDER, "split": "the files train and test"}
        )
        if len(set(classes)) != len(classes) or not all(name.isprintable() and name for name in classes):
            raise ValueError("names of classes are missing, repeated or not printable")
        labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
        if not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError("a label has no name")
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as exc:
        raise DataError(f"{folder} does not hold images and labels as CIFAR-100 has them ({exc}).") from exc
    return dataset


def _images(entry: dict[str, Any]) -> ArrayImages:
    planes = np.asarray(entry["data"], np.uint8).reshape(-1, 3, 32, 32)  # [N, 3, 32, 32]
    labels = np.asarray(entry["fine_labels"], np.int64)
    if labels.ndim != 1 or len(labels) != len(planes) or not len(labels):
        raise ValueError(f"{len(planes)} images have {len(labels)} labels")
    return ArrayImages(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels)


def _bytes(path: Path, root: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise DataError(f"{path} cannot be read ({exc.strerror}). {by_hand(root)}") from exc


def _verified(folder: Path, contents: dict[str, bytes]) -> str:
    """The name of the data set whose checksums the contents have."""
    md5 = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in contents.items()}
    if md5 == OFFICIAL_MD5:
        return "cifar-100"
    checksums = folder / SAMPLE_CHECKSUMS
    if checksums.is_file():
        try:
            stated = dict(json.loads(checksums.read_bytes())["sha256"])
        except (ValueError, KeyError, TypeError, OSError) as exc:
            raise DataError(f"{checksums} is damaged; delete {folder} and generate the sample again.") from exc
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != stated.get(name):
                raise DataError(f"{folder / name} is damaged; delete {folder} and generate the sample again.")
        return GENERATED_SAMPLE
    wrong = [str(folder / name) for name in FILES if md5[name] != OFFICIAL_MD5[name]]
    raise DataError(
        f"{', '.join(wrong)}: the md5 is not that of CIFAR-100, so the file is not read. {by_hand(folder.parent)}"
    )


_NDARRAY = object()
"""Stands for numpy.ndarray, which the files name but never call: called, it lays arrays over any memory."""


def _empty_array(kind: object, *_: object) -> npt.NDArray[Any]:
    """What numpy's `_reconstruct` gives; the pickle fills it."""
    if kind is not _NDARRAY:
        raise pickle.UnpicklingError("the file asks for an array of another kind")
    return np.empty(0, np.uint8)


def _number_type(name: str, *_: object) -> np.dtype[Any]:
    if np.dtype(name).kind not in "biuf":
        raise pickle.UnpicklingError(f"the file asks for arrays of {name}")
    return np.dtype(name)


_ARRAY_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _number_type,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,  # NumPy 1, which wrote the official files
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,  # NumPy 2
}


class _ArraysOnly(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and NumPy arrays; any other name in the pickle is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAY_NAMES:
            return _ARRAY_NAMES[module, name]
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}")


def _unpickled(path: Path, content: bytes) -> dict[str, Any]:
    try:
        entry = _ArraysOnly(BytesIO(content), encoding="latin1").load()
    except Exception as exc:  # a pickle can fail in any way; none of them is ours
        raise DataError(f"{path} cannot be read as CIFAR-100 has it: {exc}.") from exc
    if not isinstance(entry, dict):
        raise DataError(f"{path} cannot be read as CIFAR-100 has it: it holds a {type(entry).__name__}.")
    return entry


def main(arguments: Sequence[str] | None = None) -> int:
    """Download CIFAR-100; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.data.cifar100", description="Download CIFAR-100.")
    parser.add_argument("--output", type=Path, required=True, help=f"the folder to put {FOLDER}/ into")
    return run_command(parser, arguments, lambda options: download(options.output))


if __name__ == "__main__":
    sys.exit(main())
