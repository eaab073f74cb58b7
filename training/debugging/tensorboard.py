"""TensorBoard: scalars of steps and epochs, histograms of weights and gradients. `tensorboard --logdir FOLDER`."""

import logging
from pathlib import Path
from typing import Any

import torch

from training.callbacks import Callback, RunContext, Step
from training.evaluation import EpochMetrics

log = logging.getLogger(__name__)


SAMPLE = 65_536
"""About how many values of a tensor a histogram is made of, evenly spaced."""


class TensorBoardLog(Callback):
    """Without tensorboard: one line in the log, and training is the same."""

    def __init__(self, log_dir: Path | None = None, scalar_interval: int = 10, histogram_interval: int = 500) -> None:
        """`log_dir`: None is `tensorboard` in the run's folder. Intervals in steps; histograms cost a copy of the
        trained weights to the CPU each time.
        """
        self._log_dir, self._intervals = log_dir, (scalar_interval, histogram_interval)
        self._writer: Any = None
        self._last_step = 0

    def on_run_start(self, context: RunContext) -> None:
        """See `Callback`. Short runs get their points too: ten an epoch, and histograms each epoch."""
        scalars, histograms = self._intervals
        steps = context.steps_per_epoch
        self._intervals = (min(scalars, max(1, steps // 10)), min(histograms, steps))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as exc:
            log.info("tensorboard is not installed: nothing is written for it (%s).", exc)
            return
        self._context = context
        self._trained = {name: p for name, p in context.network.named_parameters() if p.requires_grad}
        folder = self._log_dir or context.folder / "tensorboard"
        # purge_step: what an earlier part of a resumed run wrote from there on is no longer shown.
        self._writer = SummaryWriter(str(folder), purge_step=context.first_step if context.first_step > 1 else None)

    def on_backward_end(self, step: Step) -> None:
        """See `Callback`."""
        if self._writer is None or step.number % self._intervals[1]:
            return
        with torch.no_grad():
            for name, parameter in self._trained.items():
                self._histogram(f"weights/{name}", parameter, step.number)
                if parameter.grad is not None:
                    self._histogram(f"gradients/{name}", parameter.grad, step.number)

    def on_step_end(self, step: Step) -> None:
        """See `Callback`."""
        self._last_step = step.number
        if self._writer is None or step.number % self._intervals[0]:
            return
        self._writer.add_scalar("batch/loss", step.loss, step.number)
        self._writer.add_scalar("batch/accuracy", step.accuracy, step.number)
        self._writer.add_scalar("batch/learning_rate", step.learning_rate, step.number)
        self._writer.add_scalar("batch/images_per_second", len(step.labels) / max(step.seconds, 1e-9), step.number)

    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        """See `Callback`. Curves of training and validation lie over each other; their abscissa is the step."""
        if self._writer is None:
            return
        for name in ("loss", "accuracy"):
            for phase in ("train", "validation"):
                value = getattr(metrics, f"{phase}_{name}")
                self._writer.add_scalar(f"epoch/{phase}_{name}", value, self._last_step)
        self._writer.flush()

    def on_run_end(self, error: BaseException | None) -> None:
        """See `Callback`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _histogram(self, name: str, tensor: torch.Tensor, step: int) -> None:
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // SAMPLE)].float().cpu()  # whole, block 4 takes 2 s of a processor
        if bool(values.isfinite().all()):  # there are no buckets for others; the rules report them
            self._writer.add_histogram(name, values, step)
