"""The device a run computes on, and how torch is set up for it."""

import logging

import torch

from service.model.machine import cores
from training.config import TrainingConfig
from training.distributed import ALONE, Group
from training.environment import ask_for_determinism
from training.errors import ConfigError

log = logging.getLogger(__name__)

SMALLEST_BF16_SIDE = 17
"""Up to 16 px block 4 begins with a convolution of 3x3 over a single pixel, whose weights get a gradient of unwritten
memory in bfloat16 on processors (oneDNN of torch 2.13 on an AVX512-BF16 EPYC: up to 1e37, NaN, or right by luck)."""


def set_up_torch(config: TrainingConfig) -> None:
    """Threads and determinism."""
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    if config.deterministic:
        ask_for_determinism()
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic


def pick_device(name: str, group: Group = ALONE) -> torch.device:
    """The device asked for, or the best there is; with several processes each has its own GPU. Raises: ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise ConfigError(f"--device {name}: this machine has none that PyTorch can use; --device cpu always works.")
    return torch.device(name, group.local_rank) if name == "cuda" else torch.device(name)


def computes_in_bf16(config: TrainingConfig, device: torch.device) -> bool:
    """Whether training steps are in bfloat16: where it is asked for, or fast, and right."""
    if config.precision == "fp32" or (config.precision == "auto" and not has_fast_bf16(device)):
        return False
    if device.type == "cpu" and config.side < SMALLEST_BF16_SIDE:
        log.warning("training in float32: below %d px bfloat16 gives wrong gradients on processors", SMALLEST_BF16_SIDE)
        return False
    return True


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
