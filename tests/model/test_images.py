"""Decoding: every allowed format gives the right pixels, everything else a sentence."""

import base64
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from service.model import images
from service.model.errors import ImageError, ImageTooLarge, UnreadableImage
from service.model.images import FORMATS, MAX_PIXELS, MEDIA_TYPES, decode

Pixels = npt.NDArray[np.uint8]
PHOTOS = Path(__file__).parents[2].parent / "shared" / "data" / "photos"
STORED_AS: dict[int, Callable[[Pixels], Pixels]] = {
    # EXIF 2.3, 4.6.4: how the rows and columns of an upright image lie in the file.
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
LOSSLESS: dict[str, dict[str, object]] = {"PNG": {}, "BMP": {}, "WEBP": {"lossless": True}, "GIF": {}}


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def few_colours(height: int = 12, width: int = 20) -> Pixels:
    """Different in every direction, and few enough colours for GIF's palette."""
    ys, xs = np.mgrid[0:height, 0:width]
    return np.stack([ys * 20 % 256, xs * 12 % 256, (ys + 2 * xs) % 3 * 100], axis=2).astype(np.uint8)


def smooth(height: int = 48, width: int = 64) -> Pixels:
    ys, xs = np.mgrid[0:height, 0:width]
    return np.stack([ys * 5, xs * 3, 255 - ys * 2 - xs], axis=2).astype(np.uint8)


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A little-endian EXIF block; an entry is tag, type, count and four bytes of value."""
    directory = b"".join(struct.pack("<HHI4s", *entry) for entry in sorted(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4)


def orientation(value: int) -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack("<HH", value, 0)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def one_bit_png(width: int, height: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format_name", LOSSLESS)
def test_lossless_formats_decode_to_exactly_the_pixels_that_were_saved(format_name: str) -> None:
    pixels = few_colours()
    decoded = decode(encoded(Image.fromarray(pixels), format_name, **LOSSLESS[format_name]))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize(
    ("format_name", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("WEBP", {"quality": 95}),
        ("MPO", {"quality": 95}),  # what phones call JPEG
    ],
)
def test_lossy_formats_decode_to_nearly_the_pixels_that_were_saved(
    format_name: str, options: dict[str, object]
) -> None:
    pixels = smooth()
    if format_name == "MPO":
        options = {**options, "save_all": True, "append_images": [Image.new("RGB", (64, 48))]}
    decoded = decode(encoded(Image.fromarray(pixels), format_name, **options))
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).mean() < 3


def test_every_allowed_format_is_tried_above_and_has_file_name_endings_with_their_media_type() -> None:
    assert set(FORMATS) == {*LOSSLESS, "JPEG"}
    registered = Image.registered_extensions()
    assert {registered[ending] for ending in MEDIA_TYPES} == set(FORMATS)
    assert {ending: Image.MIME[registered[ending]] for ending in MEDIA_TYPES} == MEDIA_TYPES


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_6_is_turned_upright(format_name: str) -> None:
    upright = smooth()
    stored = np.rot90(upright)  # the camera held on its side: showing it asks for a turn clockwise
    payload = encoded(Image.fromarray(stored), format_name, exif=exif(orientation(6)), quality=95)
    decoded = decode(payload)
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 3


@pytest.mark.parametrize("value", STORED_AS)
def test_every_exif_orientation_is_undone(value: int) -> None:
    upright = few_colours()
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[value](upright)))
    np.testing.assert_array_equal(decode(encoded(stored, "PNG", exif=exif(orientation(value)))), upright)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0garbage",
        exif(orientation(6), (0x011A, 2, 3, b"abc\0")),  # the resolution as text
        exif(orientation(6), (0x0100, 2, 4, b"abcd")),  # the width as text
    ],
    ids=["no TIFF header", "resolution is text", "width is text"],
)
def test_an_image_with_damaged_exif_is_decoded_all_the_same(format_name: str, block: bytes) -> None:
    assert decode(encoded(Image.fromarray(smooth()), format_name, exif=block)).shape in {(48, 64, 3), (64, 48, 3)}


@pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
def test_transparency_is_laid_over_white(format_name: str) -> None:
    rgba = np.zeros((1, 4, 4), np.uint8)  # [1, 4, 4]: black ...
    rgba[0, :, 3] = 0, 64, 128, 255  # ... ever less transparent
    rgba[0, 0, :3] = 200, 0, 0
    decoded = decode(encoded(Image.fromarray(rgba), format_name, **LOSSLESS[format_name], exact=True))
    assert decoded.shape == (1, 4, 3)
    np.testing.assert_allclose(decoded[0], [[255] * 3, [191] * 3, [127] * 3, [0] * 3], atol=1)


def test_grey_with_alpha_is_laid_over_white() -> None:
    grey_alpha = np.array([[[100, 0], [100, 255]]], np.uint8)
    decoded = decode(encoded(Image.fromarray(grey_alpha, "LA"), "PNG"))
    np.testing.assert_array_equal(decoded, [[[255] * 3, [100] * 3]])


@pytest.mark.parametrize("format_name", ["PNG", "GIF"])
def test_a_transparent_palette_entry_turns_white(format_name: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(
        decode(encoded(image, format_name, transparency=0)), [[[255, 255, 255], [40, 50, 60]]]
    )


@pytest.mark.parametrize(
    ("image", "transparency"),
    [(Image.new("L", (1, 1), 7), 7), (Image.new("RGB", (1, 1), (9, 8, 7)), (9, 8, 7)), (Image.new("I;16", (1, 1)), 0)],
    ids=["grey", "colour", "16-bit grey"],
)
def test_a_colour_declared_transparent_turns_white(image: Image.Image, transparency: object) -> None:
    assert decode(encoded(image, "PNG", transparency=transparency)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize(
    ("ink", "colour"), [((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 0), (255,) * 3), ((0, 0, 0, 255), (0,) * 3)]
)
def test_a_cmyk_jpeg_becomes_rgb(ink: tuple[int, ...], colour: tuple[int, ...]) -> None:
    decoded = decode(encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100))
    assert decoded.shape == (16, 16, 3)
    np.testing.assert_allclose(decoded[8, 8], colour, atol=8)


def test_a_16_bit_grey_png_is_scaled_to_8_bits_not_clipped() -> None:
    deep = np.array([[0, 255, 256, 0x1234, 0x8000, 0xFFFF]], np.uint16)
    decoded = decode(encoded(Image.fromarray(deep), "PNG"))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, np.repeat([[[0], [0], [1], [0x12], [0x80], [0xFF]]], 3, axis=2))


def test_a_16_bit_grey_png_is_turned_upright_too() -> None:
    deep = np.array([[0x1000, 0x2000]], np.uint16)
    decoded = decode(encoded(Image.fromarray(np.rot90(deep).copy()), "PNG", exif=exif(orientation(6))))
    assert decoded[..., 0].tolist() == [[0x10, 0x20]]


def deep_png(colour: int, channels: int, lace: int = 0) -> bytes:
    """2 x 2 pixels of 16 bits: 0x1000, 0x1001, ... in reading order, channel by channel."""
    samples = struct.pack(f">{4 * channels}H", *range(0x1000, 0x1000 + 0x400 * 4 * channels, 0x400))
    one = 2 * channels
    pieces = [samples[: 2 * one], samples[2 * one :]]
    if lace:  # Adam7 (PNG, 8.2): of so small a picture there are the passes 1, 6 and 7
        pieces = [samples[:one], samples[one : 2 * one], samples[2 * one :]]
    data = zlib.compress(b"".join(b"\0" + piece for piece in pieces))
    header = struct.pack(">IIBBBBB", 2, 2, 16, colour, 0, 0, lace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("lace", [0, 1], ids=["plain", "interlaced"])
@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["grey", "rgb", "la", "rgba"])
def test_a_png_of_16_bits_keeps_the_high_bytes(colour: int, channels: int, lace: int) -> None:
    high = (np.arange(4 * channels).reshape(2, 2, channels) * 0x400 + 0x1000) >> 8
    grey_or_rgb, alpha = (high, 255) if channels in (1, 3) else (high[..., :-1], high[..., -1:])
    expected = np.broadcast_to((grey_or_rgb * alpha + 255 * (255 - alpha)) / 255, (2, 2, 3))
    np.testing.assert_allclose(decode(deep_png(colour, channels, lace)), expected, atol=1)


ARITHMETIC = base64.b85decode(
    "|JeWF01!$>Nk#wx0RjLe03`qb|JwjV00RO70s;a90s;a90|NsD1_T5I1Ox~M1_cHQ2nq@b2nh)a3=a$n3l0kj2@Meq4i69z5fBOt5)%>-6Aus&5dYf"
    "%LjeN=0|WyE2m}NO5DN(l5D*X$5D*X$5D*X$5D*X$5D*X$5D*X$5D*X$5D*X$5D*X$5D*X$5D*X$5D*X$5D@>#01*fP5C9MZ0TBQK5di}c0sqVZ3IG"
    "rg1pyEd1^?Or3<CiG0ucid06zfIWHM&HB3GIUa%}_Le4t}iuk~BVN<H-H(hNsR3EJp^$E9TDG<K8doI`j^f*Wz&IVt65ih%#w"
)
"""16 x 16, written by libjpeg-turbo's `cjpeg -quality 92 -arithmetic -sample 1x1`, which Pillow cannot."""


def test_an_arithmetic_coded_jpeg_is_decoded() -> None:
    ys, xs = np.mgrid[0:16, 0:16]
    grey = ys * 8 + xs * 6
    np.testing.assert_allclose(decode(ARITHMETIC), np.stack([grey, 255 - grey, grey // 2 + 60], axis=2), atol=4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
@pytest.mark.parametrize("turn", [1, 6])
def test_strips_show_no_seam(mode: str, turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 2**16, (37, 23), np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (37, 23, 4), np.uint8), "RGBA")
        image = image.quantize(50) if mode == "P" else image.convert(mode)
    payload = encoded(image, "PNG", exif=exif(orientation(turn)))
    whole = decode(payload)
    for strip_pixels in (1, 100, 23 * 36, 23 * 37 - 1):
        monkeypatch.setattr(images, "STRIP_PIXELS", strip_pixels)
        np.testing.assert_array_equal(decode(payload), whole)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("more", [{}, {"exif": exif(orientation(1))}], ids=["simple", "extended"])
def test_the_size_of_a_webp_is_checked_before_its_canvas_is_made(
    lossless: bool, more: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = encoded(Image.new("RGB", (300, 200), "red"), "WEBP", lossless=lossless, **more)
    assert decode(payload, max_pixels=60_000).shape == (200, 300, 3)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ImageTooLarge, match="300 x 200"):
        decode(payload, max_pixels=59_999)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
@pytest.mark.parametrize("format_name", ["PNG", "BMP", "GIF"])
def test_images_of_fewer_bits_become_rgb(mode: str, format_name: str) -> None:
    decoded = decode(encoded(Image.new("RGB", (3, 2), "white").convert(mode), format_name))
    assert (decoded.shape, decoded.min()) == ((2, 3, 3), 255)


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format_name: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    payload = encoded(frames[0], format_name, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    decoded = decode(payload)
    assert decoded.shape == (6, 8, 3)
    assert (decoded == [255, 0, 0]).all()


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_truncated_file_is_refused_or_had_all_its_pixels_already(format_name: str) -> None:
    payload = encoded(Image.fromarray(few_colours()), format_name)
    whole = decode(payload)
    for length in range(1, len(payload)):
        try:
            np.testing.assert_array_equal(decode(payload[:length]), whole)
        except UnreadableImage:
            continue


@pytest.mark.parametrize("format_name", FORMATS)
def test_half_a_file_is_refused_saying_how_much_arrived(format_name: str) -> None:
    payload = encoded(Image.fromarray(smooth()), format_name)
    half = payload[: len(payload) // 2]
    with pytest.raises(UnreadableImage, match=f"damaged or incomplete.*{len(half):,} bytes arrived"):
        decode(half)


@pytest.mark.parametrize("format_name", FORMATS)
def test_damaged_bytes_give_pixels_or_an_image_error_and_nothing_else(
    format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)  # a damaged header may state any size
    payload = encoded(Image.fromarray(smooth()), format_name)
    rng = random.Random(format_name)
    for _ in range(150):
        damaged = bytearray(payload)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(min(len(damaged), rng.choice((64, len(damaged)))))] = rng.randrange(256)
        try:
            decoded = decode(bytes(damaged))
        except ImageError as exc:
            assert str(exc).startswith("The ")
        else:
            assert (decoded.dtype, decoded.ndim, decoded.shape[2]) == (np.uint8, 3, 3)


def test_an_empty_payload_is_refused_naming_the_formats() -> None:
    with pytest.raises(UnreadableImage, match=r"empty \(0 bytes\).*JPEG, PNG, WEBP, BMP or GIF"):
        decode(b"")


@pytest.mark.parametrize("format_name", ["PDF", "EPS", "TIFF", "PPM", "ICO", "TGA", "JPEG2000"])
def test_formats_that_are_not_allowed_are_refused(format_name: str) -> None:
    with pytest.raises(UnreadableImage, match="are not a JPEG, PNG, WEBP, BMP or GIF image"):
        decode(encoded(Image.fromarray(smooth(32, 32)), format_name))


@pytest.mark.parametrize("payload", [b"a photograph", b"\0", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xff\xd8"])
def test_bytes_that_are_no_image_are_refused(payload: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode(payload)


@pytest.mark.parametrize("side", [10_000, 20_000])  # below and above the size at which Pillow itself refuses
@pytest.mark.parametrize("warned", ["error", "ignore"])
def test_a_png_bomb_is_refused_for_its_pixels(side: int, warned: str) -> None:
    squeezer = zlib.compressobj(1)
    row = bytes(1 + side // 8)
    data = b"".join(squeezer.compress(row * 100) for _ in range(side // 100)) + squeezer.flush()
    bomb = one_bit_png(side, side, data)
    assert len(bomb) < 500_000
    with warnings.catch_warnings():
        warnings.simplefilter(warned)  # type: ignore[arg-type]
        with pytest.raises(ImageTooLarge, match=f"at most {MAX_PIXELS:,} pixels"):
            decode(bomb)


def with_size(format_name: str, width: int, height: int) -> bytes:
    """A small real file whose header states another size: were its pixels looked at, it would be 'damaged'."""
    payload = bytearray(encoded(Image.new("RGB", (8, 8)), format_name))
    if format_name == "JPEG":
        at = payload.index(b"\xff\xc0") + 5
        payload[at : at + 4] = struct.pack(">HH", height, width)
    elif format_name == "BMP":
        payload[18:26] = struct.pack("<ii", width, height)
    elif format_name == "GIF":
        payload[6:10] = struct.pack("<HH", width, height)
    else:
        return one_bit_png(width, height, b"junk")
    return bytes(payload)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "BMP", "GIF"])
@pytest.mark.parametrize("size", [(9_460, 9_460), (60_000, 60_000)])
def test_an_image_that_is_too_large_is_refused_without_decoding_it(format_name: str, size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageTooLarge):
            decode(with_size(format_name, *size))


def test_the_limit_itself_is_still_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    assert decode(encoded(Image.new("RGB", (10, 10)), "PNG")).shape == (10, 10, 3)
    with pytest.raises(ImageTooLarge, match="at most 100 pixels, given: 101 x 1 = 101 pixels; send a smaller one"):
        decode(encoded(Image.new("RGB", (101, 1)), "PNG"))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (10_000, 1), (1, 10_000)])
def test_the_smallest_and_the_longest_images_decode(format_name: str, width: int, height: int) -> None:
    decoded = decode(encoded(Image.new("RGB", (width, height), "white"), format_name))
    assert decoded.shape == (height, width, 3)
    assert decoded.min() >= 254


def test_real_photos_decode() -> None:
    photos = sorted(PHOTOS.glob("*.JPEG"))
    if not photos:
        pytest.skip(f"The photos are not at {PHOTOS} on this machine.")
    for photo in photos:
        decoded = decode(photo.read_bytes())
        assert decoded.ndim == 3
        assert decoded.shape[2] == 3
        assert decoded.std() > 1


def by_pillow(payload: bytes) -> Pixels:
    return np.asarray(images._to_rgb(Image.open(BytesIO(payload))))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 20}, {"restart_marker_rows": 1}], ids=str)
def test_a_jpegs_pixels_are_pillows(mode: str, subsampling: str, options: dict[str, object]) -> None:
    for size in ((47, 33), (8, 8), (1, 1), (200, 3)):
        noisy = Image.effect_noise(size, 80).convert(mode)
        payload = encoded(noisy, "JPEG", **({"subsampling": subsampling} if mode == "RGB" else {}), **options)
        np.testing.assert_array_equal(decode(payload), by_pillow(payload))


def test_most_jpegs_are_decoded_without_pillow_and_unusual_ones_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    decode_any = images._decode_any
    monkeypatch.setattr(
        images, "_decode_any", lambda payload, *rest: asked.append(payload) or decode_any(payload, *rest)
    )
    plain, picture = encoded(Image.fromarray(smooth()), "JPEG"), Image.fromarray(smooth())
    decode(plain)
    assert not asked
    unusual = [
        encoded(picture, "JPEG", exif=exif(orientation(6))),
        encoded(picture, "JPEG", xmp=b'<x tiff:Orientation="6"/>'),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture, "JPEG", keep_rgb=True),
        encoded(picture, "PNG"),
    ]
    for payload in unusual:
        decode(payload)
    assert asked == unusual


def test_damaged_jpegs_give_what_pillow_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    payload = encoded(Image.fromarray(smooth()), "JPEG")
    for _ in range(400):
        damaged = bytearray(payload)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(2, len(damaged))] = rng.randrange(256)
        cut = bytes(damaged[: rng.choice((len(damaged), len(damaged), rng.randrange(len(damaged))))])
        try:
            expected = images._decode_any(cut, None, 100_000) if cut else None
        except ImageError:
            expected = None
        try:
            np.testing.assert_array_equal(decode(cut, None, 100_000), expected)
        except ImageError:
            assert expected is None


@pytest.mark.parametrize(
    ("enough_px", "shape"), [(None, (400, 600)), (401, (400, 600)), (200, (200, 300)), (30, (50, 75))]
)
def test_a_jpeg_is_scaled_while_decoding_as_long_as_enough_is_left(
    enough_px: int | None, shape: tuple[int, int]
) -> None:
    ys, xs = np.mgrid[0:400, 0:600]
    pixels = np.stack([ys // 2, xs // 3, (ys + xs) // 5], axis=2).astype(np.uint8)
    scaled = decode(encoded(Image.fromarray(pixels), "JPEG", quality=95), enough_px)
    assert scaled.shape[:2] == shape
    expected = np.asarray(Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BOX))
    assert np.abs(scaled.astype(int) - expected).mean() < 3


def test_a_limit_of_pixels_can_be_given() -> None:
    for format_name in FORMATS:
        payload = encoded(Image.fromarray(smooth()), format_name)
        assert decode(payload, max_pixels=48 * 64).shape == (48, 64, 3)
        with pytest.raises(ImageTooLarge, match="at most 3,071 pixels"):
            decode(payload, max_pixels=48 * 64 - 1)
