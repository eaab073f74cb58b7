"""How busy a GPU is, from NVIDIA's management library, which comes with the driver and needs no package.

https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
"""

import ctypes

import torch

LIBRARY = "libnvidia-ml.so.1"


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Gpu:
    """One GPU, by its UUID: the number of a device means another one under CUDA_VISIBLE_DEVICES."""

    def __init__(self, uuid: str, library: str = LIBRARY) -> None:
        """Raises: OSError when there is no library, or it does not know the GPU."""
        self._nvml = ctypes.CDLL(library)
        self._handle = ctypes.c_void_p()
        self._check(self._nvml.nvmlInit_v2())
        self._check(self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._handle)))

    def read(self) -> dict[str, float]:
        """`gpu_percent`: share of the last moments in which a kernel ran; `gpu_memory_gb`, of all processes.

        What the GPU does not tell (a part of one, MIG, has no utilisation) is left out.
        """
        figures = {}
        utilization, memory = _Utilization(), _Memory()
        if self._nvml.nvmlDeviceGetUtilizationRates(self._handle, ctypes.byref(utilization)) == 0:
            figures["gpu_percent"] = float(utilization.gpu)
        if self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)) == 0:
            figures["gpu_memory_gb"] = memory.used / 1e9
        return figures

    @staticmethod
    def _check(status: int) -> None:
        if status != 0:
            raise OSError(f"NVML answers with error {status}.")


def open_gpu(device: torch.device) -> Gpu | None:
    """The GPU that `device` is; None for other devices, and where its library cannot be used."""
    if device.type != "cuda":
        return None
    try:
        return Gpu(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except (OSError, AttributeError):  # no driver library here (ROCm), or no UUID
        return None
