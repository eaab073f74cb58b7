"""Batches: the same from memory and from files; augmentation flips, shifts, and does nothing else."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from service.model.resize import crop_resize
from training.data import augment, loader
from training.data.dataset import FileImages
from training.data.loader import Loader
from training.errors import DataError
from training.randomness import Draws

Augmentation = Callable[[Tensor, Draws], Tensor]


def draws(seed: int, size: int) -> Draws:
    """What one process that has the whole batch draws."""
    return Draws(("test", seed), size, slice(None), torch.device("cpu"))


@pytest.fixture
def images(tmp_path: Path) -> FileImages:
    """Eleven files of different sizes."""
    rng = np.random.default_rng(0)
    for i in range(11):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20 + i, 30 - i, 3), np.uint8)).save(buffer, "PNG")
        (tmp_path / f"{i:02}.png").write_bytes(buffer.getvalue())
    return FileImages(tuple(sorted(tmp_path.iterdir())), np.arange(11) % 3)


def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MEMORY_SHARE", 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # forking workers, from Python 3.12 on
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("order", [None, [7, 3, 3, 10, 0, 1, 2, 9], []], ids=["as they are", "shuffled", "empty"])
def test_batches_from_memory_and_from_files_are_equal(
    images: FileImages, monkeypatch: pytest.MonkeyPatch, workers: int, order: list[int] | None
) -> None:
    in_memory = Loader(images, 16, workers, "memory")
    lazy(monkeypatch)
    from_files = Loader(images, 16, workers, "files")
    assert (in_memory.in_memory, from_files.in_memory) == (True, False)
    if order is None:
        one, two = list(in_memory.in_order(4)), list(from_files.in_order(4))
    else:
        wanted = [torch.tensor(order[i : i + 4]) for i in range(0, len(order), 4)]
        one, two = list(in_memory.batches(wanted)), list(from_files.batches(wanted))
    expected = list(range(11)) if order is None else order
    assert [len(labels) for _, labels in one] == [4] * (len(expected) // 4) + [len(expected) % 4] * (
        len(expected) % 4 > 0
    )
    assert len(one) == len(two)
    for (pixels, labels), (other_pixels, other_labels) in zip(one, two, strict=True):
        assert (pixels.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert (other_pixels.dtype, other_labels.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(pixels, other_pixels)
        assert torch.equal(labels, other_labels)
    for position, index in enumerate(expected):
        pixels, labels = one[position // 4]
        np.testing.assert_array_equal(pixels[position % 4].numpy(), crop_resize(images.image(index), 16))
        assert labels[position % 4] == images.labels[index]


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (3, [0, 5, 10]), (11, list(range(11))), (99, list(range(11)))]
)
def test_images_spread_over_all_are_the_same_either_way(
    images: FileImages, monkeypatch: pytest.MonkeyPatch, share: int, count: int, expected: list[int]
) -> None:
    monkeypatch.setattr(loader, "MEMORY_SHARE", share)
    loaded = Loader(images, 16, 0, "some")
    assert len(loaded) == 11
    assert loaded.labels.tolist() == images.labels.tolist()
    indices, pixels = loaded.spread(count)
    assert indices.tolist() == expected
    assert (pixels.shape, pixels.dtype) == ((len(expected), 16, 16, 3), torch.uint8)
    for position, index in enumerate(expected):
        np.testing.assert_array_equal(pixels[position].numpy(), crop_resize(images.image(index), 16))


@pytest.mark.parametrize("here", [True, False])
def test_what_fits_on_a_gpu_lies_there_though_the_machine_has_no_room_for_it(
    images: FileImages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, here: bool
) -> None:
    """`meta` stands for the GPU: tensors there have a place and a shape, and no values."""
    gpu = torch.device("meta")
    monkeypatch.setattr(loader, "MEMORY_SHARE", int(here))
    monkeypatch.setattr(loader, "PART_BYTES", 4 * 16 * 16 * 3)
    monkeypatch.setattr(loader, "fits_on", lambda device, size: (device, size) == (gpu, 11 * 16 * 16 * 3))
    caplog.set_level("INFO")
    loaded = Loader(images, 16, 0, "some", gpu)
    for path, (pixels, labels) in zip(images.paths, loaded.in_order(3), strict=False):
        assert (pixels.device, labels.device, pixels.shape[1:]) == (gpu, gpu, (16, 16, 3))
        path.unlink()  # nothing is decoded again
    assert caplog.messages == ["some: 11 images, 0.0 MB at 16 px, held in memory (meta)"]


def test_images_that_are_decoded_in_parts_are_the_same(images: FileImages, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.cat([pixels for pixels, _ in Loader(images, 16, 0, "whole").in_order(11)])
    monkeypatch.setattr(loader, "PART_BYTES", 4 * 16 * 16 * 3)
    assert torch.equal(whole, torch.cat([pixels for pixels, _ in Loader(images, 16, 0, "parts").in_order(11)]))


def test_a_changed_batch_does_not_change_the_next_pass(images: FileImages) -> None:
    loaded = Loader(images, 16, 0, "some")
    before = [pixels.clone() for pixels, _ in loaded.in_order(4)]
    for pixels, _ in loaded.in_order(4):
        pixels.zero_()
    assert all(torch.equal(a, b) for a, (b, _) in zip(before, loaded.in_order(4), strict=True))


def test_a_broken_file_is_found_before_the_first_batch(images: FileImages) -> None:
    images.paths[5].write_bytes(b"broken")
    with pytest.raises(DataError, match=r"05\.png"):
        next(Loader(images, 16, 0, "some").in_order(4))


def test_images_are_decoded_at_the_first_batch_and_only_then(images: FileImages) -> None:
    loaded = Loader(images, 16, 0, "some")
    first = [pixels.clone() for pixels, _ in loaded.in_order(4)]
    for path in images.paths:
        path.unlink()
    assert all(torch.equal(a, b) for a, (b, _) in zip(first, loaded.in_order(4), strict=True))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_later_is_a_data_error_without_a_trace(
    images: FileImages, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    lazy(monkeypatch)
    loaded = Loader(images, 16, workers, "some")
    images.paths[5].unlink()
    with pytest.raises(DataError, match=r"05\.png cannot be read") as refused:
        list(loaded.in_order(4))
    assert "Traceback" not in str(refused.value)


def gradient(count: int, side: int) -> Tensor:
    """Pixels that tell their own place: red is the column, green the row."""
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([xs, ys, torch.full_like(xs, 9)], dim=2).to(torch.uint8).repeat(count, 1, 1, 1)


@pytest.mark.parametrize("change", [augment.flip, augment.crop])
@pytest.mark.parametrize("side", [8, 32, 33])
@pytest.mark.parametrize("count", [1, 7])
def test_shape_and_type_are_kept_and_the_input_is_not_changed(change: Augmentation, side: int, count: int) -> None:
    batch = gradient(count, side)
    before = batch.clone()
    changed = change(batch, draws(0, count))
    assert (changed.shape, changed.dtype) == (batch.shape, torch.uint8)
    assert torch.equal(batch, before)


@pytest.mark.parametrize("change", [augment.flip, augment.crop])
def test_the_same_draws_change_in_the_same_way(change: Augmentation) -> None:
    batch = gradient(64, 32)
    one, again, other = (change(batch, draws(seed, 64)) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_flips_mirror_exactly_or_do_nothing_about_half_the_time() -> None:
    batch = gradient(400, 8)
    flipped = 0
    for before, after in zip(batch, augment.flip(batch, draws(0, 400)), strict=True):
        if not torch.equal(before, after):
            assert torch.equal(after, before[:, torch.arange(7, -1, -1)])
            flipped += 1
    assert 150 < flipped < 250


def test_a_crop_of_a_constant_image_is_that_image() -> None:
    batch = torch.full((20, 32, 32, 3), 77, dtype=torch.uint8)
    assert torch.equal(augment.crop(batch, draws(0, 20)), batch)


@pytest.mark.parametrize(("side", "most"), [(8, 1), (32, 4), (33, 4), (64, 8)])
def test_a_crop_shifts_by_at_most_an_eighth_and_mirrors_at_the_border(side: int, most: int) -> None:
    shifts = set()
    original = gradient(1, side)[0].numpy()
    for image in augment.crop(gradient(300, side), draws(0, 300)).numpy():
        dx, dy = (int(value) - side // 2 for value in image[side // 2, side // 2, :2])
        around = np.pad(original, ((most, most), (most, most), (0, 0)), mode="reflect")
        top, left = most + dy, most + dx
        np.testing.assert_array_equal(image, around[top : top + side, left : left + side])
        shifts.add((dx, dy))
    assert {dx for dx, _ in shifts} == {dy for _, dy in shifts} == set(range(-most, most + 1))
    assert any(dx != dy for dx, dy in shifts)
