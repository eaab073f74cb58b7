"""One training run: settings -> data -> network -> epochs -> artifact."""

import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from service.model.artifact import Artifact
from service.model.network import Network
from training import checkpoint
from training.callbacks import Callback, RunContext, StopTraining, tell
from training.config import TrainingConfig
from training.devices import pick_device
from training.distributed import ALONE, Group
from training.errors import ConfigError, DivergedError, TrainingError
from training.evaluation import EpochMetrics, Evaluation
from training.export import export
from training.features import fingerprint, frozen_digest
from training.figures import Figures, figures
from training.interruption import Interrupted, watched
from training.logits import logits_of
from training.loop import Trainer
from training.metric_lines import VALIDATION, epoch_line, pass_title
from training.preparation import Prepared, new_network, prepare
from training.report.write import write_report
from training.sources import ImageSource, Source

log = logging.getLogger(__name__)


@dataclass
class Fitted:
    """A network that was trained, and how it went."""

    network: Network
    history: list[EpochMetrics]
    evaluation: Evaluation
    """Of the last epoch, on the validation images."""
    figures: Figures | None
    """Of the weights that are kept, in float32; made in the first process, and not for tuning trials (see `fit`)."""
    pretrained: str
    """Where the initial weights came from."""
    stopped: str | None
    """Why the run ended before its last epoch."""


def run(config: TrainingConfig, callbacks: Sequence[Callback] = (), group: Group = ALONE) -> Artifact | None:
    """Train as `config` says and write the artifact; it is not touched before the last epoch is over.

    Returns: the artifact; None in processes other than the first. Raises: TrainingError, Interrupted.
    """
    if group.is_first:
        log.info("settings: %s", " ".join(f"{name}={value}" for name, value in config.model_dump(mode="json").items()))
        for folder, flag in (
            (config.output, "output"), (config.folder, "run-folder"), (config.checkpoint_folder, "checkpoints"),
        ):  # fmt: skip
            require_writable(folder, flag)
        require_ours(config.output)
    device = pick_device(config.device, group)
    group.join(device)
    claim = checkpoint.claimed(config.checkpoint_folder) if group.is_first else nullcontext()
    try:
        with claim:
            return _run(config, callbacks, group, device)
    except DivergedError:
        if group.is_first:
            checkpoint.remove(config.checkpoint_folder)  # from there it would diverge again
        raise
    finally:
        group.leave()


def _run(config: TrainingConfig, callbacks: Sequence[Callback], group: Group, device: torch.device) -> Artifact | None:
    prepared = prepare(config, group, device)
    fitted = fit(config, prepared, callbacks, group, checkpoints=True)
    if fitted.figures is None:
        return None
    artifact = export(
        fitted.network, config, prepared.dataset, prepared.validation,
        pretrained=fitted.pretrained, history=fitted.history, figures=fitted.figures, stopped=fitted.stopped,
    )  # fmt: skip
    checkpoint.remove(config.checkpoint_folder)
    found = fitted.figures
    log.info(
        "validation: accuracy %.2f %%, top-5 %.2f %%, loss %.4f, n=%d; artifact %s version %s in %s",
        100 * found.accuracy, 100 * found.top5_accuracy, found.loss, found.n,
        artifact.manifest.name, artifact.manifest.version, artifact.folder,
    )  # fmt: skip
    if config.report:
        _report(config, prepared, artifact, found)
    return artifact


def _report(config: TrainingConfig, prepared: Prepared, artifact: Artifact, found: Figures) -> None:
    """Write the report into the run's folder; the artifact is there, so a failure costs a line, not the run."""
    try:
        write_report(config.folder, artifact.manifest, prepared.dataset.validation, found)
    except (TrainingError, OSError, ValueError) as exc:  # ValueError: names that are no text
        log.warning("the report was not written: %s", exc)


def fit(
    config: TrainingConfig,
    prepared: Prepared,
    callbacks: Sequence[Callback] = (),
    group: Group = ALONE,
    *,
    checkpoints: bool = False,
) -> Fitted:
    """Train a network on `prepared` data; writes no artifact.

    With `checkpoints` it goes on from the one in the checkpoint folder, and ends with a pass of float32 over the
    validation images for its figures; tuning trials do without. The first process tells the callbacks.

    Raises: TrainingError; Interrupted on SIGTERM or SIGINT, after the checkpoint is written.
    """
    callbacks = callbacks if group.is_first else ()
    group.require_work(config.batch_size, len(prepared.train), len(prepared.validation))
    torch.manual_seed(config.seed)
    network, pretrained = new_network(config, prepared.dataset)
    if pretrained == "none" and config.frozen and group.is_first:
        log.warning("frozen blocks without pretrained weights stay random; --freeze none trains them")
    error: BaseException | None = None
    with watched() as interruption:
        trainer = Trainer(
            network, config, images=len(prepared.train), device=prepared.device, bf16=prepared.bf16,
            group=group, callbacks=callbacks, interruption=interruption,
        )  # fmt: skip
        run_ = _Run(config, prepared, trainer, group, checkpoints)
        run_.resume()
        if group.is_first:
            _describe(config, prepared, trainer)
            _write_settings(config)
        steps = trainer.steps_per_epoch
        try:
            tell(callbacks, "on_run_start", RunContext(
                config, network, trainer.criterion, prepared.dataset, config.folder, prepared.device,
                steps, steps * config.epochs, trainer.progress.step + 1,
            ))  # fmt: skip
            run_.epochs(callbacks)
        except BaseException as exc:
            error = exc
            raise
        finally:
            tell(callbacks, "on_run_end", error or (StopTraining(run_.stopped) if run_.stopped else None))
    assert run_.evaluation is not None
    trainer.keep_final()
    found = None
    if checkpoints and group.is_first:
        found = figures(*logits_of(network, prepared.validation, prepared.device, "final validation"))
    return Fitted(network, run_.history, run_.evaluation, found, pretrained, run_.stopped)


def _write_settings(config: TrainingConfig) -> None:
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / "settings.json").write_text(config.model_dump_json(indent=1))
    except (OSError, ValueError) as exc:  # ValueError: paths that are no text
        log.warning("settings.json cannot be written (%s)", exc)


class _Run:
    """The epochs of one training, and its checkpoints."""

    def __init__(
        self, config: TrainingConfig, prepared: Prepared, trainer: Trainer, group: Group, checkpoints: bool
    ) -> None:
        self._config, self._prepared, self._trainer, self._group = config, prepared, trainer, group
        self._checkpoints = checkpoints
        self._saved_s = time.monotonic()
        self.history: list[EpochMetrics] = []
        self.evaluation: Evaluation | None = None
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
        self.history = [EpochMetrics(**epoch) for epoch in self._trainer.progress.history]
        log.info(
            "resumed from %s: epoch %d, step %d of it",
            self._config.checkpoint_folder, self._trainer.progress.epoch, self._trainer.progress.steps,
        )  # fmt: skip

    @property
    def stopped(self) -> str | None:
        """Why the run ends before its last epoch."""
        return self._trainer.progress.stopped

    def epochs(self, callbacks: Sequence[Callback]) -> None:
        """Every epoch that is left. Raises: TrainingError; Interrupted, with the checkpoint written."""
        try:
            self._epochs(callbacks)
        except Interrupted:
            self.save()
            raise

    def _epochs(self, callbacks: Sequence[Callback]) -> None:
        trainer, config = self._trainer, self._config
        progress = trainer.progress
        started_s, first = time.monotonic(), progress.epoch
        while progress.epoch <= config.epochs and not (progress.stopped and progress.steps == 0):
            trainer.start_epoch()
            tell(callbacks, "on_epoch_start", progress.epoch)
            train, validation = self._sources()
            try:
                if not progress.stopped:
                    trainer.train_epoch(train)
            except StopTraining as exc:
                progress.stopped = str(exc)
            metrics = self._validated(validation, callbacks)
            self._next_epoch(metrics)
            if self._group.is_first:
                left_s = (time.monotonic() - started_s) / (metrics.epoch + 1 - first) * (config.epochs - metrics.epoch)
                log.info("%s remaining_minutes=%.1f", epoch_line(metrics, config.epochs), left_s / 60)
            try:
                tell(callbacks, "on_epoch_end", metrics)
            except StopTraining as exc:
                progress.stopped = progress.stopped or str(exc)
            self._stop_early()
            if time.monotonic() - self._saved_s >= config.checkpoint_every_s:
                self.save()
        if self._checkpoints:
            self.save()  # what follows takes a pass over the validation images, and may fail
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

    def save(self) -> None:
        """Write a checkpoint (the first process does)."""
        self._saved_s = time.monotonic()
        if self._checkpoints and self._group.is_first:
            state = {"trainer": self._trainer.state_dict()}
            checkpoint.save(self._config.checkpoint_folder, self._config, self._facts, state)


def _describe(config: TrainingConfig, prepared: Prepared, trainer: Trainer) -> None:
    count = sum(p.numel() for p in trainer.network.parameters() if p.requires_grad)
    log.info(
        "training %s parameters on %s in %s from %s", f"{count:,}", prepared.device,
        "bf16" if prepared.bf16 else "fp32", "cached features" if prepared.features else "images",
    )  # fmt: skip


def require_writable(folder: Path, flag: str) -> None:
    """Find out now, not after the last epoch. Raises: ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as exc:
        raise ConfigError(f"--{flag} {folder}: the folder cannot be written to ({exc.strerror}).") from exc


def require_ours(output: Path) -> None:
    """An artifact is not written among other files. Raises: ConfigError."""
    ours = ("manifest", "weights.", "self_check.", "example.", ".")
    others = [entry.name for entry in output.iterdir() if not entry.name.startswith(ours)]
    if others:
        raise ConfigError(
            f"--output {output} holds other things ({', '.join(sorted(others)[:3])}); name a folder of its own, "
            "which may be new, empty, or an artifact to be replaced."
        )
