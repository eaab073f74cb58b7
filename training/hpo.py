"""`python -m training.hpo --data DIR --output DIR`: tune learning rate, batch size and number of epochs.

On one's own machine: a study of ten trials, which ends with best.json for `train_model --from-tuning`. In a job that
SageMaker's tuner has started: the one training with the hyperparameters it gave, without instrumentation, and its
artifact. With the hyperparameter `trials` a job makes a study of its own. Exit status: see `training.command_line`.
"""

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from service.model.files import MANIFEST
from training.command_line import configure_logging, exit_status
from training.config import FILES, TrainingConfig, merged
from training.environment import ranks, require_channel, sagemaker_job, sagemaker_values
from training.errors import ConfigError
from training.flags import parse_flags
from training.interruption import Interrupted
from training.tuning.config import SOURCES, TuningConfig, split_tuning

if TYPE_CHECKING:
    from training.tuning.trials import Train

log = logging.getLogger("training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study, or in a SageMaker job one training; returns the exit status."""
    configure_logging()
    stopped = 0

    def program() -> None:
        nonlocal stopped
        stopped = tune_or_train(sys.argv[1:] if arguments is None else arguments)

    return exit_status(program) or stopped


def tune_or_train(arguments: Sequence[str]) -> int:
    """What the job and `arguments` say. Returns: 0, or 128 and the number of the signal that stopped a study.

    Raises: TrainingError; Interrupted, KeyboardInterrupt from a single training.
    """
    given = parse_flags(
        arguments, "training.hpo",
        "Find the learning rate, batch size and number of epochs that validate best; `python -m training.train_model "
        "--from-tuning OUTPUT/best.json` then trains with them.",
        (TuningConfig, TrainingConfig),
        {**FILES, "output": "folder of the study: best.json, plots, and what continues it"},
        "Needed: --data DIR and --output DIR, the study's folder; a study that lies there is continued, by several "
        "processes at once if you like. Settings of a training are the same in every trial.",
    )  # fmt: skip
    tuning, training = split_tuning({**sagemaker_values(), **given})
    require_channel(merged(training))
    if sagemaker_job() is not None and "trials" not in tuning:
        train_once(tuning, training)
        return 0
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        run_study(tuning, training)
    except (Interrupted, KeyboardInterrupt) as exc:
        log.error("Stopped before the end: the same command goes on; the trial under way begins again.")
        return 128 + (exc.signal_number if isinstance(exc, Interrupted) else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def run_study(tuning: Mapping[str, object], training: Mapping[str, object]) -> None:
    """Begin or continue the study in the output folder. Raises: TrainingError, Interrupted."""
    if ranks().is_distributed:
        raise ConfigError("A study is not for torchrun; several processes of python -m training.hpo share one.")
    settings = TuningConfig.create(tuning)
    start = TrainingConfig.resolve(training)
    # A recipe says where to start from; only what is given by itself is not tuned.
    fixed = {
        name: getattr(start, name) for name in start.model_fields_set if name not in SOURCES or name in training
    }  # fmt: skip
    if set(SOURCES) <= set(fixed):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in SOURCES)
        raise ConfigError(f"{names} are all given, so nothing is left to tune; leave one out.")
    settings.require_possible(fixed, start)
    try:
        start.output.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"--output {start.output}: the folder cannot be made ({exc.strerror}).") from exc
    require_study(start.output)
    from training.tuning.trials import Tuner  # torch takes seconds to import: not before the settings are right

    Tuner(settings, fixed, start, prepared).run()


def require_study(output: Path) -> None:
    """A study is not written among other files, a model's least of all. Raises: ConfigError."""
    names = sorted(entry.name for entry in output.iterdir() if not entry.name.startswith("."))
    if MANIFEST in names:
        raise ConfigError(f"--output {output} is the folder of a model; a study needs a folder of its own.")
    if names and not any(name.startswith("study.") for name in names):
        raise ConfigError(
            f"--output {output} holds other things ({', '.join(names[:3])}); name a folder of the study's own, which "
            "may be new, empty, or that of a study to continue."
        )


def train_once(tuning: Mapping[str, object], training: Mapping[str, object]) -> None:
    """The training that SageMaker's tuner asks for; its artifact is the job's. Raises: TrainingError."""
    if tuning:
        raise ConfigError(
            f"{', '.join(tuning)} are settings of a study, which SageMaker's tuner makes itself; to make one inside "
            "this job, give the hyperparameter trials too."
        )
    config = TrainingConfig.resolve(training)
    place = ranks()
    from training.distributed import Group
    from training.run import run

    run(config, (), Group(**vars(place)))


def prepared(config: TrainingConfig) -> "tuple[Train, dict[str, object]]":
    """Data and cached features, once for all trials of this process. See `training.tuning.trials.Prepare`."""
    from training.preparation import prepare
    from training.run import fit

    ready = prepare(config)
    dataset = ready.dataset
    facts: dict[str, object] = {
        "name": dataset.name,
        "classes": len(dataset.classes),
        "train_images": len(dataset.train),
        "validation_images": len(dataset.validation),
    }
    return (lambda config, callbacks: fit(config, ready, callbacks)), facts


def _terminate(number: int, _frame: FrameType | None) -> None:
    """SIGTERM outside of a training, which notices it by itself."""
    raise Interrupted(number)


if __name__ == "__main__":
    sys.exit(main())
