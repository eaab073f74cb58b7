"""`python -m training.train_model --data DIR --output DIR`: fine-tune and write the artifact.

Exit status: 0 when the artifact is written, 1 when data, weights or the run failed, 2 for wrong settings,
130 after Ctrl-C.
"""

import logging
import sys
from collections.abc import Sequence

from training.config import TrainingConfig, parse_arguments
from training.environment import sagemaker_values
from training.errors import ConfigError, TrainingError

log = logging.getLogger("training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training; returns the exit status."""
    configure_logging()
    try:
        given = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        config = TrainingConfig.create({**sagemaker_values(), **given})
        from training.run import run  # torch takes seconds to import: not before the settings are right

        run(config)
    except ConfigError as exc:
        log.error("%s", exc)
        return 2
    except TrainingError as exc:
        log.error("%s", exc)
        return 1
    except KeyboardInterrupt:
        log.error("Stopped before the end: no artifact was written, one that was there is as it was.")
        return 130
    return 0


def configure_logging() -> None:
    """Plain lines on stdout, where SageMaker reads them."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )


if __name__ == "__main__":
    sys.exit(main())
