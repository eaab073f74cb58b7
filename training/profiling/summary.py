"""What a profile says in one sentence: what holds the run up, and what to do about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DATA_WAIT_SHARE = 0.25
VALIDATION_SHARE = 0.4
OTHER_SHARE = 0.25
"""Shares of the time from which a part is called the bottleneck; of several, the one furthest above its own."""
FULL_MACHINE = 0.85
OTHERS_SHARE = 0.25
"""Contention: the machine is as good as full, and others take this share of it."""
IDLE_GPU_PERCENT = 60.0


@dataclass(frozen=True)
class Recorded:
    """What was measured over a run."""

    shares: Mapping[str, float]
    """`data_wait`, `step`, `validation`, `other`: parts of the run's time that sum to 1; empty while it goes on."""
    device: str
    """`cpu`, `cuda` or `mps`."""
    machine_cores: int = 1
    samples: Sequence[Mapping[str, float]] = ()
    """See `SystemSampler`."""
    top_operators: Sequence[Mapping[str, object]] = field(default=())
    """See `top_operators` in trace.py."""
    threads: int | None = None
    """Of torch, in this process; None where that is not known."""

    def mean(self, name: str) -> float | None:
        """The mean of a figure of the samples; None where no sample has it."""
        values = [sample[name] for sample in self.samples if name in sample]
        return sum(values) / len(values) if values else None


def conclude(recorded: Recorded) -> tuple[str, str]:
    """The bottleneck: data_wait, compute, validation, other, contention or gpu_idle; and the sentence."""
    crowded = contention(recorded)
    if crowded and (recorded.device == "cpu" or recorded.shares["data_wait"] >= DATA_WAIT_SHARE):
        return "contention", crowded
    thresholds = {"data_wait": DATA_WAIT_SHARE, "validation": VALIDATION_SHARE, "other": OTHER_SHARE}
    worst = max(thresholds, key=lambda name: recorded.shares[name] / thresholds[name])
    if recorded.shares[worst] >= thresholds[worst]:
        return worst, f"{_percent(recorded.shares[worst])} {_ADVICE[worst]}"
    gpu = recorded.mean("gpu_percent")
    if recorded.device == "cuda" and gpu is not None and gpu < IDLE_GPU_PERCENT:
        return "gpu_idle", (
            f"The GPU is idle {100 - gpu:.0f} % of the time though images are there: a larger --batch-size gives it "
            "more to do at once."
        )
    return "compute", _compute(recorded)


def contention(recorded: Recorded) -> str:
    """A sentence where other processes take so much of the processor that the run waits for it; else empty."""
    others = _others_percent(recorded)
    if others is None:
        return ""
    remedy = (
        "or train on a machine of its own."
        if recorded.threads == 1
        else "train on a machine of its own, or set OMP_NUM_THREADS=1: threads that wait for one another lose the most."
    )
    whole = 100 * recorded.machine_cores
    return f"Other processes use the CPU: {others:.0f} % of {whole} % are taken by others; end them, {remedy}"


_ADVICE = {
    "data_wait": "of the time the loop waited for images: more --loader-workers, a smaller --side, or "
    "--feature-cache on where the first blocks are frozen.",
    "validation": "of the time went into validation: a smaller validation set, or more training images for each pass.",
    "other": "of the time was neither step nor validation: saving checkpoints and whatever else watches the run; do "
    "these less often.",
}


def _compute(recorded: Recorded) -> str:
    sentence = f"Compute-bound: {_percent(recorded.shares['step'])} of the time went into training steps"
    if recorded.top_operators:
        first = recorded.top_operators[0]
        share = first["share"]
        assert isinstance(share, float)
        sentence += f", {_percent(share)} of a step into {first['name']}"
    remedy = "a GPU, " if recorded.device == "cpu" else ""
    return f"{sentence}; faster are {remedy}--precision auto, a smaller --side, and more frozen blocks."


def _others_percent(recorded: Recorded) -> float | None:
    """Processor time of other processes, 100 is one core; None while it is not in the way."""
    machine, own = recorded.mean("machine_cpu_percent"), recorded.mean("cpu_percent")
    if machine is None or own is None:
        return None
    whole, others = 100 * recorded.machine_cores, max(0.0, machine - own)
    return others if machine >= FULL_MACHINE * whole and others >= OTHERS_SHARE * whole else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
