"""`python -m training.launch COMMAND`: the journey to Amazon SageMaker, a command a step; `--help` lists them.

Exit status: 0 done; 1 a step failed, and what to do; 2 wrong settings; 130 stopped by Ctrl-C, 143 by SIGTERM: what AWS
runs goes on, the same command waits for it again.
"""

import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from training.errors import ConfigError, TrainingError

try:
    from training.launch.flags import parser
except ModuleNotFoundError as exc:
    package = (exc.name or "").partition(".")[0]
    if package not in ("boto3", "botocore"):
        raise
    sys.exit(f"{package} is not installed: `uv sync --inexact --group training --group sagemaker` installs it.")

log = logging.getLogger("training")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


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
    before = signal.signal(signal.SIGTERM, _end)
    try:
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
        return 143 if isinstance(exc, _Terminated) or isinstance(exc.__cause__, _Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    raise _Terminated


if __name__ == "__main__":
    sys.exit(main())
