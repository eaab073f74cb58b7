"""Checkpoints: all a run needs to go on as if it had never stopped.

One file, replaced by rename: a reader finds the checkpoint before or the one after, whatever happens to the writer.
It begins with the sha256 of the rest (hexadecimal), which torch.save wrote and torch.load reads with `weights_only`.
Randomness needs no state here (`training.randomness`), and the schedule follows from the number of the step.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.config import LOCAL, TrainingConfig
from training.errors import CheckpointError

log = logging.getLogger(__name__)

FILE = "checkpoint.pt"
FORMAT = 1
LOCK = "lock"
DIGEST_LENGTH = 64


@dataclass
class Progress:
    """How far a run is."""

    epoch: int = 1
    """The epoch under way, or the next; counts from 1."""
    steps: int = 0
    """Steps of this epoch that are done."""
    step: int = 0
    """Steps done in all."""
    loss_sum: float = 0.0
    hits: float = 0.0
    seen: float = 0.0
    """Sums over this epoch's images so far."""
    seconds: float = 0.0
    """Time this epoch has taken so far."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """EpochMetrics of the epochs that are done, as dictionaries."""
    stopped: str | None = None
    """Why the run is to end before its last epoch."""
    best_accuracy: float = -1.0
    best_epoch: int = 0


def save(folder: Path, config: TrainingConfig, facts: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the checkpoint: `facts` must be equal for a run to go on from it, `state` is what it restores.

    Raises: CheckpointError.
    """
    partial = folder / f"{FILE}.part"
    content = {"format": FORMAT, "settings": _settings(config), "facts": json.dumps(facts, sort_keys=True), **state}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(content, buffer)
        with partial.open("wb") as file:
            file.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / FILE)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException as exc:
        with contextlib.suppress(OSError):  # the folder may be a file
            partial.unlink()
        if not isinstance(exc, OSError | RuntimeError):
            raise
        reason = exc.strerror if isinstance(exc, OSError) else str(exc).splitlines()[0]
        raise CheckpointError(f"The checkpoint cannot be written into {folder}: {reason}.") from exc


def load(folder: Path, config: TrainingConfig, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The state of the checkpoint in `folder`; None if there is none.

    Raises: CheckpointError when it is damaged or of a run with other settings or data.
    """
    path = folder / FILE
    if not path.exists():
        return None
    way_out = "remove it to start anew, or name another folder with --checkpoints"
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read ({exc.strerror}); {way_out}.") from exc
    digest, payload = content[:DIGEST_LENGTH], content[DIGEST_LENGTH:]
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} is damaged or no checkpoint of ours; {way_out}.")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise KeyError("format")
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as exc:
        raise CheckpointError(f"{path} was written by another version of this program; {way_out}.") from exc
    known = _settings(config)
    before = state["settings"]
    differing = [
        f"{name} {before.get(name)} (now {known.get(name)})"
        for name in sorted(before.keys() | known.keys())
        if before.get(name) != known.get(name)
    ]
    if state["facts"] != json.dumps(facts, sort_keys=True):
        differing.append(f"data {state['facts']} (now {json.dumps(facts, sort_keys=True)})")
    if differing:
        raise CheckpointError(f"{path} is of an unfinished run with {', '.join(differing)}; {way_out}.")
    return state


@contextmanager
def claimed(folder: Path, flag: str) -> Iterator[None]:
    """Hold the folder's lock; the operating system lets go of it with the process.

    `flag`: what names another one. Raises: CheckpointError if it is taken.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as exc:
        raise CheckpointError(f"{folder / LOCK} cannot be written: {exc.strerror}.") from exc
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise CheckpointError(f"Another training uses {folder}; wait for its end, or name another {flag}.") from exc
        yield


def remove(folder: Path) -> None:
    """Forget the checkpoint: its run is over, and the artifact there, so a failure costs a line."""
    try:
        (folder / FILE).unlink(missing_ok=True)
    except OSError as exc:
        log.warning("%s cannot be removed (%s); remove it before another run.", folder / FILE, exc.strerror)


def remove_if_unused(folder: Path) -> None:
    """Remove a folder in which nothing lies but the lock that this process has let go of."""
    with contextlib.suppress(OSError):
        if [entry.name for entry in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
        folder.rmdir()


def _settings(config: TrainingConfig) -> dict[str, Any]:
    values = json.loads(json.dumps(config.model_dump(mode="json", exclude=set(LOCAL))))
    assert isinstance(values, dict)
    return values
