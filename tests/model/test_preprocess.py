"""Crop and resize: the centre square, resized, whatever the shape of the image."""

import platform
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pydantic import ValidationError

from service.model import resize
from service.model.images import decode
from service.model.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from service.model.resize import crop_resize, crop_resize_all, decode_resized

RED, GREEN = (255, 0, 0), (0, 255, 0)


def noise(height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (50, 70), (200, 32), (7, 5), (1, 300)])
def test_a_second_time_changes_nothing_more(height: int, width: int) -> None:
    once = crop_resize(noise(height, width), 32)
    np.testing.assert_array_equal(crop_resize(once, 32), once)


def test_an_image_of_the_right_size_keeps_every_pixel() -> None:
    image = noise(48, 48)
    np.testing.assert_array_equal(crop_resize(image, 48), image)


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40)])
def test_what_remains_is_exactly_the_centre_square(height: int, width: int) -> None:
    image = np.full((height, width, 3), RED, np.uint8)
    top, left = (height - 40) // 2, (width - 40) // 2
    image[top : top + 40, left : left + 40] = GREEN
    assert (crop_resize(image, 40) == GREEN).all()
    image[top, left : left + 40] = image[top : top + 40, left + 39] = RED  # the square's own border is still seen
    resized = crop_resize(image, 40)
    assert (resized[0] == RED).all()
    assert (resized[:, -1] == RED).all()
    assert (resized[1:, :-1] == GREEN).all()


@pytest.mark.parametrize(("height", "width"), [(30, 41), (41, 30), (33, 64)])
def test_the_centre_is_the_centre_also_when_it_lies_between_pixels(height: int, width: int) -> None:
    image = noise(height, width)
    for axis in (0, 1):
        mirrored = np.flip(crop_resize(np.flip(image, axis).copy(), 16), axis)
        np.testing.assert_allclose(mirrored.astype(int), crop_resize(image, 16), atol=1)


def test_it_is_cropping_and_then_resizing() -> None:
    image = noise(60, 90)
    cropped = Image.fromarray(image[:, 15:75])
    expected = np.asarray(cropped.resize((32, 32), Image.Resampling.BILINEAR))
    # Pillow's filter looks one pixel beyond its box, so the outermost columns may differ.
    np.testing.assert_allclose(crop_resize(image, 32)[:, 1:-1].astype(int), expected[:, 1:-1], atol=1)


SIZES = [(375, 500, 224), (1, 1, 224), (1, 10_000, 224), (10_000, 1, 32), (31, 32, 32), (7, 5, 224), (1500, 2000, 32)]


@pytest.mark.parametrize(("height", "width", "side_px"), SIZES)
def test_it_is_pillows_bilinear_within_one_level(
    height: int, width: int, side_px: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(height, width)
    found = crop_resize(image, side_px).astype(int)
    monkeypatch.setattr(resize, "fast", None)  # as where there is no wheel of it
    np.testing.assert_allclose(found, crop_resize(image, side_px), atol=1)


@pytest.mark.parametrize(("height", "width", "side_px"), SIZES)
def test_a_pillow_image_gives_the_same_bits_as_an_array(height: int, width: int, side_px: int) -> None:
    image = noise(height, width)
    np.testing.assert_array_equal(crop_resize(Image.fromarray(image), side_px), crop_resize(image, side_px))


def test_every_set_of_instructions_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = pytest.importorskip("cykooz_resizer", reason="there is no wheel of cykooz-resizer for this platform")
    image, results = noise(375, 500), []
    for name in ("none", "sse4_1", "avx2") if platform.machine() == "x86_64" else ("none", "neon"):

        class Limited(fast.Resizer):  # type: ignore[misc, name-defined]
            def __init__(self, name: str = name) -> None:
                super().__init__()
                self.cpu_extensions = fast.CpuExtensions[name]

        monkeypatch.setattr(fast, "Resizer", Limited)
        results.append(crop_resize(image, 224))
    np.testing.assert_array_equal(results[0], results[-1])
    np.testing.assert_array_equal(results[0], results[1])


def test_threads_resize_beside_each_other() -> None:
    images = [noise(300 + n, 400) for n in range(8)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda n: crop_resize(images[n % 8], 64), range(200)))
    for n, image in enumerate(found):
        np.testing.assert_array_equal(image, found[n % 8])


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(crop_resize(stripes, 8).astype(int) - 127).max() < 16


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 3000), (3000, 1), (2, 3), (31, 33), (1000, 7), (32, 31), (500, 333)]
)
@pytest.mark.parametrize("side_px", [8, 32, 224])
def test_any_aspect_ratio_gives_the_side_asked_for(height: int, width: int, side_px: int) -> None:
    resized = crop_resize(np.full((height, width, 3), (1, 128, 254), np.uint8), side_px)
    assert (resized.shape, resized.dtype) == ((side_px, side_px, 3), np.uint8)
    assert (resized == (1, 128, 254)).all()


def test_all_are_stacked_in_order() -> None:
    batch = crop_resize_all([np.full((h, 20, 3), h, np.uint8) for h in (10, 20, 30)], 16)
    assert (batch.shape, batch.dtype) == ((3, 16, 16, 3), np.uint8)
    assert batch[:, 0, 0, 0].tolist() == [10, 20, 30]


def test_the_numbers_are_imagenets() -> None:
    from torchvision.models import ResNet34_Weights

    transforms = ResNet34_Weights.IMAGENET1K_V1.transforms()
    assert (tuple(transforms.mean), tuple(transforms.std)) == (IMAGENET_MEAN, IMAGENET_STD)
    assert Preprocessing(side_px=32).model_dump() == {"side_px": 32, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


@pytest.mark.parametrize("side_px", [0, -1, 1025])
def test_a_side_that_makes_no_sense_is_refused(side_px: int) -> None:
    with pytest.raises(ValidationError):
        Preprocessing(side_px=side_px)


def jpeg(height: int, width: int) -> bytes:
    ys, xs = np.mgrid[0:height, 0:width]
    pixels = np.stack([ys * 255 // height, xs * 255 // width, (ys // 8 + xs // 8) % 2 * 90], axis=2).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (90, 120), (127, 300)])
def test_a_file_is_decoded_and_resized_as_in_two_steps(height: int, width: int) -> None:
    payload = jpeg(height, width)
    np.testing.assert_array_equal(decode_resized(payload, 32), crop_resize(decode(payload), 32))


@pytest.mark.parametrize(("height", "width"), [(128, 128), (500, 375), (1200, 1600)])
def test_a_large_jpeg_is_decoded_in_less_detail_and_looks_the_same(height: int, width: int) -> None:
    payload = jpeg(height, width)
    difference = np.abs(decode_resized(payload, 32).astype(int) - crop_resize(decode(payload), 32))
    assert difference.mean() < 1.5
