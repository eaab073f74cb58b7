"""Data that is small and learnt within seconds: drawn shapes of five classes, as folders of PNG files.

`python -m tests.rehearsal.pictures DIR` writes DIR/data, to train on, and DIR/pictures, to classify.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from training.data import sample
from training.data.layouts import open_dataset

CLASSES = 5


def write(root: Path, train_per_class: int = 24, held_out_per_class: int = 4) -> tuple[Path, Path]:
    """Class folders to train on, and pictures in one folder to classify; returns both."""
    with TemporaryDirectory() as scratch:
        sample.write(Path(scratch), train_per_class=train_per_class, test_per_class=held_out_per_class)
        dataset = open_dataset(Path(scratch), validation_fraction=0.1, seed=0, broken_files="refuse")
        chosen = dataset.classes[:: len(dataset.classes) // CLASSES + 1]  # of other shapes, colours and patterns
        data, pictures = root / "data", root / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        for images, place in ((dataset.train, data), (dataset.validation, pictures)):
            for number in range(len(images)):
                name = dataset.classes[images.labels[number]]
                if name in chosen:
                    stem = name.replace(" ", "-")
                    folder = place / stem if images is dataset.train else place
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / f"{stem}-{number}.png").write_bytes(images.payload(number))
    return data, pictures


if __name__ == "__main__":
    print(*write(Path(sys.argv[1])))
