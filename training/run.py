"""One training run: settings -> data -> network -> epochs -> artifact."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch

from service.model.artifact import Artifact
from service.model.machine import memory_bytes
from service.model.manifest import Role
from service.model.network import Network
from training import checkpoint, quantization
from training.callbacks import Callback, RunContext, StopTraining, tell
from training.config import TrainingConfig
from training.debugging import observations, verdicts
from training.devices import pick_device
from training.distributed import ALONE, Group
from training.epoch_metrics import EpochMetrics, Evaluation
from training.epochs import Epochs
from training.errors import CheckpointError, ConfigError, DivergedError, QuantizationError, TrainingError
from training.export import export
from training.figures import Figures, figures
from training.interruption import watched
from training.leftovers import remove_leftovers
from training.logits import logits_of
from training.loop import Trainer
from training.preparation import Prepared, new_network, prepare
from training.profiling import profiler, trace
from training.report.write import remove_report, write_report

log = logging.getLogger(__name__)

MEMORY_GIB = {32: 1.4, 224: 3.3}
"""Side in pixels -> what a training took at most: blocks 1 to 3 frozen, batches of 128, int8 and report included, two
cores. A line through both tells of other sides."""

WATCHED = (verdicts.FILE, observations.FILE, profiler.FILE, trace.FILE)
"""What rules and profiler leave in a run's folder; a run may have neither."""


@dataclass
class Fitted:
    """A network that was trained, and how it went."""

    network: Network
    history: list[EpochMetrics]
    evaluation: Evaluation
    """Of the last epoch, on the validation images."""
    figures: Figures | None
    """Of the weights that are kept, in float32; made in the first process, and not for tuning trials (see `fit`)."""
    logits: npt.NDArray[np.float32] | None
    """What the figures were made from, `[N, K]`."""
    pretrained: str
    """Where the initial weights came from."""
    stopped: str | None
    """Why the run ended before its last epoch."""


def run(config: TrainingConfig, callbacks: Sequence[Callback] = (), group: Group = ALONE) -> Artifact | None:
    """Train as `config` says and write the artifact; it is not touched before the last epoch is over.

    Returns: the artifact; None in processes other than the first. Raises: TrainingError, Interrupted.
    """
    folders = (config.folder, config.own_checkpoint_folder, config.checkpoint_folder)
    new = [folder for folder in folders if group.is_first and not folder.exists()]
    try:
        return _checked_run(config, callbacks, group)
    except CheckpointError:  # what is there may be another run's
        raise
    except BaseException:
        for folder in reversed(new):  # a refused run leaves no empty folders
            checkpoint.remove_if_unused(folder)
        raise


def _checked_run(config: TrainingConfig, callbacks: Sequence[Callback], group: Group) -> Artifact | None:
    if group.is_first:
        _warn_of_little_memory(config.side, memory_bytes())
        log.info("settings: %s", " ".join(f"{name}={value}" for name, value in config.model_dump(mode="json").items()))
        new = not config.output.exists()
        try:
            for folder, flag in (
                (config.output, "output"), (config.folder, "run-folder"), (config.checkpoint_folder, "checkpoints"),
            ):  # fmt: skip
                require_writable(folder, flag)
            require_ours(config.output)
        finally:
            if new:  # it is made anew with the artifact: a run that fails before leaves no empty folder there
                with suppress(OSError):
                    config.output.rmdir()
    int8 = group.is_first and quantization.wanted(config.quantize)
    device = pick_device(config.device, group)
    with group.peer_errors():
        group.join(device)
    try:
        with group.peer_errors(), _claimed(config) if group.is_first else nullcontext():
            artifact = _run(config, callbacks, group, device, int8)
    except DivergedError:
        if group.is_first:
            checkpoint.remove(config.checkpoint_folder)  # from there it would diverge again
        raise
    group.leave()  # after an error this process's end does it: else the others' words would come before the reason
    return artifact


def _warn_of_little_memory(side_px: int, memory: int) -> None:
    """Say so before the kernel ends the run without a word. `memory`: bytes that may be used here."""
    (low_px, low), (high_px, high) = MEMORY_GIB.items()
    needed = low + (high - low) * max(0, side_px - low_px) / (high_px - low_px)
    if memory < needed * 2**30:
        log.warning(
            "only %.1f GiB of memory may be used here; a training at %d px takes some %.1f GiB, and the kernel ends "
            "what takes more than it may without a word (status 137): allow it more, or take a smaller --batch-size",
            memory / 2**30, side_px, needed,
        )  # fmt: skip


@contextmanager
def _claimed(config: TrainingConfig) -> Iterator[None]:
    """No other training writes into this one's folders while the context lasts. Raises: CheckpointError."""
    with ExitStack() as claims:
        flag = "--run-folder" if config.run_folder else "--output"
        claims.enter_context(checkpoint.claimed(config.own_checkpoint_folder, flag))
        if config.checkpoint_folder.resolve() != config.own_checkpoint_folder.resolve():
            claims.enter_context(checkpoint.claimed(config.checkpoint_folder, "--checkpoints"))
        yield


def _run(
    config: TrainingConfig, callbacks: Sequence[Callback], group: Group, device: torch.device, int8: bool
) -> Artifact | None:
    prepared = prepare(config, group, device)
    fitted = fit(config, prepared, callbacks, group, checkpoints=True)
    if fitted.figures is None:
        return None
    artifact = export(
        fitted.network, config, prepared.dataset, prepared.validation,
        pretrained=fitted.pretrained, history=fitted.history, figures=fitted.figures, stopped=fitted.stopped,
    )  # fmt: skip
    found = fitted.figures
    log.info(
        "validation: %s, loss %.4f, n=%d; artifact %s version %s in %s", found.told(), found.loss, found.n,
        artifact.manifest.name, artifact.manifest.version, artifact.folder,
    )  # fmt: skip
    remove_report(config.folder)  # of the model that this one replaced
    failure = None
    if int8:
        artifact, failure = _quantized(config, prepared, artifact, fitted)
    if config.report:
        _report(config, prepared, artifact, found)
    checkpoint.remove(config.checkpoint_folder)  # last: stopped before, the same command makes what is missing
    if failure is not None and config.quantize == "on":
        raise failure
    return artifact


def _quantized(
    config: TrainingConfig, prepared: Prepared, artifact: Artifact, fitted: Fitted
) -> tuple[Artifact, QuantizationError | None]:
    """The artifact with its int8 network; or as it is already written, and why."""
    assert fitted.figures is not None and fitted.logits is not None
    elsewhere = f" --validation {config.validation}" if config.validation else ""
    later = f"`python -m training.quantize --model {config.output} --data {config.data}{elsewhere}` makes it later"
    try:
        return quantization.add_quantized(
            artifact, prepared.train, prepared.validation, fitted.logits, fitted.figures.labels
        ), None
    except QuantizationError as exc:
        log.warning("the artifact is written, without an int8 network; %s. %s", later, exc)
        return artifact, exc
    except KeyboardInterrupt:
        log.warning("stopped; the artifact is written, without an int8 network; %s", later)
        raise


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
        epochs = Epochs(config, prepared, trainer, group, checkpoints)
        epochs.resume()
        if group.is_first:
            if checkpoints and not trainer.progress.step:
                remove_leftovers(config.folder, WATCHED)
            _describe(config, prepared, trainer)
            _write_settings(config)
        steps = trainer.steps_per_epoch
        try:
            tell(callbacks, "on_run_start", RunContext(
                config, network, trainer.criterion, prepared.dataset, config.folder, prepared.device,
                steps, steps * config.epochs, trainer.progress.step + 1,
            ))  # fmt: skip
            epochs.run(callbacks)
        except BaseException as exc:
            error = exc
            raise
        finally:
            tell(callbacks, "on_run_end", error or (StopTraining(epochs.stopped) if epochs.stopped else None))
    assert epochs.evaluation is not None
    trainer.keep_final()
    found = logits = None
    if checkpoints and group.is_first:
        logits, labels = logits_of(network, prepared.validation, prepared.device, "final validation")
        found = figures(logits, labels)
    return Fitted(network, epochs.history, epochs.evaluation, found, logits, pretrained, epochs.stopped)


def _write_settings(config: TrainingConfig) -> None:
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / "settings.json").write_text(config.model_dump_json(indent=1))
    except (OSError, ValueError) as exc:  # ValueError: paths that are no text
        log.warning("settings.json cannot be written (%s)", exc)


def _describe(config: TrainingConfig, prepared: Prepared, trainer: Trainer) -> None:
    count = sum(p.numel() for p in trainer.network.parameters() if p.requires_grad)
    frozen = ", ".join(trainer.network.architecture.frozen) or "nothing"
    log.info(
        "training %s parameters (frozen: %s) on %s in %s from %s", f"{count:,}", frozen, prepared.device,
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
    ours = ("manifest", ".", *(f"{role}." for role in get_args(Role)))
    others = [entry.name for entry in output.iterdir() if not entry.name.startswith(ours)]
    if others:
        raise ConfigError(
            f"--output {output} holds other things ({', '.join(sorted(others)[:3])}); name a folder of its own, "
            "which may be new, empty, or an artifact to be replaced."
        )
