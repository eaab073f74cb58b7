"""`python -m training.starter`: a first model for `make serve` on a machine that has none.

CIFAR-100 with ImageNet weights where both can be had, else the generated sample; either within minutes on a
laptop's CPU. A starter is to try the service with; real models come from `training.train_model`.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from training.command_line import configure_logging, exit_status
from training.config import TrainingConfig, read_recipe
from training.data import cifar100, sample
from training.data.layouts import SAMPLE
from training.errors import DataError, WeightsError
from training.pretrained import imagenet_state
from training.run import run

log = logging.getLogger("training")


def choose(data: Path) -> dict[str, object]:
    """The preset that this machine can run, its data in place; says plainly which and why."""
    try:
        imagenet_state()
        cifar100.download(data)
    except (WeightsError, DataError) as exc:
        log.warning("%s", exc)
        log.warning(
            "So the starter model is trained on the GENERATED SAMPLE (100 classes of drawn shapes), from random "
            "weights: enough to try the service, useless for real pictures."
        )
        sample.write(data / SAMPLE)
        return {**read_recipe("sample"), "data": data / SAMPLE}
    log.info("The starter model is fine-tuned on CIFAR-100 from ImageNet weights: both are here.")
    return {**read_recipe("quick"), "data": data, "model_name": "resnet34-cifar100-quick"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a starter model; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.starter", description="Fine-tune a first model to serve.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where data sets are kept (default: data)")
    parser.add_argument("--output", type=Path, default=Path("artifacts/model"), help="default: artifacts/model")
    options = parser.parse_args(arguments)
    configure_logging()
    started_s = time.monotonic()
    status = exit_status(lambda: run(TrainingConfig.create({**choose(options.data), "output": options.output})))
    if status:
        return status
    log.info("the starter model took %.0f s", time.monotonic() - started_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
