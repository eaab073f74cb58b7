"""The confusion matrix as geometry: ordered by superclass, one path per shade, so that 100 classes stay small.

A cell's shade is its share of the true class's images. The diagonal (right) and the rest (mistakes) have each
their own colour and scale, because mistakes are few per cell and would be pale beside the diagonal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.figures import Integers

SHADES = 8
MAX_LABELLED = 130
"""Classes whose names are written at the rows and columns; above, pointing at a cell tells."""
MAX_NUMBERED = 25
"""Classes up to which the count is written into each cell."""
LABEL_CHARACTERS = 32
FULL_MISTAKE = 0.3
"""The share at which a mistake has the darkest shade."""
BEND = 0.7
"""Exponent of the scale of mistakes: below 1 it lifts the rare ones, so that a few per cent can be seen."""


@dataclass(frozen=True)
class Label:
    """The name of a row and column, at `at` along the axis."""

    text: str
    at: float


@dataclass(frozen=True)
class Number:
    """A count in its cell; `strong` on dark shades."""

    x: float
    y: float
    text: str
    strong: bool


@dataclass(frozen=True)
class Matrix:
    """What the template draws; `data` is what its script tells when a cell is pointed at."""

    side: float
    """Of the square of cells, in units of the drawing."""
    margin: float
    font: float
    right: tuple[str, ...]
    """One path per shade, the palest first, of the diagonal."""
    wrong: tuple[str, ...]
    labels: tuple[Label, ...]
    numbers: tuple[Number, ...]
    lines: str
    """A path between the groups."""
    groups: int
    data: dict[str, Any]


def grouped_order(groups: Sequence[str] | None, count: int) -> list[int]:
    """The order of classes in which groups lie together; as they are without groups."""
    return list(range(count)) if groups is None else sorted(range(count), key=lambda k: (groups[k], k))


def matrix(confusion: Integers, names: Sequence[str], groups: Sequence[str] | None = None) -> Matrix:
    """Lay out `confusion` `[K, K]` (rows: true) of the classes `names`, which belong to `groups` if given."""
    order = grouped_order(groups, len(names))
    counts = confusion[np.ix_(order, order)]
    ordered = [names[k] for k in order]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(96.0, max(2.0, 1000 / len(ordered)))
    if len(ordered) <= MAX_NUMBERED:
        size = max(size, 40.0) if len(ordered) > 10 else min(size, 84.0)
    labelled = len(ordered) <= MAX_LABELLED
    font = min(13.0, 0.95 * size)
    shown = [_short(name) for name in ordered]
    margin = max(len(text) for text in shown) * font * 0.56 + 10 if labelled else 16.0
    right, wrong = [""] * SHADES, [""] * SHADES
    numbers = []
    for i, j in zip(*counts.nonzero(), strict=True):
        share = float(shares[i, j]) if i == j else min(1.0, float(shares[i, j]) / FULL_MISTAKE) ** BEND
        shade = min(SHADES - 1, int(share * SHADES))
        path = f"M{_number(j * size)} {_number(i * size)}h{_number(size)}v{_number(size)}h-{_number(size)}z"
        (right if i == j else wrong)[shade] += path
        if len(ordered) <= MAX_NUMBERED:
            numbers.append(Number((j + 0.5) * size, (i + 0.5) * size, str(counts[i, j]), shade >= SHADES // 2))
    side = size * len(ordered)
    return Matrix(
        side=side,
        margin=margin,
        font=font,
        right=tuple(right),
        wrong=tuple(wrong),
        labels=tuple(Label(text, (k + 0.5) * size) for k, text in enumerate(shown)) if labelled else (),
        numbers=tuple(numbers),
        lines="".join(
            f"M0 {_number(k * size)}h{_number(side)}M{_number(k * size)} 0v{_number(side)}"
            for k in range(1, len(order))
            if groups is not None and groups[order[k]] != groups[order[k - 1]]
        ),
        groups=len(set(groups)) if groups is not None else 0,
        data={
            "names": ordered,
            "groups": [groups[k] for k in order] if groups is not None else [],
            "totals": counts.sum(1).tolist(),
            "cells": [[int(i), int(j), int(counts[i, j])] for i, j in zip(*counts.nonzero(), strict=True)],
        },
    )


def summed(confusion: Integers, groups: Sequence[str]) -> tuple[Integers, list[str]]:
    """The confusion matrix of the groups `[G, G]`, and their names in order."""
    names = sorted(set(groups))
    member = np.asarray([[group == name for name in names] for group in groups], np.int64)  # [K, G]
    return member.T @ confusion @ member, names


def _short(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
