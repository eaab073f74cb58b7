"""Outcomes as files: CSV with a line for each image, or with everything as one JSON array or as JSON lines."""

import csv
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal, get_args

from training.errors import ConfigError
from training.launch import places
from training.launch.client import Outcome
from training.launch.errors import LaunchError

log = logging.getLogger("training")

Format = Literal["csv", "json", "jsonl"]
COLUMNS = ("file", "label", "probability", "second_label", "second_probability", "problem")


def format_of(path: Path | None, given: Format | None) -> Format:
    """The format asked for, else by the file's ending, else CSV. Raises: ConfigError."""
    if given:
        return given
    ending = ".csv" if path is None else path.suffix
    known: tuple[Format, ...] = get_args(Format)
    found = next((each for each in known if ending == f".{each}"), None)
    if found is None:
        raise ConfigError(f"--output {path}: the name must end in .csv, .json or .jsonl, or give --format.")
    return found


def require_writable(path: Path | None) -> None:
    """Results can be put there: asked before a job costs. Raises: ConfigError."""
    if path is None:
        return
    places.require_writable(path)
    if places.kind_at(path) == "folder" or (path.exists() and not os.access(path, os.W_OK)):
        raise ConfigError(f"--output {path} is no file that can be written; name another one.")


def write(outcomes: Iterable[Outcome], path: Path | None, kind: Format) -> tuple[int, int]:
    """Write outcomes as they come to `path`, None: stdout. Returns: how many there were, how many had a problem.

    A file that lies at `path` is replaced at the end; what came before an interruption stays beside it.
    """
    count = bad = 0
    with _opened(path) as file:
        table = csv.writer(file, lineterminator="\n") if kind == "csv" else None
        try:
            for outcome in outcomes:
                if table and not count:  # not before: where no image can be asked about, nothing is written
                    table.writerow(COLUMNS)
                count, bad = count + 1, bad + (outcome.problem is not None)
                if table:
                    table.writerow(_row(outcome))
                else:
                    begin, end = ("", "\n") if kind == "jsonl" else ("[\n" if count == 1 else ",\n", "")
                    file.write(f"{begin}{json.dumps(_object(outcome))}{end}")
                file.flush()
        finally:
            if kind == "json" and count:  # also of a run that broke off: what stays is JSON
                file.write("\n]\n")
        if kind == "json" and not count:
            file.write("[]\n")
    return count, bad


def show(text: str) -> None:
    """A result in words, to stdout. Raises: ConfigError where that is closed."""
    with _opened(None) as file:
        file.write(f"{text}\n")
        file.flush()


def report(counts: tuple[int, int], output: Path | None) -> None:
    """Say how it went. Raises: LaunchError where images had a problem."""
    count, bad = counts
    if bad:
        raise LaunchError(f"{bad} of {count} images had a problem; `problem` in {output or 'the results'} says which.")
    if output:
        log.info("%d images, 0 with a problem; in %s", count, output)


def _row(outcome: Outcome) -> list[str]:
    cells = [_text(outcome.path)]
    for place in range(2):
        found = outcome.predictions[place : place + 1]
        cells += [found[0]["label"], f"{found[0]['probability']:.6g}"] if found else ["", ""]
    return [*cells, outcome.problem or ""]


def _object(outcome: Outcome) -> dict[str, object]:
    if outcome.problem:
        return {"file": _text(outcome.path), "problem": outcome.problem}
    return {"file": _text(outcome.path), "model": dict(outcome.model), "predictions": list(outcome.predictions)}


def _text(path: Path) -> str:
    """The path as text: names of files may be bytes that are no UTF-8, which are written as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


@contextmanager
def _opened(path: Path | None) -> Iterator[IO[str]]:
    """Where results are written. Raises: ConfigError where that cannot be; LaunchError where it cannot go on."""
    if path is None:
        if sys.stdout is None:  # started with it closed
            raise ConfigError("stdout is closed, so there is no place for the results; give --output FILE.")
        yield sys.stdout
        return
    target = Path(os.path.realpath(path))  # a link stays one
    special = target.exists() and not target.is_file()  # /dev/null, a pipe: nothing to be kept
    part = target if special else target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # What a service says may hold what is no text (half of a surrogate pair).
        file = part.open("w", newline="", encoding="utf-8", errors="backslashreplace")
    except OSError as exc:
        raise ConfigError(f"--output {path} cannot be written: {exc.strerror}.") from exc
    try:
        with file:
            yield file
        if part != target:
            part.replace(target)
    except BaseException as exc:
        if part != target:
            _keep(part, path)
        if isinstance(exc, OSError):
            raise LaunchError(
                f"{part} cannot be written further: {exc.strerror or exc}; what stands in it is not all."
            ) from exc
        raise


def _keep(part: Path, path: Path) -> None:
    """Say where the results are that came before it ended early."""
    with suppress(OSError):
        if part.stat().st_size:
            log.warning("ended early: the results until then are in %s, not in %s", part, path)
        else:
            part.unlink()
