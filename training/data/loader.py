"""Labelled images -> batches for the network: uint8 `[N, S, S, 3]` and int64 `[N]`.

Images that fit into a GPU's memory, or else into the machine's, are decoded and resized once, at the first batch, and
every epoch takes its batches from one tensor there; others are decoded again each epoch by worker processes. All give
the same batches.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from service.model.machine import cores, memory_bytes
from training.data.dataset import LabelledImages
from training.errors import DataError
from training.progress import progress

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.25
"""Share of the machine's memory that resized images may take."""

GPU_MEMORY_SHARE = 0.4
"""Share of a GPU's free memory that images or features may take."""

PART_BYTES = 64 * 2**20
"""Of the images that lie on a GPU, so much is decoded on the machine at a time."""

Batch = tuple[Tensor, Tensor]
"""Images uint8 `[N, S, S, 3]` and labels int64 `[N]`."""


class Loader:
    """Batches of `images`, cropped and resized to `side_px`."""

    def __init__(
        self,
        images: LabelledImages,
        side_px: int,
        workers: int | None,
        what: str,
        device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
        processes: int = 1,
    ) -> None:
        """Decodes nothing yet. `what` names the images in the log, `device` is where batches shall lie.

        `processes`: how many on this host do the same, and share its memory and cores.
        """
        self.labels = torch.from_numpy(images.labels)
        self.images = images
        self.side_px = side_px
        self.device = device
        self._lazy = _Resized(images, side_px)
        self._workers = workers if workers is not None else max(1, cores() // processes)
        self._what = what
        self._size = len(images) * side_px * side_px * 3
        self.in_memory = self._size <= MEMORY_SHARE * memory_bytes() / processes
        self._pixels: Tensor | None = None
        self._told = False

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """The images of each of `indices` (int64 `[N]`), on `device`. Raises: DataError."""
        pixels = self._resized()
        if pixels is not None:
            for batch in indices:
                yield pixels[batch.to(pixels.device)].to(self.device), self.labels[batch].to(self.device)
            return
        for loaded in DataLoader(
            self._lazy,
            batch_sampler=[batch.tolist() for batch in indices],
            num_workers=self._workers,
            collate_fn=_stack,
            pin_memory=self.device.type == "cuda",
        ):
            if isinstance(loaded, DataError):
                raise loaded
            images, labels = loaded
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """One pass over all images as they are."""
        return self.batches(list(torch.split(torch.arange(len(self)), batch_size)))

    def release(self) -> None:
        """Forget the decoded images: they are not needed soon. The next batch decodes them again."""
        self._pixels = None

    def spread_indices(self, count: int) -> Tensor:
        """Indices int64 `[n]` of up to `count` images, spread evenly: class folders lie one after the other."""
        return torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()

    def spread(self, count: int) -> tuple[Tensor, Tensor]:
        """The images of `spread_indices`, decoded now.

        Returns: their indices int64 `[n]`, and the images uint8 `[n, S, S, 3]`, both on the CPU.
        """
        indices = self.spread_indices(count)
        return indices, torch.stack([torch.from_numpy(self._lazy[i][0].copy()) for i in indices.tolist()])

    def _resized(self) -> Tensor | None:
        """All images uint8 `[N, S, S, 3]`, decoded at the first call; None if they fit nowhere."""
        if self._pixels is not None:
            return self._pixels
        place = self.device if fits_on(self.device, self._size) else torch.device("cpu") if self.in_memory else None
        if not self._told:
            self._told = True
            held = "decoded in every epoch" if place is None else f"held in memory ({place})"
            size = f"{self._size / 1e6:,.1f}"
            log.info("%s: %d images, %s MB at %d px, %s", self._what, len(self), size, self.side_px, held)
        if place is not None:
            self._pixels = _resize_all(self.images, self.side_px, self._what, place)
        return self._pixels


def fits_on(device: torch.device, size: int) -> bool:
    """Whether `size` bytes may be kept in the memory of a GPU; False for other devices, which need no copy."""
    return device.type == "cuda" and size <= GPU_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]


class _Resized(TorchDataset[Any]):
    def __init__(self, images: LabelledImages, side_px: int) -> None:
        self._images = images
        self._side_px = side_px

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        return self._images.resized(index, self._side_px), int(self._images.labels[index])

    def __getitems__(self, indices: list[int]) -> list[tuple[npt.NDArray[np.uint8], int]] | DataError:
        """A batch at once, as torch's fetcher asks for it where this method is."""
        try:
            return [self[index] for index in indices]
        except DataError as exc:  # raised by a worker, it would reach the user with the worker's trace
            return exc


def _stack(samples: list[tuple[npt.NDArray[np.uint8], int]] | DataError) -> Batch | DataError:
    if isinstance(samples, DataError):
        return samples
    pixels, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def _resize_all(images: LabelledImages, side_px: int, what: str, device: torch.device) -> Tensor:
    """uint8 `[N, S, S, 3]` on `device`; on another than the CPU by way of parts that the machine has room for."""
    pixels = torch.empty(len(images), side_px, side_px, 3, dtype=torch.uint8, device=device)
    parts = torch.split(pixels, max(1, PART_BYTES // (side_px * side_px * 3)))

    def fill(rows: npt.NDArray[np.uint8], first: int, index: int) -> None:
        rows[index - first] = images.resized(index, side_px)

    def decoded(threads: ThreadPoolExecutor) -> Iterator[None]:
        first = 0
        for part in parts:
            here = part if device.type == "cpu" else torch.empty(part.shape, dtype=torch.uint8)
            yield from threads.map(partial(fill, here.numpy(), first), range(first, first + len(part)))
            if here is not part:
                part.copy_(here)
            first += len(part)

    with ThreadPoolExecutor(cores()) as threads:
        for _ in progress(decoded(threads), f"{what}: decoding", total=len(images)):
            pass
    return pixels
