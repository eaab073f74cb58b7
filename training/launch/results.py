"""Outcomes as files: CSV with a line for each image, or JSON lines with everything."""

import csv
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from training.errors import ConfigError
from training.launch.client import Outcome
from training.launch.errors import LaunchError

log = logging.getLogger("training")

Format = Literal["csv", "jsonl"]
COLUMNS = ("file", "label", "probability", "second_label", "second_probability", "problem")


def format_of(path: Path | None, given: Format | None) -> Format:
    """The format asked for, else by the file's ending, else CSV. Raises: ConfigError."""
    if given:
        return given
    if path is None or path.suffix == ".csv":
        return "csv"
    if path.suffix in (".json", ".jsonl"):
        return "jsonl"
    raise ConfigError(f"--output {path}: the name must end in .csv or .jsonl, or give --format.")


def write(outcomes: Iterable[Outcome], path: Path | None, kind: Format) -> tuple[int, int]:
    """Write outcomes as they come to `path`, None: stdout. Returns: how many there were, how many had a problem."""
    count = bad = 0
    with _opened(path) as file:
        table = csv.writer(file, lineterminator="\n") if kind == "csv" else None
        if table:
            table.writerow(COLUMNS)
        for outcome in outcomes:
            count, bad = count + 1, bad + (outcome.problem is not None)
            if table:
                table.writerow(_row(outcome))
            else:
                file.write(f"{json.dumps(_object(outcome))}\n")
            file.flush()
    return count, bad


def report(counts: tuple[int, int], output: Path | None) -> None:
    """Say how it went. Raises: LaunchError where images had a problem."""
    count, bad = counts
    if output:
        log.info("%d images, %d with a problem; in %s", count, bad, output)
    if bad:
        raise LaunchError(f"{bad} of {count} images had a problem; `problem` in the results says which.")


def _row(outcome: Outcome) -> list[str]:
    cells = [str(outcome.path)]
    for place in range(2):
        found = outcome.predictions[place : place + 1]
        cells += [found[0]["label"], f"{found[0]['probability']:.6g}"] if found else ["", ""]
    return [*cells, outcome.problem or ""]


def _object(outcome: Outcome) -> dict[str, object]:
    if outcome.problem:
        return {"file": str(outcome.path), "problem": outcome.problem}
    return {"file": str(outcome.path), "model": dict(outcome.model), "predictions": list(outcome.predictions)}


@contextmanager
def _opened(path: Path | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", newline="")
    except OSError as exc:
        raise ConfigError(f"--output {path} cannot be written: {exc.strerror}.") from exc
    with file:
        yield file
