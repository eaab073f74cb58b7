"""The decoding bench: every way gives the picture, and a network its class, on files of all sizes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.bench import decoding, inputs


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [inputs.drawn(seed, *size) for seed, size in enumerate(((500, 375), (375, 500), (150, 160)))]


@pytest.mark.parametrize("way", decoding.WAYS, ids=str)
def test_every_way_gives_nearly_the_same_picture(way: decoding.Way, files: list[bytes]) -> None:
    for side_px in (224, 32):
        assert all(way.run(file, side_px).shape == (side_px, side_px, 3) for file in files)
        mean, largest = decoding.difference(way, files, side_px)
        assert 0 <= mean < 4
        assert mean <= largest
    assert decoding.difference(decoding.REFERENCE, files, 224) == (0, 0)


def test_what_the_service_does_differs_by_one_step_where_files_are_not_scaled(files: list[bytes]) -> None:
    service = decoding.WAYS[0]
    mean, largest = decoding.difference(service, files, 224)
    assert 0 < mean < 0.5 and largest == 1
    assert decoding.difference(decoding.Way("simplejpeg", decoding.COMPARED[1]), files, 224) == (mean, largest)
    assert decoding.difference(service, files[:1], 32)[1] > 1


def test_each_resizer_is_the_one_it_is_called(files: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    picture = decoding.pillow(files[0], 224)
    pillows, fasts = (decoding.RESIZERS[name](picture, 224) for name in decoding.COMPARED)
    monkeypatch.setattr(decoding.resize, "fast", None)
    np.testing.assert_array_equal(pillows, decoding.crop_resize(picture, 224))
    assert np.any(fasts != pillows)


def test_crops_are_large_enough_to_be_scaled(files: list[bytes]) -> None:
    found = decoding.crops(files, 80, 3)
    assert len(found) == 6  # none of the smallest
    assert all(min(Image.open(io.BytesIO(file)).size) >= 320 for file in found)
    assert found == decoding.crops(files, 80, 3)


def test_the_bench_writes_times_differences_and_classes(
    artifact: Path, files: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "payloads", lambda *_: (files, "3 drawn files"))
    flags = ["--sides", "32", "--rounds", "1", "--crops", "2", "--model", str(artifact), "--cache", str(tmp_path)]
    assert decoding.main([*flags, "--output", str(tmp_path)]) == 0
    table = json.loads((tmp_path / "decoding.json").read_text())
    assert len(table["rows"]) == len(decoding.WAYS)
    assert all(float(row[3]) > 0 for row in table["rows"])
    assert np.all(np.diff([float(row[3]) for row in table["rows"]]) >= 0)
    assert "32 px: 3 of 3 files are large enough" in table["notes"][1]
    assert "of 6 crops, so many get the class of full decoding" in table["notes"][2]
    for name in decoding.COMPARED:
        assert f"{name}: " in table["notes"][2]
    assert "and fast_image_resize bilinear, box give the same class to " in table["notes"][2]
    assert "| 32 | the service's | its own |" in (tmp_path / "decoding.md").read_text()
