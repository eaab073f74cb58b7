"""`python -m training.hpo --data DIR --output DIR`: tune learning rate, batch size and number of epochs.

On one's own machine: a study of ten trials, which ends with best.json for `train_model --from-tuning`. In a job that
SageMaker's tuner has started: the one training with the hyperparameters it gave, and its artifact.

Exit status: as `training.train_model`, and 143 after SIGTERM.
"""

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from training.config import TrainingConfig, parse_arguments
from training.environment import sagemaker_values
from training.errors import ConfigError, TrainingError
from training.interruption import Interrupted
from training.train_model import configure_logging
from training.tuning_config import TuningConfig, parse_tuning_arguments, require_something_to_tune, split

if TYPE_CHECKING:
    from training.tuning import Train

log = logging.getLogger("training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study, or in a SageMaker job one training; returns the exit status."""
    configure_logging()
    before = signal.signal(signal.SIGTERM, _terminate)
    how_to_go_on = "Stopped before the end: no artifact was written."
    try:
        given, rest = parse_tuning_arguments(sys.argv[1:] if arguments is None else arguments)
        job = sagemaker_values()
        tuning, training = split({**job, **given, **_training_arguments(rest)})
        if job and "trials" not in tuning:
            train_once(tuning, training)
        else:
            how_to_go_on = "Stopped before the end: the same command goes on, the trial under way begins again."
            run_study(tuning, training)
    except ConfigError as exc:
        log.error("%s", exc)
        return 2
    except TrainingError as exc:
        log.error("%s", exc)
        return 1
    except (KeyboardInterrupt, Interrupted) as exc:
        log.error("%s", how_to_go_on)
        number = exc.signal_number if isinstance(exc, Interrupted) else signal.SIGINT
        return 128 + number
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def run_study(tuning: Mapping[str, object], training: Mapping[str, object]) -> Path:
    """The study in the output folder, begun or continued. Returns: best.json. Raises: TrainingError."""
    settings = TuningConfig.create(tuning)
    require_something_to_tune(training)
    base = TrainingConfig.create({**training, **settings.nearest(training)})
    try:
        base.output.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"--output {base.output}: the folder cannot be made ({exc.strerror}).") from exc
    from training.tuning import Tuner  # torch takes seconds to import: not before the settings are right

    return Tuner(settings, training, base.output, prepared).run()


def train_once(tuning: Mapping[str, object], training: Mapping[str, object]) -> None:
    """The training that SageMaker's tuner asks for; its artifact is the job's. Raises: TrainingError."""
    if tuning:
        raise ConfigError(
            f"{', '.join(tuning)} are settings of a study, which SageMaker's tuner makes itself; to make one inside "
            "this job, give the hyperparameter trials too."
        )
    config = TrainingConfig.create(training)
    from training.run import run

    run(config)


def prepared(config: TrainingConfig) -> "tuple[Train, dict[str, object]]":
    """Data and cached features, once for all trials of this process. See `training.tuning.Prepare`."""
    from training.run import fit, prepare

    ready = prepare(config)
    dataset = ready.dataset
    facts: dict[str, object] = {
        "name": dataset.name,
        "classes": len(dataset.classes),
        "train_images": len(dataset.train),
        "validation_images": len(dataset.validation),
    }
    return (lambda config, callbacks: fit(config, ready, callbacks)), facts


def _training_arguments(arguments: Sequence[str]) -> dict[str, object]:
    """As `parse_arguments`; an unknown name is refused with the study's names too."""
    try:
        return parse_arguments(arguments)
    except ConfigError as exc:
        raise ConfigError(f"{exc} And of the study: {', '.join(TuningConfig.model_fields)}.") from exc


def _terminate(number: int, _frame: FrameType | None) -> None:
    """SIGTERM outside of a training, which notices it by itself."""
    raise Interrupted(number)


if __name__ == "__main__":
    sys.exit(main())
