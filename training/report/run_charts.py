"""Charts of how the run went: losses and accuracies by epoch and by step, the learning rate, where the time went."""

from dataclasses import dataclass
from typing import Any

from training.report.charts import Chart, Series, duration, line_chart, percent, smoothed
from training.report.sources import Record, Sources, finite, numbers, records, series

SMOOTHING = 40
"""A batch series is smoothed over this part of its length."""
MAX_OPERATORS = 12


@dataclass(frozen=True)
class Share:
    """A part of the time or of an operator list: 0..1 and what stands beside it."""

    name: str
    share: float
    text: str


@dataclass(frozen=True)
class ProfileView:
    """What the template draws of profile.json."""

    summary: str
    shares: tuple[Share, ...]
    step_ms: tuple[tuple[str, str], ...]
    operators: tuple[Share, ...]
    charts: tuple[Chart, ...]


def training_charts(sources: Sources) -> list[Chart]:
    """Those of: loss and accuracy by epoch, batch loss and batch accuracy by step, learning rate."""
    epochs, steps = sources.epochs, sources.steps
    found = [
        line_chart("Loss", "epoch", _parts(epochs, "loss"), low=0),
        line_chart("Accuracy", "epoch", _parts(epochs, "accuracy"), percent, low=0),
        line_chart("Batch loss", "step", _noisy(steps, "batch_loss"), low=0),
        line_chart("Batch accuracy", "step", _noisy(steps, "batch_accuracy"), percent, low=0),
    ]
    rate = series(steps, "step", "learning_rate")
    if rate:
        found.append(line_chart("Learning rate", "step", [Series("learning rate", rate)], low=0))
    else:
        rate = series(epochs, "epoch", "learning_rate")
        found.append(line_chart("Learning rate", "epoch", [Series("learning rate", rate)], low=0))
    seconds = series(epochs, "epoch", "seconds")
    found.append(line_chart("Seconds per epoch", "epoch", [Series("seconds", seconds)], low=0))
    return [chart for chart in found if chart is not None]


def profile_view(profile: Record | None) -> ProfileView | None:
    """Whatever of the profile is there and of the right kind."""
    if profile is None:
        return None
    shares = numbers(profile.get("shares"))
    summary = profile.get("summary")
    return ProfileView(
        summary=summary if isinstance(summary, str) else "",
        shares=tuple(Share(_words(name), min(1.0, max(0.0, s)), percent(s)) for name, s in _largest(shares)),
        step_ms=tuple((name, duration(value)) for name, value in numbers(profile.get("step_ms")).items()),
        operators=tuple(_operator(each) for each in records(profile.get("top_operators"))[:MAX_OPERATORS]),
        charts=_samples(records(profile.get("samples"))),
    )


def _parts(epochs: list[Record], name: str) -> list[Series]:
    return [Series(part, series(epochs, "epoch", f"{part}_{name}")) for part in ("train", "validation")]


def _noisy(steps: list[Record], name: str) -> list[Series]:
    points = series(steps, "step", name)
    window = max(1, len(points) // SMOOTHING)
    raw = Series("batches", points, faint=window > 1)
    return [raw, Series(f"mean of {window}", smoothed(points, window))] if window > 1 else [raw]


def _largest(shares: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(shares.items(), key=lambda pair: -pair[1])


def _operator(record: Record) -> Share:
    share, total_ms = finite(record.get("share")) or 0.0, finite(record.get("total_ms"))
    text = percent(share) if total_ms is None else f"{percent(share)}, {duration(total_ms)}"
    return Share(str(record.get("name", "?")), min(1.0, max(0.0, share)), text)


def _samples(samples: list[Record]) -> tuple[Chart, ...]:
    """Percentages in one chart, memory in another."""
    names: dict[str, Any] = {}
    for record in samples:
        names |= dict.fromkeys(numbers(record))
    loads = [name for name in names if name.endswith("_percent")]
    memories = [name for name in names if name.endswith("_gb")]
    found = [
        line_chart("Load in percent", "seconds", _by_time(samples, loads), low=0),
        line_chart("Memory in GB", "seconds", _by_time(samples, memories), low=0),
    ]
    return tuple(chart for chart in found if chart is not None)


def _by_time(samples: list[Record], names: list[str]) -> list[Series]:
    suffixes = ("_percent", "_gb")
    labels = [next((name.removesuffix(s) for s in suffixes if name.endswith(s)), name) for name in names]
    return [Series(_words(label), series(samples, "t_s", name)) for label, name in zip(labels, names, strict=True)]


def _words(name: str) -> str:
    return name.replace("_", " ")
