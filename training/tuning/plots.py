"""The pictures of a study: how it went, what mattered, which hyperparameters go with which result. PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.tuning.config import SOURCES, TuningConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.trial import FrozenTrial

INK, GOOD, PALE = "#33415c", "#2a9d8f", "#b8bfcc"
DPI = 130
IMPORTANCES_FROM, COORDINATES_FROM = 4, 2
"""Complete trials from which these pictures say something."""


def draw(trials: "Sequence[FrozenTrial]", tuning: TuningConfig, folder: Path) -> list[Path]:
    """Write history.png, importances.png and parallel_coordinates.png. `trials`: at least one is complete.

    Returns: the files written; those whose picture needs more trials than there are, are left out.
    """
    made = [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
    complete = [trial for trial in made if trial.state.name == "COMPLETE"]
    written = [_history(made, tuning, folder / "history.png")]
    names = [name for name in SOURCES if any(name in trial.params for trial in complete)]
    if len(complete) >= IMPORTANCES_FROM:
        written.append(_importances(complete, tuning, names, folder / "importances.png"))
    if len(complete) >= COORDINATES_FROM:
        written.append(_parallel(made, tuning, names, folder / "parallel_coordinates.png"))
    return written


def _history(made: "list[FrozenTrial]", tuning: TuningConfig, path: Path) -> Path:
    """The result of each trial, and the best until then."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _page(7, 4)
    best_so_far: list[tuple[int, float]] = []
    best = max if tuning.direction == "maximize" else min
    for state, colour, what in (("PRUNED", PALE, "pruned (where it stood)"), ("COMPLETE", INK, "complete")):
        shown = [trial for trial in made if trial.state.name == state and trial.value is not None]
        if shown:
            axes.scatter([t.number for t in shown], [t.value or 0.0 for t in shown], color=colour, label=what, zorder=3)
    for trial in made:
        if trial.state.name == "COMPLETE" and trial.value is not None:
            reached = best([value for _, value in best_so_far[-1:]] + [trial.value])
            best_so_far.append((trial.number, reached))
    numbers, values = zip(*best_so_far, strict=True)
    axes.step([*numbers, made[-1].number], [*values, values[-1]], where="post", color=GOOD, label="best so far")
    lost = [trial for trial in made if trial.value is None]
    if lost:
        low, high = axes.get_ylim()
        axes.scatter([t.number for t in lost], [low] * len(lost), color="#d1495b", marker="x", label="no result")
        axes.set_ylim(low - 0.05 * (high - low), high)
    axes.set_xlabel("trial")
    axes.set_ylabel(_name(tuning.metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle("The result of each trial", fontsize=11, color=INK)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=4, fontsize=9)
    return _save(figure, path)


def _importances(complete: "list[FrozenTrial]", tuning: TuningConfig, names: list[str], path: Path) -> Path:
    """How far the good trials' values of each hyperparameter lie from those of all trials."""
    shares = importances(complete, tuning)
    figure, axes = _page(7, 0.6 * len(names) + 1.4)
    ordered = sorted(names, key=lambda name: shares.get(name, 0.0))
    widths = [100 * shares.get(name, 0.0) for name in ordered]
    bars = axes.barh([_name(name) for name in ordered], widths, color=INK, height=0.6)
    axes.bar_label(bars, fmt="%.0f %%", padding=4)
    axes.set_xlim(0, 115)
    axes.set_xlabel(f"share of importance for the better half of {len(complete)} complete trials (PED-ANOVA), %")
    return _save(figure, path)


def importances(complete: "Sequence[FrozenTrial]", tuning: TuningConfig) -> dict[str, float]:
    """Importance of each tuned hyperparameter, in all 1: PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255)."""
    import optuna

    study = optuna.create_study(direction=tuning.direction)  # in memory: the file may be another process's by now
    study.add_trials(list(complete))
    # The better half: Optuna's default, the best tenth, is a single trial of ten.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _parallel(made: "list[FrozenTrial]", tuning: TuningConfig, names: list[str], path: Path) -> Path:
    """A line for each trial through its hyperparameters to its result; the darker, the better."""
    from matplotlib import colormaps

    shown = [trial for trial in made if trial.value is not None and all(name in trial.params for name in names)]
    figure, axes = _page(8, 4.2)
    columns = [_Axis([trial.params[name] for trial in shown], tuning, name) for name in names]
    columns.append(_Axis([trial.value or 0.0 for trial in shown], tuning, tuning.metric))
    result = columns[-1]
    sign = -1 if tuning.direction == "minimize" else 1
    order = sorted(range(len(shown)), key=lambda i: (shown[i].state.name == "COMPLETE", sign * result.heights[i]))
    for rank, i in enumerate(order):
        pruned = shown[i].state.name == "PRUNED"
        best = rank == len(order) - 1
        axes.plot(
            range(len(columns)), [column.heights[i] for column in columns],
            color=GOOD if best else colormaps["Blues"](0.25 + 0.7 * rank / len(order)),
            linewidth=3 if best else 1.6, linestyle=":" if pruned else "-", zorder=2 + rank,
        )  # fmt: skip
    for x, column in enumerate(columns):
        axes.axvline(x, color=INK, linewidth=1, zorder=1)
        for height, text in column.ticks:
            axes.annotate(
                text, (x, height), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5, zorder=200,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), [_name(column.name) for column in columns])
    axes.set_xlim(-0.1, len(columns) - 0.7)
    axes.set_yticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("green: the best trial; darker: better; dotted: pruned", fontsize=9, color=INK)
    return _save(figure, path)


class _Axis:
    """Values of one quantity -> heights 0..1, and labels beside them. Learning rates and batch sizes on a log scale."""

    def __init__(self, values: "list[float]", tuning: TuningConfig, name: str) -> None:
        import numpy as np

        ends: tuple[float, ...] = getattr(tuning, SOURCES[name]) if name in SOURCES else (min(values), max(values))
        self.name = name
        scale = np.log if name in ("learning_rate", "batch_size") else np.asarray
        low, high = scale(float(min(ends))), scale(float(max(ends)))
        marks = ends if name == "batch_size" else self._marks(ends, log=name == "learning_rate")
        span = (high - low) or 1.0
        self.heights = [float((scale(float(value)) - low) / span) for value in values]
        self.ticks = [(float((scale(float(mark)) - low) / span), f"{mark:.4g}") for mark in marks]

    @staticmethod
    def _marks(ends: tuple[float, ...], log: bool) -> list[float]:
        import numpy as np

        low, high = ends
        spaced = np.geomspace(low, high, 4) if log else np.linspace(low, high, 4)
        whole = all(isinstance(end, int) for end in ends)
        return sorted({float(round(mark) if whole else mark) for mark in spaced})


def _page(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure of its own, without pyplot: no global state, no window system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: "Figure", path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path


def _name(name: str) -> str:
    return name.replace("_", " ")
