"""`python -m training.train_model --data DIR --output DIR`: fine-tune, watched by Debugger and profiler.

The same training as a trial of `training.hpo`, and instrumentation. Exit status: see `training.entry`.
"""

import logging
import sys
from collections.abc import Sequence

from training.config import TrainingConfig, parse_arguments
from training.entry import configure_logging, exit_status
from training.environment import ranks, sagemaker_values

log = logging.getLogger("training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training; returns the exit status."""
    configure_logging()
    return exit_status(lambda: train(sys.argv[1:] if arguments is None else arguments))


def train(arguments: Sequence[str]) -> None:
    """One training as the job and `arguments` say. Raises: TrainingError, Interrupted."""
    config = TrainingConfig.resolve({**sagemaker_values(), **parse_arguments(arguments)})
    place = ranks()
    from training.distributed import Group  # torch takes seconds to import: not before the settings are right
    from training.run import run

    run(config, (), Group(**vars(place)))


if __name__ == "__main__":
    sys.exit(main())
