"""Where the loop's batches come from: images, augmented anew each epoch, or cached features.

Both give batches on the device, for the same steps in the same order with the same random choices, so that a run from
cached features makes the steps that the plain run makes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from training.config import TrainingConfig
from training.data import augment
from training.data.loader import Loader, fits_on
from training.features import FeatureCache
from training.randomness import Draws


@dataclass(frozen=True)
class StepPlan:
    """The images one process works on in one step."""

    indices: Tensor
    """int64 `[n]`, this process's share of the global batch."""
    draws: Draws
    """The randomness of this step's augmentation."""


class Source(Protocol):
    """Batches to train on, and to validate on."""

    from_features: bool
    """Whether batches are features (see `Network.forward`) rather than images."""
    labels: Tensor
    """int64 `[N]` of all images, on the CPU."""

    def __len__(self) -> int:
        """The number of images."""
        ...

    def training_batches(self, plans: Sequence[StepPlan]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step: inputs, augmented, and labels int64 `[n]`, on the device."""
        ...

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The inputs as they are, and labels."""
        ...


class ImageSource:
    """Images uint8 `[n, S, S, 3]` from a loader, augmented as the settings say."""

    from_features = False

    def __init__(self, loader: Loader, config: TrainingConfig) -> None:
        self._loader = loader
        self._config = config
        self.labels = loader.labels

    def __len__(self) -> int:
        """See `Source`."""
        return len(self._loader)

    def training_batches(self, plans: Sequence[StepPlan]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Source`."""
        batches = self._loader.batches([plan.indices for plan in plans])
        for plan, (images, labels) in zip(plans, batches, strict=True):
            if self._config.augment != "none":
                images = augment.flip(images, plan.draws)
            if self._config.augment in ("flip-crop", "rand"):
                images = augment.crop(images, plan.draws)
            if self._config.augment == "rand":
                images = augment.rand_augment(images, plan.draws)
            yield images, labels

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Source`."""
        return self._loader.batches(indices)


class FeatureSource:
    """Features bfloat16 `[n, C, h, w]` (channels last in memory) from a cache; one of its views at random."""

    from_features = True

    def __init__(self, cache: FeatureCache, device: torch.device) -> None:
        """Copies the features into the device's memory if they fit there."""
        self._views = cache.views
        self._count = len(cache)
        self._device = device
        flat = cache.features.flatten(0, 1)  # [V * N, h, w, C]
        self._on_device = fits_on(device, cache.size)
        self._features = flat.to(device) if self._on_device else flat
        self.labels = cache.labels
        self._labels = cache.labels.to(device)

    def __len__(self) -> int:
        """See `Source`."""
        return self._count

    def training_batches(self, plans: Sequence[StepPlan]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Source`."""
        for plan in plans:
            yield self._take(plan.indices, self._pick(plan))

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Source`: view 0, the image as it is unless views are crops."""
        for some in indices:
            yield self._take(some, torch.zeros_like(some))

    def _pick(self, plan: StepPlan) -> Tensor:
        """The view of each image, int64 `[n]`; flips are drawn first, as from images."""
        view = torch.zeros(len(plan.indices), dtype=torch.int64, device=self._device)
        if self._views.flip:
            view += plan.draws.uniform() < 0.5
        if self._views.crops:
            view += plan.draws.integers(self._views.crops) * (2 if self._views.flip else 1)
        return view

    def _take(self, indices: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        place = self._features.device
        rows = view.to(place) * self._count + indices.to(place)
        features = self._features.index_select(0, rows)  # [n, h, w, C]
        labels = self._labels[indices.to(self._device)]
        return features.to(self._device, non_blocking=True).permute(0, 3, 1, 2), labels
