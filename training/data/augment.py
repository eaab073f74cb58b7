"""Random changes to training batches, whole batches at a time; images are uint8 `[N, S, S, 3]`."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from training.randomness import Draws

Labelled = tuple[Tensor, Tensor]
"""Images `[N, S, S, 3]` and labels int64 `[N]`."""

CROP_SHARE = 8
"""A crop shifts the image by up to a CROP_SHARE-th of its side: 4 of 32 px, as He et al. 2015 (4.2) do."""


def flip(batch: Tensor, draws: "Draws") -> Tensor:
    """Mirror each image left-right with probability one half."""
    return torch.where((draws.uniform() < 0.5)[:, None, None, None], batch.flip(2), batch)


def crop(batch: Tensor, draws: "Draws") -> Tensor:
    """Shift each image by up to an eighth of its side, mirroring what comes in at the border."""
    return shift(batch, draws.integers(2 * (batch.shape[1] // CROP_SHARE) + 1, 2))


def shift(batch: Tensor, offsets: Tensor) -> Tensor:
    """Shift each image by `offsets` (int64 `[N, 2]`, 0 to twice an eighth of the side: in the middle nothing moves)."""
    count, side = batch.shape[0], batch.shape[1]
    pad = side // CROP_SHARE
    places = torch.arange(-pad, side + pad, device=batch.device)
    mirrored = torch.where(places < 0, -places, torch.where(places >= side, 2 * side - 2 - places, places))
    window = torch.arange(side, device=batch.device)
    ys, xs = mirrored[offsets[:, :1] + window], mirrored[offsets[:, 1:] + window]  # each [N, S]
    return batch[torch.arange(count, device=batch.device)[:, None, None], ys[:, :, None], xs[:, None, :]]


def rand_augment(batch: Tensor, draws: "Draws") -> Tensor:
    """RandAugment (Cubuk et al. 2019, https://arxiv.org/abs/1909.13719), torchvision's: 2 operations of strength 9."""
    from torchvision.transforms.v2 import RandAugment  # slow to import

    transform = RandAugment()
    planes = batch.permute(0, 3, 1, 2)  # [N, 3, S, S]
    seeds = draws.integers(2**31)
    changed = torch.empty_like(planes)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        for i, seed in enumerate(seeds.tolist()):
            torch.manual_seed(seed)
            changed[i] = transform(planes[i])
    return changed.permute(0, 2, 3, 1)


def mix(
    batch: Labelled, others: Labelled, num_classes: int, draws: "Draws", mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Blend (mixup) or patch (cutmix) each image with its partner in `others`; with both, one of them at random.

    `batch`, `others`: images uint8 `[N, S, S, 3]` and labels int64 `[N]`. `mixup`, `cutmix`: alpha of their Beta
    distribution, 0 to leave it out (Zhang et al. 2017, https://arxiv.org/abs/1710.09412; Yun et al. 2019,
    https://arxiv.org/abs/1905.04899).

    Returns: images float32 `[N, S, S, 3]` in 0..255, and the probabilities of the classes, float32 `[N, K]`.
    """
    patch = cutmix > 0 and (mixup == 0 or draws.number() < 0.5)
    alpha = cutmix if patch else mixup
    kept = _beta(alpha, draws)
    images, other_images = batch[0].float(), others[0].float()
    if patch:
        side = images.shape[1]
        half = side * math.sqrt(1 - kept) / 2
        places = [draws.number() * side for _ in range(2)]  # of the patch's centre; what lies outside is cut off
        (top, bottom), (left, right) = ((max(0, round(at - half)), min(side, round(at + half))) for at in places)
        images[:, top:bottom, left:right] = other_images[:, top:bottom, left:right]
        kept = 1 - (bottom - top) * (right - left) / (side * side)
    else:
        images = other_images.lerp(images, kept)  # rounding never leads out of 0..255
    targets, other_targets = (torch.nn.functional.one_hot(labels, num_classes) for _, labels in (batch, others))
    return images, targets * kept + other_targets * (1 - kept)  # [N, K]


def _beta(alpha: float, draws: "Draws") -> float:
    import numpy as np

    return float(np.random.default_rng(draws.seed()).beta(alpha, alpha))
