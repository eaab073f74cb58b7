"""The generated sample: the same for the same seed, varied within a class, made anew when it was not finished."""

import json
from pathlib import Path

import numpy as np
import pytest

from training.data import cifar100
from training.data.sample import CLASSES, POLYGONS, SUPERCLASSES, SURFACES, main, render, write
from training.errors import DataError

FOLDER = "cifar-100-python"


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / FOLDER).iterdir()}


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (root / FOLDER).iterdir()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image per class and split; only read, copy it to change it."""
    root = tmp_path_factory.mktemp("small")
    write(root, 1, 1)
    return root


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    (tmp_path / FOLDER).mkdir()
    for name, content in contents(small).items():
        (tmp_path / FOLDER / name).write_bytes(content)
    return tmp_path


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(small: Path, tmp_path: Path) -> None:
    write(tmp_path / "again", 1, 1)
    assert contents(tmp_path / "again") == contents(small)
    write(tmp_path / "other", 1, 1, seed=1)
    assert contents(tmp_path / "other")["train"] != contents(small)["train"]


def test_there_are_100_classes_in_20_superclasses_as_in_cifar100(sample_root: Path) -> None:
    assert len(set(CLASSES)) == 100 == len(POLYGONS) * len(SURFACES)
    assert len(set(SUPERCLASSES)) == 20
    dataset = cifar100.read(sample_root)
    assert dataset.classes == CLASSES
    assert np.bincount(dataset.train.labels).tolist() == [2] * 100
    assert np.bincount(dataset.validation.labels).tolist() == [1] * 100


def test_each_superclass_holds_five_classes(small: Path) -> None:
    entry = cifar100._unpickled(small / FOLDER / "train", contents(small)["train"])
    pairs = set(zip(entry["fine_labels"], entry["coarse_labels"], strict=True))
    assert len(pairs) == 100
    assert np.bincount([coarse for _, coarse in pairs]).tolist() == [5] * 20
    for name, label, coarse in zip(entry["filenames"], entry["fine_labels"], entry["coarse_labels"], strict=True):
        assert name.startswith(CLASSES[label].replace(" ", "_"))
        assert SUPERCLASSES[coarse].split()[1] == CLASSES[label].split()[-1]


def test_images_within_a_class_differ(sample_root: Path) -> None:
    dataset = cifar100.read(sample_root)
    every = [*map(dataset.train.image, range(200)), *map(dataset.validation.image, range(100))]
    labels = [*dataset.train.labels, *dataset.validation.labels]
    assert len({image.tobytes() for image in every}) == 300
    for label in range(100):
        first, second, third = (image.astype(int) for image, of in zip(every, labels, strict=True) if of == label)
        assert min(np.abs(a - b).mean() for a, b in ((first, second), (second, third), (first, third))) > 2


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_class_draws_a_shape_that_differs_from_its_background(class_name: str) -> None:
    image = render(class_name, np.random.default_rng(1))
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    assert image.std(axis=(0, 1)).max() > 10


def test_a_second_write_with_the_same_parameters_changes_nothing(own: Path) -> None:
    before = stamps(own)
    write(own, 1, 1)
    assert stamps(own) == before


@pytest.mark.parametrize("parameters", [(1, 1, 7), (2, 1, 0), (1, 2, 0)])
def test_other_parameters_make_it_anew(own: Path, parameters: tuple[int, int, int]) -> None:
    before = contents(own)
    write(own, *parameters)
    assert contents(own)["sample.json"] != before["sample.json"]
    assert len(cifar100.read(own).train) == 100 * parameters[0]


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_an_interrupted_write_is_made_anew(own: Path, small: Path, name: str) -> None:
    for half in (b"half", None):
        if half is None:
            (own / FOLDER / name).unlink()
        else:
            (own / FOLDER / name).write_bytes(half)
        write(own, 1, 1)
        assert contents(own) == contents(small)


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"null", b"{}", b'{"sha256": null}'])
def test_a_damaged_description_is_made_anew(own: Path, small: Path, damaged: bytes) -> None:
    (own / FOLDER / "sample.json").write_bytes(damaged)
    write(own, 1, 1)
    assert contents(own) == contents(small)


def test_another_data_set_is_not_overwritten(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / FOLDER / "sample.json").unlink()
    before = stamps(own)
    with pytest.raises(DataError, match="holds another data set; give another folder"):
        write(own, 1, 1)
    assert main(["--output", str(own)]) == 1
    assert stamps(own) == before


@pytest.mark.parametrize("flag", ["--train-per-class", "--test-per-class"])
@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_a_count_that_makes_no_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, count: str
) -> None:
    assert main(["--output", str(tmp_path), flag, count]) == 2
    assert f"{flag}: given {count}, allowed are whole numbers from 1 up" in capsys.readouterr().err


def test_the_description_states_parameters_and_checksums(small: Path) -> None:
    stated = json.loads(contents(small)["sample.json"])
    assert stated["parameters"] == {"generator": 1, "train_per_class": 1, "test_per_class": 1, "seed": 0}
    assert set(stated["sha256"]) == {"train", "test", "meta"}
    assert set(contents(small)) == {"train", "test", "meta", "sample.json"}


def test_the_command_line_writes_the_same(small: Path, tmp_path: Path) -> None:
    arguments = f"--output {tmp_path} --train-per-class 1 --test-per-class 1 --seed 0"
    assert main(arguments.split()) == 0
    assert contents(tmp_path) == contents(small)
