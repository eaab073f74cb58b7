"""What this process may use of the machine: cores, memory, GPUs; with a container's limits (cgroup v2 and v1) counted.

Amazon Linux 2, which SageMaker's older hosts run, has v1.
"""

import ctypes
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")

NICE = 10
"""Added to the priority of threads that compute. Else the event loop waits for a core in an overload: at five times the
capacity of 2 cores with AMX (224 px, int8, 1,240 requests/s, two runs of 6 s) refusals came after 1,200 and 2,100 ms
(p95), with 5 after 14 and 42, with 10 after 8 and 9; capacity 236 and 252 images/s, 236 and 250, 248 and 261."""

_M_ARENA_MAX = -8  # mallopt(3), malloc.h

SAGEMAKER_MODEL = Path("/opt/ml/model")
"""A folder of this name is where SageMaker started us, or someone who starts containers as it does."""


def cores(cgroup: Path = CGROUP) -> int:
    """Cores this process may use: its affinity, or less where the container's quota is less. At least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if not quota:  # v1, where a quota of -1 is none
        quota, period = (_read(cgroup / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota.isdecimal() and period.isdecimal() and int(period):
        count = min(count, -(-int(quota) // int(period)))
    return max(1, count)


def memory_bytes(cgroup: Path = CGROUP) -> int:
    """Memory this process may use: the machine's, or the container's limit where that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read(cgroup / "memory.max") or _read(cgroup / "memory" / "memory.limit_in_bytes")
    return min(machine, int(limit)) if limit.isdecimal() else machine


def tasks(cgroup: Path = CGROUP) -> int | None:
    """Processes and threads this container may have (docker run --pids-limit); None where there is no limit."""
    limit = _read(cgroup / "pids.max") or _read(cgroup / "pids" / "pids.max")
    return int(limit) if limit.isdecimal() else None


def has_driver() -> bool:
    """Whether there is a driver for NVIDIA GPUs; it is not initialised."""
    return _driver() is not None


def gpus() -> int:
    """NVIDIA GPUs the driver shows this process; 0 without a driver (CUDA driver API, cuDeviceGetCount)."""
    driver, count = _driver(), ctypes.c_int(0)
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def give_way() -> None:
    """Let this thread, and those it starts, come after the others of this process where cores are short (nice(2), which
    on Linux is of a thread: setpriority(2), C library/kernel differences).
    """
    if sys.platform == "linux":
        with suppress(OSError):  # where a sandbox forbids it
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICE))


def few_arenas() -> None:
    """Let glibc have two heaps for all threads: else it gives almost every thread one of its own, and none of it back
    to the others (mallopt(3)). Those that are there stay.

    With MALLOC_ARENA_MAX=2, which does the same from the start, at 224 px in bfloat16, 32 clients, three starts in
    turns: 426, 423 and 379 MiB (PSS) against 456, 459 and 393, at 57 images/s on average both; at 32 px in int8 the
    same memory, 2,480 images/s against 2,410 (2 cores of an EPYC).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # not every C library has it
        mallopt(_M_ARENA_MAX, 2)


def give_back_memory() -> None:
    """Return to the system what was freed: glibc keeps blocks below 32 MB once it has freed one (mallopt(3))."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # not every C library has it
        trim(0)


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether there is an NVIDIA GPU, be its driver as it may: its device is there (WSL has another), or it is seen."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists() or gpus() > 0


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # no such cgroup here
        return ""
