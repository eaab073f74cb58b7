"""Logits -> figures: the one place where a pass over labelled images becomes numbers.

    logits float32 [N, K], labels int64 [N]  ->  Figures  ->  manifest, evaluation.json, report

so that the manifest, the command line and the report state the same numbers.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from training.epoch_metrics import Evaluation
from training.errors import DivergedError

BINS = 15
"""Of the calibration error, as Guo et al. 2017 have them (https://arxiv.org/abs/1706.04599, section 5)."""

ROWS_AT_ONCE = 8192
"""Logits are worked on in blocks of rows, in float64: 1,000 classes take 65 MB a block."""

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """The images whose confidence lies in (low, high]; the means are None where there are none."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class ClassFigures:
    """One class. Its accuracy is its recall: the share of its images that are recognised."""

    n: int
    """Images of this class."""
    predicted: int
    """Images taken for this class."""
    accuracy: float | None
    """None where the class has no image."""
    precision: float | None
    """Share of the images taken for this class that are of it; None where there are none."""
    f1: float | None
    """2 TP / (2 TP + FP + FN); None where the class is neither there nor predicted."""


@dataclass(frozen=True)
class Confused:
    """`n` images of the class `true` were taken for `predicted`: `share` of that class's images."""

    true: int
    predicted: int
    n: int
    share: float


@dataclass(frozen=True, eq=False)
class Figures:
    """How a network does on N images of K classes; shares in 0..1."""

    n: int
    loss: float
    """Mean cross-entropy in nats."""
    accuracy: float
    accuracy_interval: tuple[float, float]
    """95 % interval of the accuracy (Wilson 1927, score interval): what the number of images leaves open."""
    top5_accuracy: float
    """The true class is among the five likeliest (all, where there are fewer)."""
    ece: float
    """Expected calibration error, Guo et al. 2017, equation 3: sum over bins of n/N |accuracy - confidence|."""
    macro_f1: float
    """Mean F1 over the classes that have images."""
    bins: tuple[Bin, ...]
    classes: tuple[ClassFigures, ...]
    """K entries."""
    confusion: Integers
    """`[K, K]`: row the true class, column the predicted."""
    labels: Integers
    """`[N]`."""
    predicted: Integers
    """`[N]`; of equal logits, the first class."""
    confidence: Floats
    """`[N]`: the probability of the predicted class."""
    losses: Floats
    """`[N]`: the cross-entropy of each image."""

    def evaluation(self) -> Evaluation:
        """The four figures that the manifest states."""
        return Evaluation(self.loss, self.accuracy, self.top5_accuracy, self.n)

    def told(self) -> str:
        """The accuracy for the log, and top-5 where that says something."""
        top5 = f", top-5 {100 * self.top5_accuracy:.2f} %" if len(self.classes) > 5 else ""
        return f"accuracy {100 * self.accuracy:.2f} %{top5}"

    def most_confused(self, count: int) -> list[Confused]:
        """The pairs with the most mistakes; of as many, those with the larger share, then in the order of classes."""
        mistakes = self.confusion.copy()
        np.fill_diagonal(mistakes, 0)
        sizes = self.confusion.sum(1)
        pairs = [
            Confused(int(i), int(j), int(mistakes[i, j]), float(mistakes[i, j] / sizes[i]))
            for i, j in zip(*mistakes.nonzero(), strict=True)
        ]
        return sorted(pairs, key=lambda pair: (-pair.n, -pair.share, pair.true, pair.predicted))[:count]

    def worst(self, count: int) -> list[int]:
        """The images with the highest loss, highest first."""
        return [int(i) for i in np.argsort(-self.losses, kind="stable")[:count]]

    def surprising(self, count: int) -> list[int]:
        """The wrong answers given with the most confidence, most first."""
        wrong = (self.predicted != self.labels).nonzero()[0]
        return [int(i) for i in wrong[np.argsort(-self.confidence[wrong], kind="stable")][:count]]

    def mistaken(self, pair: Confused, count: int) -> list[int]:
        """Images of `pair.true` taken for `pair.predicted`, the most confident first."""
        chosen = ((self.labels == pair.true) & (self.predicted == pair.predicted)).nonzero()[0]
        return [int(i) for i in chosen[np.argsort(-self.confidence[chosen], kind="stable")][:count]]

    def as_json(self) -> dict[str, Any]:
        """What evaluation.json states; classes and images by index."""
        return {
            "n": self.n, "loss": self.loss, "accuracy": self.accuracy,
            "accuracy_95_percent_interval": list(self.accuracy_interval), "top5_accuracy": self.top5_accuracy,
            "ece": self.ece, "macro_f1": self.macro_f1, "reliability": [asdict(each) for each in self.bins],
            "confusion": self.confusion.tolist(),
        }  # fmt: skip


def figures(logits: npt.ArrayLike, labels: npt.ArrayLike) -> Figures:
    """The figures of logits `[N, K]` (any float type) against labels `[N]` in 0..K-1; N >= 1, K >= 2.

    Raises: DivergedError when a logit is not finite.
    """
    scores, truth = np.asarray(logits), np.asarray(labels, np.int64)
    assert scores.ndim == 2 and scores.shape[:1] == truth.shape and len(truth), (scores.shape, truth.shape)
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).any(1).sum())
        raise DivergedError(
            f"The network's logits of {bad} of {len(scores)} images are not finite numbers; "
            "train again with a smaller --learning-rate."
        )
    count, classes = scores.shape
    predicted, rank = np.empty(count, np.int64), np.empty(count, np.int64)
    confidence, losses = np.empty(count), np.empty(count)
    for start in range(0, count, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        predicted[rows], rank[rows], confidence[rows], losses[rows] = _of_rows(scores[rows], truth[rows])
    confusion = np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)
    per_class = tuple(_of_class(confusion, k) for k in range(classes))
    f1 = [each.f1 or 0.0 for each in per_class if each.n]
    bins = _bins(confidence, predicted == truth)
    right = int((predicted == truth).sum())
    return Figures(
        n=count,
        loss=float(losses.mean()),
        accuracy=right / count,
        accuracy_interval=wilson_interval(right, count),
        top5_accuracy=float((rank < 5).mean()),
        ece=sum(b.n / count * abs(b.accuracy - b.confidence) for b in bins if b.accuracy is not None and b.confidence),
        macro_f1=float(np.mean(f1)),
        bins=bins,
        classes=per_class,
        confusion=confusion,
        labels=truth,
        predicted=predicted,
        confidence=confidence,
        losses=losses,
    )


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927, "Probable Inference", JASA 22; z = 1.96)."""
    z = 1.959964
    share, scale = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def _of_rows(logits: npt.NDArray[Any], labels: Integers) -> tuple[Integers, Integers, Floats, Floats]:
    """Predicted class, rank of the true one (0: predicted), confidence and loss of each row."""
    rows = np.arange(len(logits))
    scores = logits.astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    log_total = np.log(np.exp(scores).sum(1))
    true = scores[rows, labels][:, None]
    before = np.arange(scores.shape[1]) < labels[:, None]
    rank = (scores > true).sum(1) + ((scores == true) & before).sum(1)
    # Of the likeliest class the shifted logit is 0: its log-probability is -log_total.
    return scores.argmax(1), rank, np.exp(-log_total), log_total - true[:, 0]


def _of_class(confusion: Integers, k: int) -> ClassFigures:
    hits, count, predicted = int(confusion[k, k]), int(confusion[k].sum()), int(confusion[:, k].sum())
    return ClassFigures(
        n=count,
        predicted=predicted,
        accuracy=hits / count if count else None,
        precision=hits / predicted if predicted else None,
        f1=2 * hits / (count + predicted) if count + predicted else None,
    )


def _bins(confidence: Floats, right: npt.NDArray[np.bool_]) -> tuple[Bin, ...]:
    index = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    found = []
    for m in range(BINS):
        inside = index == m
        n = int(inside.sum())
        means = (float(confidence[inside].mean()), float(right[inside].mean())) if n else (None, None)
        found.append(Bin(m / BINS, (m + 1) / BINS, n, *means))
    return tuple(found)
