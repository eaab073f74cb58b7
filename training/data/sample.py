"""A generated data set in the genuine CIFAR-100 format, for machines that cannot download one.

100 classes, ten shapes times ten surfaces ("blue striped star"), on 32 x 32 pixels. Within a class the shape's
proportions, size, turn and place vary, so do the surface's hue, brightness and pattern, and the background;
so the classes must be learned, not looked up. It stands in for a data set, not for a benchmark.

    python -m training.data.sample --output data/sample
"""

import argparse
import colorsys
import hashlib
import json
import logging
import math
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from service.model.images import RgbImage
from training.command_line import positive, run_command
from training.data.cifar100 import FOLDER, SAMPLE_CHECKSUMS
from training.errors import DataError
from training.progress import progress

log = logging.getLogger(__name__)

SIDE_PX = 32
SUPERSAMPLING = 3
CANVAS_PX = SIDE_PX * SUPERSAMPLING
GENERATOR_VERSION = 1
"""To be raised when the pictures change, so that an older sample is made anew."""

Point = tuple[float, float]
Field = npt.NDArray[np.float64]


def _regular(corners: int, inner: float = 1.0, turn: float = 0.0) -> list[Point]:
    """A polygon, or with `inner` < 1 a star, in the unit circle, its first corner at the top."""
    count = corners if inner == 1.0 else 2 * corners
    radii = [1.0 if i % 2 == 0 or inner == 1.0 else inner for i in range(count)]
    angles = [turn + 2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[Point]:
    """The curve 16 sin^3 t, 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t (Weisstein, "Heart Curve", MathWorld)."""
    ts = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in ts
    ]


POLYGONS: dict[str, list[list[Point]]] = {
    # One outline, then the holes cut out of it.
    "arrow": [[(-1, -0.3), (0.1, -0.3), (0.1, -0.85), (1, 0), (0.1, 0.85), (0.1, 0.3), (-1, 0.3)]],
    "bar": [[(-1, -0.28), (1, -0.28), (1, 0.28), (-1, 0.28)]],
    "crescent": [_regular(40), [(0.85 * x + 0.5, 0.85 * y) for x, y in _regular(40)]],
    "cross": [[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
               (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)]],
    "disc": [_regular(40)],
    "heart": [_heart()],
    "ring": [_regular(40), [(0.55 * x, 0.55 * y) for x, y in _regular(40)]],
    "square": [_regular(4, turn=math.pi / 4)],
    "star": [_regular(5, inner=0.42)],
    "triangle": [_regular(3)],
}  # fmt: skip

SURFACES: dict[str, tuple[float, float, float, str]] = {
    # name: hue in degrees, saturation, brightness, pattern
    "black plain": (0, 0.0, 0.06, "plain"),
    "blue striped": (225, 0.85, 0.9, "striped"),
    "cyan checked": (180, 0.85, 0.9, "checked"),
    "green plain": (120, 0.85, 0.7, "plain"),
    "orange striped": (28, 0.95, 1.0, "striped"),
    "pink checked": (325, 0.6, 1.0, "checked"),
    "red plain": (0, 0.9, 0.85, "plain"),
    "violet dotted": (275, 0.75, 0.85, "dotted"),
    "white striped": (0, 0.0, 1.0, "striped"),
    "yellow dotted": (54, 0.95, 1.0, "dotted"),
}
WARM = {"orange striped", "pink checked", "red plain", "white striped", "yellow dotted"}

_YS, _XS = np.mgrid[0:CANVAS_PX, 0:CANVAS_PX].astype(np.float64)

PATTERNS: dict[str, Callable[[Field, Field], npt.NDArray[np.bool_]]] = {
    # Where the second colour shows; u and v count periods across the canvas.
    "plain": lambda u, v: np.zeros(u.shape, bool),
    "striped": lambda u, v: u % 1 < 0.5,
    "checked": lambda u, v: (u % 1 < 0.5) != (v % 1 < 0.5),
    "dotted": lambda u, v: (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.09,
}

CLASSES = tuple(sorted(f"{surface} {shape}" for shape in POLYGONS for surface in SURFACES))
SUPERCLASSES = tuple(sorted(f"{warmth} {shape}" for shape in POLYGONS for warmth in ("cool", "warm")))


def render(class_name: str, rng: np.random.Generator) -> RgbImage:
    """Draw one image of a class: uint8 `[32, 32, 3]`."""
    surface, shape = class_name.rsplit(" ", 1)
    inside = _shape_mask(shape, rng)[..., None]
    canvas = np.where(inside, _surface(surface, rng), _background(rng))  # [C, C, 3], 0..1
    blocks = canvas.reshape(SIDE_PX, SUPERSAMPLING, SIDE_PX, SUPERSAMPLING, 3)
    pixels = blocks.mean(axis=(1, 3)) + rng.normal(0, 0.02, (SIDE_PX, SIDE_PX, 3))
    drawn: RgbImage = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    return drawn


def write(root: Path, train_per_class: int = 100, test_per_class: int = 20, seed: int = 0) -> None:
    """Write `root/cifar-100-python` unless a whole sample of the same parameters is there already.

    Raises: DataError when another data set is there.
    """
    parameters = {
        "generator": GENERATOR_VERSION, "train_per_class": train_per_class,
        "test_per_class": test_per_class, "seed": seed,
    }  # fmt: skip
    folder = root / FOLDER
    if _parameters_of(folder) == parameters:
        return
    if (folder / "train").exists() and not (folder / SAMPLE_CHECKSUMS).exists():
        raise DataError(f"{folder} holds another data set; give another folder for the generated sample.")
    rng = np.random.default_rng(seed)
    contents = {
        "train": _split("training", train_per_class, rng),
        "test": _split("testing", test_per_class, rng),
        "meta": {"fine_label_names": list(CLASSES), "coarse_label_names": list(SUPERCLASSES)},
    }
    pickles = {name: pickle.dumps(entry, protocol=4) for name, entry in contents.items()}
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in pickles.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # First the checksums, then the files: whatever moment this is interrupted at, the folder is a sample, and the
    # checksums tell whether a whole one.
    checksums = {"parameters": parameters, "sha256": sha256}
    (folder / SAMPLE_CHECKSUMS).write_text(json.dumps(checksums, indent=2))
    for name, content in pickles.items():
        (folder / name).write_bytes(content)
    log.info(
        "generated %d training and %d test images of %d classes in %s",
        train_per_class * len(CLASSES), test_per_class * len(CLASSES), len(CLASSES), folder,
    )  # fmt: skip


def _parameters_of(folder: Path) -> object:
    """What the whole sample in `folder` was generated with; None where there is no whole one."""
    try:
        stated = json.loads((folder / SAMPLE_CHECKSUMS).read_bytes())
        whole = all(hashlib.sha256((folder / n).read_bytes()).hexdigest() == h for n, h in stated["sha256"].items())
        return stated["parameters"] if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _split(name: str, per_class: int, rng: np.random.Generator) -> dict[str, Any]:
    labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), per_class))
    images = [render(CLASSES[label], rng) for label in progress(labels, f"drawing the {name} images", len(labels))]
    coarse = [_superclass(CLASSES[label]) for label in labels]
    return {
        "batch_label": f"{name} batch 1 of 1",
        "filenames": [f"{CLASSES[label].replace(' ', '_')}_s_{i:06d}.png" for i, label in enumerate(labels)],
        "fine_labels": [int(label) for label in labels],
        "coarse_labels": coarse,
        "data": np.stack(images).transpose(0, 3, 1, 2).reshape(len(images), -1),  # [N, 3072], planes as CIFAR has them
    }


def _superclass(class_name: str) -> int:
    surface, shape = class_name.rsplit(" ", 1)
    return SUPERCLASSES.index(f"{'warm' if surface in WARM else 'cool'} {shape}")


def _shape_mask(shape: str, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    radius = rng.uniform(0.34, 0.44) * CANVAS_PX
    aspect = rng.uniform(0.9, 1.1)
    turn = math.radians(rng.uniform(-15, 15))
    room = CANVAS_PX / 2 - radius * 0.95
    cx, cy = CANVAS_PX / 2 + rng.uniform(-room, room, 2)
    mask = Image.new("1", (CANVAS_PX, CANVAS_PX))
    draw = ImageDraw.Draw(mask)
    for fill, points in zip((1, 0), POLYGONS[shape], strict=False):
        placed = []
        for x, y in points:
            x, y = x * aspect * radius, y / aspect * radius
            placed.append((cx + x * math.cos(turn) - y * math.sin(turn), cy + x * math.sin(turn) + y * math.cos(turn)))
        draw.polygon(placed, fill=fill)
    return np.asarray(mask)


def _surface(surface: str, rng: np.random.Generator) -> Field:
    hue, saturation, brightness, pattern = SURFACES[surface]
    hue = (hue + rng.uniform(-8, 8)) / 360 % 1
    brightness = float(np.clip(brightness * rng.uniform(0.85, 1.1), 0, 1))
    first = colorsys.hsv_to_rgb(hue, saturation, brightness)
    second = colorsys.hsv_to_rgb(hue, saturation * 0.9, brightness * rng.uniform(0.25, 0.45))
    period = rng.uniform(0.2, 0.28) * CANVAS_PX
    turn = rng.uniform(0, math.pi)
    u = (_XS * math.cos(turn) + _YS * math.sin(turn)) / period + rng.uniform()
    v = (_YS * math.cos(turn) - _XS * math.sin(turn)) / period + rng.uniform()
    return np.where(PATTERNS[pattern](u, v)[..., None], second, first)


def _background(rng: np.random.Generator) -> Field:
    """A dull, slightly tinted slope of brightness."""
    base = rng.uniform(0.35, 0.65) + rng.uniform(-0.08, 0.08, 3)  # [3]
    slope = rng.uniform(-0.2, 0.2, 2) / CANVAS_PX
    shaded: Field = base + (slope[0] * (_XS - CANVAS_PX / 2) + slope[1] * (_YS - CANVAS_PX / 2))[..., None]
    return shaded


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m training.data.sample", description="Generate the sample data set.")
    parser.add_argument("--output", type=Path, required=True, help=f"the folder to write {FOLDER}/ into")
    parser.add_argument("--train-per-class", type=positive, default=100)
    parser.add_argument("--test-per-class", type=positive, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return run_command(parser, arguments, lambda o: write(o.output, o.train_per_class, o.test_per_class, o.seed))


if __name__ == "__main__":
    sys.exit(main())
