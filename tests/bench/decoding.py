"""Decoders and resizers on the same photographs: milliseconds for each, pixels that differ, classes that differ.

    python -m tests.bench.decoding [--sides 224,32] [--rounds 7] [--model ARTIFACT] [--crops 16]

Every decoder is combined with every resizer; `the service's` is what runs (service/model/resize.py). All take turns in
every round on one thread, and the least time over the rounds counts. The reference is Pillow: decoded in full, and
resized by it. fast_image_resize, the service's resizer where there is a wheel of it, rounds otherwise; a JPEG of at
least four times the side may be scaled while it is decoded, which changes pixels. AWS's toolkit, which decodes before
it knows the side, does not do so. How often the class changes is counted with `--model`, a trained artifact
(without it, the bench's own network of random weights), on random crops of the photographs, saved anew, all of them
large enough to be scaled: by either resizer against full decoding with the same one, and between the two.
Writes tests/bench/results/decoding.{md,json}.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from service.engines.choose import Layout, create
from service.model import resize
from service.model.artifact import open_artifact
from service.model.images import decode
from service.model.machine import cores
from service.model.resize import crop_resize, decode_resized
from tests.bench.inputs import payloads
from tests.bench.serving import CACHE
from tests.bench.subjects import models
from tests.bench.table import save

SCALED_FROM = 4
"""Times the side from which `decode_resized` takes a JPEG at less detail."""
CROP_QUALITY = 92
RESERVES = (2, 3, 4, 6)
"""Times the side that a scaled JPEG keeps; the service's is the first (`resize.enough_px`)."""
SEED = 34
Picture = np.ndarray | Image.Image
Decoder = Callable[[bytes, int], Picture]
Resizer = Callable[[Picture, int], np.ndarray]


def pillow(payload: bytes, _: int) -> Image.Image:
    image = Image.open(io.BytesIO(payload))
    return image.convert("RGB")  # loads it


def pillow_draft(payload: bytes, side_px: int) -> Image.Image:
    """Scaled to no less than twice the side, as the service does."""
    image = Image.open(io.BytesIO(payload))
    image.draft(None, (2 * side_px, 2 * side_px))
    return image.convert("RGB")


def turbo(payload: bytes, _: int) -> np.ndarray:
    return simplejpeg.decode_jpeg(payload, "RGB", fastdct=False, fastupsample=False)


def turbo_fast(payload: bytes, _: int) -> np.ndarray:
    return simplejpeg.decode_jpeg(payload, "RGB", fastdct=True, fastupsample=True)


def turbo_scaled(payload: bytes, side_px: int) -> np.ndarray:
    return simplejpeg.decode_jpeg(
        payload, "RGB", fastdct=False, fastupsample=False, min_height=2 * side_px, min_width=2 * side_px, min_factor=2
    )


def by_pillow(picture: Picture, side_px: int) -> np.ndarray:
    """What `crop_resize` does where fast_image_resize is not installed."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    return np.asarray(image.resize((side_px, side_px), Image.Resampling.BILINEAR, box=_square(image)))


def by_fast(picture: Picture, side_px: int) -> np.ndarray:
    """What `crop_resize` does where it is, which this bench needs."""
    assert resize.fast is not None, "cykooz.resizer is not installed"
    return crop_resize(picture, side_px)


def _square(image: Image.Image) -> tuple[float, float, float, float]:
    """The box of the centre square."""
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    return left, top, left + short, top + short


def with_reduction(picture: Picture, side_px: int) -> np.ndarray:
    """Pillow's own shortcut: boxes of whole pixels first, then bilinear from twice the size."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    box = _square(image)
    return np.asarray(image.resize((side_px, side_px), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0))


def by_torch(picture: Picture, side_px: int) -> np.ndarray:
    """torch's antialiased bilinear on uint8, from the square of whole pixels nearest to the centre."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = torch.from_numpy(pixels[top : top + short, left : left + short].copy()).permute(2, 0, 1)[None]
    size = (side_px, side_px)
    resized = torch.nn.functional.interpolate(square, size, mode="bilinear", antialias=True)  # [1, 3, S, S]
    return resized[0].permute(1, 2, 0).numpy()


DECODERS: dict[str, Decoder] = {
    "Pillow": pillow, "Pillow, draft": pillow_draft, "simplejpeg": turbo, "simplejpeg, scaled": turbo_scaled,
    "simplejpeg, fast DCT and upsampling": turbo_fast,
}  # fmt: skip
RESIZERS: dict[str, Resizer] = {
    "Pillow bilinear, box": by_pillow, "fast_image_resize bilinear, box": by_fast,
    "Pillow bilinear, reducing_gap 2": with_reduction, "torch bilinear, antialiased": by_torch,
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """JPEG bytes -> uint8 `[S, S, 3]`, in one way."""

    decoder: str
    resizer: str

    def run(self, payload: bytes, side_px: int) -> np.ndarray:
        if not self.resizer:
            return decode_resized(payload, side_px)
        return RESIZERS[self.resizer](DECODERS[self.decoder](payload, side_px), side_px)


REFERENCE = Way("Pillow", "Pillow bilinear, box")
COMPARED = ("Pillow bilinear, box", "fast_image_resize bilinear, box")
"""The resizers that `crop_resize` has, without and with a wheel of the faster one."""
WAYS = [Way("the service's", ""), *(Way(decoder, resizer) for decoder in DECODERS for resizer in RESIZERS)]


def timed(files: Sequence[bytes], side_px: int, rounds: int) -> dict[Way, float]:
    """Milliseconds for a file, the least of all rounds."""
    least = dict.fromkeys(WAYS, float("inf"))
    for _ in range(rounds):
        for way in WAYS:
            started_s = time.perf_counter()
            for file in files:
                way.run(file, side_px)
            least[way] = min(least[way], 1000 * (time.perf_counter() - started_s) / len(files))
    return least


def difference(way: Way, files: Sequence[bytes], side_px: int) -> tuple[float, int]:
    """Of the pixels from those of the reference, in steps of 255: mean, largest."""
    apart = [
        np.abs(way.run(file, side_px).astype(int) - REFERENCE.run(file, side_px).astype(int)) for file in files
    ]  # fmt: skip
    return float(np.mean([each.mean() for each in apart])), max(int(each.max()) for each in apart)


def crops(files: Sequence[bytes], side_px: int, count: int) -> list[bytes]:
    """`count` JPEGs of each photograph that is large enough: random squares of at least SCALED_FROM times the side."""
    random, found = np.random.default_rng(SEED), []
    for file in files:
        image = pillow(file, side_px)
        short = min(image.size)
        for _ in range(count if short >= SCALED_FROM * side_px else 0):
            size = int(random.integers(SCALED_FROM * side_px, short + 1))
            left, top = (int(random.integers(0, each - size + 1)) for each in image.size)
            stream = io.BytesIO()
            image.crop((left, top, left + size, top + size)).save(stream, "JPEG", quality=CROP_QUALITY)
            found.append(stream.getvalue())
    return found


def agreement(folder: Path, files: Sequence[bytes], count: int) -> str:
    """How often the class stays: with the other resizer, and where a JPEG is scaled to so many times the side."""
    artifact = open_artifact(folder)
    side_px, metrics = artifact.manifest.preprocessing.side_px, artifact.manifest.metrics
    chosen = crops(files, side_px, count)
    which = f"{artifact.manifest.name}, {side_px} px"
    if not chosen:
        return f"Top-1 with {which}: no photograph has {SCALED_FROM * side_px} pixels a side, none is scaled."
    engine = create(artifact, "openvino-fp32", Layout(cores()))

    def classes(pixels: list[np.ndarray]) -> np.ndarray:
        parts = [np.stack(pixels[i : i + 16]) for i in range(0, len(pixels), 16)]
        return np.concatenate([engine.infer(part).argmax(1) for part in parts])

    whole = {name: classes([Way("Pillow", name).run(file, side_px) for file in chosen]) for name in COMPARED}
    found = []
    for name, expected in whole.items():
        scaled = {
            times: classes([RESIZERS[name](decode(file, times * side_px), side_px) for file in chosen])
            for times in RESERVES
        }
        shares = ", ".join(f"{_same(expected, given)} with at least {times}" for times, given in scaled.items())
        found.append(f"scaled while decoded to a number of times the side, {name}: {shares}")
    pillows, fasts = whole.values()
    accuracy = metrics.get("validation", {}).get("accuracy")
    trained = f"trained, validation accuracy {accuracy:.2%}" if accuracy else "random weights"
    return (
        f"Top-1 with {which} ({trained}): of {len(chosen):,} crops, so many get the class of full decoding: "
        f"{'; '.join(found)}. Decoded in full, {' and '.join(COMPARED)} give the same class to "
        f"{_same(pillows, fasts)}. {len(np.unique(pillows))} classes occur."
    )


def _same(one: np.ndarray, other: np.ndarray) -> str:
    count = int((one == other).sum())
    return f"{count:,} ({count / len(one):.2%})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; see the module."""
    options = parse(arguments)
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    files, what = payloads(224, options.cache)
    rows, notes = [], [f"Inputs: {what}; least of {options.rounds} rounds; one thread; differences in steps of 255."]
    for side_px in options.sides:
        least = timed(files, side_px, options.rounds)
        for way, ms in sorted(least.items(), key=lambda entry: entry[1]):
            mean, largest = difference(way, files, side_px)
            rows.append([side_px, way.decoder, way.resizer or "its own", f"{ms:.2f}", f"{mean:.3f}", largest])
        large = sum(min(pillow(file, side_px).size) >= SCALED_FROM * side_px for file in files)
        notes.append(f"{side_px} px: {large} of {len(files)} files are large enough to be scaled while decoded.")
    folder = options.model or models(32, options.cache) / "artifact"
    notes.append(agreement(folder, files, options.crops))
    save("decoding", "Decoding and resizing", HEADER, rows, notes, options.output)
    return 0


HEADER = ("side", "decoder", "resizer", "ms a file", "mean difference", "largest difference")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=lambda text: [int(part) for part in text.split(",")], default=[224, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path, help="a trained artifact, for the classes")
    parser.add_argument("--crops", type=int, default=16, help="of each photograph, for the classes")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--output", type=Path, help="the folder for the table, instead of tests/bench/results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
