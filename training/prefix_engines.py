"""Engines for the one pass that fills the feature cache: resized images -> what the frozen blocks make of them.

An engine is a function: uint8 `[n, S, S, 3]` -> bfloat16 `[n, h, w, C]` on the CPU. OpenVINO runs it on CPUs where it
is installed, else torch; on a GPU torch, in half precision: results are kept in bfloat16, which rounds more than that.
"""

import functools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from service.model.network import Network
from service.model.openvino_graph import core, no_telemetry
from service.model.small_maps import flatten_small_maps

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PrefixEngine:
    """One way to run the frozen blocks."""

    name: str
    """Tells engines apart whose results differ: part of the cache's key."""
    batch_size: int
    run: Callable[[Tensor], Tensor]


def choose_engine(network: Network, device: torch.device, bf16: bool) -> PrefixEngine:
    """The fastest at hand; `bf16`: compute in bfloat16, else in float32, on a GPU in float16."""
    if device.type == "cpu":
        try:
            return _openvino(network, bf16)
        except ImportError:
            log.info("OpenVINO is not installed: torch computes the features, which takes longer")
    precision: Precision = "bf16" if bf16 else "fp16" if device.type == "cuda" else "fp32"
    return _torch(network, device, precision)


def _torch(network: Network, device: torch.device, precision: Precision) -> PrefixEngine:
    network = network.to(device).to(memory_format=torch.channels_last).eval()

    def compute(images: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return network.features(images.to(device)).permute(0, 2, 3, 1).to("cpu", torch.bfloat16)

    def run(images: Tensor) -> Tensor:
        features = compute(images, DTYPES[precision])
        if precision == "fp16" and not torch.isfinite(features).all():  # beyond 65,504, which other types can hold
            features = compute(images, torch.float32)
        return features

    return PrefixEngine(f"torch-{device.type}-{precision}", 512 if device.type == "cuda" else 64, run)


def _openvino(network: Network, bf16: bool) -> PrefixEngine:
    # Measured on 2 cores of an AVX512-BF16 EPYC, 224 px, batches of 32, img/s: fp32 38 (torch 30), bf16 75 (torch 55).
    # With AMX, 32 px, batches of 64: bf16 10,700, of which small maps as products (`flatten_small_maps`) are a third.
    with no_telemetry():
        import openvino

    @functools.cache
    def compiled(side_px: int) -> Callable[..., Any]:  # at the first batch: it takes seconds, and a cache may be there
        example = torch.zeros(1, side_px, side_px, 3, dtype=torch.uint8)
        with warnings.catch_warnings():
            # OpenVINO traces with torch.jit, which torch 2.13 calls deprecated: nothing a user could act on.
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            model = openvino.convert_model(_Features(network).eval(), example_input=example)
        model.reshape([-1, side_px, side_px, 3])
        flatten_small_maps(model)
        hints = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32", "PERFORMANCE_HINT": "LATENCY"}
        found: Callable[..., Any] = core().compile_model(model, "CPU", hints)
        return found

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.shape[1])(images.contiguous().numpy())[0]).to(torch.bfloat16)

    return PrefixEngine(f"openvino-{'bf16' if bf16 else 'fp32'}", 64, run)


class _Features(nn.Module):
    """The frozen blocks as a module of their own, channels last as the cache lays them down."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Tensor) -> Tensor:
        return self.network.features(batch).permute(0, 2, 3, 1)
