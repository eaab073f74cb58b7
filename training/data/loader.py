"""Labelled images -> batches for the network: uint8 `[N, S, S, 3]` and int64 `[N]`.

Images that fit into memory are decoded and fitted once, and every epoch takes its batches from one tensor;
others are decoded again each epoch by worker processes. Both give the same batches.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from service.model.preprocess import fit
from training.data.dataset import LabelledImages
from training.progress import progress

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.25
"""Share of the machine's memory that fitted images may take."""

Batch = tuple[Tensor, Tensor]
"""Images uint8 `[N, S, S, 3]` and labels int64 `[N]`."""


class Loader:
    """Batches of `images`, fitted to `side_px`."""

    def __init__(self, images: LabelledImages, side_px: int, batch_size: int, workers: int | None, what: str) -> None:
        """Decodes everything now if it fits into memory. Raises: DataError."""
        self.labels = torch.from_numpy(images.labels)
        self._batch_size = batch_size
        self._lazy = _Fitted(images, side_px)
        self._workers = workers if workers is not None else (os.cpu_count() or 1)
        size = len(images) * side_px * side_px * 3
        self.in_memory = size <= MEMORY_SHARE * memory_limit_bytes()
        log.info(
            "%s: %d images, %.2f GB at %d px, %s",
            what, len(images), size / 1e9, side_px, "held in memory" if self.in_memory else "decoded in every epoch",
        )  # fmt: skip
        self._pixels = _fit_all(images, side_px, what) if self.in_memory else None

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
            yield from DataLoader(
                self._lazy, self._batch_size, sampler=order.tolist(), num_workers=self._workers, collate_fn=_stack
            )

    def first(self, count: int) -> Tensor:
        """The first images, uint8 `[count, S, S, 3]`."""
        return torch.stack([torch.from_numpy(self._lazy[i][0].copy()) for i in range(min(count, len(self)))])


class _Fitted(TorchDataset[tuple[np.ndarray, int]]):
    def __init__(self, images: LabelledImages, side_px: int) -> None:
        self._images = images
        self._side_px = side_px

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return fit(self._images.image(index), self._side_px), int(self._images.labels[index])


def _stack(samples: list[tuple[np.ndarray, int]]) -> Batch:
    pixels, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def _fit_all(images: LabelledImages, side_px: int, what: str) -> Tensor:
    pixels = np.empty((len(images), side_px, side_px, 3), np.uint8)

    def fill(index: int) -> None:
        pixels[index] = fit(images.image(index), side_px)

    with ThreadPoolExecutor() as threads:
        for _ in progress(threads.map(fill, range(len(images))), f"{what}: decoding", total=len(images)):
            pass
    return torch.from_numpy(pixels)


def memory_limit_bytes() -> int:
    """The machine's memory, or the container's share of it (cgroup v2 memory.max) where that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    stated = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(stated)) if stated.isdecimal() else machine
