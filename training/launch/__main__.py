"""`python -m training.launch COMMAND`: the journey to Amazon SageMaker, a command a step; `--help` lists them.

Exit status: 0 done; 1 a step failed, and what to do; 2 wrong settings; 130 stopped by Ctrl-C, 143 by SIGTERM: what AWS
runs goes on, the same command waits for it again.
"""

import logging
import shlex
import sys
from collections.abc import Sequence

from training.errors import ConfigError, TrainingError
from training.interruption import Terminated, raised

try:
    from training.launch.flags import parser
except ModuleNotFoundError as exc:
    package = (exc.name or "").partition(".")[0]
    if package not in ("boto3", "botocore"):
        raise
    sys.exit(f"{package} is not installed: `uv sync --inexact --group training --group sagemaker` installs it.")

log = logging.getLogger("training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    # Results go to stdout (`invoke | sort`), so what is told of them goes beside.
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("botocore", "boto3", "s3transfer", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        options, rest = parser().parse_known_args(arguments)
    except SystemExit as exc:  # argparse has told why, or printed --help
        return int(exc.code or 0)
    try:
        with raised():
            from training.launch.commands import run  # the training's settings: seconds, and not for --help

            run(options, rest)
    except TrainingError as exc:
        log.error("%s", exc)
        return 2 if isinstance(exc, ConfigError) else 1
    except KeyboardInterrupt as exc:
        log.error(
            "%s", exc if exc.args else "Stopped; repeat the command: what is there already is found and not made again."
        )
        given = sys.argv[1:] if arguments is None else arguments
        log.error("The command was: python -m training.launch %s", shlex.join(given))
        return 143 if isinstance(exc, Terminated) or isinstance(exc.__cause__, Terminated) else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
