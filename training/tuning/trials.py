"""Trials one after the other: hyperparameters from the study, a training with them, the verdict back to the study.

How a training is made is passed in (`Train`), so that all trials of a process share its data and cached features.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from training.callbacks import Callback, RunContext, Step, StopTraining
from training.config import TrainingConfig
from training.epoch_metrics import EpochMetrics, Evaluation
from training.errors import DivergedError, ExportError, TrainingError
from training.interruption import Interrupted
from training.tuning.best import settings_of, write_best
from training.tuning.config import SOURCES, TuningConfig
from training.tuning.plots import IMPORTANCES_FROM, draw
from training.tuning.study import INTERRUPTED, Study
from training.tuning.table import Table, label, shown

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

BEST_FILE = "best.json"
LOOK_AGAIN_S = 1.0
"""How often a process with nothing to do looks whether a trial of another has ended, or lost its process."""


class Trained(Protocol):
    """What a training leaves: `training.run.Fitted`, as far as a study looks at it."""

    @property
    def history(self) -> list[EpochMetrics]:
        """The epochs made."""
        ...

    @property
    def evaluation(self) -> Evaluation:
        """The network after its last epoch on the validation images."""
        ...


Train = Callable[[TrainingConfig, Sequence[Callback]], Trained]
Prepare = Callable[[TrainingConfig], tuple[Train, Mapping[str, object]]]
"""Settings -> a training on their data, and facts about the data (JSON)."""


class TrialWatcher(Callback):
    """Reports each epoch to the study, and ends a trial that others make hopeless or whose time is over."""

    def __init__(self, report: Callable[[int, float], bool], tuning: TuningConfig, deadline_s: float) -> None:
        """`report(step, value) -> hopeless`; `deadline_s` is a time of `time.monotonic()`."""
        self._report, self._metric, self._deadline_s = report, tuning.metric, deadline_s
        self.pruned_at: int | None = None
        """The epoch after which the trial was given up."""
        self.out_of_time = False

    def on_run_start(self, context: RunContext) -> None:
        """See `Callback`."""
        self._config = context.config
        self._reported = 0

    def on_step_end(self, step: Step) -> None:
        """See `Callback`."""
        if time.monotonic() >= self._deadline_s:
            self.out_of_time = True
            raise StopTraining("the time of the study is over")

    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        """See `Callback`."""
        if self.out_of_time:
            return
        value = getattr(metrics, self._metric)
        step = comparable_step(self._config, metrics.epoch)
        if metrics.epoch == self._config.epochs or step == self._reported or not math.isfinite(value):
            return  # the last epoch's verdict is the trial's own
        self._reported = step
        if self._report(step, value):
            self.pruned_at = metrics.epoch
            raise StopTraining(f"pruned: {self._metric} {value:.4f} is worse than the median of other trials")


def comparable_step(config: TrainingConfig, epoch: int) -> int:
    """The step at which an epoch is compared with other trials, whose number of epochs differs.

    With a constant learning rate that is the epoch. In a schedule, epoch 10 of 10 has come to rest and epoch 10 of
    70 has not: there it is the tenths of the run that are over.
    """
    return epoch if config.schedule == "constant" else 10 * epoch // config.epochs


class Tuner:
    """Makes the trials of a study, all with one preparation of the data."""

    def __init__(
        self, tuning: TuningConfig, fixed: Mapping[str, object], start: TrainingConfig, prepare: Prepare
    ) -> None:
        """`fixed`: settings of every trial by field name, data and output among them; the study lies in output.

        `start`: what is tried first, where its values lie in the ranges. `prepare` is called before the first trial of
        this process, not where nothing is left to do.

        Raises: ConfigError.
        """
        self._tuning, self._fixed, self._prepare = tuning, fixed, prepare
        self._first = tuning.nearest(fixed, start)
        self._base = TrainingConfig.create({**fixed, **self._first})
        self._folder = self._base.output
        self._train: Train | None = None
        self._deadline_s = math.inf

    def run(self) -> Path:
        """Make trials until the study has as many as asked for, or its time is over; then write what came out.

        Returns: best.json.

        Raises: TrainingError; Interrupted, KeyboardInterrupt. The trial under way then is tried again by the next call.
        """
        settings = settings_of(self._base, self._first)
        study = Study(self._folder, self._tuning, self._first, settings, self._base.seed)
        table = Table(self._tuning)
        try:
            self._make_trials(study, table)
            trials = study.finished()
            table.show(trials)
            dataset = study.dataset()
        finally:
            study.close()
        best = table.best
        if best is None:
            raise TrainingError(
                f"None of {len(trials)} trials ended with a result; try smaller learning rates "
                "(--learning-rate-range) or more time (--timeout-minutes)."
            )
        states = [label(trial) for trial in trials]
        facts = {
            "metric": self._tuning.metric,
            "value": best.value,
            "reached": best.user_attrs.get("reached", {}),
            "trial": best.number,
            "trials": {state: states.count(state) for state in sorted(set(states))},
            "search_space": {SOURCES[name]: getattr(self._tuning, SOURCES[name]) for name in self._first},
            "dataset": dataset,
        }
        path = self._folder / BEST_FILE
        try:
            write_best(path, best.params, settings, facts)
            plots = draw(trials, self._tuning, self._folder)
        except OSError as exc:
            raise ExportError(
                f"The result of the tuning cannot be written into {self._folder} ({exc.strerror}); free space and run "
                "the same command again: the trials are kept."
            ) from exc
        log.info("plots: %s", ", ".join(str(plot) for plot in plots))
        complete = states.count("complete")
        if complete < IMPORTANCES_FROM:
            log.info("importances are drawn from %d complete trials on, there are %d", IMPORTANCES_FROM, complete)
        log.info("best hyperparameters: %s, %s=%.4f (trial %d, the best of %d that ended); wrote %s",
                 shown(best.params), self._tuning.metric, best.value, best.number, len(trials), path)  # fmt: skip
        return path

    def _make_trials(self, study: Study, table: Table) -> None:
        if self._tuning.timeout_minutes is not None:
            self._deadline_s = time.monotonic() + 60 * self._tuning.timeout_minutes
        waited = False
        while time.monotonic() < self._deadline_s:
            trial = study.claim()
            finished = study.finished()
            table.show(finished)
            if trial is not None:
                self._announce(trial, finished)
                self._try(study, trial)
            elif study.running_elsewhere:
                if not waited:
                    log.info("waiting for %d trials of other processes, the last ones", study.running_elsewhere)
                waited = True
                time.sleep(min(LOOK_AGAIN_S, max(0.0, self._deadline_s - time.monotonic())))
            else:
                return
        log.info("the time of the study is over; the same command continues it")

    def _announce(self, trial: "optuna.Trial", finished: "Sequence[FrozenTrial]") -> None:
        """What is tried next, and how much of the study is left, as long as this process makes the rest alone."""
        made = [other for other in finished if other.state.name in ("COMPLETE", "PRUNED")]
        seconds = [other.user_attrs["seconds"] for other in made if "seconds" in other.user_attrs]
        again = f" (trial {trial.user_attrs['retry_of']} again)" if "retry_of" in trial.user_attrs else ""
        left = ""
        if seconds:
            minutes = (self._tuning.trials - len(made)) * sum(seconds) / len(seconds) / 60
            left = f", some {minutes:.1f} minutes for the rest"
        log.info(
            "trial %d%s: %s; %d of %d made%s",
            trial.number, again, shown(trial.params), len(made), self._tuning.trials, left,
        )  # fmt: skip

    def _try(self, study: Study, trial: "optuna.Trial") -> None:
        """Train with the hyperparameters of a claimed trial and tell the study how it went."""
        started_s = time.monotonic()
        watcher = TrialWatcher(lambda step, value: study.report(trial, step, value), self._tuning, self._deadline_s)
        folder = (self._base.run_folder or self._folder / "trials") / f"{trial.number:03d}"
        try:
            if self._train is None:
                self._train, dataset = self._prepare(self._base)
                study.require_dataset(dataset)
            config = TrainingConfig.create({**self._fixed, **trial.params, "run_folder": folder})
            started_s = time.monotonic()
            found = kept(config, self._train(config, [watcher]))
        except (DivergedError, MemoryError, torch.OutOfMemoryError) as exc:
            # Pruned, not failed: to TPE a failed trial is no news, a pruned one worse than every complete one; and
            # no made-up accuracy bends the plots.
            log.warning("trial %d: %s", trial.number, exc)
            ended = "diverged" if isinstance(exc, DivergedError) else "out of memory"
            study.finish(trial, "PRUNED", ended=ended, seconds=time.monotonic() - started_s)
            return
        except (TrainingError, Interrupted, KeyboardInterrupt):  # no fault of these hyperparameters
            study.finish(trial, "FAIL", ended=INTERRUPTED)
            raise
        except BaseException as exc:
            study.finish(trial, "FAIL", ended=type(exc).__name__)
            raise
        seconds = time.monotonic() - started_s
        if watcher.out_of_time:
            study.finish(trial, "FAIL", ended=INTERRUPTED, seconds=seconds)
        elif watcher.pruned_at is not None:
            study.finish(trial, "PRUNED", ended="pruned", seconds=seconds)
        elif not math.isfinite(found["validation_loss"]):
            study.finish(trial, "PRUNED", ended="diverged", seconds=seconds)
        else:
            study.finish(trial, "COMPLETE", found[self._tuning.metric], reached=found, seconds=seconds)


def kept(config: TrainingConfig, trained: Trained) -> dict[str, float]:
    """Figures of the weights that a training keeps: those of its best epoch with early stopping, else the last."""
    if config.early_stopping and trained.history:
        best = max(trained.history, key=lambda epoch: epoch.validation_accuracy)
        return {
            "validation_accuracy": best.validation_accuracy, "validation_loss": best.validation_loss,
            "epoch": best.epoch,
        }  # fmt: skip
    found = trained.evaluation
    return {
        "validation_accuracy": found.accuracy, "validation_loss": found.loss, "top5_accuracy": found.top5_accuracy,
        "epoch": len(trained.history), "validation_images": found.n,
    }  # fmt: skip
