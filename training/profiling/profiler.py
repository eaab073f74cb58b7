"""The callback that finds out where the time of a run goes: profile.json and trace.json.gz in the run's folder.

profile.json:

    summary        one sentence: what holds the run up, and what to do
    bottleneck     data_wait, compute, validation, other, contention or gpu_idle
    shares         data_wait, step, validation, other: parts of the time, sum 1
    step_ms        median and p95 of a step with its wait; traced steps left out
    images_per_s   trained on by this process, validation left out
    steps, seconds, profiling_s    of this process; what the profiler itself took is no part of seconds
    device, machine_cores
    samples        of the machine, see system.py
    top_operators  see trace.py; of the traced steps
    trace          the name of the trace's file, or null
"""

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from service.model.files import replace
from training.callbacks import Callback, RunContext, Step
from training.environment import ranks
from training.epoch_metrics import EpochMetrics
from training.profiling.clock import RunClock
from training.profiling.gpu import open_gpu
from training.profiling.summary import Recorded, conclude, contention
from training.profiling.system import SystemSampler
from training.profiling.trace import FILE as TRACE_FILE
from training.profiling.trace import StepTrace, plan

log = logging.getLogger(__name__)

FILE = "profile.json"
TRACED_STEPS = (5, 10)
INTERVAL_S = 1.0
SAMPLES_BEFORE_WARNING = 15
"""Enough that a short burst of others is none."""


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """What goes wrong in a measurement must not end a training: one warning, and the profiler is off."""

    @functools.wraps(method)
    def guarded(self: "Profiler", *arguments: Any) -> None:
        if self.is_off:
            return
        try:
            method(self, *arguments)
        except Exception as exc:  # noqa: BLE001  # see above
            self.turn_off(exc)

    return guarded


class Profiler(Callback):
    """Times every step, samples the machine, traces a few steps. Costs: see tests/bench/profiling.py."""

    def __init__(
        self,
        traced_steps: tuple[int, int] | None = TRACED_STEPS,
        interval_s: float = INTERVAL_S,
        samples_before_warning: int = SAMPLES_BEFORE_WARNING,
    ) -> None:
        """`traced_steps`: the first and last to trace, counted from 1 where this process starts; None traces none.

        `samples_before_warning`: by so many samples of the machine, `interval_s` apart, the log warns of others.
        """
        self._samples_before_warning = samples_before_warning
        self.is_off = True  # until a run starts
        self._traced_steps = traced_steps
        self._interval_s = interval_s
        self._trace: StepTrace | None = None
        self._sampler: SystemSampler | None = None
        self._top_operators: list[dict[str, object]] = []
        self._warned, self._looked_at = False, 0
        """Whether the log has been told of other processes, and at how many samples that was looked at last."""

    def on_run_start(self, context: RunContext) -> None:
        """Start the clock and the thread."""
        self.is_off = False
        self._start(context)

    @_harmless
    def _start(self, context: RunContext) -> None:
        self._context = context
        self._top_operators, self._trace, self._sampler = [], None, None
        self._warned, self._looked_at = False, 0
        queued = context.device.type != "cpu"
        self._clock = RunClock(queued)
        if self._traced_steps is not None:
            window = plan(context.first_step, context.total_steps, context.steps_per_epoch, self._traced_steps)
            self._trace = StepTrace(window, context.device)
        gpu = open_gpu(context.device)
        # Of several processes that train together each is the others' "other process" unless all below torchrun count.
        pid = os.getppid() if ranks().is_distributed else os.getpid()
        try:
            # Late: the clock is made anew once all has begun.
            readers = [lambda: self._clock.wait_since_told(), *([gpu.read] if gpu is not None else [])]
            self._sampler = SystemSampler(pid, self._interval_s, readers)
        except ImportError as exc:
            log.warning("the machine is not watched: %s", exc)
        else:
            self._sampler.start()
        self._clock = RunClock(queued)  # again: what this start took is no part of the run

    @_harmless
    def on_epoch_start(self, epoch: int) -> None:
        """The time between epochs is no step's."""
        self._clock.epoch_start()

    @_harmless
    def on_step_start(self, number: int) -> None:
        """Trace, where the window begins."""
        if self._trace is not None and self._trace.covers(number):
            self._tracing(lambda trace: trace.step_start(number), in_step=True)

    @_harmless
    def on_step_end(self, step: Step) -> None:
        """Count its time; write the trace, where the window ends."""
        traced = self._trace is not None and self._trace.covers(step.number)
        if traced:
            self._tracing(lambda trace: trace.step_end())
        self._clock.step_end(step, typical=not traced)
        if self._trace is not None and self._trace.is_complete(step.number):
            self._finish_trace()
        self._warn_of_others()

    @_harmless
    def on_validation_start(self, epoch: int) -> None:
        """Validation is not traced."""
        self._finish_trace()
        self._clock.validation_start()

    @_harmless
    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        """Validation is over."""
        self._clock.epoch_end()

    def on_run_end(self, error: BaseException | None) -> None:
        """Stop the thread and write what was measured, also of a run that failed."""
        self._finish()
        self.turn_off(None)

    @_harmless
    def _finish(self) -> None:
        self._clock.epoch_end()  # where the run ended in a validation pass
        seconds = self._clock.elapsed_s()
        self._finish_trace()
        if self._sampler is not None:
            self._sampler.stop()
        if self._clock.steps == 0:
            return
        profile = self._profile(seconds)
        replace(self._context.folder / FILE, json.dumps(profile, indent=1, allow_nan=False).encode())
        log.info("profile: %s", profile["summary"])

    def turn_off(self, reason: Exception | None) -> None:
        """Leave nothing running; `reason`, if any, is said in a warning."""
        self.is_off = True
        if reason is not None:
            log.warning("the profiler is off: %s: %s; the training goes on", type(reason).__name__, reason)
        self._tracing(StepTrace.discard)
        self._trace = None
        if self._sampler is not None:
            self._sampler.stop()

    def _warn_of_others(self) -> None:
        """Once, while something can be done about it; the summary at the end is of the whole run."""
        if self._warned or self._sampler is None or self._context.device.type != "cpu":
            return
        latest = self._sampler.samples[self._looked_at :]
        if len(latest) < self._samples_before_warning:
            return
        self._looked_at += len(latest)
        if sentence := contention(self._recorded({}, latest)):
            self._warned = True
            log.warning("%s", sentence)

    def _recorded(self, shares: Mapping[str, float], samples: Sequence[Mapping[str, float]]) -> Recorded:
        import torch  # is there: a training is watched

        cores = self._sampler.cores if self._sampler is not None else os.cpu_count() or 1
        device = self._context.device.type
        return Recorded(shares, device, cores, samples, self._top_operators, torch.get_num_threads())

    def _profile(self, seconds: float) -> dict[str, object]:
        samples = self._sampler.samples if self._sampler is not None else []
        recorded = self._recorded(self._clock.shares(seconds), samples)
        bottleneck, summary = conclude(recorded)
        step_ms, images_per_s = self._clock.step_ms(), self._clock.images_per_s()
        return {
            "summary": summary,
            "bottleneck": bottleneck,
            "shares": {name: round(share, 4) for name, share in recorded.shares.items()},
            "step_ms": None if step_ms is None else {name: round(ms, 3) for name, ms in step_ms.items()},
            "images_per_s": None if images_per_s is None else round(images_per_s, 2),
            "steps": self._clock.steps,
            "seconds": round(seconds, 3),
            "profiling_s": round(self._clock.profiling_s, 3),
            "device": recorded.device,
            "machine_cores": recorded.machine_cores,
            "samples": samples,
            "top_operators": self._top_operators,
            "trace": TRACE_FILE if self._top_operators else None,
        }

    def _finish_trace(self) -> None:
        self._tracing(self._write_trace)

    def _write_trace(self, trace: StepTrace) -> None:
        self._top_operators = trace.finish(self._context.folder) or self._top_operators

    def _tracing(self, what: Callable[[StepTrace], None], in_step: bool = False) -> None:
        """A trace that fails leaves the times and the samples, which need it not. Its time is no part of the run."""
        if self._trace is None:
            return
        started_s = time.perf_counter()
        try:
            what(self._trace)
        except Exception as exc:  # noqa: BLE001  # torch's profiler, a driver, the disk: the training goes on
            log.warning("no trace of steps: %s", exc)
            self._trace = None
        self._clock.add_profiling(time.perf_counter() - started_s, in_step)
