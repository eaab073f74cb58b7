"""`python -m training.evaluate --model DIR_OR_TAR_GZ --data DIR`: figures and report of any artifact on any data set.

Runs the network in float32 over the images, logs one line, and writes evaluation.json, report.html and PNGs. On the
images that the model was validated on in training, the figures are compared with the manifest's.

Exit status: see `training.entry`; 1 also when the figures differ from the manifest's.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.model.archive import model_folder
from service.model.artifact import open_artifact
from service.model.errors import ArtifactError
from service.model.images import RgbImage
from service.model.machine import cores
from service.model.manifest import Manifest
from service.model.network import network_of
from training.data.dataset import Dataset, LabelledImages, Labels
from training.data.layouts import open_dataset
from training.data.loader import Loader
from training.devices import pick_device
from training.entry import add_machine_flags, positive, run_command
from training.errors import DataError, TrainingError
from training.figures import Figures, figures
from training.logits import BATCH, logits_of
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

    Raises: DataError naming the classes that only one of the two has.
    """
    trained = manifest.hyperparameters
    dataset = open_dataset(
        data,
        validation_fraction=trained.get("validation_fraction", 0.1),
        seed=trained.get("seed", 0),
        broken_files=trained.get("broken_files", "refuse"),
        validation_root=validation,
    )
    unknown, absent = (
        [name for name in one if name not in set(other)]
        for one, other in ((dataset.classes, manifest.classes), (manifest.classes, dataset.classes))
    )
    if unknown or absent:
        parts = [f"unknown to the model: {_listed(unknown)}"] if unknown else []
        parts += [f"missing in the data: {_listed(absent)}"] if absent else []
        raise DataError(
            f"{data} has {len(dataset.classes)} classes, the model {manifest.name} has {len(manifest.classes)}, "
            f"and they are not the same ({'; '.join(parts)}); name the folders as the model's classes."
        )
    images = dataset.validation if split == "validation" else dataset.train
    places = {name: k for k, name in enumerate(manifest.classes)}
    in_model = np.asarray([places[name] for name in dataset.classes], np.int64)  # [K]
    return dataset, Relabelled(images, in_model[images.labels])


def facts_of(dataset: Dataset) -> dict[str, Any]:
    """What a manifest says of the data set (see `training.export`)."""
    return {
        "name": dataset.name, "train_images": len(dataset.train), "validation_images": len(dataset.validation),
        **dataset.facts,
    }  # fmt: skip


def compare(manifest: Manifest, dataset: Dataset, split: str, measured: Figures) -> bool | None:
    """Whether the figures are those of the manifest; None where it tells of other images. Logs which."""
    stated = numbers(manifest.metrics.get("validation"))
    facts = json.loads(json.dumps(facts_of(dataset)))
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
            network = network_of(artifact).to(device)
    except ArtifactError as exc:
        raise TrainingError(str(exc)) from exc
    dataset, images = open_images(manifest, options.data, options.validation, options.split)
    loader = Loader(images, manifest.preprocessing.side_px, options.loader_workers, options.split, device)
    logits, labels = logits_of(network, loader, device, "evaluating", options.batch_size)
    measured = figures(logits, labels)
    log.info(
        "%s: accuracy %.2f %%, top-5 %.2f %%, loss %.4f, ece %.4f, macro_f1 %.4f, n=%d",
        options.split, 100 * measured.accuracy, 100 * measured.top5_accuracy, measured.loss, measured.ece,
        measured.macro_f1, measured.n,
    )  # fmt: skip
    if manifest.quantization is not None:
        log.info("int8, as the manifest states: %s", described(manifest.quantization))
    write_report(
        options.output or default_output(options.model), manifest, images, measured,
        split=options.split, dataset=facts_of(dataset),
    )  # fmt: skip
    if compare(manifest, dataset, options.split, measured) is False:
        raise TrainingError(
            "The figures differ from those the manifest states of the same images; "
            "is this the data, unchanged, that the model was trained on?"
        )


def default_output(model: Path) -> Path:
    """`artifacts/pets` and `artifacts/pets.tar.gz` -> `artifacts/pets-evaluation`."""
    home = model.resolve()
    return home.with_name(f"{home.name.removesuffix('.gz').removesuffix('.tgz').removesuffix('.tar')}-evaluation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description="Evaluate a model on labelled images and write a report."
    )
    parser.add_argument("--model", type=Path, required=True, help="artifact: its folder or a .tar.gz of it")
    parser.add_argument("--data", type=Path, required=True, help="cifar-100-python/ or one folder of images per class")
    parser.add_argument("--validation", type=Path, help="class folders to evaluate on, instead of a part of --data")
    parser.add_argument("--split", choices=("validation", "train"), default="validation", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder of the report (default: beside the model, -evaluation)")
    parser.add_argument("--batch-size", type=positive, default=BATCH, help="images at once (default: %(default)s)")
    add_machine_flags(parser)
    return run_command(parser, arguments, evaluate)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _described(manifest: Manifest) -> str:
    facts = manifest.dataset
    return f"{facts.get('name')}, {facts.get('validation_images')} to validate on, split {facts.get('split')}"


if __name__ == "__main__":
    sys.exit(main())
