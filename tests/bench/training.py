"""`make bench-training`: what the feature cache saves, what tuning and instrumentation cost. Writes results/training.md.

Times are medians of rounds in which all ways take turns; images are drawn by us (speed does not depend on what they
show). Epochs count from the second on and have the validation pass that CIFAR-100 has: one image for five trained on.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.bench.table import save
from training.callbacks import Callback, Step
from training.config import TrainingConfig
from training.data import sample
from training.entry import configure_logging
from training.features import Views, open_cache
from training.loop import evaluate
from training.prefix_engines import choose_engine
from training.run import fit, prepare
from training.sources import ImageSource

log = logging.getLogger("bench")

FROZEN = ("stem", "layer1", "layer2", "layer3")
Row = list[object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["epochs", "pass", "tuning", "instruments"], action="append")
    options = parser.parse_args(arguments)
    configure_logging()
    logging.getLogger("training").setLevel(logging.WARNING)
    parts = {"epochs": epochs, "pass": first_pass, "tuning": tuning, "instruments": instruments}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only or parts:
            rows += parts[name](Path(scratch), options.rounds)
    save(
        "training", "Training: ratios measured in one run", ["what", "side", "measured", "against", "ratio", "wanted"],
        rows, [
            f"medians of {options.rounds} rounds, ways in turn; torch threads {torch.get_num_threads()}",
            "an epoch is its training steps and its validation pass (one image for five), from the second epoch on",
            "'plain' runs the frozen blocks in every step; both ways make the same steps from the same weights",
            "blocks have random weights: time does not depend on them",
        ],
    )  # fmt: skip
    return 0


def epochs(scratch: Path, rounds: int) -> list[Row]:
    """Epoch times from cached features and from images, in float32 and bfloat16."""
    rows: list[Row] = []
    for side, images, wanted in ((128, 640, 4), (224, 256, 8)):
        data = drawn(scratch / f"data{side}", images)
        ways = {
            (cache, precision): config(data, scratch, side=side, precision=precision, feature_cache=cache, epochs=2)
            for precision in ("fp32", "bf16")
            for cache in ("on", "off")
        }
        prepared = {way: prepare(settings) for way, settings in ways.items()}
        seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way, settings in ways.items():
                seconds[way].append(fit(settings, prepared[way]).history[1].seconds)
                log.info("epoch side %d round %d %s: %.2f s", side, number + 1, way, seconds[way][-1])
        median = {way: statistics.median(values) for way, values in seconds.items()}
        for cached, plain in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")):
            ratio = median["off", plain] / median["on", cached]
            rows.append(
                [
                    f"epoch, cached {cached} against plain {plain}", side,
                    f"{1000 * median['on', cached] / images:.2f} ms an image",
                    f"{1000 * median['off', plain] / images:.2f} ms an image", f"{ratio:.2f}", f">= {wanted}",
                ]
            )  # fmt: skip
    return rows


def first_pass(scratch: Path, rounds: int) -> list[Row]:
    """Filling the cache against a plain forward pass of the whole network over the same images."""
    rows: list[Row] = []
    for side, images in ((128, 640), (224, 256)):
        data = drawn(scratch / f"data{side}", images)
        for precision in ("fp32", "bf16"):
            settings = config(data, scratch, side=side, precision=precision, feature_cache="off", epochs=1)
            prepared = prepare(settings)
            network = fit(settings, prepared).network.eval()
            network.architecture = network.architecture.model_copy(update={"frozen": FROZEN})
            engine = choose_engine(network, prepared.device, prepared.bf16)
            engine.run(torch.zeros(engine.batch_size, side, side, 3, dtype=torch.uint8))  # burn in
            filled, forward = [], []
            for number in range(rounds):
                started_s = time.perf_counter()
                open_cache(scratch / f"pass{number}", network, prepared.train, Views(), engine)
                filled.append(time.perf_counter() - started_s)
                started_s = time.perf_counter()
                evaluate(network, ImageSource(prepared.train, settings), prepared.device, "plain", bf16=prepared.bf16)
                forward.append(time.perf_counter() - started_s)
            one, other = statistics.median(filled), statistics.median(forward)
            rows.append(
                [
                    f"first pass {precision} ({engine.name}) against a plain forward pass", side,
                    f"{1000 * one / images:.2f} ms an image", f"{1000 * other / images:.2f} ms an image",
                    f"{one / other:.2f}", "<= 1.2",
                ]
            )  # fmt: skip
    return rows


class Steps(Callback):
    """Notes the time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, step: Step) -> None:
        """See `Callback`."""
        self.seconds.append(step.seconds)


def config(data: Path, scratch: Path, **values: object) -> TrainingConfig:
    """Settings of a run with frozen random blocks."""
    common = {"weights": "none", "freeze": ",".join(FROZEN), "batch_size": 128, "augment": "none"}
    places = {"data": data, "output": scratch / "model", "cache_folder": scratch / "features"}
    return TrainingConfig.create({**common, **places, **values})


def drawn(folder: Path, images: int) -> Path:
    """A data set of `images` to train on and a fifth as many to validate on, in CIFAR-100's format."""
    if not folder.exists():
        sample.write(folder, train_per_class=-(-images // 100), test_per_class=-(-images // 500))
    return folder


if __name__ == "__main__":
    sys.exit(main())
