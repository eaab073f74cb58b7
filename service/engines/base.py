"""The contract between the batcher's side of the service and whatever computes the logits."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from service.model.resize import PixelBatch

Logits = npt.NDArray[np.float32]
"""float32 `[N, K]`."""


class EngineUnavailable(Exception):
    """The engine cannot run on this machine: a sentence that says why, and what to do."""


class Engine(Protocol):
    """Computes logits. `infer` is called from `lanes` threads at a time, at most; holds its own device memory."""

    name: str
    """Its name in the settings ("openvino-int8")."""

    tolerance: float
    """How far its logits may be from the stored ones, as a share of the largest stored |logit|."""

    best_batch: int
    """Images per call beyond which it gets no faster, or slower: the service gives it no more at once."""

    lanes: int
    """Batches it computes side by side."""

    warm_sizes: tuple[int, ...]
    """Sizes of batches that cost much more the first time, besides the largest batch it will get: the service runs each
    once before it is ready."""

    def infer(self, batch: PixelBatch) -> Logits:
        """uint8 `[N, S, S, 3]` -> float32 `[N, K]`: as many rows as given, in the same order. N >= 1."""
        ...

    def settle(self) -> None:
        """Do what makes it faster and may wait until it answers, beside `infer`; a second time does nothing.

        Raises: EngineUnavailable; it answers as before then.
        """
        ...
