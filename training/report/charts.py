"""Charts as geometry: numbers -> paths and ticks, which the template draws as SVG (and colours, light or dark).

Texts stay texts until the template escapes them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.figures import Figures

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 24, 12, 42
MAX_POINTS = 400
"""Points a line is drawn with; more are averaged in groups of neighbours."""
MAX_DOTS = 40
"""Lines of at most so many points show each of them."""
FEW = 10
"""The accuracy of fewer images is drawn pale."""
DURATIONS = (("h", 3_600_000), ("min", 60_000), ("s", 1000), ("ms", 1))
"""Units and what they are in ms."""

Point = tuple[float, float]
Show = Callable[[float], str]


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in the chart's units, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A point with the text that appears over it."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """One series."""

    name: str
    path: str
    dots: tuple[Dot, ...]
    faint: bool = False
    """Drawn thin and pale, for what is noisy."""


@dataclass(frozen=True)
class Bar:
    """One upright bar."""

    x: float
    y: float
    width: float
    height: float
    text: str
    faint: bool = False
    """Drawn pale, for what few images say."""


@dataclass(frozen=True)
class Chart:
    """Lines or bars between two axes."""

    title: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()
    diagonal: str = ""
    """A path to compare with."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Series:
    """A named list of points (x, y) to draw."""

    name: str
    points: Sequence[Point]
    faint: bool = False


def percent(value: float) -> str:
    """0.4137 -> "41.4 %" (with a no-break space); only 1 itself is "100 %"."""
    text = f"{100 * value:.1f}"
    if text == "100.0":
        return "100\u00a0%" if value >= 1 else ">\u00a099.9\u00a0%"
    return f"{text}\u00a0%"


def plain(value: float) -> str:
    """Four significant digits; large numbers whole, with commas."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def duration(ms: float) -> str:
    """12.5 -> "12.5 ms", 83400 -> "1.39 min": in the largest unit that there is one of, to three digits."""
    unit, size = next((unit, size) for unit, size in DURATIONS if ms >= size or size == 1)
    value = ms / size
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def line_chart(
    title: str, x_label: str, series: Sequence[Series], show: Show = plain, low: float | None = None
) -> Chart | None:
    """A chart of the series that have points; None when none has.

    Args:
        show: writes a value of the y axis.
        low: where the y axis begins; default: below the least value.
    """
    drawn = [Series(each.name, thinned(each.points, MAX_POINTS), each.faint) for each in series if each.points]
    if not drawn:
        return None
    xs = [x for each in drawn for x, _ in each.points]
    ys = [y for each in drawn for _, y in each.points]
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, whole=True)
    floor = min(ys) if low is None else min(low, min(ys))
    y_axis = _Axis(*_rounded(floor, max(ys)), HEIGHT - BOTTOM, TOP)
    lines = []
    for each in drawn:
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in each.points]
        dots: tuple[Dot, ...] = ()
        if len(places) <= MAX_DOTS:
            texts = (f"{x_label} {plain(x)}: {each.name} {show(y)}" for x, y in each.points)
            dots = tuple(Dot(*place, text) for place, text in zip(places, texts, strict=True))
        lines.append(Line(each.name, "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places), dots, each.faint))
    return Chart(title, x_label, x_axis.ticks(plain), y_axis.ticks(_tick_text(show)), tuple(lines))


def reliability_chart(figures: Figures) -> Chart:
    """Accuracy of each bin of confidence, against the diagonal of a perfectly calibrated network."""
    x_axis = _Axis(0, 1, LEFT, WIDTH - RIGHT)
    y_axis = _Axis(0, 1, HEIGHT - BOTTOM, TOP)
    bars = []
    for each in figures.bins:
        if each.accuracy is None or each.confidence is None:
            continue
        left, right, top = x_axis.place(each.low) + 1, x_axis.place(each.high) - 1, y_axis.place(each.accuracy)
        text = f"{each.n:,} images: confidence {percent(each.confidence)}, accuracy {percent(each.accuracy)}"
        bars.append(Bar(left, top, right - left, HEIGHT - BOTTOM - top, text, each.n < FEW))
    diagonal = f"M{LEFT} {HEIGHT - BOTTOM}L{WIDTH - RIGHT} {TOP}"
    ticks = x_axis.ticks(_tick_text(percent)), y_axis.ticks(_tick_text(percent))
    return Chart("Accuracy by confidence", "confidence", *ticks, bars=tuple(bars), diagonal=diagonal)


def confidence_chart(figures: Figures) -> Chart:
    """How many images lie in each bin of confidence."""
    x_axis = _Axis(0, 1, LEFT, WIDTH - RIGHT)
    y_axis = _Axis(*_rounded(0, max(each.n for each in figures.bins)), HEIGHT - BOTTOM, TOP, whole=True)
    bars = []
    for each in figures.bins:
        left, right, top = x_axis.place(each.low) + 1, x_axis.place(each.high) - 1, y_axis.place(each.n)
        text = f"{each.n:,} images of confidence {percent(each.low)} to {percent(each.high)}"
        bars.append(Bar(left, top, right - left, HEIGHT - BOTTOM - top, text))
    ticks = x_axis.ticks(_tick_text(percent)), y_axis.ticks(lambda value: f"{value:,.0f}")
    return Chart("Images by confidence", "confidence", *ticks, bars=tuple(bars))


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: the means of groups of neighbours."""
    group = math.ceil(len(points) / most)
    if group <= 1:
        return list(points)
    groups = (points[start : start + group] for start in range(0, len(points), group))
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in groups]


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Each y as the mean of the last `window`, so that the trend of a noisy series shows."""
    means, total = [], 0.0
    for i, (x, y) in enumerate(points):
        total += y - (points[i - window][1] if i >= window else 0.0)
        means.append((x, total / min(i + 1, window)))
    return means


class _Axis:
    """Maps values to places and chooses round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, whole: bool = False) -> None:
        if high <= low:  # a single value stands in the middle
            low, high = low - 0.5, high + 0.5
        self._low, self._high, self._start, self._end, self._whole = low, high, start, end, whole

    def place(self, value: float) -> float:
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self, show: Show) -> tuple[Tick, ...]:
        step = _round_step((self._high - self._low) / 5)
        if self._whole:  # there is no step 2.5
            step = max(1.0, step) if step != 2.5 else 5.0
        first, last = math.ceil(self._low / step - 1e-9), math.floor(self._high / step + 1e-9)
        return tuple(Tick(self.place(i * step), show(i * step)) for i in range(first, last + 1))


def _round_step(least: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def _rounded(low: float, high: float) -> tuple[float, float]:
    """Bounds on round numbers around [low, high]."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        return (low, low + 1.0) if low == 0 else (min(0.0, 2 * low), max(0.0, 2 * low))
    step = _round_step((high - low) / 5)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _tick_text(show: Show) -> Show:
    """Whole percents on an axis; others as they are."""
    return (lambda value: f"{100 * value:g} %") if show is percent else show
