"""`python -m training.launch COMMAND`: the journey to Amazon SageMaker, a command a step; `--help` lists them.

Exit status: 0 done; 1 a step failed, and what to do; 2 wrong settings; 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by a
terminal that was closed: what AWS runs goes on, the same command waits for it again.
"""

import io
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence

from training.errors import ConfigError, TrainingError
from training.interruption import HANGUP, Terminated, raised

try:
    from training.launch.flags import parser
except ModuleNotFoundError as exc:
    package = (exc.name or "").partition(".")[0]
    if package not in ("boto3", "botocore"):
        raise
    sys.exit(
        f"{package} is not installed: `make setup-sagemaker` installs it, or `uv sync --inexact --group training "
        "--group sagemaker`."
    )

log = logging.getLogger("training")

STOPPED = (
    "Stopped; repeat the command: what is there already is found and not made again. `status` lists what runs at AWS, "
    "`stop` ends jobs."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    # Results go to stdout (`invoke | sort`), so what is told of them goes beside.
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if isinstance(sys.stdout, io.TextIOWrapper):  # whatever a result has in it can be written, in any locale
        sys.stdout.reconfigure(errors="backslashreplace")
    for noisy in ("botocore", "boto3", "s3transfer", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("botocore.credentials").setLevel(logging.ERROR)  # what fails is raised besides, and told
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options, rest = parser().parse_known_args(given)
    except SystemExit as exc:  # argparse has told why, or printed --help
        return int(exc.code or 0)
    try:
        with raised(*HANGUP):  # a closed terminal: it cleans up and says what goes on, as after Ctrl-C
            _require_no_empty(given)
            from training.launch.commands import run  # the training's settings: seconds, and not for --help

            run(options, rest)
    except TrainingError as exc:
        log.error("%s", exc)
        return 2 if isinstance(exc, ConfigError) else 1
    except KeyboardInterrupt as exc:
        log.error("%s", exc if exc.args else STOPPED)
        ends = getattr(exc, "ends", "")
        if ends:
            from training.launch.opening import command_line

            log.error("To end it: %s", command_line(options, ends))
        log.error("The command was: python -m training.launch %s", shlex.join(given))
        ended = exc if isinstance(exc, Terminated) else exc.__cause__
        return 128 + (ended.signal_number if isinstance(ended, Terminated) else signal.SIGINT)
    except BrokenPipeError:  # `invoke photos | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still held is not written at the end either
        more = "; --output FILE keeps all of them" if hasattr(options, "output") else ""
        log.error("Nobody reads the results any more%s.", more)
        return 1
    except OSError as exc:  # a full disk, say; what is known of is told where it occurs
        where = f"{exc.filename}: " if exc.filename else ""
        log.error("This machine refused: %s%s. Mend that, and repeat the command.", where, exc.strerror or exc)
        return 1
    return 0


def _require_no_empty(given: Sequence[str]) -> None:
    """Raises: ConfigError where a flag's text is empty: of a variable that the shell does not know, say."""
    for place, text in enumerate(given):
        if not text or re.fullmatch(r"--[\w-]+=", text):
            what = text.rstrip("=") or (given[place - 1] if place else "The command")
            raise ConfigError(
                f"{what} is given an empty text (is a variable of the shell not set?): give a value, or leave it out."
            )


if __name__ == "__main__":
    sys.exit(main())
