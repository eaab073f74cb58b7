"""Where the seconds of a run go: waiting for images, computing, validating, anything else."""

import time
from array import array

from training.callbacks import Step
from training.profiling.thinned import Thinned

STEPS_KEPT = 20_000
"""Step times kept for median and percentile; of longer runs an even part."""


class RunClock:
    """Told the moments of a run; sums are seconds."""

    def __init__(self, queued: bool) -> None:
        """`queued`: a step's own time is only that of queueing it (on a GPU).

        Then all between the ends of two steps is the step's, since there the host waits for the device.
        """
        self._queued = queued
        self._started_s = time.perf_counter()
        self._last_end_s: float | None = None
        self._validation_start_s: float | None = None
        self._step_ms: Thinned[float] = Thinned(STEPS_KEPT)
        self.data_wait_s = self.step_s = self.validation_s = self.profiling_s = 0.0
        self._own_in_step_s = 0.0
        self._told_s = 0.0, 0.0
        self.steps = self.images = 0

    def epoch_start(self) -> None:
        """The time since the last step belongs to no step."""
        self._last_end_s = None

    def step_end(self, step: Step, typical: bool) -> None:
        """`typical`: False for a step that was slowed down by being traced."""
        now_s = time.perf_counter()
        seconds, self._own_in_step_s = step.seconds - self._own_in_step_s, 0.0
        if self._queued and self._last_end_s is not None:
            seconds = now_s - self._last_end_s
        self._last_end_s = now_s
        seconds = max(seconds, 0.0)
        wait_s = min(step.data_wait_s, seconds)
        self.data_wait_s += wait_s
        self.step_s += seconds - wait_s
        self.steps += 1
        self.images += len(step.labels)
        if typical:
            self._step_ms.append(1000 * seconds)

    def validation_start(self) -> None:
        """From here to `epoch_end`."""
        self._validation_start_s = time.perf_counter()

    def epoch_end(self) -> None:
        """Validation is over."""
        if self._validation_start_s is not None:
            self.validation_s += time.perf_counter() - self._validation_start_s
            self._validation_start_s = None

    def add_profiling(self, seconds: float, in_step: bool) -> None:
        """Time of our own, which is no part of the run; `in_step`: nor of the step's seconds, which hold it."""
        self.profiling_s += seconds
        if in_step:
            self._own_in_step_s += seconds
        if self._last_end_s is not None:
            self._last_end_s += seconds

    def elapsed_s(self) -> float:
        """Seconds of the run so far, without those of profiling."""
        return max(time.perf_counter() - self._started_s - self.profiling_s, 1e-9)

    def shares(self, elapsed_s: float) -> dict[str, float]:
        """The parts of `elapsed_s`; they sum to 1."""
        parts = {"data_wait": self.data_wait_s, "step": self.step_s, "validation": self.validation_s}
        parts["other"] = max(0.0, elapsed_s - sum(parts.values()))
        whole = sum(parts.values())
        return {name: seconds / whole for name, seconds in parts.items()}

    def wait_since_told(self) -> dict[str, float]:
        """`loader_wait_percent`: the wait's part of the steps that ended since the last call; empty if none did."""
        wait_s = self.data_wait_s
        both_s = wait_s + self.step_s
        (wait_before_s, both_before_s), self._told_s = self._told_s, (wait_s, both_s)
        if both_s <= both_before_s:
            return {}
        return {"loader_wait_percent": round(100 * (wait_s - wait_before_s) / (both_s - both_before_s), 3)}

    def step_ms(self) -> dict[str, float] | None:
        """Median and 95th percentile of a step with its wait, milliseconds; None before the first."""
        ordered = array("d", sorted(self._step_ms.items))
        if not ordered:
            return None
        last = len(ordered) - 1
        return {"median": ordered[round(0.5 * last)], "p95": ordered[round(0.95 * last)]}

    def images_per_s(self) -> float | None:
        """Images this process trains on a second, validation left out; None before the first step."""
        seconds = self.data_wait_s + self.step_s
        return self.images / seconds if seconds > 0 else None
