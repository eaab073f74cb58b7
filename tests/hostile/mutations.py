"""Real files, damaged as accidents and attackers do: bits, lengths, cuts, and pieces of one file in another."""

import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tests.hostile.bombs import encoded, picture

PHOTOS = Path(__file__).parents[2].parent / "shared" / "data" / "photos"


def seeds() -> list[bytes]:
    """One small file of every kind that is decoded, and photographs where they are at hand."""
    rgb, turned = picture(), Image.Exif()
    turned[0x0112] = 6
    frames = [picture(32, 32).rotate(90 * k) for k in range(3)]
    files = [
        encoded(rgb, "JPEG"),
        encoded(rgb, "JPEG", progressive=True),
        encoded(rgb, "JPEG", exif=turned, restart_marker_rows=1),
        encoded(rgb.convert("CMYK"), "JPEG"),
        encoded(rgb.convert("L"), "JPEG", subsampling="4:4:4"),
        *[encoded(rgb.convert(mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")],
        encoded(rgb, "PNG", exif=turned),
        encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        *[encoded(rgb.convert(mode), "BMP") for mode in ("RGB", "RGBA", "L", "P", "1")],
        encoded(rgb, "GIF"),
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        encoded(rgb, "WEBP"),
        encoded(rgb.convert("RGBA"), "WEBP", lossless=True, exif=turned),
        encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
    ]
    return files + [path.read_bytes() for path in sorted(PHOTOS.glob("*.JPEG"))[:6]]


def mutations(count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged files, the same for the same seed."""
    rng, files = random.Random(seed), seeds()
    for _ in range(count):
        file = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            file = rng.choice((flip, set_bytes, set_length, cut, repeat, splice))(file, rng, files)
        yield bytes(file)


def place(file: bytearray, rng: random.Random) -> int:
    """Somewhere; headers, which are at the beginning, more often."""
    return rng.randrange(max(1, min(len(file), rng.choice((64, 700, len(file) + 1)))))


def flip(file: bytearray, rng: random.Random, _: list[bytes]) -> bytearray:
    if file:
        file[place(file, rng)] ^= 1 << rng.randrange(8)
    return file


def set_bytes(file: bytearray, rng: random.Random, _: list[bytes]) -> bytearray:
    at = place(file, rng)
    return file[:at] + rng.randbytes(rng.randint(1, 8)) + file[at + rng.randint(0, 8) :]


def set_length(file: bytearray, rng: random.Random, _: list[bytes]) -> bytearray:
    """What a length field likes least."""
    at, size = place(file, rng), rng.choice((1, 2, 4))
    value = rng.choice((0, 1, 2, 2 ** (8 * size - 1), 2 ** (8 * size) - 1, len(file) % 2 ** (8 * size)))
    return file[:at] + value.to_bytes(size, rng.choice(("big", "little"))) + file[at + size :]


def cut(file: bytearray, rng: random.Random, _: list[bytes]) -> bytearray:
    return file[: place(file, rng)]


def repeat(file: bytearray, rng: random.Random, _: list[bytes]) -> bytearray:
    at = place(file, rng)
    return file[:at] + file[at : at + rng.randint(1, 200)] * rng.randint(2, 50) + file[at:]


def splice(file: bytearray, rng: random.Random, files: list[bytes]) -> bytearray:
    other = bytearray(rng.choice(files))
    return file[: place(file, rng)] + other[place(other, rng) :]
