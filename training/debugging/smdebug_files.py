"""Observations from the tensors that smdebug wrote, so that the rules judge those too."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from training.debugging import statistics
from training.debugging.observations import Kind, Observation, scalar
from training.debugging.smdebug_hook import import_smdebug
from training.errors import DataError

log = logging.getLogger(__name__)

MARK = "worker_0_collections.json"
"""The file by which a folder of smdebug's is known: collections/*/worker_0_collections.json in it."""


def is_trial(folder: Path) -> bool:
    """Whether smdebug wrote into the folder."""
    return any(folder.glob(f"collections/*/{MARK}"))


def read_trial(folder: Path, atol: float = 1e-8) -> Iterator[Observation]:
    """What smdebug wrote of the training steps, and the scalars of epochs, in the order of steps.

    Changes of weights are those between saved steps; the time of a step is when the first of its tensors was written.
    There are no labels in it. Raises: DataError.
    """
    if import_smdebug() is None:
        raise DataError(
            f"{folder} is in smdebug's format and smdebug is not installed: uv sync --inexact --group debugger."
        )
    from smdebug.core.modes import ModeKeys  # type: ignore[import-untyped]
    from smdebug.trials import create_trial  # type: ignore[import-untyped]

    trial = create_trial(str(folder))
    names = trial.tensor_names()
    entries: list[tuple[float, int, str, Any]] = []
    for name in names:
        kind = _kind(name)
        for step in trial.tensor(name).steps(mode=ModeKeys.TRAIN):
            entries.append((step, 0 if kind == "loss" else 1, name, ModeKeys.TRAIN))
    train_steps = sorted({step for step, *_ in entries})
    epochs = sorted({epoch for name in names for epoch in trial.tensor(name).steps(mode=ModeKeys.EVAL)})
    for name in names:
        for epoch in trial.tensor(name).steps(mode=ModeKeys.EVAL):
            entries.append((epoch, 2, name, ModeKeys.EVAL))
    before: dict[str, tuple[int, torch.Tensor]] = {}
    times_s: dict[tuple[float, Any], float] = {}
    last = int(train_steps[-1]) if train_steps else 0
    # Epochs have no step of training in these files: they are judged after all steps, each in its turn.
    for step, _, name, mode in sorted(entries, key=lambda entry: (entry[3] is ModeKeys.EVAL, *entry[:3])):
        value = trial.tensor(name).value(int(step), mode=mode)
        if (step, mode) not in times_s:
            times_s[step, mode] = _written_s(trial.tensor(name)._step(int(step), mode=mode).location)
        number = int(step) if mode is ModeKeys.TRAIN else last + epochs.index(step) + 1
        yield _observation(number, name, times_s[step, mode], torch.as_tensor(value), before, atol)


def _written_s(location: Any) -> float:
    """The time of the event at a place in smdebug's files, which its trials do not hand out; seconds since 1970."""
    from smdebug.core.tfevent.proto.event_pb2 import Event  # type: ignore[import-untyped]
    from smdebug.core.tfrecord.tensor_reader import TensorReader  # type: ignore[import-untyped]

    with Path(location.event_file_name).open("rb") as file:
        file.seek(location.start_idx)
        record = TensorReader(file.read(location.length)).read_record()
    return float(Event.FromString(record).wall_time)


def _kind(name: str) -> Kind:
    if name.startswith("scalar/"):
        return "scalar"
    if name.startswith("gradient/"):
        return "gradient"
    if "oss_output" in name:
        return "loss"
    if "_output_" in name:
        return "activation_output"
    return "activation_input" if "_input_" in name else "weight"


def _observation(
    step: int,
    name: str,
    time_s: float,
    tensor: torch.Tensor,
    before: dict[str, tuple[int, torch.Tensor]],
    atol: float,
) -> Observation:
    kind = _kind(name)
    if kind in ("scalar", "loss") and tensor.numel() == 1:
        return scalar(step, name, float(tensor), time_s, kind)
    table = dict(statistics.tensor_figures([tensor])[0])
    extra: dict[str, float] = {}
    if kind == "gradient":
        table |= statistics.percentiles(tensor)
    elif kind == "activation_output" and tensor.ndim > 1:
        table["activity"] = statistics.activity(tensor)
    elif kind == "weight":
        if name in before:
            table |= statistics.changes(tensor, before[name][1], atol)
            extra = {"since": float(before[name][0]), "atol": atol}
        before[name] = step, tensor
    (figures,) = statistics.transfer([table])
    series = tuple(figures.pop("activity", ()))
    return Observation(step, name, kind, time_s, {each: value for each, (value,) in figures.items()} | extra, series)
