"""What the report says in sentences: the result, and what to look at first."""

import math
from collections.abc import Sequence

import numpy as np

from service.model.manifest import Manifest
from training.figures import Figures
from training.report import rules
from training.report.charts import percent
from training.report.sources import Sources, finite

CALIBRATED = 0.03
"""A calibration error below this is called good: confidence and accuracy differ by three points on average."""
UNCERTAIN = 1000
"""Below so many images the calibration error itself is uncertain. Bins of few images differ from their confidence by
chance: of a perfectly calibrated network that is 75 % sure throughout, the error of 1,000 images is 0.011 on average,
of 100 it is 0.035; spread over all bins, 0.04 and 0.12."""
GAP = 0.1
"""A train accuracy this far above the validation accuracy is worth a sentence."""


def headline(manifest: Manifest, figures: Figures, split: str) -> str:
    """The result in one sentence."""
    low, high = figures.accuracy_interval
    among = ""
    if len(manifest.classes) > 5:
        among = f", and has the right class among its five likeliest for {percent(figures.top5_accuracy)}"
    return (
        f"{manifest.name} recognises {percent(figures.accuracy)} of {figures.n:,} {split} images of "
        f"{len(manifest.classes)} classes (95 % interval {percent(low)} to {percent(high)}){among}."
    )


def findings(manifest: Manifest, figures: Figures, sources: Sources, groups: Sequence[str] | None) -> list[str]:
    """What to look at first, a sentence each."""
    found = [_confusions(manifest.classes, figures), _classes(manifest.classes, figures)]
    if groups is not None:
        found.append(_within_groups(figures, groups))
    found += [_calibration(figures), _gap(sources), _best_epoch(sources)]
    if manifest.metrics.get("stopped"):
        found.append(f"The run ended before its last epoch: {manifest.metrics['stopped']}")
    if sources.rules is not None:
        found.append(_rules(sources))
    if sources.profile and isinstance(sources.profile.get("summary"), str):
        found.append(sources.profile["summary"])
    return [sentence for sentence in found if sentence]


def _confusions(classes: Sequence[str], figures: Figures) -> str:
    pairs = figures.most_confused(1)
    if not pairs:
        return "Not one image is taken for another class."
    (pair,) = pairs
    times = "once" if pair.n == 1 else f"{pair.n:,} times"
    mistakes = figures.confusion.copy()
    np.fill_diagonal(mistakes, 0)
    others = int((mistakes == pair.n).sum()) - 1
    alike = f", as often as {others:,} other pairs" if others > 1 else ", as often as one other pair" if others else ""
    return (
        f"Most often confused: {classes[pair.true]} taken for {classes[pair.predicted]}, {times} "
        f"({percent(pair.share)} of that class){alike}."
    )


def _classes(classes: Sequence[str], figures: Figures) -> str:
    found = {
        name: each.accuracy for name, each in zip(classes, figures.classes, strict=True) if each.accuracy is not None
    }
    worst, best = min(found.values()), max(found.values())
    if worst == best:
        return f"Every class is recognised at {percent(best)}."

    def those(accuracy: float) -> str:
        first, *others = (name for name, each in found.items() if each == accuracy)
        return f"{first}{f' and {len(others):,} more' if others else ''} ({percent(accuracy)})"

    return f"Hardest: {those(worst)}; easiest: {those(best)}."


def _within_groups(figures: Figures, groups: Sequence[str]) -> str:
    wrong = figures.predicted != figures.labels
    if not wrong.any():
        return ""
    names = sorted(set(groups))
    group_of = [names.index(group) for group in groups]
    within = sum(
        group_of[t] == group_of[p] for t, p in zip(figures.labels[wrong], figures.predicted[wrong], strict=True)
    )
    right = figures.n - int(wrong.sum()) + within
    return (
        f"{percent(within / int(wrong.sum()))} of the mistakes stay within the superclass; "
        f"the superclass alone is right for {percent(right / figures.n)}."
    )


def _calibration(figures: Figures) -> str:
    return f"{_confidence(figures)} {uncertainty(figures)}".rstrip()


def uncertainty(figures: Figures) -> str:
    """What few images leave of the calibration error, as a sentence; empty from UNCERTAIN images on.

    It says what a perfectly calibrated network would show: the share of right answers among n images of confidence p
    then has the standard deviation sqrt(p (1 - p) / n), and its mean distance from p is sqrt(2 / pi) of that.
    """
    if figures.n >= UNCERTAIN:
        return ""
    chance = sum(
        each.n / figures.n * math.sqrt(2 / math.pi * each.confidence * max(0.0, 1 - each.confidence) / each.n)
        for each in figures.bins
        if each.confidence is not None
    )
    return (
        f"Below {UNCERTAIN:,} images this is uncertain: with {figures.n:,}, perfect calibration would show about "
        f"{percent(chance)} by chance."
    )


def _confidence(figures: Figures) -> str:
    mean = float(figures.confidence.mean())
    if figures.ece < CALIBRATED:
        return f"Its confidence can be believed: it is off by {percent(figures.ece)} on average (ECE)."
    if abs(mean - figures.accuracy) < figures.ece / 2:
        return f"Its confidence is off by {percent(figures.ece)} on average (ECE), up and down."
    way = "too sure of itself" if mean > figures.accuracy else "less sure of itself than it could be"
    return (
        f"It is {way}: mean confidence {percent(mean)} at an accuracy of {percent(figures.accuracy)} "
        f"(ECE {percent(figures.ece)})."
    )


def _gap(sources: Sources) -> str:
    last = sources.epochs[-1] if sources.epochs else {}
    train, validation = finite(last.get("train_accuracy")), finite(last.get("validation_accuracy"))
    if train is None or validation is None or train - validation < GAP:
        return ""
    return (
        f"In the last epoch the training images are recognised {100 * (train - validation):.0f} points better than the "
        "validation images: the network learns them by heart; more images, augmentation or fewer epochs would help."
    )


def _best_epoch(sources: Sources) -> str:
    found = [
        (accuracy, number)
        for each in sources.epochs
        if (accuracy := finite(each.get("validation_accuracy"))) is not None
        and (number := finite(each.get("epoch"))) is not None
    ]
    if not found:
        return ""
    best, number = max(found, key=lambda pair: (pair[0], -pair[1]))
    if best - found[-1][0] < 0.005:
        return ""
    return f"Epoch {number:.0f} validated best ({percent(best)}), the last one at {percent(found[-1][0])}."


def _rules(sources: Sources) -> str:
    fired = [str(rule.get("rule", "?")) for rule in sources.rules or [] if rule.get("status") == "IssuesFound"]
    if not sources.rules:
        return ""
    unjudged = sum(map(rules.unjudged, sources.rules))
    rest = f" {unjudged} of {len(sources.rules)} saw too little to judge." if unjudged else ""
    if not fired:
        return f"No debugging rule found an issue.{rest}"
    return f"Debugging rules that found issues: {', '.join(fired)}.{rest}"
