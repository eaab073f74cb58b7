"""A pass without training: the figures of an epoch."""

from collections.abc import Callable

import torch
from torch import nn

from service.model.network import Network
from training.distributed import ALONE, Group
from training.epoch_metrics import Evaluation
from training.progress import BatchLines
from training.sources import Source

VALIDATION_BATCH = 256
"""Images per forward pass of a validation: figures do not depend on it."""


def validate(
    network: Network,
    source: Source,
    device: torch.device,
    title: str,
    *,
    bf16: bool = False,
    group: Group = ALONE,
    watch: Callable[[], None] | None = None,
) -> Evaluation:
    """Loss and accuracy in eval mode, without augmentation, over the images of all processes of `group`.

    `watch` is called between batches, equally often in every process; what it raises ends the pass.
    """
    network.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    together = torch.split(torch.arange(len(source)), VALIDATION_BATCH * group.world_size)
    shares = [indices[group.share(len(indices))] for indices in together]
    batches = source.batches([mine for mine in shares if len(mine)])
    with torch.inference_mode(), BatchLines(title, len(source), 0, quiet=not group.is_first) as lines:
        for mine in shares:
            if watch is not None:
                watch()
            if not len(mine):  # the last batch was too small for every process to have an image of it
                continue
            inputs, labels = next(batches)
            if source.from_features and not bf16:
                inputs = inputs.float()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                logits = network(inputs, from_features=source.from_features).float()  # [N, K]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [N, 5]
            some = torch.stack([loss, hits[:, 0].sum(), hits.sum()]).tolist()
            sums += torch.tensor([*some, len(labels)], dtype=torch.float64)
            lines.add(len(labels), some[0] / len(labels), some[1] / len(labels))
    total = group.sum(sums.to(device)) if group.world_size > 1 else sums
    loss_sum, right, top5, seen = total.tolist()
    return Evaluation(loss_sum / seen, right / seen, top5 / seen, int(seen))
