"""What a JPEG's header tells: which are plain, and which would cost too much."""

import io
import random

import pytest
from PIL import Image

from service.model.errors import ImageTooCostly
from service.model.images import decode
from service.model.jpeg import MAX_SCANS, MAX_SEGMENTS, plain_size


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((90, 60)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def scans(count: int) -> bytes:
    """A progressive JPEG of so many scans: the last is repeated."""
    file = jpeg("L", progressive=True)
    last, end = file.rindex(b"\xff\xda"), file.rindex(b"\xff\xd9")
    return file[:end] + file[last:end] * (count - file.count(b"\xff\xda")) + b"\xff\xd9"


def segments(count: int) -> bytes:
    """A plain JPEG with so many comments."""
    return jpeg()[:2] + b"\xff\xfe\0\3c" * count + jpeg()[2:]


@pytest.mark.parametrize(
    "file", [jpeg(), jpeg("L"), jpeg(quality=100, subsampling=0), jpeg(restart_marker_rows=1), segments(9)]
)
def test_plain_jpegs_tell_their_size(file: bytes) -> None:
    assert plain_size(file) == (60, 90)


@pytest.mark.parametrize(
    "file",
    [
        jpeg(progressive=True),
        jpeg("CMYK"),
        jpeg(keep_rgb=True),
        jpeg(exif=turned()),
        jpeg(xmp=b"<x/>"),
        jpeg().replace(b"\xff\xc0", b"\xff\xc9", 1),  # arithmetic
        jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1),  # 12 bits
        jpeg()[:2] + b"rubbish" + jpeg()[2:],
        jpeg()[: jpeg().index(b"\xff\xda")],
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"",
    ],
)
def test_others_do_not(file: bytes) -> None:
    assert plain_size(file) is None


def test_as_many_scans_as_encoders_write_are_decoded_and_not_thousands() -> None:
    assert decode(scans(MAX_SCANS)).shape == (60, 90, 3)
    with pytest.raises(ImageTooCostly, match="at most 100 scans, given: 101; save it anew as a baseline JPEG"):
        decode(scans(MAX_SCANS + 1))


def test_what_follows_the_picture_counts_as_no_scan() -> None:
    assert decode(jpeg(progressive=True) + b"\xff\xda" * 1000).shape == (60, 90, 3)


def test_as_many_segments_as_metadata_needs_are_read_and_not_thousands() -> None:
    assert decode(segments(MAX_SEGMENTS - 20)).shape == (60, 90, 3)
    with pytest.raises(ImageTooCostly, match="more than 2,000 segments"):
        decode(segments(MAX_SEGMENTS))


def test_no_damage_to_a_header_raises_anything_else() -> None:
    rng = random.Random(0)
    for file in (jpeg(), jpeg(progressive=True), jpeg(exif=turned())):
        for _ in range(3000):
            damaged = bytearray(file[: rng.choice((len(file), rng.randrange(len(file))))])
            for _ in range(rng.randint(1, 4)):
                if damaged:
                    damaged[rng.randrange(min(len(damaged), 700))] = rng.randrange(256)
            plain_size(bytes(damaged))
