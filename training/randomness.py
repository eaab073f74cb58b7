"""Randomness without state: what is drawn depends on (seed, purpose, epoch, step) alone.

So a resumed run draws what the uninterrupted one did, and several processes draw the same for one global batch and
each takes its share of it.
"""

import hashlib

import torch
from torch import Tensor


def generator(*key: object) -> torch.Generator:
    """A generator on the CPU that `key` determines."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Draws:
    """Random numbers for the images of one global batch, of which this process works on the share `mine`."""

    def __init__(self, key: tuple[object, ...], size: int, mine: slice, device: torch.device) -> None:
        """`size`: images of the global batch. Results lie on `device`."""
        self._generator, self._size, self._mine, self._device = generator(*key), size, mine, device

    def uniform(self, *shape: int) -> Tensor:
        """float32 in 0..1, `[n, *shape]` for the n images of this process."""
        return torch.rand(self._size, *shape, generator=self._generator)[self._mine].to(self._device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in 0..high-1, `[n, *shape]`."""
        return torch.randint(high, (self._size, *shape), generator=self._generator)[self._mine].to(self._device)

    def number(self) -> float:
        """One number in 0..1, the same in every process."""
        return float(torch.rand((), generator=self._generator))

    def seed(self) -> int:
        """A seed, the same in every process."""
        return int(torch.randint(2**31, (), generator=self._generator))
