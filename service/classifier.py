"""A model that is ready to classify: the artifact's facts and an engine. Images -> predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from service.engines.base import Engine, Logits
from service.model.artifact import Artifact, SelfCheck
from service.model.errors import ArtifactError
from service.model.images import RgbImage
from service.model.resize import crop_resize_all


@dataclass(frozen=True)
class ModelCard:
    """What an answer says of the model that gave it."""

    name: str
    version: str
    classes: tuple[str, ...]
    caution: str | None = None
    """What people are told of it besides (`Manifest.caution`)."""


@dataclass(frozen=True)
class Prediction:
    """The probabilities of one image."""

    probs: npt.NDArray[np.float32]
    """float32 `[K]`, summing to 1."""
    model: ModelCard

    def top(self, k: int) -> list[tuple[str, int, float]]:
        """The k likeliest classes as (label, index, probability), likeliest first."""
        best = (-self.probs).argsort(kind="stable")[:k]
        return [
            (self.model.classes[index], index, prob)
            for index, prob in zip(best.tolist(), self.probs[best].tolist(), strict=True)
        ]


@dataclass(frozen=True)
class ExampleFile:
    """An image to try the service with."""

    path: Path
    label: str
    media_type: str


class Classifier:
    """Crops and resizes, infers and ranks: what `model_fn` returns."""

    def __init__(self, card: ModelCard, side_px: int, engine: Engine, example: ExampleFile | None = None) -> None:
        self.card = card
        self.side_px = side_px
        self.engine = engine
        self.example = example

    @classmethod
    def of(cls, artifact: Artifact, engine: Engine) -> "Classifier":
        """A classifier with what the artifact's manifest says."""
        manifest = artifact.manifest
        card = ModelCard(manifest.name, manifest.version, manifest.classes, manifest.caution)
        example = ExampleFile(artifact.path("example"), manifest.example.label, manifest.example.media_type)
        return cls(card, manifest.preprocessing.side_px, engine, example)

    def classify(self, images: Sequence[RgbImage]) -> list[Prediction]:
        """Predict each of `images` (uint8 `[H, W, 3]`, any size), in the same order."""
        logits = self.engine.infer(crop_resize_all(images, self.side_px))  # [N, K]
        expected = (len(images), len(self.card.classes))
        if logits.shape != expected:
            raise ValueError(f"The engine {self.engine.name} answered {logits.shape}, expected {expected}.")
        if not np.isfinite(logits).all():
            raise ValueError(f"The engine {self.engine.name} answered with values that are not finite.")
        return [Prediction(probs, self.card) for probs in softmax(logits)]

    def check(self, check: SelfCheck) -> float:
        """Compare the engine's logits with the stored ones; returns the largest difference, relative.

        Raises: ArtifactError when it exceeds the engine's tolerance.
        """
        difference = check.difference(self.engine.infer(check.inputs))
        if not difference <= self.engine.tolerance:  # also true for NaN
            raise ArtifactError(
                f"The self-check failed: {self.engine.name} differs from the stored logits by {difference:.2g} "
                f"of the largest, allowed is {self.engine.tolerance:.2g}; the model would not predict as measured."
            )
        return difference


def softmax(logits: Logits) -> npt.NDArray[np.float32]:
    """Row-wise softmax, shifted by the maximum so that nothing overflows: `[N, K]` -> `[N, K]`."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: npt.NDArray[np.float32] = exponents / exponents.sum(axis=1, keepdims=True)
    return result
