"""Random changes to training batches, on uint8 `[N, S, S, 3]`, whole batches at a time."""

import torch
from torch import Tensor

CROP_SHARE = 8
"""A crop shifts the image by up to a CROP_SHARE-th of its side: 4 of 32 px, as He et al. 2015 (4.2) do."""


def flip(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left-right with probability one half."""
    flipped = torch.rand(len(batch), generator=generator) < 0.5
    return torch.where(flipped[:, None, None, None], batch.flip(2), batch)


def crop(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its side, mirroring what comes in at the border."""
    count, side = batch.shape[0], batch.shape[1]
    pad = side // CROP_SHARE
    places = torch.arange(-pad, side + pad)
    mirrored = torch.where(places < 0, -places, torch.where(places >= side, 2 * side - 2 - places, places))
    offsets = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    ys, xs = mirrored[offsets + torch.arange(side)]  # each [N, S]
    return batch[torch.arange(count)[:, None, None], ys[:, :, None], xs[:, None, :]]
