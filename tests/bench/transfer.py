"""`python -m tests.bench.transfer`: do frozen blocks that were pretrained beat frozen blocks that were not?

Weights are pretrained here, on 5 classes of CIFAR-10 (real pictures, random initial weights, nothing frozen). The
other 5 classes are then fine-tuned twice with the same recipe, blocks 1 to 3 and the stem frozen: once from those
weights, once from random ones. Validation images are a tenth of each class, split by seed.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from service.model.artifact import open_artifact
from tests.bench.pictures import selection, unpacked
from tests.bench.table import save
from training.callbacks import Callback
from training.command_line import configure_logging
from training.config import TrainingConfig
from training.run import run

log = logging.getLogger("bench")

PRETRAINING = ("airplane", "automobile", "bird", "cat", "deer")
FINE_TUNING = ("dog", "frog", "horse", "ship", "truck")


def main() -> int:
    """Train all three; returns the exit status: 1 when the margin is not reached."""
    configure_logging()
    with tempfile.TemporaryDirectory() as scratch:
        return _measure(Path(scratch))


def _measure(scratch: Path) -> int:
    train = unpacked(Path(tempfile.gettempdir()) / "resnet34-bench")
    if train is None:
        log.error("The CIFAR-10 JPEG files are not at hand (../shared/data): nothing is measured.")
        return 1
    first = selection(train, scratch / "first", PRETRAINING, 4000)
    second = selection(train, scratch / "second", FINE_TUNING, 2000)
    started_s = time.monotonic()
    weights = pretrain(first, scratch / "pretrained", epochs=6)
    pretraining_s = time.monotonic() - started_s
    metrics = open_artifact(scratch / "pretrained").manifest.metrics
    rows: list[list[object]] = [["5 classes, nothing frozen", "random", *_figures(metrics), f"{pretraining_s:.0f}"]]
    accuracies = []
    for name, source in (("those weights", str(weights)), ("random", "none")):
        started_s = time.monotonic()
        artifact = run(
            TrainingConfig(
                data=second, output=scratch / name, weights=source, freeze=("stem", "layer1", "layer2", "layer3"),
                epochs=12, learning_rate=0.01, schedule="one-cycle", precision="auto",
                cache_folder=scratch / "features", quantize="off",
            )
        )  # fmt: skip
        assert artifact is not None
        metrics = artifact.manifest.metrics
        accuracies.append(metrics["validation"]["accuracy"])
        seconds = time.monotonic() - started_s
        rows.append(["other 5 classes, blocks 1-3 and stem frozen", name, *_figures(metrics), f"{seconds:.0f}"])
    margin = 100 * (accuracies[0] - accuracies[1])
    save(
        "transfer", "Transfer: frozen blocks pretrained on other classes, against random ones",
        ["training", "initial weights", "validation accuracy", "n", "seconds"], rows,
        [
            f"Pretrained frozen blocks are {margin:+.1f} points ahead (wanted: at least 10).",
            "CIFAR-10 training images as JPEG, 32 px, a tenth of each class held out by seed; one run each.",
        ],
    )  # fmt: skip
    log.info("pretrained frozen blocks are %+.1f points ahead", margin)
    return 0 if margin >= 10 else 1


def pretrain(data: Path, output: Path, epochs: int, callbacks: Sequence[Callback] = (), seed: int = 0) -> Path:
    """Train a whole network from random weights on `data`. Returns: its weights file, in the artifact `output`."""
    pretrained = run(
        TrainingConfig(
            data=data, output=output, weights="none", epochs=epochs, optimizer="adamw", learning_rate=1e-3,
            batch_size=64, weight_decay=0.01, schedule="one-cycle", precision="auto", augment="flip-crop",
            quantize="off", seed=seed,
        ),
        callbacks,
    )  # fmt: skip
    assert pretrained is not None
    return pretrained.path("weights")


def _figures(metrics: dict[str, dict[str, float]]) -> tuple[str, int]:
    validation = metrics["validation"]
    return f"{100 * validation['accuracy']:.2f} %", int(validation["n"])


if __name__ == "__main__":
    sys.exit(main())
