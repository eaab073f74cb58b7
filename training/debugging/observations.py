"""What was seen of a run at one step: flat records, and the file that keeps them for later.

Names are smdebug's (as its PyTorch hook 1.0.34 writes them), so that the same rules read both:

    CrossEntropyLoss_output_0                    a loss
    scalar/batch_loss, scalar/epoch_accuracy     scalars
    Network_layer4.0.conv1.weight                a trained parameter, as before the step
    gradient/Network_layer4.0.conv1.weight       its gradient
    layer4.0.relu_input_1, layer4.0.relu_output_1  the second pass through a ReLU that a block uses twice
    labels                                       images of each class since the observation before
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, get_args

from training.errors import DataError

log = logging.getLogger(__name__)

FILE = "observations.jsonl"

Kind = Literal["start", "scalar", "loss", "weight", "gradient", "activation_input", "activation_output", "labels"]
KINDS: tuple[str, ...] = get_args(Kind)

COLLECTIONS: dict[str, tuple[Kind, str]] = {
    # Debugger's collections: kind and what the name looks like (smdebug/pytorch/collection.py).
    "weights": ("weight", r"weight$"),
    "biases": ("weight", r"bias$"),
    "gradients": ("gradient", r"^gradient/"),
    "losses": ("loss", r"[Ll]oss_(?!input).*output"),
    "relu_input": ("activation_input", r".*(relu|activation)_input"),
    "relu_output": ("activation_output", r".*(relu|activation)_output"),
    "scalars": ("scalar", r"^scalar/"),
}


@dataclass(frozen=True)
class Observation:
    """Figures of one tensor (or scalar) at one step; no tensor is kept."""

    step: int
    name: str
    kind: Kind
    time_s: float
    """Seconds since 1970 when it was seen."""
    stats: Mapping[str, float] = field(default_factory=dict)
    """Of tensors: size, mean, std, min, max, l2, mean_abs, zeros (share), nan, inf (counts); by kind also
    p5, p95 (gradients), needed_rtol, change_ratio, update_ratio, atol, since (weights), rate_share (weights: the
    step's learning rate, as a share of the configured one). Of scalars: value, nan, inf;
    of losses also mean. Of the start: interval, epoch, batch (see `Pace` in rules.py)."""
    series: tuple[float, ...] = ()
    """activation_output: 101 percentiles over units of the percentage of inputs that a unit is active for.
    labels: the number of images of each class, followed by the number of those among them whose prediction was
    looked at and by the number predicted wrong (three equal parts)."""

    @property
    def value(self) -> float:
        """The value of a scalar or loss, NaN where there is none."""
        return self.stats.get("value", math.nan)

    def line(self) -> str:
        """One line of JSON; a figure that is not finite becomes null, which JSON has, unlike NaN."""
        # Seven digits are what float32 has.
        stats = {name: float(f"{value:.7g}") if math.isfinite(value) else None for name, value in self.stats.items()}
        entry: dict[str, Any] = {"step": self.step, "name": self.name, "kind": self.kind, "time_s": self.time_s}
        entry["stats"] = stats
        if self.series:
            entry["series"] = [int(part) if part == int(part) else part for part in self.series]
        return json.dumps(entry)

    @classmethod
    def parse(cls, line: str) -> "Observation":
        """The inverse of `line`. Raises: ValueError, KeyError, TypeError, OverflowError."""
        entry = json.loads(line)
        if entry["kind"] not in KINDS:
            raise ValueError(f"kind {entry['kind']!r}")
        stats = {name: math.nan if value is None else float(value) for name, value in entry["stats"].items()}
        return cls(
            int(entry["step"]), str(entry["name"]), entry["kind"], float(entry["time_s"]), stats,
            tuple(float(part) for part in entry.get("series", ())),
        )  # fmt: skip


def scalar(
    step: int, name: str, value: float, time_s: float, kind: Kind = "scalar", mean: float | None = None
) -> Observation:
    """A scalar or a loss; `nan` and `inf` say what a value that is not finite was.

    `mean`: of a loss, its mean over the steps since the observation before.
    """
    stats = {"value": value, "nan": float(math.isnan(value)), "inf": float(math.isinf(value))}
    if mean is not None:
        stats["mean"] = mean
    return Observation(step, name, kind, time_s, stats)


def read(path: Path) -> Iterator[Observation]:
    """The observations in a file, in order; a last line that was cut off (the run was killed) is left out.

    Raises: DataError.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):
                    return
                try:
                    yield Observation.parse(line)
                except (OverflowError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
                    raise DataError(
                        f"{path}, line {number} is not an observation; {FILE} is written by a training run."
                    ) from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path} cannot be read ({exc}); give the folder of a run.") from exc


class ObservationFile:
    """Appends observations to `observations.jsonl`; a resumed run goes on after the step it starts from."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """What is damaged in the file of the earlier part is left out, with a warning."""
        path = folder / FILE
        self.earlier: list[Observation] = []
        """What is kept of the run's earlier part, those before `first_step`."""
        if first_step > 1 and path.exists():
            try:
                for seen in read(path):
                    if seen.step < first_step:
                        self.earlier.append(seen)
            except DataError as exc:
                log.warning("%s What comes before is kept.", exc)
        self._file: IO[str] | None = path.open("w", encoding="utf-8")
        self.write(self.earlier)

    def write(self, observations: Iterable[Observation]) -> None:
        """Append, and hand over to the operating system, so that a killed run leaves what it saw.

        A file that cannot be written (disk full) costs a warning and the rest of the lines, not the run or its rules.
        """
        if self._file is None:
            return
        try:
            self._file.writelines(f"{observation.line()}\n" for observation in observations)
            self._file.flush()
        except OSError as exc:
            log.warning("%s cannot be written (%s); the run goes on without it", FILE, exc.strerror or exc)
            self.close()

    def close(self) -> None:
        """No more observations."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # it flushes once more
                file.close()
