"""An engine for tests: no weights, logits that follow from the pixels, and faults on demand."""

import time

import numpy as np

from service.engines.base import Logits
from service.model.resize import PixelBatch


class FakeEngine:
    """Logit k is -|mean pixel value - k|: an image of the grey value k belongs to class k."""

    name = "fake"
    tolerance = 1e-3
    best_batch = 1024
    lanes = 1
    warm_sizes: tuple[int, ...] = ()

    def __init__(self, num_classes: int, delay_s: float = 0.0, failure: Exception | None = None) -> None:
        self.num_classes = num_classes
        self.delay_s = delay_s
        self.failure = failure
        self.batch_sizes: list[int] = []

    def infer(self, batch: PixelBatch) -> Logits:
        """See `Engine.infer`."""
        self.batch_sizes.append(len(batch))
        time.sleep(self.delay_s)
        if self.failure is not None:
            raise self.failure
        mean = batch.reshape(len(batch), -1).mean(axis=1, dtype=np.float32)  # [N]
        logits: Logits = -np.abs(mean[:, None] - np.arange(self.num_classes, dtype=np.float32))  # [N, K]
        return logits

    def settle(self) -> None:
        """See `Engine.settle`."""
