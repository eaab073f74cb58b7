"""TensorBoard: `tensorboard --logdir FOLDER` shows what a run was like.

Scalars of steps and epochs, histograms of weights, gradients and the outputs of observed activations, and the rules'
verdicts as text.
"""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.callbacks import Callback, RunContext, Step
from training.debugging import verdicts
from training.debugging.observer import observed_modules, trained_parameters
from training.epoch_metrics import EpochMetrics

log = logging.getLogger(__name__)


SAMPLE = 65_536
"""About how many values of a tensor a histogram is made of, evenly spaced."""


class TensorBoardLog(Callback):
    """Without tensorboard, or when its files cannot be written: one line in the log, and training is the same."""

    def __init__(self, log_dir: Path | None = None, scalar_interval: int = 10, histogram_interval: int = 500) -> None:
        """`log_dir`: None is `tensorboard` in the run's folder. Intervals in steps; histograms cost a copy of the
        trained weights to the CPU each time.
        """
        self._log_dir, self._intervals = log_dir, (scalar_interval, histogram_interval)
        self._writer: Any = None
        self._last_step = 0
        self._others: Callable[[threading.ExceptHookArgs], object] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

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
        folder = self._log_dir or context.folder / "tensorboard"
        self._others, threading.excepthook = threading.excepthook, self._thread_ended
        # purge_step: what an earlier part of a resumed run wrote from there on is no longer shown.
        purge = context.first_step if context.first_step > 1 else None
        try:
            self._writer = SummaryWriter(str(folder), purge_step=purge)
        except OSError as exc:
            self._give_up(exc)

    def on_epoch_start(self, epoch: int) -> None:
        """See `Callback`. What is trained from this epoch on has histograms."""
        if self._writer is not None:
            network = self._context.network
            self._trained = trained_parameters(network)
            self._modules = observed_modules(network)

    def on_step_start(self, number: int) -> None:
        """See `Callback`. Hooks sit on the network during the steps that have histograms only."""
        if self._writer is None or number % self._intervals[1]:
            return
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._output_hook(f"activations/{name}", number)))

    def on_backward_end(self, step: Step) -> None:
        """See `Callback`."""
        self._unhook()
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
        self._call("add_scalar", "batch/loss", step.loss, step.number)
        self._call("add_scalar", "batch/accuracy", step.accuracy, step.number)
        self._call("add_scalar", "batch/learning_rate", step.learning_rate, step.number)
        self._call("add_scalar", "batch/images_per_second", len(step.labels) / max(step.seconds, 1e-9), step.number)

    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        """See `Callback`. Curves of training and validation lie over each other; their abscissa is the step."""
        if self._writer is None:
            return
        for name in ("loss", "accuracy"):
            for phase in ("train", "validation"):
                value = getattr(metrics, f"{phase}_{name}")
                self._call("add_scalar", f"epoch/{phase}_{name}", value, self._last_step)
        self._call("flush")

    def on_run_end(self, error: BaseException | None) -> None:
        """See `Callback`."""
        self._unhook()
        if self._writer is not None:
            self._verdicts()
            self._call("close")
            self._writer = None
        if self._others is not None:
            threading.excepthook, self._others = self._others, None

    def _call(self, method: str, *arguments: object) -> None:
        """Call the writer, as long as there is one; a full disk costs a warning and the rest of the curves."""
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments)
        except OSError as exc:
            self._give_up(exc)

    def _give_up(self, exc: OSError) -> None:
        log.warning("tensorboard: nothing more can be written (%s); the run goes on without", exc.strerror or exc)
        self._writer = None

    def _thread_ended(self, ended: threading.ExceptHookArgs) -> None:
        """Of an error in the thread that writes, the next call to the writer tells; its traceback would repeat it."""
        ours = type(ended.thread).__module__.startswith("tensorboard.") and isinstance(ended.exc_value, OSError)
        if not ours and self._others is not None:
            self._others(ended)

    def _verdicts(self) -> None:
        """What the rules found, where an observer that was told before this one has written it."""
        try:
            entries = json.loads((self._context.folder / verdicts.FILE).read_text(encoding="utf-8"))["rules"]
        except FileNotFoundError:
            return
        for entry in entries:
            found = "".join(
                f"\n\nstep {each['step']}, {each['tensor']}: {each['message']}" for each in entry["firings"]
            )
            self._call("add_text", f"rules/{entry['rule']}", verdicts.told(entry) + found, self._last_step)

    def _output_hook(self, name: str, step: int) -> Callable[..., None]:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):  # of a module that is used twice, the histogram has both
                self._histogram(name, output, step)

        return look

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _histogram(self, name: str, tensor: torch.Tensor, step: int) -> None:
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // SAMPLE)].float().cpu()  # whole, block 4 takes 2 s of a processor
        if bool(values.isfinite().all()):  # there are no buckets for others; the rules report them
            self._call("add_histogram", name, values, step)
