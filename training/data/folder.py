"""A user's own images: a folder of class folders.

    DIR/<class>/<image>                                      split by seed, class by class
    DIR/train/<class>/<image>  DIR/validation/<class>/<image>    split as given ("val", "valid" and "test" will do)

Every file is decoded once before training starts, so that a broken one is found now and not after an hour.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from service.model.errors import ImageError
from service.model.images import MEDIA_TYPES, allowed_formats, decode
from training.data.dataset import Dataset, FileImages
from training.errors import DataError
from training.progress import progress

log = logging.getLogger(__name__)

BrokenFiles = Literal["refuse", "skip"]
VALIDATION_NAMES = ("validation", "val", "valid", "test")
MAX_FILE_BYTES = 2**29
"""Of an image file: more than photographs have. A bitmap of as many pixels as are read has 360 MB, of 32 bits each."""
LISTED = 1000
"""How many broken files a message names at most."""

ByClass = dict[str, list[Path]]


def read(
    root: Path, validation_fraction: float, seed: int, broken_files: BrokenFiles, validation_root: Path | None = None
) -> Dataset:
    """Read the class folders below `root`.

    Args:
        validation_fraction: share of each class's images to validate on, where no split is given.
        broken_files: "refuse" ends with the list of broken files, "skip" lists them and goes on without.
        validation_root: class folders to validate on, in place of those in `root` or a split.

    Raises: DataError.
    """
    train_root, given = _layout(root)
    validation_root = validation_root or given
    facts: dict[str, object] = {"folder": root.resolve().name, "broken_files": broken_files}
    if validation_root is not None:
        train, validation = (_decodable(_scan(folder), broken_files) for folder in (train_root, validation_root))
        facts |= {"split": f"given: {train_root.name} and {validation_root.name}"}
    else:
        train, validation = _split(_decodable(_scan(train_root), broken_files), validation_fraction, seed)
        facts |= {"split": "by seed", "validation_fraction": validation_fraction, "seed": seed}
    classes = tuple(sorted(train))
    if len(classes) < 2:
        raise DataError(f"{root} has {len(classes)} class, at least 2 are needed: one folder of images per class.")
    unknown = sorted(set(validation) - set(classes))
    if unknown:
        raise DataError(f"{', '.join(unknown)}: classes to validate on that have no images to train on.")
    return Dataset(root.resolve().name, classes, _labelled(train, classes), _labelled(validation, classes), facts)


def images_below(root: Path) -> list[Path]:
    """The image files, by their names, in the class folders that `read` looks into. Raises: DataError."""
    train_root, given = _layout(root)
    folders = [*_visible_folders(train_root), *(_visible_folders(given) if given else ())]
    return [path for folder in folders for path in _files(folder)[0]]


def has_classes(root: Path) -> bool:
    """Whether `root` looks like a folder of class folders."""
    return root.is_dir() and bool(_visible_folders(root))


def _layout(root: Path) -> tuple[Path, Path | None]:
    """The folders of classes to train and to validate on.

    `train` is a part of the data, not a class, when it holds folders and nothing but such parts lies beside it.

    Raises: DataError when there is a part to validate on too, but other folders lie beside them.
    """
    names = [folder.name for folder in _visible_folders(root)]
    if "train" not in names or not has_classes(root / "train"):
        return root, None
    others = sorted(set(names) - {"train", *VALIDATION_NAMES})
    if others and any(has_classes(root / name) for name in VALIDATION_NAMES):
        raise DataError(
            f"{root} holds train/ and a part to validate on, both with folders in them, and beside them "
            f"{', '.join(others)}: move these away, or give --data {root / 'train'} and --validation."
        )
    if others:
        return root, None
    return root / "train", next((root / name for name in VALIDATION_NAMES if name in names), None)


def _scan(root: Path) -> ByClass:
    """The image files of each class folder; refuses a class without any."""
    found: ByClass = {}
    others = 0
    for folder in _visible_folders(root):
        if not folder.name.isprintable():
            raise DataError(f"{str(folder)!r}: the name of a class must be printable text; rename the folder.")
        found[folder.name], left_out = _files(folder)
        others += left_out
        if left_out:
            log.warning("%s: %d files are not %s by their name and are left out", folder, left_out, allowed_formats())
    if not found:
        raise DataError(f"{root} has no class folders: put the images of each class into a folder of its name.")
    _refuse_empty(found)
    _warn_of_another_level(root, [path for files in found.values() for path in files], others)
    return found


def _files(folder: Path) -> tuple[list[Path], int]:
    """The image files below a class folder, and how many others lie there; hidden ones are not looked at."""
    visible = (p for p in folder.rglob("*") if not any(n.startswith(".") for n in p.relative_to(folder).parts))
    files = sorted(path for path in visible if path.is_file())
    images = [path for path in files if path.suffix.lower() in MEDIA_TYPES]
    return images, len(files) - len(images)


def _warn_of_another_level(root: Path, images: list[Path], others: int) -> None:
    """Say so where `root` looks like the folder above the data, or like no data at all."""
    inner = [path.relative_to(root).parts[:2] for path in images if len(path.relative_to(root).parts) > 2]
    if 2 * len(inner) > len(images):
        log.warning(
            "%s: %d of the %d images lie in folders within the class folders (%s), and count as of the outer one's "
            "class; if the inner folders are the classes, name the folder that holds them, such as %s",
            root, len(inner), len(images), ", ".join("/".join(parts) for parts in sorted(set(inner))[:3]),
            root / min(inner)[0],
        )  # fmt: skip
    if others > len(images):
        log.warning(
            "%s: %d of its %d files are no images; is it the folder that holds one folder of images per class?",
            root, others, others + len(images),
        )  # fmt: skip


def _decodable(images: ByClass, broken_files: BrokenFiles) -> ByClass:
    """Without the files that cannot be decoded, or DataError naming them."""
    paths = [path for files in images.values() for path in files]
    with ThreadPoolExecutor() as threads:
        problems = list(progress(threads.map(_problem, paths), "checking the images", total=len(paths)))
    broken = {path: problem for path, problem in zip(paths, problems, strict=True) if problem}
    if not broken:
        return images
    listed = "\n".join(f"  {_shown(path)}: {problem}" for path, problem in list(broken.items())[:LISTED])
    more = f"\n  and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
    if broken_files == "refuse":
        raise DataError(
            f"{len(broken)} of {len(paths)} files cannot be decoded; mend or remove them, "
            f"or go on without them with --broken-files skip:\n{listed}{more}"
        )
    log.warning("%d of %d files cannot be decoded and are skipped:\n%s%s", len(broken), len(paths), listed, more)
    rest = {name: [path for path in files if path not in broken] for name, files in images.items()}
    _refuse_empty(rest)
    return rest


def _shown(path: Path) -> str:
    """As it is where it can be printed: a name with a line break must not look like a line of the log."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _problem(path: Path) -> str | None:
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            return f"has {size:,} bytes, at most {MAX_FILE_BYTES:,} are read"
        decode(path.read_bytes())
    except ImageError as exc:
        return str(exc).partition("; send ")[0]  # which is said to clients of the service
    except OSError as exc:
        return f"cannot be read: {exc.strerror}"
    return None


def _split(images: ByClass, fraction: float, seed: int) -> tuple[ByClass, ByClass]:
    """Class by class, at least one image on either side."""
    rng = np.random.default_rng(seed)
    train: ByClass = {}
    validation: ByClass = {}
    for name in sorted(images):
        files = images[name]
        if len(files) < 2:
            raise DataError(f"Class {name} has 1 image; 2 are needed, one to train and one to validate on.")
        shuffled = [files[i] for i in rng.permutation(len(files))]
        count = min(len(files) - 1, max(1, round(fraction * len(files))))
        validation[name], train[name] = sorted(shuffled[:count]), sorted(shuffled[count:])
    return train, validation


def _labelled(images: ByClass, classes: tuple[str, ...]) -> FileImages:
    paths = [path for name in classes for path in images.get(name, [])]
    labels = [label for label, name in enumerate(classes) for _ in images.get(name, [])]
    return FileImages(tuple(paths), np.asarray(labels, np.int64))


def _refuse_empty(images: ByClass) -> None:
    empty = sorted(name for name, files in images.items() if not files)
    if empty:
        raise DataError(f"No {allowed_formats()} image in class {', '.join(empty)}: add some or remove the folder.")


def _visible_folders(root: Path) -> list[Path]:
    try:
        return [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as exc:
        raise DataError(f"{root} cannot be read: {exc.strerror}.") from exc
