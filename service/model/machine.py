"""What this process may use of the machine: cores, memory and GPUs, with a container's limits (cgroup v2) counted."""

import ctypes
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cores(cgroup: Path = CGROUP) -> int:
    """Cores this process may use: its affinity, or less where the container's quota (cpu.max) is less. At least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period):
        count = min(count, -(-int(quota) // int(period)))
    return max(1, count)


def memory_bytes(cgroup: Path = CGROUP) -> int:
    """Memory this process may use: the machine's, or the container's limit (memory.max) where that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read(cgroup / "memory.max")
    return min(machine, int(limit)) if limit.isdecimal() else machine


def gpus() -> int:
    """NVIDIA GPUs the driver shows this process; 0 without a driver (CUDA driver API, cuDeviceGetCount)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # no cgroup v2 here (macOS, cgroup v1)
        return ""
