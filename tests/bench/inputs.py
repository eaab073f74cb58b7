"""JPEG files to send: photographs and CIFAR-10's pictures where at hand, else drawn ones of like statistics."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tests.bench.pictures import ROOT, unpacked

PHOTOS = ROOT.parent / "shared" / "data" / "photos"
CIFAR_FILES = 200
DRAWN = 48


def payloads(side_px: int, cache: Path) -> tuple[list[bytes], str]:
    """JPEG files for a model of this side, and a sentence on what they are."""
    if side_px <= 64:
        train = unpacked(cache)
        if train is not None:
            files = [path for folder in sorted(train.iterdir()) for path in sorted(folder.iterdir())[:20]]
            return [path.read_bytes() for path in files[:CIFAR_FILES]], f"{CIFAR_FILES} CIFAR-10 pictures as JPEG"
        return [drawn(seed, 32, 32) for seed in range(DRAWN)], f"{DRAWN} drawn pictures of 32 x 32 pixels as JPEG"
    files = sorted(PHOTOS.glob("*.JPEG")) if PHOTOS.is_dir() else []
    if files:
        return [path.read_bytes() for path in files], f"{len(files)} ImageNet photographs as JPEG"
    return [photo(seed) for seed in range(DRAWN)], f"{DRAWN} drawn pictures of about 500 x 375 pixels as JPEG"


def photo(seed: int) -> bytes:
    """A drawn picture of a usual size of photographs."""
    random = np.random.default_rng(seed)
    long, short = int(random.normal(500, 40)), int(random.normal(375, 30))
    return drawn(seed, *((long, short) if random.random() < 0.75 else (short, long)))


def drawn(seed: int, width: int, height: int, quality: int = 90) -> bytes:
    """A JPEG of coloured shapes under 1/f noise.

    The amplitudes of natural images fall as one over the frequency (Field 1987,
    https://doi.org/10.1364/JOSAA.4.002379), which is what a JPEG's size, and so its decoding, depends on.
    """
    random = np.random.default_rng(seed)
    canvas = Image.new("RGB", (width, height), tuple(int(v) for v in random.integers(60, 196, 3)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(12):
        x, y = random.uniform(0, width), random.uniform(0, height)
        w, h = random.uniform(0.05, 0.4) * width, random.uniform(0.05, 0.4) * height
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=tuple(int(v) for v in random.integers(0, 256, 3)))
    noise = np.stack([_pink(random, width, height) * scale for scale in (28, 8, 8)], axis=2)  # luma, two of colour
    luma, blue, red = noise[..., 0:1], noise[..., 1:2], noise[..., 2:3]
    pixels = np.asarray(canvas, dtype=np.float64) + np.concatenate([luma + red, luma, luma + blue], axis=2)
    stream = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _pink(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Noise `[height, width]` whose amplitudes fall as 1/f, with standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * random.random(frequency.shape))
    field = np.fft.irfft2(phases / frequency, s=(height, width))
    return (field - field.mean()) / field.std()
