"""A trace of a few steps by torch's profiler, for chrome://tracing and https://ui.perfetto.dev.

Outside of its steps the profiler does not run: its price is paid by the steps it shows.
"""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from training.environment import quiet_profiler_library

FILE = "trace.json.gz"
TOP = 10


@dataclass(frozen=True)
class Window:
    """Numbers of steps: the profiler warms up from `warm_up`, and records `first` to `last`."""

    warm_up: int
    first: int
    last: int


def plan(first_step: int, total_steps: int, steps_per_epoch: int, wanted: tuple[int, int]) -> Window:
    """The steps to record: `wanted` (first and last, counted from 1 at `first_step`), or as near as there are.

    All lie in one epoch, so that no validation is among them, and one step warms up before where there is one.
    """
    wanted_first, wanted_last = wanted
    length = wanted_last - wanted_first + 1
    warm_up = max(first_step, min(first_step + wanted_first - 2, total_steps - length))
    epoch_end = _epoch_end(warm_up, steps_per_epoch, total_steps)
    if warm_up + length > epoch_end:
        next_end = _epoch_end(epoch_end + 1, steps_per_epoch, total_steps)
        if next_end - epoch_end > length:  # the next epoch has room for all
            warm_up, epoch_end = epoch_end + 1, next_end
        else:
            warm_up = max(first_step, epoch_end - steps_per_epoch + 1, epoch_end - length)
    last = min(warm_up + length, epoch_end)
    return Window(warm_up, min(warm_up + 1, last), last)


def _epoch_end(step: int, steps_per_epoch: int, total_steps: int) -> int:
    """The last step of the epoch that `step` lies in."""
    return min(total_steps, (step + steps_per_epoch - 1) // steps_per_epoch * steps_per_epoch)


class StepTrace:
    """Told each step's start and end; holds the profiler from the first step of its window to the last."""

    def __init__(self, window: Window, device: torch.device) -> None:
        self._window = window
        self._device = device
        self._profile: profile | None = None
        self._span = contextlib.ExitStack()
        self._recording = False

    def covers(self, number: int) -> bool:
        """Whether the profiler slows step `number` down."""
        return self._window.warm_up <= number <= self._window.last

    def step_start(self, number: int) -> None:
        """Turn the profiler on where its steps begin. Raises: RuntimeError when another one is on."""
        if number == self._window.warm_up:
            if torch._C._autograd._profiler_enabled():  # a second one would end it
                raise RuntimeError("another profiler is on")
            quiet_profiler_library()
            on_gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu], acc_events=True)
            self._profile.prepare_trace()
        if self._profile is not None:
            if number == self._window.first:
                self._profile.start_trace()
                self._recording = True
            if self._recording:
                self._span.enter_context(record_function(f"training step {number}"))

    def step_end(self) -> None:
        """The step's span ends."""
        self._span.close()

    def is_complete(self, number: int) -> bool:
        """Whether `number` was the last step to record."""
        return self._recording and number >= self._window.last

    def finish(self, folder: Path) -> list[dict[str, object]] | None:
        """Turn the profiler off and write FILE; returns the operators that took longest.

        None when there is nothing to write: no step was recorded, or it is written already.
        """
        recorded = self._stop()
        if recorded is None:
            return None
        with tempfile.TemporaryDirectory(dir=folder, prefix=".trace-") as temporary:
            path = Path(temporary) / FILE
            recorded.export_chrome_trace(str(path))  # packs it, by its name
            path.replace(folder / FILE)
        return top_operators(recorded, on_gpu=self._device.type == "cuda")

    def discard(self) -> None:
        """Turn the profiler off and write nothing."""
        self._stop()

    def _stop(self) -> profile | None:
        """Returns: the profiler if it recorded, else None."""
        self._span.close()
        running, self._profile = self._profile, None
        recorded, self._recording = self._recording, False
        if running is None:
            return None
        if not recorded:
            running.start_trace()  # a profiler that only warmed up cannot be stopped otherwise
        running.stop_trace()  # waits for the kernels of the last step
        return running if recorded else None


def top_operators(recorded: profile, on_gpu: bool) -> list[dict[str, object]]:
    """Where the device's time went: `name`, `total_ms` in the operator itself, its `share`; longest first."""
    times_ms: dict[str, float] = {}
    for event in recorded.key_averages():
        # aten::conv2d or Optimizer.step#SGD.step, but no span; a kernel's time is its operator's already
        if event.device_type == torch._C._autograd.DeviceType.CPU and ("::" in event.key or "#" in event.key):
            times_ms[event.key] = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
    total_ms = sum(times_ms.values())
    ordered = sorted(times_ms.items(), key=lambda item: -item[1])
    return [
        {"name": name, "total_ms": round(ms, 3), "share": round(ms / total_ms, 4)}
        for name, ms in ordered[:TOP]
        if ms > 0
    ]
