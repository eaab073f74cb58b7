"""The same charts as PNG files, for slides, notebooks and experiment trackers: matplotlib, without a screen."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from training.figures import Figures
from training.report.matrix import FULL_MISTAKE, MAX_LABELLED, MAX_NUMBERED, grouped_order
from training.report.sources import Sources, series

if TYPE_CHECKING:  # matplotlib takes a second to import: not before a report is written
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALIDATION = "#d9730d", "#2563c9"
MAX_BARS = 200
"""Classes up to which each has its bar."""


def pictures(
    figures: Figures, classes: Sequence[str], groups: Sequence[str] | None, sources: Sources
) -> dict[str, bytes]:
    """File name -> PNG."""
    with _quiet_settings():
        drawn = {"confusion.png": _confusion(figures, classes, groups), "calibration.png": _calibration(figures)}
        if sources.epochs:
            drawn["curves.png"] = _curves(sources)
        if len(classes) <= MAX_BARS:
            drawn["classes.png"] = _classes(figures, classes)
        return {name: _png(figure) for name, figure in drawn.items()}


@contextmanager
def _quiet_settings() -> Iterator[None]:
    """Class names are plain text ("$" begins no formula), and a letter the font lacks is a box, not a warning."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")  # a Figure made without pyplot draws with Agg
    return buffer.getvalue()


def _curves(sources: Sources) -> "Figure":
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = _figure(11, 3.4)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        for part, colour in (("train", TRAIN), ("validation", VALIDATION)):
            _plot(axes, series(sources.epochs, "epoch", f"{part}_{name}"), part, colour)
        axes.legend(frameon=False)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    _plot(rate, series(sources.epochs, "epoch", "learning_rate"), "learning rate", VALIDATION)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy"), (rate, "learning rate")):
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _plot(axes: "Axes", points: list[tuple[float, float]], name: str, colour: str) -> None:
    axes.plot(
        [x for x, _ in points], [y for _, y in points], label=name, color=colour,
        marker="o" if len(points) <= 20 else "", markersize=3,
    )  # fmt: skip


def _confusion(figures: Figures, classes: Sequence[str], groups: Sequence[str] | None) -> "Figure":
    """The diagonal in blue, mistakes in orange on a scale that ends at FULL_MISTAKE."""
    order = grouped_order(groups, len(classes))
    counts = figures.confusion[np.ix_(order, order)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    diagonal = np.eye(len(order), dtype=bool)
    size = min(16.0, max(5.0, 2.5 + 0.14 * len(order) if len(order) > MAX_NUMBERED else 3.5 + 0.4 * len(order)))
    figure = _figure(size + 0.5, size)
    axes = figure.subplots()
    axes.imshow(
        np.where(diagonal | (counts == 0), np.nan, shares),
        cmap="Oranges",
        vmin=0,
        vmax=FULL_MISTAKE,
        interpolation="none",
    )
    axes.imshow(np.where(diagonal, shares, np.nan), cmap="Blues", vmin=0, vmax=1, interpolation="none")
    axes.set(xlabel="predicted", ylabel="true", title=f"Confusion matrix, {figures.n:,} images")
    if len(order) <= MAX_LABELLED:
        names = [classes[k][:40] for k in order]
        font = 6.0 if len(order) > MAX_NUMBERED else 9.0
        axes.set_xticks(range(len(order)), names, rotation=90, fontsize=font)
        axes.set_yticks(range(len(order)), names, fontsize=font)
    if len(order) <= MAX_NUMBERED:
        for i, j in zip(*counts.nonzero(), strict=True):
            dark = shares[i, j] > (0.5 if i == j else FULL_MISTAKE / 2)
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=8, color="white" if dark else "black")
    for k in range(1, len(order)):
        if groups is not None and groups[order[k]] != groups[order[k - 1]]:
            axes.axhline(k - 0.5, color="0.6", linewidth=0.5)
            axes.axvline(k - 0.5, color="0.6", linewidth=0.5)
    return figure


def _classes(figures: Figures, classes: Sequence[str]) -> "Figure":
    ranked = sorted((each.accuracy, classes[k]) for k, each in enumerate(figures.classes) if each.accuracy is not None)
    figure = _figure(7, max(2.5, 0.16 * len(ranked) + 1))
    axes = figure.subplots()
    axes.barh(range(len(ranked)), [accuracy for accuracy, _ in ranked], color=VALIDATION)
    axes.axvline(figures.accuracy, color=TRAIN, linewidth=1)
    axes.set_yticks(range(len(ranked)), [name[:40] for _, name in ranked], fontsize=7)
    axes.set(xlim=(0, 1), ylim=(-0.7, len(ranked) - 0.3), xlabel="accuracy (line: of all images)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _calibration(figures: Figures) -> "Figure":
    figure = _figure(5, 4.4)
    axes = figure.subplots()
    for each in figures.bins:
        if each.accuracy is not None:
            axes.bar(each.low, each.accuracy, each.high - each.low, align="edge", color=VALIDATION, edgecolor="white")
    axes.plot([0, 1], [0, 1], color=TRAIN, linestyle="--")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=f"ECE {100 * figures.ece:.1f} %")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
