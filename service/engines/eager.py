"""The reference engine: PyTorch on the CPU, eager, float32."""

import numpy as np
import torch

from service.engines.base import Logits
from service.model.artifact import Artifact
from service.model.network import network_of
from service.model.resize import PixelBatch


class EagerEngine:
    """Runs `service.model.network.Network` as it was trained.

    Tolerance: float32 sums in another order differ by about 1e-6 relative per layer.
    """

    name = "torch"
    tolerance = 1e-3
    best_batch = 32
    lanes = 1
    warm_sizes: tuple[int, ...] = (1,)

    def __init__(self, artifact: Artifact, threads: int) -> None:
        """Build the network from the artifact. Raises: ArtifactError when the weights do not fit it."""
        torch.set_num_threads(min(torch.get_num_threads(), threads))
        self._network = network_of(artifact)

    def infer(self, batch: PixelBatch) -> Logits:
        """See `Engine.infer`."""
        with torch.inference_mode():
            logits: Logits = self._network(torch.from_numpy(np.ascontiguousarray(batch))).numpy()
        return logits

    def settle(self) -> None:
        """See `Engine.settle`."""
