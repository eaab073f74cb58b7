"""The reference engine: PyTorch, eager, float32, on the GPU where there is one, else on the CPU."""

import numpy as np
import torch

from service.engines.base import Logits
from service.model.artifact import Artifact
from service.model.errors import ArtifactError
from service.model.machine import cores
from service.model.network import Network
from service.model.preprocess import PixelBatch


class EagerEngine:
    """Runs `service.model.network.Network` as it was trained.

    Tolerances: float32 sums in another order differ by about 1e-6 relative per layer; a GPU may use
    TF32 in convolutions (10 bits of mantissa, `torch.backends.cudnn.allow_tf32`).
    """

    def __init__(self, artifact: Artifact) -> None:
        """Build the network from the artifact. Raises: ArtifactError when the weights do not fit it."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(min(torch.get_num_threads(), cores()))
        network = Network(artifact.manifest.architecture, artifact.manifest.preprocessing)
        try:
            network.load_state_dict({name: torch.from_numpy(array) for name, array in artifact.weights().items()})
        except RuntimeError as exc:
            detail = ascii(" ".join(str(exc).split())[:300])
            raise ArtifactError(f"{artifact.path('weights')} does not fit the architecture stated: {detail}") from exc
        self._device = torch.device(device)
        self._network = network.eval().to(self._device)
        self.name = f"torch {device}"
        self.tolerance = 2e-2 if device == "cuda" else 1e-3

    def infer(self, batch: PixelBatch) -> Logits:
        """See `Engine.infer`."""
        with torch.inference_mode():
            logits = self._network(torch.from_numpy(np.ascontiguousarray(batch)).to(self._device))
            result: Logits = logits.float().cpu().numpy()
        return result
