"""What the commands of `training` share: log lines, and what ends them.

Exit status: 0 done; 1 data, weights or the run failed; 2 wrong settings; 128 + the signal's number when stopped by one
(130 Ctrl-C, 143 SIGTERM), after which the same command resumes. Inside a SageMaker job the reason goes to
/opt/ml/output/failure too.
"""

import argparse
import io
import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TextIO

from training.environment import write_failure
from training.errors import ConfigError, TrainingError
from training.interruption import Interrupted, Terminated, raised

log = logging.getLogger("training")


class _Handler(logging.StreamHandler[TextIO]):
    """A full disk or a reader that is gone costs lines, not a trace for each of them."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """See `logging.Handler`."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def configure_logging() -> None:
    """Plain lines on stdout, where SageMaker reads them; times in UTC, as the service's."""
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    if isinstance(sys.stdout, io.TextIOWrapper):  # whatever a file's name has in it can be written
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = _Handler(sys.stdout)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("torch").setLevel(logging.WARNING)  # it tells of its caches when a process ends


def positive(text: str) -> int:
    """A flag's whole number from 1 up. Raises: argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"given {text}, allowed are whole numbers from 1 up")
    return int(text)


def listed(names: Sequence[str]) -> str:
    """The names for a sentence; of more than ten, how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--device and --loader-workers, of a command that runs a network over images."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: %(default)s")
    parser.add_argument("--loader-workers", type=positive, help="processes that decode what does not fit into memory")


def run_command(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, command: Callable[[argparse.Namespace], object]
) -> int:
    """Parse `arguments` (None: the process's) and run `command` with them; returns the exit status."""
    try:
        options = parser.parse_args(arguments)
    except SystemExit as exc:  # argparse has told why, or printed --help
        return int(exc.code or 0)
    configure_logging()
    return exit_status(lambda: command(options))


def exit_status(program: Callable[[], object]) -> int:
    """Run `program`; returns the exit status, with a sentence in the log for what ended it."""
    try:
        with raised():
            program()
    except TrainingError as exc:
        log.error("%s", exc)
        write_failure(str(exc), traceback.format_exc())
        return 2 if isinstance(exc, ConfigError) else 1
    except Interrupted as exc:
        log.error("%s: a checkpoint is written, the same command goes on from there; no artifact was touched.", exc)
        return 128 + exc.signal_number
    except KeyboardInterrupt as exc:
        log.error("Stopped before the end; the same command goes on from the last checkpoint, if there is one.")
        return 143 if isinstance(exc, Terminated) else 130
    except Exception as exc:
        log.error("A fault of this program: %s: %s. Please report it with the lines below.", type(exc).__name__, exc)
        write_failure(f"{type(exc).__name__}: {exc}", traceback.format_exc())
        raise
    return 0
