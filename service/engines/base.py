"""The contract between the batcher's side of the service and whatever computes the logits."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from service.model.preprocess import PixelBatch

Logits = npt.NDArray[np.float32]
"""float32 `[N, K]`."""


class Engine(Protocol):
    """Computes logits. Called from one thread at a time; holds its own device memory."""

    name: str
    """For logs and answers: what runs, and where ("torch cpu")."""

    tolerance: float
    """How far its logits may be from the stored ones, as a share of the largest stored |logit|."""

    def infer(self, batch: PixelBatch) -> Logits:
        """uint8 `[N, S, S, 3]` -> float32 `[N, K]`: as many rows as given, in the same order. N >= 1."""
        ...
