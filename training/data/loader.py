"""Labelled images -> batches for the network: uint8 `[N, S, S, 3]` and int64 `[N]`.

Images that fit into memory are decoded and resized once, and every epoch takes its batches from one tensor;
others are decoded again each epoch by worker processes. Both give the same batches.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from service.model.machine import cores, memory_bytes
from service.model.preprocess import crop_resize
from training.data.dataset import LabelledImages
from training.errors import DataError
from training.progress import progress

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.25
"""Share of the machine's memory that resized images may take."""

Batch = tuple[Tensor, Tensor]
"""Images uint8 `[N, S, S, 3]` and labels int64 `[N]`."""


class Loader:
    """Batches of `images`, cropped and resized to `side_px`."""

    def __init__(self, images: LabelledImages, side_px: int, batch_size: int, workers: int | None, what: str) -> None:
        """Decodes everything now if it fits into memory. Raises: DataError."""
        self.labels = torch.from_numpy(images.labels)
        self._batch_size = batch_size
        self._lazy = _Resized(images, side_px)
        self._workers = workers if workers is not None else cores()
        size = len(images) * side_px * side_px * 3
        self.in_memory = size <= MEMORY_SHARE * memory_bytes()
        log.info(
            "%s: %d images, %.2f GB at %d px, %s",
            what, len(images), size / 1e9, side_px, "held in memory" if self.in_memory else "decoded in every epoch",
        )  # fmt: skip
        self._pixels = _resize_all(images, side_px, what) if self.in_memory else None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def batches(self, order: Tensor | None = None) -> Iterator[Batch]:
        """One pass, in the given order (int64 `[N]`), else as they are."""
        order = torch.arange(len(self)) if order is None else order
        if self._pixels is not None:
            for start in range(0, len(order), self._batch_size):
                indices = order[start : start + self._batch_size]
                yield self._pixels[indices], self.labels[indices]
        else:
            for batch in DataLoader(
                self._lazy, self._batch_size, sampler=order.tolist(), num_workers=self._workers, collate_fn=_stack
            ):
                if isinstance(batch, DataError):
                    raise batch
                yield batch

    def spread(self, count: int) -> tuple[Tensor, Tensor]:
        """Up to `count` images spread evenly over all (class folders lie one after the other).

        Returns: their indices int64 `[n]`, and the images uint8 `[n, S, S, 3]`.
        """
        indices = torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()
        return indices, torch.stack([torch.from_numpy(self._lazy[i][0].copy()) for i in indices.tolist()])


class _Resized(TorchDataset[tuple[np.ndarray, int]]):
    def __init__(self, images: LabelledImages, side_px: int) -> None:
        self._images = images
        self._side_px = side_px

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return crop_resize(self._images.image(index), self._side_px), int(self._images.labels[index])

    def __getitems__(self, indices: list[int]) -> list[tuple[np.ndarray, int]] | DataError:
        """A batch at once, as torch's fetcher asks for it where this method is."""
        try:
            return [self[index] for index in indices]
        except DataError as exc:  # raised by a worker, it would reach the user with the worker's trace
            return exc


def _stack(samples: list[tuple[np.ndarray, int]] | DataError) -> Batch | DataError:
    if isinstance(samples, DataError):
        return samples
    pixels, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def _resize_all(images: LabelledImages, side_px: int, what: str) -> Tensor:
    pixels = np.empty((len(images), side_px, side_px, 3), np.uint8)

    def fill(index: int) -> None:
        pixels[index] = crop_resize(images.image(index), side_px)

    with ThreadPoolExecutor() as threads:
        for _ in progress(threads.map(fill, range(len(images))), f"{what}: decoding", total=len(images)):
            pass
    return torch.from_numpy(pixels)
