"""Figures of tensors, computed where the tensors are and brought over in one transfer.

Each function gives tensors; `transfer` turns many of them into numbers at once.
"""

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

SAMPLED = 16384
"""Values that percentiles are taken of, evenly spaced through the tensor; sorting millions would cost more than
the step."""

Table = Mapping[str, Tensor]
"""Figures of one tensor by name; scalars, but for lists such as `activity`."""


def tensor_figures(tensors: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """size, mean, std, min, max, l2, mean_abs, zeros (share), nan and inf (counts) of each tensor (any shape)."""
    if not tensors:
        return []  # _foreach_norm refuses an empty list
    wide = [tensor.detach().float() for tensor in tensors]
    norms, sums = torch._foreach_norm(wide, 2), torch._foreach_norm(wide, 1)
    figures = []
    for tensor, l2, l1 in zip(wide, norms, sums, strict=True):
        size = tensor.numel()
        low, high = torch.aminmax(tensor)
        mean = tensor.mean()
        # From moments, which are there already; Welford's way would cost as much as all the rest.
        std = (l2.square() / size - mean.square()).clamp(min=0).sqrt() if size > 65536 else tensor.std(correction=0)
        none = torch.zeros_like(l1)
        finite = _known_finite(l1)
        figures.append(
            {
                "size": torch.full_like(l1, size), "mean": mean, "std": std, "min": low, "max": high,
                "l2": l2, "mean_abs": l1 / size,
                "zeros": 1 - torch.count_nonzero(tensor) / size,
                "nan": none if finite else tensor.isnan().sum(), "inf": none if finite else tensor.isinf().sum(),
            }
        )  # fmt: skip
    return figures


def _known_finite(total: Tensor) -> bool:
    """Whether a sum of absolute values proves that all are finite; on other devices looking would mean waiting."""
    return total.device.type == "cpu" and bool(total.isfinite())


def percentiles(tensor: Tensor) -> dict[str, Tensor]:
    """p5 and p95 of a tensor of any shape, from up to SAMPLED of its values."""
    flat = tensor.detach().float().reshape(-1)
    ordered = flat[:: -(-flat.numel() // SAMPLED)].sort().values
    last = ordered.numel() - 1
    return {"p5": ordered[round(0.05 * last)], "p95": ordered[round(0.95 * last)]}


def changes(after: Tensor, before: Tensor, atol: float) -> dict[str, Tensor]:
    """How far a tensor is from an earlier state of it.

    needed_rtol: the smallest `rtol` with which `numpy.allclose(after, before, rtol, atol, equal_nan=True)` holds,
    infinite where none is. change_ratio: ||after - before|| / ||before||.
    """
    difference = (after - before).abs_()
    change = difference.norm()
    beyond = difference.sub_(atol).clamp_(min=0)  # |a - b| <= atol + rtol |b|
    needed = beyond.div_(before.abs())
    needed.nan_to_num_(nan=0.0, posinf=float("inf"))  # 0 / 0: no change
    if not _known_finite(change):  # NaN or infinity on one side only is a change
        same = (after == before) | (after.isnan() & before.isnan())
        unlike = ~same & ~(after.isfinite() & before.isfinite())
        needed.masked_fill_(same, 0.0).masked_fill_(unlike, float("inf"))
    return {"needed_rtol": needed.amax(), "change_ratio": change / before.norm()}


def activity(outputs: Tensor) -> Tensor:
    """How often each unit of a ReLU's output `[N, C]` or channel of `[N, C, H, W]` is above zero.

    Returns: float32 `[101]`, percentiles over the units of their percentage of values above zero.
    """
    units = (outputs.detach() > 0).float().transpose(0, 1).flatten(1).mean(1).mul(100).sort().values  # [C]
    ranks = torch.arange(101, device=units.device) * (len(units) - 1) / 100
    return units[ranks.round().long()]


def transfer(tables: Sequence[Table]) -> list[dict[str, list[float]]]:
    """The tables as numbers, each tensor flattened; one wait for the device for all of them."""
    cells = [cell.detach().float().reshape(-1) for table in tables for cell in table.values()]
    values = iter(torch.cat(cells).tolist() if cells else ())
    return [{name: list(islice(values, cell.numel())) for name, cell in table.items()} for table in tables]
