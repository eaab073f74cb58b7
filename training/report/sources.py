"""The files of a run that the report reads, each of them optional: formats in `training.callbacks`.

A run may have been interrupted while it wrote; what is damaged is left out with a line in the log, and a value that
is no finite number counts as absent.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(frozen=True)
class Sources:
    """What was found in a run's folder."""

    settings: Record = field(default_factory=dict)
    steps: list[Record] = field(default_factory=list)
    """By `step`, each once; of a step made twice (resumed runs) the last."""
    epochs: list[Record] = field(default_factory=list)
    rules: list[Record] | None = None
    """None where no rule watched."""
    profile: Record | None = None


def read_sources(folder: Path, history: list[Record]) -> Sources:
    """Read what there is in `folder`; `history` (the manifest's) stands in where no epochs are recorded."""
    steps: dict[float, Record] = {}
    epochs: dict[float, Record] = {}
    for record in _lines(folder / "metrics.jsonl"):
        kind = record.get("kind")
        number = finite(record.get(kind)) if kind in ("step", "epoch") else None
        if number is not None:
            (steps if kind == "step" else epochs)[number] = record
    if not epochs:
        epochs = {number: each for each in history if (number := finite(each.get("epoch"))) is not None}
    rules = _object(folder / "rules.json")
    return Sources(
        settings=_object(folder / "settings.json") or {},
        steps=[steps[number] for number in sorted(steps)],
        epochs=[epochs[number] for number in sorted(epochs)],
        rules=None if rules is None else records(rules.get("rules")),
        profile=_object(folder / "profile.json"),
    )


def finite(value: object) -> float | None:
    """`value` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def records(value: object) -> list[Record]:
    """The objects in a list that came from JSON; none where it is no list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def numbers(value: object) -> dict[str, float]:
    """The finite numbers in an object that came from JSON, by name."""
    pairs = value.items() if isinstance(value, Mapping) else ()
    return {str(name): number for name, each in pairs if (number := finite(each)) is not None}


def series(found: list[Record], x: str, y: str) -> list[tuple[float, float]]:
    """The points (x, y) of the records that have both."""
    pairs = ((finite(record.get(x)), finite(record.get(y))) for record in found)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _object(path: Path) -> Record | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as exc:
        log.warning("%s cannot be read (%s); the report goes without it", path, exc)
        return None
    if not isinstance(content, dict):
        log.warning("%s is not a JSON object; the report goes without it", path)
        return None
    return content


def _lines(path: Path) -> list[Record]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as exc:
        log.warning("%s cannot be read (%s); the report goes without it", path, exc.strerror)
        return []
    found, damaged = [], 0
    for line in lines:
        try:
            record = json.loads(line)
            found.append(record if isinstance(record, dict) else {})
        except (ValueError, RecursionError):
            damaged += 1
    if damaged:
        log.warning("%s: %d of %d lines are damaged and left out", path, damaged, len(lines))
    return found
