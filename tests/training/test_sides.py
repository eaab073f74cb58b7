"""Photographs that a training would look at as stamps are told, and nothing else is."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.config import TrainingConfig
from training.data.dataset import ArrayImages, FileImages
from training.data.sides import hint, median_px
from training.preparation import prepare


def files(folder: Path, sizes: list[tuple[int, int]], ending: str = "jpg") -> FileImages:
    folder.mkdir(parents=True)
    paths = tuple(folder / f"{number}.{ending}" for number in range(len(sizes)))
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size).save(path)
    return FileImages(paths, np.zeros(len(paths), np.int64))


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_it_is_the_median_of_the_shorter_sides(tmp_path: Path, ending: str) -> None:
    images = files(tmp_path / "few", [(40, 30), (500, 375), (375, 500), (600, 400), (10, 10)], ending)
    assert median_px(images) == 375
    assert median_px(files(tmp_path / "many", [(20, 20)] * 150, ending)) == 20
    assert median_px(ArrayImages(np.zeros((3, 32, 32, 3), np.uint8), np.zeros(3, np.int64))) == 32


def test_only_what_is_far_larger_is_told(tmp_path: Path) -> None:
    images = files(tmp_path / "some", [(120, 97)] * 3)
    assert hint(images, 32) == (
        "the pictures are about 97 px, and the training looks at them at 32 px: --side 224 suits photographs"
    )
    assert hint(images, 64) is None
    assert hint(files(tmp_path / "small", [(96, 200)] * 3), 32) is None


def test_a_training_tells_it_unless_the_side_was_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        files(tmp_path / "data" / name, [(300, 200)] * 4)
    given = {"data": tmp_path / "data", "output": tmp_path / "model", "weights": "none", "feature_cache": "off"}
    for more, told in (({}, True), ({"side": 32}, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prepare(TrainingConfig.create({**given, **more}))
        assert ("the pictures are about 200 px" in caplog.text) is told
