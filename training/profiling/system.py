"""The machine while a run goes: a thread that reads processor, memory, disk, network, loader and GPU once a second."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from training.profiling.thinned import Thinned

log = logging.getLogger(__name__)

SAMPLES_KEPT = 1000
SHORTEST_S = 0.05
"""Below this, processor time (counted in hundredths of a second) is too coarse to be divided."""


class SystemSampler:
    """Starts with `start`, ends with `stop`; `samples` grow meanwhile, and may be thinned out once there are many.

    A sample: `t_s` since the start; `cpu_percent` of the watched process and its children, `machine_cpu_percent`
    of all processes (both: 100 is one core); `memory_gb` of the process alone (children share pages with it),
    `machine_memory_gb`; `read_mb_s`, `write_mb_s` of all disks, `received_mb_s`, `sent_mb_s` of all networks, where the
    system tells; and what the `readers` return: `loader_wait_percent` (clock.py), figures of the GPU (gpu.py).
    """

    def __init__(self, pid: int, interval_s: float, readers: Sequence[Callable[[], dict[str, float]]] = ()) -> None:
        """`pid`: the process whose children, too, count as this run. Raises: ImportError without psutil."""
        import psutil  # type: ignore[import-untyped]  # optional; it has no types

        self._psutil = psutil
        self._process = psutil.Process(pid)
        self.cores: int = psutil.cpu_count() or 1
        """Of the machine: `machine_cpu_percent` is at most 100 times this."""
        self._interval_s = interval_s
        self._readers = readers
        self._samples: Thinned[dict[str, float]] = Thinned(SAMPLES_KEPT)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-sampler", daemon=True)

    @property
    def samples(self) -> list[dict[str, float]]:
        """Those kept, in order."""
        return self._samples.items

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, with a last sample; returns when the thread is gone."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            started_s = before_s = time.monotonic()
            before = self._counters()
            stopping = False
            while not stopping:
                stopping = self._stop.wait(self._interval_s)
                now_s = time.monotonic()
                if now_s - before_s < SHORTEST_S:
                    continue
                now = self._counters()
                self._samples.append(
                    {"t_s": round(now_s - started_s, 3), **_rates(before, now, now_s - before_s), **self._levels()}
                )
                before, before_s = now, now_s
        except Exception as exc:  # noqa: BLE001  # nothing a measurement meets may end a training
            log.warning("the machine is no longer watched: %s", exc)

    def _counters(self) -> dict[str, float]:
        """What only grows, in the unit of the rate per second."""
        counters = {"cpu_percent": 100 * self._own_cpu_s(), "machine_cpu_percent": 100 * self._machine_cpu_s()}
        disk = self._psutil.disk_io_counters()  # None where the system tells nothing
        if disk is not None:
            counters |= {"read_mb_s": disk.read_bytes / 1e6, "write_mb_s": disk.write_bytes / 1e6}
        network = self._psutil.net_io_counters()
        if network is not None:
            counters |= {"received_mb_s": network.bytes_recv / 1e6, "sent_mb_s": network.bytes_sent / 1e6}
        return counters

    def _levels(self) -> dict[str, float]:
        levels = {
            "memory_gb": round(self._psutil.Process().memory_info().rss / 1e9, 4),
            "machine_memory_gb": round(self._psutil.virtual_memory().used / 1e9, 4),
        }
        for read in self._readers:
            levels |= read()
        return levels

    def _own_cpu_s(self) -> float:
        """Of the process and all below it; an ended child's time is its parent's from then on."""
        total = 0.0
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                times: Any = process.cpu_times()
            except (self._psutil.NoSuchProcess, self._psutil.AccessDenied):
                continue
            ended = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
            total += times.user + times.system + ended
        return total

    def _machine_cpu_s(self) -> float:
        times = self._psutil.cpu_times()
        busy = ("user", "nice", "system", "irq", "softirq", "steal")  # user holds guest's already
        return sum(getattr(times, name, 0.0) for name in busy)


def _rates(before: dict[str, float], now: dict[str, float], seconds: float) -> dict[str, float]:
    """Growth per second; a counter that fell (a child vanished between two looks) has grown by nothing."""
    return {name: round(max(0.0, value - before[name]) / seconds, 3) for name, value in now.items() if name in before}
