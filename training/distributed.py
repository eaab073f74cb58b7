"""Several processes train one network: who takes which images, and the sums over all of them.

Each process takes every world-th image of a global batch. Loss, gradients, batch norm statistics and the partners of
mixup and cutmix are those of the global batch, so that any number of processes makes the same steps up to rounding.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.environment import Ranks
from training.errors import ConfigError, PeerError

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: the first may take long to decode or to compute features."""
LOST = re.compile(
    "(closed|reset) by (remote )?peer|broken pipe|read error|timed out|wait timeout|got 0 bytes|remote process exit"
    "|connection refused|no route to host",
    re.IGNORECASE,
)
"""What gloo, NCCL and torch's store say where a process is gone or silent."""


@dataclass(frozen=True)
class Group(Ranks):
    """This process among those that train together, and what they do together; alone by default."""

    def share(self, size: int) -> slice:
        """This process's places in a global batch of `size`."""
        return slice(self.rank, size, self.world_size)

    def join(self, device: torch.device) -> None:
        """Meet the other processes (torchrun's environment says where)."""
        if self.world_size > 1 and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)

    def leave(self) -> None:
        """Part from the others."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def peer_errors(self) -> Iterator[None]:
        """What the network says of a process that is gone becomes a sentence; other errors stay. Raises: PeerError."""
        try:
            yield
        except RuntimeError as exc:
            # Of gloo's errors the file that raised them is all that tells them from others.
            networks = self.world_size > 1 and (isinstance(exc, dist.DistError) or "gloo/" in str(exc))
            lines = str(exc).partition("Exception raised from")[0].splitlines()  # torch's trace in C++ follows
            line = next((line for line in lines if networks and LOST.search(line)), None)
            if line is None:
                raise
            said = re.sub(r"\[\S*gloo/\S*\] | This is typically.*", "", line)
            raise PeerError(
                f"Training process {self.rank} has lost the others ({said.rstrip('.')}): one of them, its host or the "
                "network has failed, and their logs may say why; started again, the training goes on from its last "
                "checkpoint, if there is one."
            ) from exc

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def whole(self, mine: Tensor, size: int) -> Tensor:
        """A global batch `[size, ...]` in its order, of which each process has its `share` as `mine`."""
        if self.world_size == 1:
            return mine
        padded = mine.new_zeros(-(-size // self.world_size), *mine.shape[1:])  # shares differ by one image
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, 1).flatten(0, 1)[:size]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is set in any process."""
        return flag if self.world_size == 1 else bool(self.sum(torch.full((), float(flag), device=device)) > 0)

    def from_first(self, value: Any) -> Any:
        """What the first process has as `value`."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def require_work(self, batch_size: int, train: int, validation: int) -> None:
        """Raises: ConfigError when a process would have no image of a batch, or there is no batch at all."""
        if batch_size < self.world_size or min(train, validation) < max(self.world_size, 1):
            raise ConfigError(
                f"{self.world_size} processes cannot share batches of {batch_size} from {train} images to train on and "
                f"{validation} to validate on: each needs an image; use fewer processes, or a larger --batch-size."
            )
        if train < 2:
            raise ConfigError("There is one image to train on; batch norm needs at least 2.")

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """`network` with gradients averaged over all processes."""
        if self.world_size == 1:
            return network
        devices = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)


ALONE = Group()
"""The group of a process that trains by itself."""


def share_statistics(network: nn.Module, group: Group) -> None:
    """Let the batch norms that train take mean and variance over the global batch, in place."""
    if group.world_size == 1:
        return
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes.

    torch's SyncBatchNorm does the same on GPUs alone; this one runs on any device. (Ioffe & Szegedy 2015,
    https://arxiv.org/abs/1502.03167)
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` -> the same shape."""
        if not self.training:
            return super().forward(input)
        values = input.float()
        count = torch.full((1,), values.numel() / values.shape[1], device=input.device)
        dist.all_reduce(count)
        # Two passes, as one over squares loses digits: mean first, then the squares of what is left.
        mean = _Sum.apply(values.sum((0, 2, 3))) / count  # type: ignore[no-untyped-call]  # [C]
        centred = values - mean[:, None, None]
        squares = _Sum.apply(centred.square().sum((0, 2, 3)))  # type: ignore[no-untyped-call]
        variance = squares / count  # [C]
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            momentum = 0.1 if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        scaled: Tensor = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            scaled = scaled * self.weight[:, None, None] + self.bias[:, None, None]
        return scaled.to(input.dtype)
