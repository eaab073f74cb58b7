"""The layouts of data folders are told apart, and what is none of them is refused with what to do."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from training.data.dataset import Dataset
from training.data.layouts import open_dataset
from training.errors import DataError


def load(root: Path, validation_root: Path | None = None) -> Dataset:
    return open_dataset(root, validation_fraction=0.5, seed=0, broken_files="refuse", validation_root=validation_root)


def class_folders(root: Path) -> Path:
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (4, 4)).save(root / name / f"{i}.png")
    return root


def test_the_folder_above_cifar100_and_that_folder_itself_will_do(sample_root: Path) -> None:
    for root in (sample_root, sample_root / "cifar-100-python"):
        assert (load(root).name, len(load(root).train)) == ("generated-sample", 200)


def test_class_folders_are_read(tmp_path: Path) -> None:
    dataset = load(class_folders(tmp_path / "insects"))
    assert (dataset.name, dataset.classes) == ("insects", ("ant", "bee"))


def test_the_name_is_the_folders_also_for_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(class_folders(tmp_path / "insects"))
    assert load(Path()).name == "insects"


def test_a_validation_folder_is_taken_with_class_folders(tmp_path: Path) -> None:
    dataset = load(class_folders(tmp_path / "a"), class_folders(tmp_path / "b"))
    assert (len(dataset.train), len(dataset.validation)) == (4, 4)


def test_a_validation_folder_is_refused_with_cifar100(sample_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--validation .*: cifar-100-python brings its own; leave it out"):
        load(sample_root, class_folders(tmp_path))


@pytest.mark.parametrize(("made", "said"), [(True, " holds no class folders"), (False, ": there is no such folder")])
def test_a_validation_folder_without_classes_is_refused(tmp_path: Path, made: bool, said: str) -> None:
    if made:
        (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"--validation .*empty{said}"):
        load(class_folders(tmp_path / "a"), tmp_path / "empty")


def test_the_folder_above_the_generated_sample_is_refused_naming_the_sample(sample_root: Path, tmp_path: Path) -> None:
    shutil.copytree(sample_root, tmp_path / "sample")
    with pytest.raises(DataError, match=rf"holds the generated sample; say --data {tmp_path / 'sample'}"):
        load(tmp_path)


@pytest.mark.parametrize(("name", "said"), [("nowhere", ": there is no such folder"), ("file", " is a file")])
def test_what_is_no_folder_is_refused_naming_it(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=rf"--data {tmp_path / name}{said}"):
        load(tmp_path / name)


def test_an_empty_folder_is_refused_with_what_to_put_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        load(tmp_path)
    for part in (
        f"--data {tmp_path} is empty",
        str(tmp_path / "cat" / "001.jpg"),
        "cifar-100-python/",
        "one folder of images per class",
        "https://www.cs.toronto.edu",
        str(tmp_path),
    ):
        assert part in str(refused.value)
