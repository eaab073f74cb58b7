"""`make bench-training`: what the feature cache saves, what tuning and instruments cost. Writes results/training-*.md.

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
from training.command_line import configure_logging
from training.config import TrainingConfig
from training.data import sample
from training.epoch_metrics import EpochMetrics
from training.features import Views, open_cache
from training.instrumentation import Instrumentation
from training.prefix_engines import choose_engine
from training.preparation import prepare
from training.run import Fitted, fit
from training.sources import ImageSource
from training.tuning.config import TuningConfig
from training.tuning.trials import Train, Tuner
from training.validation import validate

log = logging.getLogger("bench")

FROZEN = ("stem", "layer1", "layer2", "layer3")
Row = list[object]

NOTES = {
    "epochs": (
        "at 224 px block 4's training is 1.9 of the plain loop's 4.9 GMAC an image: 2.6 is as far apart as their "
        "arithmetic is, what goes beyond it in one precision comes of memory-bound early layers",
        "before block 4's convolutions were gathered products (commit 5f9653b, 2026-11-29, one round), 128 px took "
        "in bfloat16 5.07 ms an image cached and 20.97 plain (4.13), in float32 8.14 and 19.79 (2.43): both ways make "
        "these steps, so that in bfloat16 the ratio fell when both became faster",
        "without AMX: [training-epochs-no-amx.md](training-epochs-no-amx.md)",
    ),
    "pass": (
        "without AMX (2 cores of an EPYC, 2026-11-23, commit 5ddaefa, two rounds): 0.66 and 0.72 at 128 px, 0.64 and "
        "0.66 at 224 px",
    ),
}
"""What is said below a part's table besides."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(PARTS), action="append")
    options = parser.parse_args(arguments)
    configure_logging()
    logging.getLogger("training").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only or PARTS:
            rows = PARTS[name](Path(scratch), options.rounds)
            if rows:
                write(name, rows, options.rounds)
    return 0


def write(part: str, rows: list[Row], rounds: int) -> None:
    """The table of a part, at once: a bench that is stopped keeps what it has."""
    save(
        f"training-{part}", f"Training ({part}): ratios measured in one run",
        ["what", "side", "measured", "against", "ratio", "wanted"], rows, [
            f"{'one round' if rounds == 1 else f'medians of {rounds} rounds'}, ways in turn; "
            f"torch threads {torch.get_num_threads()}",
            "an epoch is its training steps and its validation pass (one image for five), from the second epoch on",
            "'plain' runs the frozen blocks in every step; both ways make the same steps from the same weights",
            "blocks have random weights: time does not depend on them",
            *NOTES.get(part, ()),
        ],
    )  # fmt: skip


def epochs(scratch: Path, rounds: int) -> list[Row]:
    """Epoch times from cached features and from images, in float32 and bfloat16."""
    rows: list[Row] = []
    for side, images, wanted in ((64, 1000, ""), (128, 500, ">= 4"), (224, 500, ">= 8")):
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
                    f"{1000 * median['off', plain] / images:.2f} ms an image", f"{ratio:.2f}", wanted,
                ]
            )  # fmt: skip
    return rows


def first_pass(scratch: Path, rounds: int) -> list[Row]:
    """Filling the cache against a plain forward pass of the whole network over the same images."""
    rows: list[Row] = []
    for side, images in ((128, 500), (224, 500)):
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
                validate(network, ImageSource(prepared.train, settings), prepared.device, "plain", bf16=prepared.bf16)
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


def tuning(scratch: Path, rounds: int) -> list[Row]:
    """Ten trials from an empty folder against their epochs and the pass that fills the cache."""
    rows: list[Row] = []
    for side, images, epochs_range in ((64, 600, "2:6"),):
        data = drawn(scratch / f"data{side}", images)
        shares, walls = [], []
        for number in range(rounds):
            places = {"output": scratch / f"study{number}", "cache_folder": scratch / f"features{number}"}
            base = config(data, scratch, side=side, precision="fp32", feature_cache="on", **places)
            fixed = {name: getattr(base, name) for name in base.model_fields_set}
            parts = {"pass": 0.0, "epochs": 0.0}

            def prepared(settings: TrainingConfig, parts: dict[str, float] = parts) -> tuple[Train, dict[str, object]]:
                started_s = time.perf_counter()
                ready = prepare(settings)
                parts["pass"] = time.perf_counter() - started_s

                def train(trial: TrainingConfig, callbacks: Sequence[Callback]) -> Fitted:
                    fitted = fit(trial, ready, callbacks)
                    parts["epochs"] += sum(epoch.seconds for epoch in fitted.history)
                    return fitted

                return train, {}

            del fixed["batch_size"]
            settings = TuningConfig.create({"trials": 10, "epochs_range": epochs_range, "batch_sizes": "32,64,128"})
            started_s = time.perf_counter()
            base.output.mkdir(parents=True)
            Tuner(settings, fixed, base, prepared).run()
            walls.append(time.perf_counter() - started_s)
            shares.append(walls[-1] / (parts["pass"] + parts["epochs"]))
        rows.append(
            [
                "10 tuning trials against their cached epochs and one pass", side,
                f"{statistics.median(walls):.1f} s", f"{statistics.median(walls) / statistics.median(shares):.1f} s",
                f"{statistics.median(shares):.2f}", "<= 1.5",
            ]
        )  # fmt: skip
    return rows


def compiling(scratch: Path, rounds: int) -> list[Row]:
    """Epochs of the compiled network against those of the plain one, in the precision that `auto` takes here."""
    rows: list[Row] = []
    for side, images, cache in ((32, 2000, "on"), (224, 500, "on"), (224, 300, "off")):
        data = drawn(scratch / f"data{side}-{images}", images)
        ways = {
            compiled: config(
                data, scratch, side=side, precision="auto", feature_cache=cache, epochs=2, compile=compiled
            )
            for compiled in (False, True)
        }
        prepared = {way: prepare(settings) for way, settings in ways.items()}
        seconds: dict[bool, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(rounds):
            for way, settings in ways.items():
                torch.compiler.reset()
                first, second = (epoch.seconds for epoch in fit(settings, prepared[way]).history)
                seconds[way].append((first, second))
                log.info("side %d round %d compiled %s: %.2f s, %.2f s", side, number + 1, way, first, second)
        plain, compiled = (statistics.median(second for _, second in seconds[way]) for way in (False, True))
        longer = statistics.median(first - second for first, second in seconds[True])
        rows.append(
            [
                f"epoch, compiled against not, {'from cached features' if cache == 'on' else 'plain loop'}; "
                f"the first takes {longer:.0f} s more",
                side, f"{1000 * compiled / images:.2f} ms an image", f"{1000 * plain / images:.2f} ms an image",
                f"{compiled / plain:.2f}", "",
            ]
        )  # fmt: skip
    return rows


def gpu(scratch: Path, rounds: int) -> list[Row]:
    """Seventy epochs of the reference on 50,000 images, the pass that fills the cache included; once, on a GPU.

    The parts of the time are for the header of the recipe.
    """
    if not torch.cuda.is_available():
        log.warning("no GPU that PyTorch can use: nothing is measured on one")
        return []
    rows: list[Row] = []
    data = drawn(scratch / "data-cifar", 50_000)
    for side, limit_s in ((32, 60), (224, 300)):
        settings = config(data, scratch, side=side, precision="auto", feature_cache="on", augment="flip", epochs=70)
        clock = StepClock()
        started_s = time.perf_counter()
        prepared = prepare(settings)
        filled_s = time.perf_counter() - started_s
        history = fit(settings, prepared, [clock]).history
        total_s = time.perf_counter() - started_s
        epochs_s = sum(epoch.seconds for epoch in history)
        parts = {
            "images and cache": filled_s, "waiting for batches": clock.waited_s,
            "training steps": clock.steps_s - clock.waited_s, "validation passes": epochs_s - clock.steps_s,
            "the rest": total_s - filled_s - epochs_s,
        }  # fmt: skip
        shares = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
        median_s = statistics.median(epoch.seconds for epoch in history)
        rows.append(
            [
                f"70 epochs of 50,000 images ({shares})", side, f"{total_s:.1f} s", f"{median_s:.2f} s an epoch", "",
                f"<= {limit_s} s",
            ]
        )  # fmt: skip
    return rows


class StepClock(Callback):
    """Adds up the steps' times, and the part of them in which they waited for their batch.

    The loop looks at a GPU every 50 steps only: what is under way counts for the step that waits for it.
    """

    def __init__(self) -> None:
        self.steps_s = 0.0
        self.waited_s = 0.0

    def on_step_end(self, step: Step) -> None:
        """See `Callback`."""
        self.steps_s += step.seconds
        self.waited_s += step.data_wait_s


class Wall(Callback):
    """Notes the time from the first epoch's start to the last one's end."""

    def __init__(self) -> None:
        self.started_s = 0.0
        self.seconds = 0.0

    def on_epoch_start(self, epoch: int) -> None:
        """See `Callback`."""
        self.started_s = self.started_s or time.perf_counter()

    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        """See `Callback`."""
        self.seconds = time.perf_counter() - self.started_s


def instruments(scratch: Path, rounds: int) -> list[Row]:
    """Training with each instrument against training without, from cached features at 32 px: the shortest steps.

    An epoch has 200 steps, half of what the reference has on CIFAR-100: some instruments do something once an epoch.
    """
    data = drawn(scratch / "data32", 6400)
    settings = config(data, scratch, side=32, batch_size=32, feature_cache="on", epochs=2)
    prepared = prepare(settings)
    off = {"observe_every": 0, "tensorboard": False, "profile": False, "debugger": "off"}
    ways: dict[str, dict[str, object]] = {
        "none": off,
        "rules, every 100 steps (default)": off | {"observe_every": 100},
        "TensorBoard (default)": off | {"tensorboard": True},
        "profiler (default)": off | {"profile": True},
        "all defaults": {},
        "smdebug's hook, every 100 steps": off | {"debugger": "on", "debugger_interval": 100},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, values in ways.items():
            wall = Wall()
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                own = settings.model_copy(update={"run_folder": Path(folder)})
                fit(own, prepared, [*Instrumentation.create(values).callbacks(None), wall])
            seconds[name].append(wall.seconds)
    steps = settings.epochs * len(prepared.train) // settings.batch_size
    median = {name: statistics.median(values) / steps for name, values in seconds.items()}
    return [
        [
            f"a step with {name}, against one without", 32, f"{1000 * median[name]:.1f} ms",
            f"{1000 * median['none']:.1f} ms", f"{median[name] / median['none']:.2f}", "",
        ]
        for name in ways
        if name != "none"
    ]  # fmt: skip


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


PARTS = {
    "epochs": epochs, "pass": first_pass, "tuning": tuning, "instruments": instruments, "compile": compiling,
    "gpu": gpu,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
