"""Trained network -> artifact: weights, facts, self-check and the example."""

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from service.model.artifact import Artifact, SelfCheck, write_artifact
from service.model.images import MEDIA_TYPES
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training.config import LOCAL, TrainingConfig
from training.data.dataset import Dataset
from training.data.loader import Loader
from training.epoch_metrics import EpochMetrics
from training.errors import ExportError
from training.figures import Figures

SELF_CHECK_INPUTS = 4
EXAMPLE_CANDIDATES = 32
PACKAGES = ("numpy", "pillow", "safetensors", "torch", "torchvision")


def export(
    network: Network,
    config: TrainingConfig,
    dataset: Dataset,
    validation: Loader,
    *,
    pretrained: str,
    history: list[EpochMetrics],
    figures: Figures,
    stopped: str | None,
) -> Artifact:
    """Write the artifact of `network` into `config.output`. Raises: ExportError."""
    network = network.cpu().float().eval()
    indices, candidates = validation.spread(EXAMPLE_CANDIDATES)  # [n], [n, S, S, 3]
    with torch.inference_mode():
        logits = network(candidates)  # [n, K]
    check = SelfCheck(candidates[:SELF_CHECK_INPUTS].numpy(), logits[:SELF_CHECK_INPUTS].numpy())
    predicted_right = (logits.argmax(1) == validation.labels[indices]).nonzero()
    index = int(indices[predicted_right[0]]) if len(predicted_right) else int(indices[0])
    ending = Path(dataset.validation.file_name(index)).suffix.lower()
    facts: dict[str, Any] = {
        "name": config.model_name,
        "architecture": network.architecture,
        "classes": dataset.classes,
        "preprocessing": Preprocessing(side_px=config.side),
        "example": {
            "label": dataset.classes[int(dataset.validation.labels[index])],
            "media_type": MEDIA_TYPES[ending],
        },
        "hyperparameters": {
            **config.model_dump(mode="json", exclude=set(LOCAL)),
            "weights": pretrained, "freeze": network.architecture.frozen,
        },
        "dataset": dataset.described(),
        "metrics": metrics(history, figures, len(dataset.train), stopped),
        "packages": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
    }  # fmt: skip
    weights = {name: tensor.contiguous().numpy() for name, tensor in network.state_dict().items()}
    example = (ending, dataset.validation.payload(index))
    try:
        return write_artifact(config.output, facts, weights, check, example)
    except OSError as exc:
        raise ExportError(
            f"The artifact cannot be written into {config.output} ({exc.strerror}); one that was there is as it was."
        ) from exc


def metrics(
    history: list[EpochMetrics], figures: Figures, train_images: int, stopped: str | None = None
) -> Mapping[str, Any]:
    """What was measured: `train` over the last epoch's steps, `validation` with the exported weights."""
    last = history[-1]
    return {
        "train": {"loss": last.train_loss, "accuracy": last.train_accuracy, "n": train_images},
        "validation": {**vars(figures.evaluation()), "ece": figures.ece},
        "history": [vars(epoch) for epoch in history],
        **({"stopped": stopped} if stopped else {}),
    }
