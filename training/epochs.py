"""The epochs of one training: train, validate, tell, save, stop."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from training import checkpoint
from training.callbacks import Callback, StopTraining, tell
from training.config import TrainingConfig
from training.distributed import Group
from training.epoch_metrics import EpochMetrics, Evaluation
from training.errors import CheckpointError
from training.features import fingerprint, frozen_digest
from training.interruption import Interrupted
from training.loop import Trainer
from training.metric_lines import VALIDATION, epoch_line, pass_title, remaining
from training.preparation import Prepared
from training.sources import ImageSource, Source

log = logging.getLogger(__name__)


class Epochs:
    """The epochs of one training, and its checkpoints."""

    def __init__(
        self, config: TrainingConfig, prepared: Prepared, trainer: Trainer, group: Group, checkpoints: bool
    ) -> None:
        self._config, self._prepared, self._trainer, self._group = config, prepared, trainer, group
        self._checkpoints = checkpoints
        self._saved_s = time.monotonic()
        self.history: list[EpochMetrics] = []
        self.evaluation: Evaluation | None = None
        self._from_features = self._began_from_features = prepared.features is not None
        """Whether epochs are now trained from cached features; and whether the run's first ones were."""
        self._facts: dict[str, Any] = {}
        if checkpoints and group.is_first:
            dataset = prepared.dataset
            self._facts = {
                "classes": dataset.classes, "images": [fingerprint(dataset.train), fingerprint(dataset.validation)],
                "frozen weights": frozen_digest(trainer.network), "steps an epoch": trainer.steps_per_epoch,
            }  # fmt: skip

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if not self._checkpoints:
            return
        state = None
        if self._group.is_first:
            state = checkpoint.load(self._config.checkpoint_folder, self._config, self._facts)
        state = self._group.from_first(state)  # other hosts may not see the folder
        if state is None:
            return
        self._trainer.load_state_dict(state["trainer"])
        self._began_from_features = state.get("from_features", self._from_features)
        if self._began_from_features != self._from_features and self._trainer.network.prefix and self._group.is_first:
            log.warning(
                "the run began %s cached features and goes on %s: the model will differ, by rounding, from that of a "
                "run that was never stopped",
                *(("from", "without them") if self._began_from_features else ("without", "with them")),
            )  # fmt: skip
        self.history = [EpochMetrics(**epoch) for epoch in self._trainer.progress.history]
        log.info(
            "resumed from %s: epoch %d, step %d of it",
            self._config.checkpoint_folder, self._trainer.progress.epoch, self._trainer.progress.steps,
        )  # fmt: skip

    @property
    def stopped(self) -> str | None:
        """Why the run ends before its last epoch."""
        return self._trainer.progress.stopped

    def run(self, callbacks: Sequence[Callback]) -> None:
        """Every epoch that is left. Raises: TrainingError; Interrupted, with the checkpoint written."""
        try:
            self._run(callbacks)
        except Interrupted:
            self.save()
            raise

    def _run(self, callbacks: Sequence[Callback]) -> None:
        trainer, config = self._trainer, self._config
        progress = trainer.progress
        started_s, first = time.monotonic(), progress.epoch
        while progress.epoch <= config.epochs and not (progress.stopped and progress.steps == 0):
            trainer.start_epoch()
            tell(callbacks, "on_epoch_start", progress.epoch)
            train, validation = self._sources()
            if self._from_features and not train.from_features:
                self._from_features = False
                if self._group.is_first:
                    log.info(
                        "epoch %d: trained from images from here on, as cached features are of frozen blocks",
                        progress.epoch,
                    )
            try:
                if not progress.stopped:
                    trainer.train_epoch(train)
            except StopTraining as exc:
                progress.stopped = str(exc)
            metrics = self._validated(validation, callbacks)
            self._next_epoch(metrics)
            if self._group.is_first:
                left_s = (time.monotonic() - started_s) / (metrics.epoch + 1 - first) * (config.epochs - metrics.epoch)
                log.info("%s %s", epoch_line(metrics, config.epochs), remaining(left_s))
            try:
                tell(callbacks, "on_epoch_end", metrics)
            except StopTraining as exc:
                progress.stopped = progress.stopped or str(exc)
            self._stop_early()
            if time.monotonic() - self._saved_s >= config.checkpoint_every_s:
                self._save_if_possible()
        if self._checkpoints:
            self._save_if_possible()  # what follows takes a pass over the validation images, and may fail
        trainer.stop_if_interrupted()  # the signal may have come after the last look
        if self.stopped and self._group.is_first:
            log.info("stopped after epoch %d of %d: %s", len(self.history), config.epochs, self.stopped)
        if self.evaluation is None:  # resumed after the last epoch
            self.evaluation = trainer.evaluate(self._sources()[1], "validation")

    def _validated(self, source: Source, callbacks: Sequence[Callback]) -> EpochMetrics:
        progress = self._trainer.progress
        started_s = time.perf_counter()
        tell(callbacks, "on_validation_start", progress.epoch)
        title = pass_title(progress.epoch, self._config.epochs, VALIDATION)
        self.evaluation = found = self._trainer.evaluate(source, title)
        return EpochMetrics(
            progress.epoch, progress.loss_sum / progress.seen, progress.hits / progress.seen, found.loss,
            found.accuracy, self._trainer.rate_of_epoch(progress.epoch),
            progress.seconds + time.perf_counter() - started_s,
        )  # fmt: skip

    def _next_epoch(self, metrics: EpochMetrics) -> None:
        self.history.append(metrics)
        self._trainer.remember_best(metrics.validation_accuracy)
        progress = self._trainer.progress
        progress.history.append(asdict(metrics))
        progress.epoch, progress.steps = progress.epoch + 1, 0
        progress.loss_sum, progress.hits, progress.seen, progress.seconds = 0.0, 0.0, 0.0, 0.0

    def _stop_early(self) -> None:
        """End the run if it no longer gets better, or if another process ends it.

        Patience begins anew where every block begins to be trained: accuracy often falls there before it rises.
        """
        progress, config = self._trainer.progress, self._config
        since = progress.best_epoch
        if config.unfreeze_at is not None:
            since = max(since, config.unfreeze_at - 1)
        if config.early_stopping and progress.epoch - 1 - since >= config.early_stopping:
            progress.stopped = progress.stopped or f"no better validation accuracy in {config.early_stopping} epochs"
        if self._group.any(progress.stopped is not None, self._prepared.device):
            progress.stopped = progress.stopped or "another process stopped the training"

    def _sources(self) -> tuple[Source, Source]:
        """What to train and validate on: features as long as the blocks that made them are frozen."""
        prepared = self._prepared
        if prepared.features is not None and self._trainer.network.prefix:
            return prepared.features
        return ImageSource(prepared.train, self._config), ImageSource(prepared.validation, self._config)

    def _save_if_possible(self) -> None:
        """A full disk costs a warning, not the run."""
        try:
            self.save()
        except CheckpointError as exc:
            log.warning("%s The training goes on without it; stopped now, it would lose what came after the last.", exc)

    def save(self) -> None:
        """Write a checkpoint (the first process does). Raises: CheckpointError."""
        self._saved_s = time.monotonic()
        if self._checkpoints and self._group.is_first:
            state = {"trainer": self._trainer.state_dict(), "from_features": self._began_from_features}
            checkpoint.save(self._config.checkpoint_folder, self._config, self._facts, state)
