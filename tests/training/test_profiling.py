"""Where the time of a run goes: real small trainings, and conclusions from recorded numbers."""

import gzip
import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from service.model.architecture import Architecture
from service.model.machine import cores
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training.callbacks import RunContext, Step, StopTraining, tell
from training.config import TrainingConfig
from training.data.dataset import ArrayImages, Dataset
from training.epoch_metrics import EpochMetrics
from training.profiling.clock import RunClock
from training.profiling.gpu import Gpu, open_gpu
from training.profiling.profiler import FILE, Profiler
from training.profiling.summary import Recorded, conclude
from training.profiling.system import SystemSampler
from training.profiling.thinned import Thinned
from training.profiling.trace import FILE as TRACE_FILE
from training.profiling.trace import plan

SIDE_PX, BATCH, CLASSES = 32, 8, 4


@pytest.fixture(autouse=True)
def nothing_is_left_of_a_run() -> Iterator[None]:
    """Neither the sampler's thread nor torch's profiler."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "system-sampler"] == []
    assert not torch.autograd._profiler_enabled()


class Small(nn.Module):
    """Two layers: a step takes a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, batch: Tensor) -> Tensor:
        planes = self.convolution(batch.permute(0, 3, 1, 2).float() / 255)
        return self.head(planes.mean((2, 3)))


def resnet() -> Network:
    return Network(Architecture(num_classes=CLASSES, hidden_units=8, frozen=()), Preprocessing(side_px=SIDE_PX))


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    """The first step of a process imports half of torch, which would drown these few milliseconds."""
    network = Small()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    network(torch.zeros(1, SIDE_PX, SIDE_PX, 3)).sum().backward()
    optimizer.step()


@dataclass
class Training:
    """A real loop that drives a profiler as the contract says."""

    folder: Path
    network: Any
    epochs: int = 1
    steps_per_epoch: int = 12
    first_step: int = 1
    load_s: float = 0.0
    validation_s: float = 0.0
    checkpoint_s: float = 0.0
    fail_at: int = 0
    error: type[Exception] = ValueError

    def run(self, profiler: Profiler) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (BATCH, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        images = ArrayImages(pixels, rng.integers(0, CLASSES, BATCH))
        criterion = nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)
        callbacks = [profiler]
        context = RunContext(
            TrainingConfig(data=self.folder, output=self.folder, epochs=self.epochs), self.network, criterion,
            Dataset("small", tuple("abcd"), images, images, {}), self.folder, torch.device("cpu"),
            self.steps_per_epoch, self.steps_per_epoch * self.epochs, self.first_step,
        )  # fmt: skip
        tell(callbacks, "on_run_start", context)
        error: Exception | None = None
        try:
            for number in range(self.first_step, context.total_steps + 1):
                epoch, place = (number - 1) // self.steps_per_epoch + 1, (number - 1) % self.steps_per_epoch
                if place == 0 or number == self.first_step:
                    tell(callbacks, "on_epoch_start", epoch)
                started_s = time.perf_counter()
                time.sleep(self.load_s)
                batch, labels = torch.from_numpy(pixels), torch.from_numpy(images.labels)
                wait_s = time.perf_counter() - started_s
                tell(callbacks, "on_step_start", number)
                logits = self.network(batch)
                loss = criterion(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                if number == self.fail_at:
                    raise self.error("on purpose")
                step = Step(number, epoch, 0.01, labels, loss.detach(), (logits.argmax(1) == labels).sum(), wait_s)
                tell(callbacks, "on_backward_end", step)
                optimizer.step()
                step.seconds = time.perf_counter() - started_s
                tell(callbacks, "on_step_end", step)
                if place == self.steps_per_epoch - 1:
                    tell(callbacks, "on_validation_start", epoch)
                    with torch.inference_mode():
                        self.network(batch)
                    time.sleep(self.validation_s)
                    tell(callbacks, "on_epoch_end", EpochMetrics(epoch, 1.0, 0.5, 1.0, 0.5, 0.01, 1.0))
                    time.sleep(self.checkpoint_s)
        except self.error as exc:
            error = exc
        finally:
            tell(callbacks, "on_run_end", error)
        return json.loads((self.folder / FILE).read_text())


def trace_of(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / TRACE_FILE, "rt") as file:
        return json.load(file)["traceEvents"]


def spans(folder: Path) -> list[int]:
    """The numbers of the traced steps."""
    names = {event.get("name", "") for event in trace_of(folder)}
    return sorted(int(name.split()[-1]) for name in names if name.startswith("training step "))


def test_a_slow_loader_is_named_as_what_holds_the_run_up(tmp_path: Path) -> None:
    profile = Training(tmp_path, Small(), load_s=0.03).run(Profiler(interval_s=0.1))
    assert profile["bottleneck"] in ("data_wait", "contention")  # the latter where others keep this machine busy
    assert profile["shares"]["data_wait"] > 0.5
    assert profile["step_ms"]["median"] >= 30
    assert profile["images_per_s"] < BATCH / 0.03
    assert any(sample.get("loader_wait_percent", 0) > 50 for sample in profile["samples"])


def test_a_heavy_network_is_bound_by_its_convolutions(tmp_path: Path) -> None:
    profile = Training(tmp_path, resnet(), steps_per_epoch=4).run(Profiler((2, 3), interval_s=0.1))
    assert profile["bottleneck"] in ("compute", "contention")
    assert profile["shares"]["step"] > 0.4
    assert any("convolution" in operator["name"] for operator in profile["top_operators"])
    assert profile["top_operators"][0]["share"] <= 1
    events = {event.get("name") for event in trace_of(tmp_path)}
    assert {"aten::convolution", "aten::convolution_backward", "training step 3"} <= events
    if profile["bottleneck"] == "compute":
        assert profile["top_operators"][0]["name"] in profile["summary"]


@pytest.mark.skipif(cores() != os.cpu_count(), reason="only a part of the machine's cores may be made busy here")
def test_the_log_warns_once_while_other_processes_hold_the_processor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Children count as the run itself: these are nobody's, as the shell that starts them ends.
    start = ["sh", "-c", '"$0" -c "while True: pass" >/dev/null 2>&1 & echo $!', sys.executable]
    with ExitStack() as others:
        for _ in range(2 * (os.cpu_count() or 1)):
            started = subprocess.run(start, check=True, capture_output=True, text=True)
            others.callback(os.kill, int(started.stdout), signal.SIGKILL)
        training = Training(tmp_path, Small(), steps_per_epoch=150, load_s=0.03)
        training.run(Profiler(None, interval_s=0.1, samples_before_warning=5))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and warnings[0].startswith("Other processes use the CPU: ")


def test_long_validation_and_long_checkpoints_are_told_apart(tmp_path: Path) -> None:
    validates, saves = tmp_path / "a", tmp_path / "b"
    validates.mkdir()
    saves.mkdir()
    first = Training(validates, Small(), steps_per_epoch=3, epochs=2, validation_s=0.3).run(Profiler(None))
    second = Training(saves, Small(), steps_per_epoch=3, epochs=2, checkpoint_s=0.3).run(Profiler(None))
    assert (max(first["shares"], key=first["shares"].get), first["trace"]) == ("validation", None)
    assert max(second["shares"], key=second["shares"].get) == "other"


def test_the_profile_has_every_figure(tmp_path: Path) -> None:
    profile = Training(tmp_path, Small(), load_s=0.02).run(Profiler(interval_s=0.1))
    assert list(profile) == [
        "summary", "bottleneck", "shares", "step_ms", "images_per_s", "steps", "seconds", "profiling_s", "device",
        "machine_cores", "samples", "top_operators", "trace",
    ]  # fmt: skip
    assert sum(profile["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert (profile["steps"], profile["device"], profile["trace"]) == (12, "cpu", TRACE_FILE)
    assert profile["step_ms"]["median"] <= profile["step_ms"]["p95"]
    assert profile["samples"]
    for sample in profile["samples"]:
        assert {"t_s", "cpu_percent", "machine_cpu_percent", "memory_gb", "machine_memory_gb"} <= set(sample)
        assert 0 <= sample.get("loader_wait_percent", 0) <= 100  # missing where no step ended since the one before
        assert sample["memory_gb"] > 0.05
        if sys.platform == "linux":  # elsewhere the system may not tell
            traffic = [sample[name] for name in ("read_mb_s", "write_mb_s", "received_mb_s", "sent_mb_s")]
            assert min(traffic) >= 0
    assert {path.name for path in tmp_path.iterdir()} == {FILE, TRACE_FILE}


def test_the_loaders_part_is_that_of_the_steps_since_the_sample_before() -> None:
    clock = RunClock(queued=False)
    assert clock.wait_since_told() == {}
    for wait_s in (0.3, 0.1, 5.0):  # of the last, all it has is wait
        step = Step(1, 1, 0.01, torch.zeros(8), torch.zeros(()), torch.zeros(()), wait_s)
        step.seconds = 1.0
        clock.step_end(step, typical=True)
        if wait_s == 0.1:
            assert clock.wait_since_told() == {"loader_wait_percent": 20.0}
    assert clock.wait_since_told() == {"loader_wait_percent": 100.0}
    assert clock.wait_since_told() == {}


def test_only_the_steps_asked_for_are_traced(tmp_path: Path) -> None:
    Training(tmp_path, Small()).run(Profiler((5, 7)))
    assert spans(tmp_path) == [5, 6, 7]


@pytest.mark.parametrize(
    ("steps", "first_step", "traced"), [(1, 1, [1]), (2, 1, [2]), (3, 1, [2, 3]), (12, 10, [11, 12])]
)
def test_a_short_or_resumed_run_is_traced_as_far_as_it_goes(
    tmp_path: Path, steps: int, first_step: int, traced: list[int]
) -> None:
    profile = Training(tmp_path, Small(), steps_per_epoch=steps, first_step=first_step).run(Profiler((5, 10)))
    assert spans(tmp_path) == traced
    assert profile["steps"] == steps - first_step + 1


@pytest.mark.parametrize("error", [ValueError, StopTraining])
@pytest.mark.parametrize("fail_at", [5, 6, 12])
def test_a_run_that_fails_leaves_its_profile_and_nothing_running(
    tmp_path: Path, fail_at: int, error: type[Exception]
) -> None:
    training = Training(tmp_path, Small(), fail_at=fail_at, error=error)
    profile = training.run(Profiler((6, 8)))  # 5 warms up
    assert profile["steps"] == fail_at - 1
    assert (profile["trace"] is None) == (fail_at == 5)


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Training(tmp_path, Small(), fail_at=1).run(Profiler())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_costs_warnings_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(FileNotFoundError):
        Training(tmp_path / "missing", Small()).run(Profiler())
    assert len(caplog.messages) == 2
    assert "no trace of steps" in caplog.text
    assert "the training goes on" in caplog.text


def test_another_profiler_that_is_on_costs_the_trace_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), caplog.at_level(logging.WARNING):
        profile = Training(tmp_path, Small()).run(Profiler())
    assert (profile["trace"], profile["steps"]) == (None, 12)
    assert len(caplog.messages) == 1


def test_a_run_with_the_profiler_trains_as_one_without(tmp_path: Path) -> None:
    weights = []
    for profiler in (Profiler((2, 3)), Profiler(None)):
        torch.manual_seed(0)
        network = Small()
        Training(tmp_path, network, steps_per_epoch=4).run(profiler)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert torch.equal(*weights)


@given(
    first=st.integers(1, 60), left=st.integers(0, 60), steps_per_epoch=st.integers(1, 30),
    wanted=st.tuples(st.integers(1, 12), st.integers(0, 9)),
)  # fmt: skip
def test_traced_steps_lie_in_the_run_and_in_one_epoch(
    first: int, left: int, steps_per_epoch: int, wanted: tuple[int, int]
) -> None:
    window = plan(first, first + left, steps_per_epoch, (wanted[0], wanted[0] + wanted[1]))
    assert first <= window.warm_up <= window.first <= window.last <= first + left
    assert window.last - window.first <= wanted[1]
    assert (window.warm_up - 1) // steps_per_epoch == (window.last - 1) // steps_per_epoch
    if first == 1 and wanted[0] > 1 and steps_per_epoch >= sum(wanted) <= left:
        assert (window.first, window.last) == (wanted[0], sum(wanted))


@given(st.integers(2, 50), st.integers(0, 500))
def test_a_series_is_bounded_even_and_in_order(limit: int, count: int) -> None:
    series: Thinned[int] = Thinned(limit)
    for item in range(count):
        series.append(item)
    assert len(series.items) <= limit
    assert len(series.items) >= min(count, limit // 2)
    assert len({b - a for a, b in zip(series.items, series.items[1:], strict=False)}) <= 1
    assert series.items[:1] == [0][:count]


def test_a_childs_processor_time_counts_as_the_runs() -> None:
    sampler = SystemSampler(os.getpid(), interval_s=0.2)
    sampler.start()
    spin = "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    sampler.stop()
    assert max(sample["cpu_percent"] for sample in sampler.samples) > 15  # 100 on a quiet machine
    # One sample may be too high: where the sampler waits for a core between the clock and the counters.
    machine = statistics.median(sample["machine_cpu_percent"] for sample in sampler.samples)
    assert machine <= 100 * sampler.cores * 1.2


def test_a_machine_without_nvidias_library_has_no_gpu_figures() -> None:
    assert open_gpu(torch.device("cpu")) is None
    with pytest.raises(OSError):
        Gpu("GPU-0", library="libof-no-such-driver.so.1")


QUIET = [{"cpu_percent": 190.0, "machine_cpu_percent": 195.0}] * 3
CROWDED = [{"cpu_percent": 20.0, "machine_cpu_percent": 200.0}] * 3
HALF_EMPTY = [{"cpu_percent": 20.0, "machine_cpu_percent": 100.0}] * 3
OPERATORS = [{"name": "aten::convolution_backward", "total_ms": 58.0, "share": 0.58}]


def shares(**given: float) -> dict[str, float]:
    parts = {"data_wait": 0.0, "step": 0.0, "validation": 0.0, "other": 0.0, **given}
    parts["step"] = 1 - sum(parts.values())
    return parts


@pytest.mark.parametrize(
    ("recorded", "bottleneck", "words"),
    [
        (Recorded(shares(data_wait=0.62), "cpu", 2, QUIET), "data_wait", "62 % of the time the loop waited"),
        (Recorded(shares(data_wait=0.62), "cuda", 2, QUIET), "data_wait", "--loader-workers"),
        (Recorded(shares(data_wait=0.1), "cpu", 2, QUIET, OPERATORS), "compute", "58 % of a step into aten::convol"),
        (Recorded(shares(), "cpu", 2, QUIET), "compute", "a GPU"),
        (Recorded(shares(validation=0.45), "cpu", 2, QUIET), "validation", "45 % of the time went into validation"),
        (Recorded(shares(other=0.5), "cpu", 2, QUIET), "other", "saving checkpoints"),
        (Recorded(shares(data_wait=0.3, validation=0.6), "cpu", 2, QUIET), "validation", "60 %"),
        (Recorded(shares(), "cpu", 2, CROWDED), "contention", "180 % of 200 % are taken by others"),
        (Recorded(shares(), "cpu", 2, HALF_EMPTY), "compute", "Compute-bound"),
        (Recorded(shares(), "cuda", 2, CROWDED), "compute", "Compute-bound: 100 %"),
        (Recorded(shares(data_wait=0.5), "cuda", 2, CROWDED), "contention", "Other processes"),
        (Recorded(shares(), "cuda", 2, [{"gpu_percent": 40.0}]), "gpu_idle", "idle 60 % of the time"),
        (Recorded(shares(), "cuda", 2, [{"gpu_percent": 95.0}]), "compute", "into training steps"),
        (Recorded(shares(), "cpu"), "compute", "Compute-bound"),
    ],
)
def test_the_sentence_names_the_bottleneck(recorded: Recorded, bottleneck: str, words: str) -> None:
    named, sentence = conclude(recorded)
    assert named == bottleneck
    assert words in sentence
    assert sentence.endswith(".")


def test_threads_that_are_one_already_are_not_advised() -> None:
    assert "OMP_NUM_THREADS=1" in conclude(Recorded(shares(), "cpu", 2, CROWDED, threads=2))[1]
    sentence = conclude(Recorded(shares(), "cpu", 2, CROWDED, threads=1))[1]
    assert "OMP" not in sentence and sentence.endswith("end them, or train on a machine of its own.")


NVML = """
#include <string.h>
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned long long total, free, used; } memory;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = (void *)0x123456789abc;
    return strcmp(uuid, "GPU-1") ? 6 : 0;
}
int nvmlDeviceGetUtilizationRates(void *device, utilization *u) {
    u->gpu = 77;
    return device == (void *)0x123456789abc ? 0 : 2;
}
int nvmlDeviceGetMemoryInfo(void *device, memory *m) {
    m->total = 80000000000; m->used = 5000000000;
    return device == (void *)0x123456789abc ? 0 : 2;
}
"""
"""The four functions of NVIDIA's library that are called, as its header declares them."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_gpu_is_read_through_the_librarys_own_types(tmp_path: Path) -> None:
    source, library = tmp_path / "nvml.c", tmp_path / "nvml.so"
    source.write_text(NVML)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    assert Gpu("GPU-1", str(library)).read() == {"gpu_percent": 77.0, "gpu_memory_gb": 5.0}
    with pytest.raises(OSError, match="error 6"):
        Gpu("GPU-2", str(library))
