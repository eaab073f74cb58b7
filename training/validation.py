"""Passes over images without training: figures during a run, logits at its end."""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from service.model.network import Network
from training.data.dataset import Labels
from training.data.loader import Loader
from training.distributed import ALONE, Group
from training.evaluation import Evaluation
from training.progress import BatchLines
from training.sources import Source

VALIDATION_BATCH = 256
"""Images per forward pass of a validation: figures do not depend on it."""


def evaluate(
    network: Network, source: Source, device: torch.device, title: str, *, bf16: bool = False, group: Group = ALONE
) -> Evaluation:
    """Loss and accuracy in eval mode, without augmentation, over the images of all processes of `group`."""
    network.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    shares = torch.split(torch.arange(len(source))[group.share(len(source))], VALIDATION_BATCH)
    with torch.inference_mode(), BatchLines(title, len(source), 0, quiet=not group.is_first) as lines:
        for inputs, labels in source.batches(list(shares)):
            if source.from_features and not bf16:
                inputs = inputs.float()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                logits = network(inputs, from_features=source.from_features).float()  # [N, K]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [N, 5]
            some = torch.stack([loss, hits[:, 0].sum(), hits.sum(), hits.sum() * 0 + len(labels)]).double().cpu()
            sums += some
            lines.add(len(labels), float(some[0]) / len(labels), float(some[1]) / len(labels))
    total = group.sum(sums.to(device, torch.float32)) if group.world_size > 1 else sums
    loss_sum, right, top5, seen = total.tolist()
    return Evaluation(loss_sum / seen, right / seen, top5 / seen, int(seen))


def predict(
    network: Network, loader: Loader, device: torch.device, title: str
) -> tuple[npt.NDArray[np.float32], Labels]:
    """One pass in eval mode and float32, in the loader's order: logits `[N, K]`, labels `[N]`. Raises: DataError."""
    network.eval()
    logits, labels = [], []
    with torch.inference_mode(), BatchLines(title, len(loader), 0, quiet=False) as lines:
        for images, truth in loader.in_order(VALIDATION_BATCH):
            scores = network(images).float()  # [N, K]
            logits.append(scores.cpu().numpy())
            labels.append(truth.cpu().numpy())
            loss, hits = nn.functional.cross_entropy(scores, truth), (scores.argmax(1) == truth).float().mean()
            lines.add(len(truth), float(loss), float(hits))
    return np.concatenate(logits), np.concatenate(labels)
