"""metrics.jsonl of a run: its curves as one JSON object a line, for the report and for whoever wants numbers.

    {"kind": "step", "step": 20, "epoch": 1, "batch_loss": 4.6, "batch_accuracy": 0.01, "learning_rate": 0.1,
     "seconds": 0.12}
    {"kind": "epoch", "epoch": 1, "epochs": 70, "train_loss": ..., "validation_accuracy": ..., "seconds": 31.2}

Accuracies in 0..1; `seconds` of a step with its wait for images. A figure that is no number (nan, inf) is null.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO

from service.model.files import replace
from training.callbacks import Callback, RunContext, Step
from training.epoch_metrics import EpochMetrics

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
STEP_LINES = 2000
"""About how many steps of a run get a line; the last of each epoch always does."""


class MetricsLog(Callback):
    """Appends to metrics.jsonl as the run goes; a resumed run's file becomes that of one without interruption.

    A file that cannot be written (disk full) costs a warning and the rest of the lines, not the run.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None
        self._every = self._steps_per_epoch = self._epochs = 1
        self._epochs_written: set[int] = set()

    def on_run_start(self, context: RunContext) -> None:
        """Open the file, with what is kept of an interrupted run."""
        self._every = max(1, math.ceil(context.total_steps / STEP_LINES))
        self._steps_per_epoch = context.steps_per_epoch
        self._epochs = context.config.epochs
        path = context.folder / FILE
        try:
            kept = [line for line in _lines(path) if self._last_step(line) < context.first_step]
            self._epochs_written = {int(str(line["epoch"])) for line in kept if line["kind"] == "epoch"}
            replace(path, "".join(_dumped(line) for line in kept).encode())
            self._file = path.open("a", encoding="utf-8")
        except OSError as exc:
            self._give_up(exc)

    def on_step_end(self, step: Step) -> None:
        """A line for every so many steps, counted through the whole run."""
        if self._file is None or (step.number % self._every and step.number % self._steps_per_epoch):
            return
        self._write(
            {
                "kind": "step", "step": step.number, "epoch": step.epoch, "batch_loss": step.loss,
                "batch_accuracy": step.accuracy, "learning_rate": step.learning_rate, "seconds": step.seconds,
            }
        )  # fmt: skip

    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        """A line; none when the interrupted run wrote it already."""
        if metrics.epoch not in self._epochs_written:
            self._write({"kind": "epoch", "epoch": metrics.epoch, "epochs": self._epochs, **asdict(metrics)})

    def on_run_end(self, error: BaseException | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _last_step(self, line: Mapping[str, object]) -> int:
        """The step after which a line was written."""
        if line["kind"] == "step":
            return int(str(line["step"]))
        return int(str(line["epoch"])) * self._steps_per_epoch

    def _write(self, line: Mapping[str, object]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(_dumped(line))
            self._file.flush()
        except OSError as exc:
            self._give_up(exc)

    def _give_up(self, exc: OSError) -> None:
        log.warning("%s cannot be written (%s); the run goes on without it", FILE, exc)
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # it flushes once more
                file.close()


def _lines(path: Path) -> Iterable[dict[str, object]]:
    """The whole lines of the file; one that was cut off by a kill is left out."""
    if not path.exists():
        return
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
            number = line["step"] if line["kind"] == "step" else line["epoch"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(number, int):
            yield line


def _dumped(line: Mapping[str, object]) -> str:
    """Strict JSON, which knows no nan."""
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()
    }
    return json.dumps(clean, allow_nan=False) + "\n"
