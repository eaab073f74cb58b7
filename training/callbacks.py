"""What watches a run: the contract between the training loop and everything that observes it.

The loop calls each callback at the moments below, in the order of the list it was given. A callback reads; it
never changes the network, so that a run with callbacks trains exactly as one without. From `on_step_end` and
`on_epoch_end` it may end the run by raising `StopTraining`. Files of a run lie in one folder beside the artifact
(`RunContext.folder`), where the report finds them:

    settings.json                    the resolved settings
    metrics.jsonl                    one JSON object a line: {"kind": "step" | "epoch", ...}
    observations.jsonl, rules.json   what the rules saw, and their verdicts
    profile.json, trace.json.gz      where the time went
    evaluation.json, report.html     figures of the final network on the validation images
    tensorboard/, tensors/           TensorBoard's files, smdebug's
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from service.model.network import Network
from training.config import TrainingConfig
from training.data.dataset import Dataset
from training.epoch_metrics import EpochMetrics

log = logging.getLogger(__name__)


class StopTraining(Exception):
    """Raised by a callback: end the run after this step, in good order. Its text says why."""


@dataclass(frozen=True)
class RunContext:
    """What a callback is told before the first step."""

    config: TrainingConfig
    network: Network
    """The network that is trained; frozen parameters have `requires_grad` False."""
    criterion: nn.Module
    """The loss: called once a step as `criterion(logits [N, K], targets)`."""
    dataset: Dataset
    folder: Path
    """Where a callback writes its files; it exists."""
    device: torch.device
    steps_per_epoch: int
    total_steps: int
    first_step: int
    """Number of the first step this process makes: 1, or more when the run is resumed."""


@dataclass
class Step:
    """One training step. Numbers count from 1 through the whole run."""

    number: int
    epoch: int
    learning_rate: float
    labels: Tensor
    """int64 `[N]`, the true classes of this process's images, on the CPU."""
    loss_tensor: Tensor
    """Scalar, on the device: reading it waits for the device. The cross-entropy of this process's images, without
    label smoothing; under mixup and cutmix against the heavier label."""
    hits_tensor: Tensor
    """Number of images classified right, on the device. Under mixup and cutmix: against the heavier label."""
    data_wait_s: float
    """Seconds the loop waited for this batch."""
    seconds: float = 0.0
    """Seconds the step took with the wait; on a GPU the time to queue it. Set before `on_step_end`."""

    @property
    def loss(self) -> float:
        """The batch loss (waits for the device)."""
        return float(self.loss_tensor)

    @property
    def accuracy(self) -> float:
        """The batch accuracy in 0..1 (waits for the device)."""
        return float(self.hits_tensor) / len(self.labels)


class Callback:
    """Watches a run; each method does nothing unless overridden."""

    gave_up = False
    """Set when it could not write (see `tell`): it is told nothing more."""

    def on_run_start(self, context: RunContext) -> None:
        """Before the first step; the network is on its device."""

    def on_epoch_start(self, epoch: int) -> None:
        """Before the first training step of `epoch` (or the first that is left, when resumed)."""

    def on_step_start(self, number: int) -> None:
        """Before the forward pass of training step `number`, in training mode."""

    def on_backward_end(self, step: Step) -> None:
        """Gradients are there (not clipped yet), the weights as before the step."""

    def on_step_end(self, step: Step) -> None:
        """The weights have changed; gradients are still there, clipped if clipping is on."""

    def on_validation_start(self, epoch: int) -> None:
        """Before the validation pass of `epoch`; forward passes until `on_epoch_end` are in eval mode."""

    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        """After the validation pass."""

    def on_run_end(self, error: BaseException | None) -> None:
        """After the last step, whatever ended the run: None, `StopTraining`, or what went wrong."""


def tell(callbacks: Sequence[Callback], moment: str, *arguments: object) -> None:
    """Call the method `moment` of each callback. Raises: StopTraining after the last, if any of them raised it.

    A callback whose disk is full, say, costs a warning, not the run.
    """
    stop: StopTraining | None = None
    for callback in callbacks:
        if callback.gave_up:
            continue
        try:
            getattr(callback, moment)(*arguments)
        except StopTraining as exc:
            stop = stop or exc
        except OSError as exc:
            callback.gave_up = True
            log.warning("%s cannot write (%s); the run goes on without it", type(callback).__name__, exc)
    if stop is not None:
        raise stop
