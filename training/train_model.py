"""`python -m training.train_model --data DIR --output DIR`: fine-tune, watched by Debugger and profiler.

The same training as a trial of `training.hpo`, and instrumentation. Exit status: see `training.command_line`.
"""

import logging
import sys
from collections.abc import Sequence

from training.command_line import configure_logging, exit_status
from training.config import FILES, TrainingConfig, merged
from training.environment import ranks, require_channel, sagemaker_job, sagemaker_values
from training.flags import parse_flags, split
from training.instrumentation import Instrumentation

log = logging.getLogger("training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training; returns the exit status."""
    configure_logging()
    return exit_status(lambda: train(sys.argv[1:] if arguments is None else arguments))


def train(arguments: Sequence[str]) -> None:
    """One training as the job and `arguments` say. Raises: TrainingError, Interrupted."""
    given = {**sagemaker_values(), **parse_arguments(arguments)}
    values = merged(given)
    require_channel(values)
    watching, training = split(values, Instrumentation)
    instrumentation = Instrumentation.create(watching)
    config = TrainingConfig.create(training)
    place = ranks()
    if place.is_first:
        if "from_tuning" in given:
            log.info("hyperparameters and settings are those of %s, unless flags say otherwise", given["from_tuning"])
        log.info("loading PyTorch")
    from training.distributed import Group  # torch takes seconds to import: not before the settings are right
    from training.run import run

    run(config, instrumentation.callbacks(sagemaker_job()) if place.is_first else (), Group(**vars(place)))


def parse_arguments(arguments: Sequence[str]) -> dict[str, object]:
    """The values given on the command line, by field name. Raises: ConfigError."""
    return parse_flags(
        arguments, "training.train_model",
        "Fine-tune ResNet-34 and write an artifact that `python -m service` serves.",
        (TrainingConfig, Instrumentation), FILES,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
