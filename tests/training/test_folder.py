"""A user's own images: split the same way every time, and refused in words when something is wrong with them."""

import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import folder
from training.data.dataset import Dataset
from training.data.folder import BrokenFiles, has_classes, read
from training.errors import DataError


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def make(root: Path, **classes: int) -> Path:
    """`classes` by name, with so many images each; a double underscore stands for a slash."""
    for name, count in classes.items():
        place = root / name.replace("__", "/")
        place.mkdir(parents=True)
        for i in range(count):
            (place / f"{i}.png").write_bytes(png(i))
    return root


def load(root: Path, fraction: float = 0.2, seed: int = 0, broken_files: BrokenFiles = "refuse") -> Dataset:
    return read(root, fraction, seed, broken_files)


def files(dataset: Dataset, root: Path) -> tuple[list[str], list[str]]:
    """The files to train and to validate on, relative to `root`."""
    sides = (dataset.train, dataset.validation)
    return tuple([str(path.relative_to(root)) for path in side.paths] for side in sides)  # type: ignore[attr-defined, return-value]


def test_the_split_by_seed_is_stratified_and_disjoint_and_loses_nothing(tmp_path: Path) -> None:
    dataset = load(make(tmp_path, ant=10, bee=20, cow=5), 0.2)
    assert dataset.classes == ("ant", "bee", "cow")
    assert np.bincount(dataset.validation.labels).tolist() == [2, 4, 1]
    assert np.bincount(dataset.train.labels).tolist() == [8, 16, 4]
    train, validation = files(dataset, tmp_path)
    assert not set(train) & set(validation)
    assert len({*train, *validation}) == 35
    for images in (dataset.train, dataset.validation):
        for index, label in enumerate(images.labels):
            assert images.paths[index].parent.name == dataset.classes[label]  # type: ignore[attr-defined]


def test_the_same_seed_splits_the_same_way_wherever_the_folder_lies(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", ant=20, bee=20), make(tmp_path / "elsewhere" / "two", bee=20, ant=20)
    assert files(load(one), one) == files(load(one), one) == files(load(two), two)
    assert files(load(one, seed=1), one) != files(load(one), one)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_every_class_has_an_image_on_either_side(tmp_path: Path, fraction: float) -> None:
    dataset = load(make(tmp_path, ant=2, bee=3), fraction)
    assert set(dataset.train.labels) == set(dataset.validation.labels) == {0, 1}


def test_how_it_was_split_is_among_the_facts(tmp_path: Path) -> None:
    dataset = load(make(tmp_path / "insects", ant=2, bee=2), 0.3, seed=4)
    assert dataset.name == "insects"
    assert {"split": "by seed", "validation_fraction": 0.3, "seed": 4}.items() <= dataset.facts.items()


@pytest.mark.parametrize("name", ["validation", "val", "valid", "test"])
def test_a_given_split_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    root = make(tmp_path, train__ant=3, train__bee=1, **{f"{name}__ant": 1, f"{name}__bee": 4})
    dataset = load(root)
    train, validation = files(dataset, root)
    assert train == ["train/ant/0.png", "train/ant/1.png", "train/ant/2.png", "train/bee/0.png"]
    assert validation == [f"{name}/ant/0.png", *(f"{name}/bee/{i}.png" for i in range(4))]
    assert dataset.facts["split"] == f"given: train and {name}"


def test_validation_is_preferred_to_test(tmp_path: Path) -> None:
    folders = {f"{side}__{name}": 1 for side in ("train", "test", "validation") for name in ("ant", "bee")}
    root = make(tmp_path, **folders)
    assert files(load(root), root)[1] == ["validation/ant/0.png", "validation/bee/0.png"]


def test_a_validation_folder_elsewhere_replaces_the_split(tmp_path: Path) -> None:
    root, elsewhere = make(tmp_path / "data", ant=4, bee=4), make(tmp_path / "held out", ant=1, bee=2)
    dataset = read(root, 0.5, 0, "refuse", elsewhere)
    assert np.bincount(dataset.train.labels).tolist() == [4, 4]
    assert files(dataset, tmp_path)[1] == ["held out/ant/0.png", "held out/bee/0.png", "held out/bee/1.png"]
    assert dataset.facts["split"] == "given: data and held out"


def test_a_train_folder_alone_is_split_by_seed(tmp_path: Path) -> None:
    root = make(tmp_path, train__ant=5, train__bee=5)
    dataset = load(root)
    assert dataset.classes == ("ant", "bee")
    assert len(dataset.validation) == 2


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load(make(tmp_path / "flat", bus=3, train=3)).classes == ("bus", "train")
    assert load(make(tmp_path / "nested", bus=3, train__steam=2, train__diesel=2)).classes == ("bus", "train")


def test_parts_with_other_folders_beside_them_are_refused_as_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"beside them bus: move these away"):
        load(make(tmp_path, bus=3, train__ant=2, train__bee=2, test__ant=3))


def test_a_class_without_images_to_validate_on_is_accepted(tmp_path: Path) -> None:
    dataset = load(make(tmp_path, train__ant=2, train__bee=2, test__bee=3))
    assert dataset.validation.labels.tolist() == [1, 1, 1]


def test_images_decode_and_keep_their_bytes_and_names(tmp_path: Path) -> None:
    dataset = load(make(tmp_path, ant=3, bee=3))
    images = dataset.train
    assert images.image(0).shape == (4, 5, 3)
    assert images.file_name(0).endswith(".png")
    assert images.payload(0) == images.paths[0].read_bytes()  # type: ignore[attr-defined]


BROKEN = {"cut.png": png(1)[:-20], "empty.jpg": b"", "text.gif": b"not an image", "other.jpeg": b"%PDF-1.4"}


def test_broken_files_are_refused_and_listed_with_their_faults(tmp_path: Path) -> None:
    root = make(tmp_path, ant=3, bee=3)
    for name, content in BROKEN.items():
        (root / "bee" / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        load(root)
    message = str(refused.value)
    assert message.startswith("4 of 10 files cannot be decoded; ")
    assert "--broken-files skip" in message
    for name in BROKEN:
        assert f"{root / 'bee' / name}: The " in message
    assert "cut.png: The image is damaged or incomplete (" in message and "send" not in message


def test_broken_files_are_skipped_by_option_and_listed_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make(tmp_path, ant=3, bee=3)
    for name, content in BROKEN.items():
        (root / "bee" / name).write_bytes(content)
    dataset = load(root, broken_files="skip")
    assert len(dataset.train) + len(dataset.validation) == 6
    assert all(name in caplog.text for name in BROKEN)
    assert dataset.facts["broken_files"] == "skip"


def test_a_file_too_large_for_a_picture_is_broken_and_a_name_forges_no_line(tmp_path: Path) -> None:
    root = make(tmp_path, ant=3, bee=3)
    with (root / "bee" / "large.png").open("wb") as file:
        file.truncate(2**40)  # takes no room
    (root / "bee" / "red\n2026 INFO validation.png").write_bytes(b"")
    (root / "bee" / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"")
    with pytest.raises(DataError) as refused:
        load(root)
    message = str(refused.value)
    assert "large.png: has 1,099,511,627,776 bytes, at most 536,870,912 are read" in message
    assert len(message.splitlines()) == 4  # a sentence, and a line for each
    assert "\\n2026 INFO" in message and "\\udcff\\udcfe.png" in message


def test_of_very_many_broken_files_the_first_are_listed_and_the_others_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "LISTED", 20)
    root = make(tmp_path, ant=3, bee=3)
    for i in range(25):
        (root / "ant" / f"broken{i:02}.png").touch()
    with pytest.raises(DataError) as refused:
        load(root)
    assert str(refused.value).count(".png: ") == 20
    assert str(refused.value).endswith("and 5 more")


def test_broken_files_in_a_given_validation_folder_are_found_too(tmp_path: Path) -> None:
    root = make(tmp_path, train__ant=2, train__bee=2, val__ant=1)
    (root / "val" / "ant" / "x.png").touch()
    with pytest.raises(DataError, match=r"val/ant/x\.png"):
        load(root)


def test_a_class_without_an_image_is_refused_naming_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No JPEG, PNG, WEBP, BMP or GIF image in class bee, cow: add some or remove"):
        load(make(tmp_path, ant=3, bee=0, cow=0))


def test_a_class_left_without_an_image_by_skipping_is_refused_naming_it(tmp_path: Path) -> None:
    root = make(tmp_path, ant=3, bee=0)
    (root / "bee" / "x.png").touch()
    with pytest.raises(DataError, match="image in class bee"):
        load(root, broken_files="skip")


def test_a_class_with_a_single_image_cannot_be_split_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Class bee has 1 image; 2 are needed"):
        load(make(tmp_path, ant=3, bee=1))


def test_a_class_to_validate_on_that_is_not_trained_is_refused_naming_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cow: classes to validate on that have no images to train on"):
        load(make(tmp_path, train__ant=2, train__bee=2, test__ant=1, test__cow=1))


@pytest.mark.parametrize("classes", [{"ant": 3}, {"train__ant": 3, "val__ant": 3}])
def test_one_class_is_refused(tmp_path: Path, classes: dict[str, int]) -> None:
    with pytest.raises(DataError, match="has 1 class, at least 2 are needed"):
        load(make(tmp_path, **classes))


def test_a_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / ".hidden").mkdir()
    assert not has_classes(tmp_path)
    assert not has_classes(tmp_path / "missing")
    with pytest.raises(DataError, match="has no class folders"):
        load(tmp_path)


def test_hidden_files_and_folders_are_not_looked_at(tmp_path: Path) -> None:
    root = make(tmp_path, ant=3, bee=3)
    make(root, **{".cache": 2})
    make(root / "ant", **{".ipynb_checkpoints": 2, "more__.thumbnails": 2})
    (root / "ant" / "._0.png").write_bytes(b"what macOS leaves beside 0.png")
    (root / "ant" / ".DS_Store").write_bytes(b"\0")
    dataset = load(root)
    assert dataset.classes == ("ant", "bee")
    train, validation = files(dataset, root)
    assert sorted([*train, *validation]) == [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(3)]


def test_hidden_folders_above_the_data_do_not_matter(tmp_path: Path) -> None:
    assert len(load(make(tmp_path / ".data", ant=2, bee=2)).train) == 2


def test_foreign_files_are_left_out_and_counted_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make(tmp_path, ant=3, bee=3)
    (root / "labels.csv").touch()
    for name in ("notes.txt", "scan.tiff", "no ending"):
        (root / "bee" / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        dataset = load(root)
    assert len(dataset.train) + len(dataset.validation) == 6
    assert "bee: 3 files are not JPEG, PNG, WEBP, BMP or GIF by their name" in caplog.text


def test_folders_within_a_class_belong_to_it(tmp_path: Path) -> None:
    root = make(tmp_path, ant__red__small=2, ant__black=2, bee=2)
    dataset = load(root, 0.5)
    assert dataset.classes == ("ant", "bee")
    assert np.bincount([*dataset.train.labels, *dataset.validation.labels]).tolist() == [4, 2]


def test_the_folder_above_the_data_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make(tmp_path / "all", pets__cat=4, pets__dog=4, flowers__rose=4, misc=2)
    with caplog.at_level(logging.WARNING):
        load(root)
    assert (
        f"{root}: 12 of the 14 images lie in folders within the class folders (flowers/rose, pets/cat, pets/dog)"
        in (caplog.text)
    )
    assert f"name the folder that holds them, such as {root / 'flowers'}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(make(tmp_path / "some", ant__red=2, ant__black=2, bee=4))
    assert caplog.text == ""


def test_a_folder_that_holds_other_things_mostly_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make(tmp_path, ant=3, bee=3)
    for number in range(7):
        (root / "bee" / f"{number}.txt").touch()
    with caplog.at_level(logging.WARNING):
        load(root)
    assert f"{root}: 7 of its 13 files are no images; is it the folder that holds one folder of images" in caplog.text


@pytest.mark.parametrize("ending", ["PNG", "JPG", "Jpeg"])
def test_endings_count_in_any_case(tmp_path: Path, ending: str) -> None:
    root = make(tmp_path, ant=1, bee=2)
    (root / "ant" / f"x.{ending}").write_bytes(png(1))
    assert len(load(root).train) == 2


def test_any_characters_will_do_in_names(tmp_path: Path) -> None:
    names = {"größe L": 2, "猫": 2, "it's 100 %": 2}
    dataset = load(make(tmp_path / "my pictures", **names))
    assert set(dataset.classes) == set(names)
    assert dataset.name == "my pictures"
    (tmp_path / "my pictures" / "猫" / "ein Bild (1).png").touch()
    with pytest.raises(DataError, match=r"猫/ein Bild \(1\)\.png"):
        load(tmp_path / "my pictures")


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"bell\a"])
def test_a_class_name_that_is_no_printable_text_is_refused(tmp_path: Path, name: bytes) -> None:
    make(tmp_path, ant=2, **{os.fsdecode(name): 2})
    with pytest.raises(DataError, match="must be printable text") as refused:
        load(tmp_path)
    str(refused.value).encode()


def test_links_to_class_folders_and_files_are_followed(tmp_path: Path) -> None:
    stored = make(tmp_path / "stored", ant=2, bee=2)
    root = make(tmp_path / "data", cow=2)
    (root / "ant").symlink_to(stored / "ant")
    (root / "cow" / "x.png").symlink_to(stored / "bee" / "0.png")
    dataset = load(root)
    assert np.bincount([*dataset.train.labels, *dataset.validation.labels]).tolist() == [2, 3]


def test_a_file_that_vanishes_later_is_a_data_error_naming_it(tmp_path: Path) -> None:
    dataset = load(make(tmp_path, ant=3, bee=3))
    path = dataset.train.paths[0]  # type: ignore[attr-defined]
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} cannot be read: No such file"):
        dataset.train.image(0)
    path.write_bytes(b"overwritten")
    with pytest.raises(DataError, match=rf"{path.name}: The 11 bytes given"):
        dataset.train.image(0)
