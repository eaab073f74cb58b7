"""Trained network -> artifact: weights, facts, self-check and the example."""

import mimetypes
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from service.model.artifact import Artifact, SelfCheck, write_artifact
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training.config import TrainingConfig
from training.data.dataset import Dataset
from training.data.loader import Loader
from training.loop import EpochMetrics, Evaluation

SELF_CHECK_INPUTS = 4
EXAMPLE_CANDIDATES = 32
PACKAGES = ("numpy", "pillow", "safetensors", "torch", "torchvision")


def export(
    network: Network,
    preprocessing: Preprocessing,
    config: TrainingConfig,
    dataset: Dataset,
    validation: Loader,
    *,
    pretrained: str,
    history: list[EpochMetrics],
    evaluation: Evaluation,
) -> Artifact:
    """Write the artifact of `network` into `config.output`. Raises: OSError."""
    network = network.cpu().float().eval()
    with torch.inference_mode():
        candidates = validation.first(EXAMPLE_CANDIDATES)  # [n, S, S, 3]
        logits = network(candidates)  # [n, K]
    predicted_right = (logits.argmax(1) == validation.labels[: len(candidates)]).nonzero()
    index = int(predicted_right[0]) if len(predicted_right) else 0
    file_name = dataset.validation.file_name(index)
    inputs = candidates[:SELF_CHECK_INPUTS]
    with torch.inference_mode():
        check = SelfCheck(inputs.numpy(), network(inputs).numpy())
    facts: dict[str, Any] = {
        "name": config.model_name,
        "architecture": network.architecture,
        "classes": dataset.classes,
        "preprocessing": preprocessing,
        "example": {
            "label": dataset.classes[int(dataset.validation.labels[index])],
            "media_type": mimetypes.guess_type(file_name)[0] or "application/octet-stream",
        },
        "hyperparameters": {**config.model_dump(mode="json", exclude={"data", "output"}), "weights": pretrained},
        "dataset": {
            "name": dataset.name, "train_images": len(dataset.train), "validation_images": len(dataset.validation),
            **dataset.facts,
        },
        "metrics": metrics(history, evaluation),
        "packages": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
    }  # fmt: skip
    weights = {name: tensor.contiguous().numpy() for name, tensor in network.state_dict().items()}
    example = (Path(file_name).suffix.lower(), dataset.validation.payload(index))
    return write_artifact(config.output, facts, weights, check, example)


def metrics(history: list[EpochMetrics], evaluation: Evaluation) -> Mapping[str, Any]:
    """What was measured: `train` over the last epoch's steps, `validation` with the exported weights."""
    last = history[-1]
    return {
        "train": {"loss": last.train_loss, "accuracy": last.train_accuracy},
        "validation": vars(evaluation),
        "history": [vars(epoch) for epoch in history],
    }
