"""`python -m training.evaluate --model DIR_OR_TAR_GZ --data DIR`: figures and report of any artifact on any data set.

Runs the network over the images, in float32 unless --engine names another, logs one line, and writes evaluation.json,
report.html and PNGs. On the images that the model was validated on in training, the figures are compared with the
manifest's of that network. The images may lack some of the model's classes.

Exit status: see `training.command_line`; 1 also when the figures differ from the manifest's.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from service.model.archive import model_folder
from service.model.artifact import Artifact, open_artifact
from service.model.errors import ArtifactError
from service.model.images import RgbImage
from service.model.machine import cores
from service.model.manifest import Manifest
from service.model.network import network_of
from training.command_line import add_machine_flags, listed, positive, run_command
from training.config import beside
from training.data.dataset import Dataset, LabelledImages, Labels
from training.data.layouts import open_dataset
from training.data.loader import Loader
from training.devices import pick_device
from training.errors import ConfigError, DataError, TrainingError
from training.figures import Figures, figures
from training.logits import BATCH, logits_of
from training.openvino_runner import openvino_runner
from training.quantization import described
from training.report.sources import numbers
from training.report.write import write_report

log = logging.getLogger("training")

ACCURACY_TOLERANCE, LOSS_TOLERANCE = 0.002, 0.01
"""Figures this near to the manifest's agree with them: another device rounds otherwise (TF32 on a GPU)."""


@dataclass(frozen=True)
class Relabelled:
    """The images of a data set with its labels written in the model's order of classes."""

    images: LabelledImages
    labels: Labels

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> RgbImage:
        """See `LabelledImages.image`."""
        return self.images.image(index)

    def resized(self, index: int, side_px: int) -> RgbImage:
        """See `LabelledImages.resized`."""
        return self.images.resized(index, side_px)

    def payload(self, index: int) -> bytes:
        """See `LabelledImages.payload`."""
        return self.images.payload(index)

    def file_name(self, index: int) -> str:
        """See `LabelledImages.file_name`."""
        return self.images.file_name(index)

    def digest(self) -> bytes:
        """See `LabelledImages.digest`."""
        return self.images.digest()


def open_images(manifest: Manifest, data: Path, validation: Path | None, split: str) -> tuple[Dataset, LabelledImages]:
    """The data set, split by the seed and share of the model's training, and its images of `split`.

    The images' labels are indices into the manifest's classes, whatever the order of the data set's.

    Raises: DataError naming the classes that the model does not know.
    """
    trained = manifest.hyperparameters
    dataset = open_dataset(
        data,
        validation_fraction=trained.get("validation_fraction", 0.1),
        seed=trained.get("seed", 0),
        broken_files=trained.get("broken_files", "refuse"),
        validation_root=validation,
    )
    unknown = [name for name in dataset.classes if name not in set(manifest.classes)]
    absent = absent_classes(manifest, dataset)
    if unknown:
        raise DataError(
            f"{data} has classes unknown to the model {manifest.name}: {listed(unknown)}; name the folders as the "
            f"model's {len(manifest.classes)} classes ({listed(absent or manifest.classes)})."
        )
    if absent:
        log.info(
            "without images of %d of the model's %d classes: %s", len(absent), len(manifest.classes), listed(absent)
        )
    images = dataset.validation if split == "validation" else dataset.train
    places = {name: k for k, name in enumerate(manifest.classes)}
    in_model = np.asarray([places[name] for name in dataset.classes], np.int64)  # [K]
    return dataset, Relabelled(images, in_model[images.labels])


def absent_classes(manifest: Manifest, dataset: Dataset) -> list[str]:
    """The model's classes that the data set does not have, in the model's order."""
    return [name for name in manifest.classes if name not in set(dataset.classes)]


def compare(manifest: Manifest, dataset: Dataset, split: str, measured: Figures, engine: str = "torch") -> bool | None:
    """Whether the figures are those of the manifest; None where it tells of other images. Logs which."""
    if engine == "openvino-int8" and manifest.quantization is not None:  # its accuracy is stated, its loss is not
        stated = {"accuracy": manifest.quantization.accuracy, "loss": measured.loss}
    else:
        stated = numbers(manifest.metrics.get("validation"))
    facts = json.loads(json.dumps(dataset.described()))
    same_data = facts == {name: value for name, value in manifest.dataset.items() if name in facts}
    if split != "validation" or not same_data or not {"accuracy", "loss"} <= set(stated):
        log.warning(
            "not compared with the manifest, whose figures are of other images (%s); if these are its folders with "
            "images added or removed, some of them were trained on",
            _described(manifest),
        )
        return None
    agrees = (
        abs(measured.accuracy - stated["accuracy"]) <= ACCURACY_TOLERANCE
        and abs(measured.loss - stated["loss"]) <= LOSS_TOLERANCE
    )
    if engine == "openvino-bf16":
        log.info("manifest, float32: accuracy %.2f %%, loss %.4f", 100 * stated["accuracy"], stated["loss"])
        return None  # rounding alone may change as much as the tolerance
    log.log(
        logging.INFO if agrees else logging.ERROR,
        "manifest: accuracy %.2f %%, loss %.4f: %s",
        100 * stated["accuracy"], stated["loss"], "they agree" if agrees else "THEY DIFFER",
    )  # fmt: skip
    return agrees


def evaluate(options: argparse.Namespace) -> None:
    """Load, run, write, compare. Raises: TrainingError."""
    device = pick_device(options.device)
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    try:
        with model_folder(options.model) as folder:
            artifact = open_artifact(folder)
            manifest = artifact.manifest
            artifact.verify()
            run = runner(artifact, options.engine, device)
    except ArtifactError as exc:
        raise TrainingError(str(exc)) from exc
    dataset, images = open_images(manifest, options.data, options.validation, options.split)
    loader = Loader(images, manifest.preprocessing.side_px, options.loader_workers, options.split, device)
    logits, labels = logits_of(run, loader, device, "evaluating", options.batch_size)
    measured = figures(logits, labels)
    log.info(
        "%s, %s: %s, loss %.4f, ece %.4f, macro_f1 %.4f, n=%d",
        options.split, options.engine, measured.told(), measured.loss, measured.ece, measured.macro_f1, measured.n,
    )  # fmt: skip
    if manifest.quantization is not None and options.engine != "openvino-int8":
        log.info("int8, as the manifest states: %s", described(manifest.quantization))
    write_report(
        options.output or default_output(options.model, options.engine), manifest, images, measured,
        split=options.split, dataset={**dataset.described(), "engine": options.engine},
    )  # fmt: skip
    if compare(manifest, dataset, options.split, measured, options.engine) is False:
        raise TrainingError(
            "The figures differ from those the manifest states of the same images; "
            "is this the data, unchanged, that the model was trained on?"
        )


def runner(artifact: Artifact, engine: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function uint8 `[N, S, S, 3]` -> logits `[N, K]` of one of the artifact's networks.

    Raises: ArtifactError, ConfigError.
    """
    if engine == "torch":
        network: Callable[[Tensor], Tensor] = network_of(artifact).to(device).eval()
        return network
    try:
        run = openvino_runner(artifact, engine.removeprefix("openvino-"))
    except ImportError as exc:
        raise ConfigError(f"--engine {engine} needs OpenVINO, which cannot be imported ({exc}).") from exc
    return lambda images: torch.from_numpy(run(images.cpu().numpy()))


def default_output(model: Path, engine: str = "torch") -> Path:
    """`artifacts/pets` and `artifacts/pets.tar.gz` -> `artifacts/pets-evaluation`, with other engines' names behind."""
    home = beside(model, "")
    name = home.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
    return home.with_name(f"{name}-evaluation" + (f"-{engine}" if engine != "torch" else ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description="Evaluate a model on labelled images and write a report."
    )
    parser.add_argument("--model", type=Path, required=True, help="artifact: its folder or a .tar.gz of it")
    parser.add_argument("--data", type=Path, required=True, help="cifar-100-python/ or one folder of images per class")
    parser.add_argument("--validation", type=Path, help="class folders to evaluate on, instead of a part of --data")
    parser.add_argument("--split", choices=("validation", "train"), default="validation", help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, help="folder of the report (default: beside the model, MODEL-evaluation[-ENGINE])"
    )
    parser.add_argument(
        "--engine", choices=("torch", "openvino-fp32", "openvino-bf16", "openvino-int8"), default="torch",
        help="which network, and in which arithmetic: those that the service runs on processors (default: %(default)s, "
        "in float32)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=BATCH, help="images at once (default: %(default)s)")
    add_machine_flags(parser)
    return run_command(parser, arguments, evaluate)


def _described(manifest: Manifest) -> str:
    facts = manifest.dataset
    return f"{facts.get('name')}, {facts.get('validation_images')} to validate on, split {facts.get('split')}"


if __name__ == "__main__":
    sys.exit(main())
