"""Network, images -> logits: one pass, in float32, whose logits the figures, the manifest and the report come from."""

import logging
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.model.network import Network
from training.data.dataset import Labels
from training.data.loader import Loader
from training.progress import LINE_EVERY_S

log = logging.getLogger(__name__)

BATCH = 256
"""Images per forward pass; the logits do not depend on it, but for rounding."""


def logits_of(
    network: Network | Callable[[Tensor], Tensor],
    loader: Loader,
    device: torch.device,
    title: str,
    batch_size: int = BATCH,
) -> tuple[npt.NDArray[np.float32], Labels]:
    """One pass in eval mode, in the loader's order: logits float32 `[N, K]`, labels int64 `[N]`.

    `network`: or any function uint8 `[n, S, S, 3]` -> logits `[n, K]`.

    Raises: DataError when an image cannot be read.
    """
    if isinstance(network, Network):
        network.eval()
    logits, labels, done, last_s = [], [], 0, time.monotonic()
    with torch.inference_mode():
        for images, truth in loader.in_order(batch_size):
            logits.append(network(images.to(device)).float().cpu().numpy())
            labels.append(truth.cpu().numpy())
            done += len(truth)
            if time.monotonic() - last_s >= LINE_EVERY_S:
                last_s = time.monotonic()
                log.info("%s: %d of %d images", title, done, len(loader))
    return np.concatenate(logits), np.concatenate(labels)
