"""What the figures were computed on: processor, memory, GPU, versions."""

import platform
from pathlib import Path

import torch

from service.model.machine import cores, memory_bytes

CPUINFO = Path("/proc/cpuinfo")


def hardware() -> dict[str, str]:
    """Name -> value, for people."""
    found = {
        "processor": f"{_processor()}, {cores()} cores",
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["gpu"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return found


def _processor() -> str:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:  # no Linux
        return platform.processor() or "unknown processor"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")
