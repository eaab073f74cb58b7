"""`python -m training.quantize --model DIR --data DIR`: add the int8 network to an artifact that has been written.

For models trained without nncf or with `--quantize off`. The float32 network, its version and everything else the
manifest states stay; a service that runs meanwhile does not notice. Exit status: see `training.command_line`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from service.model.artifact import open_artifact
from service.model.errors import ArtifactError
from service.model.machine import cores
from service.model.network import network_of
from training.command_line import add_machine_flags, positive, run_command
from training.data.loader import Loader
from training.devices import pick_device
from training.errors import DataError, TrainingError
from training.evaluate import absent_classes, compare, open_images
from training.figures import figures
from training.logits import logits_of
from training.quantization import CALIBRATION_IMAGES, add_quantized, require
from training.run import require_writable

log = logging.getLogger("training")


def quantize(options: argparse.Namespace) -> None:
    """Check, run the float32 network, quantize, write. Raises: TrainingError."""
    if options.model.is_file():
        raise TrainingError(
            f"--model {options.model} is a file; int8 is added to a folder: unpack the archive "
            f"(tar -xzf {options.model} -C DIR), name that folder, and pack it again."
        )
    require()
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    device = pick_device(options.device)
    try:
        artifact = open_artifact(options.model)
        artifact.verify()
        network = network_of(artifact).to(device)
    except ArtifactError as exc:
        raise TrainingError(str(exc)) from exc
    require_writable(artifact.folder, "model")
    manifest = artifact.manifest
    dataset, images = open_images(manifest, options.data, options.validation, "validation")
    if absent := absent_classes(manifest, dataset):
        raise DataError(
            f"Missing in the data: {', '.join(absent[:10])}; int8 is calibrated and judged on all of the model's "
            f"{len(manifest.classes)} classes: give the data it was trained on."
        )
    side_px = manifest.preprocessing.side_px
    train = Loader(dataset.train, side_px, options.loader_workers, "train", device)
    validation = Loader(images, side_px, options.loader_workers, "validation", device)
    logits, labels = logits_of(network, validation, device, "float32")
    if compare(manifest, dataset, "validation", figures(logits, labels)) is False:
        raise TrainingError(
            "The float32 network's figures differ from those the manifest states of the same images, so int8 would be "
            "compared with the wrong thing; is this the data, unchanged, that the model was trained on?"
        )
    artifact = add_quantized(artifact, train, validation, logits, labels, options.calibration_images)
    log.info("artifact %s version %s in %s has its int8 network", manifest.name, manifest.version, artifact.folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Quantize; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.quantize", description="Add an int8 network to an artifact, and measure it."
    )
    parser.add_argument("--model", type=Path, required=True, help="the artifact's folder")
    parser.add_argument("--data", type=Path, required=True, help="the images it was trained on, as in training")
    parser.add_argument("--validation", type=Path, help="class folders to validate on, instead of a part of --data")
    parser.add_argument(
        "--calibration-images", type=positive, default=CALIBRATION_IMAGES,
        help="training images that tell the ranges of the activations (default: %(default)s)",
    )  # fmt: skip
    add_machine_flags(parser)
    return run_command(parser, arguments, quantize)


if __name__ == "__main__":
    sys.exit(main())
