"""The live table of a study: a row in the log when a trial ends, and the words it is told in."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from training.tuning.config import TuningConfig

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)


class Table:
    """A row in the log for each trial that has ended, those of other processes among them."""

    def __init__(self, tuning: TuningConfig) -> None:
        self._tuning = tuning
        self._rows: set[int] = set()
        self.best: FrozenTrial | None = None
        """The best of the trials shown."""

    def show(self, finished: "Sequence[FrozenTrial]") -> None:
        """Write the rows that were not written yet."""
        for trial in sorted(finished, key=lambda trial: (trial.datetime_complete, trial.number)):
            if trial.number in self._rows:
                continue
            if not self._rows:
                log.info("trial  learning_rate  batch_size  epochs  %s  state          seconds  best so far",
                         self._tuning.metric)  # fmt: skip
            self._rows.add(trial.number)
            if (
                trial.state.name == "COMPLETE"
                and trial.value is not None
                and (self.best is None or self._better(trial, self.best))
            ):
                self.best = trial
            cells = [
                f"{trial.number:5d}",
                f"{_cell(trial, 'learning_rate'):>13}", f"{_cell(trial, 'batch_size'):>10}",
                f"{_cell(trial, 'epochs'):>6}",
                f"{_figure(trial.value):>{len(self._tuning.metric)}}",
                f"{label(trial):<13}",
                f"{trial.user_attrs.get('seconds', math.nan):7.1f}",
                f"{_figure(self.best.value)} (trial {self.best.number})" if self.best else "-",
            ]  # fmt: skip
            log.info("%s", "  ".join(cells))

    def _better(self, trial: "FrozenTrial", other: "FrozenTrial") -> bool:
        assert trial.value is not None
        assert other.value is not None
        return trial.value < other.value if self._tuning.direction == "minimize" else trial.value > other.value


def label(trial: "FrozenTrial") -> str:
    """How a trial ended: complete, pruned, diverged, out of memory, interrupted, killed, or the error's name."""
    return str(trial.user_attrs.get("ended", trial.state.name.lower()))


def shown(params: Mapping[str, object]) -> str:
    """Hyperparameters as `name=value`."""
    return " ".join(f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
                    for name, value in params.items())  # fmt: skip


def _cell(trial: "FrozenTrial", name: str) -> str:
    value = trial.params.get(name)
    return "fixed" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
