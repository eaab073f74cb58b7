"""The engine for NVIDIA GPUs: PyTorch in half precision, channels last, one CUDA graph for each batch size in use."""

from typing import Any

import numpy as np
import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock

from service.engines.base import EngineUnavailable, Logits
from service.model.artifact import Artifact
from service.model.network import Network, network_of
from service.model.resize import PixelBatch

WARM_UP = 3
"""Passes before a graph is captured: cuDNN chooses its algorithms in the first (PyTorch notes, CUDA graphs)."""


class CudaEngine:
    """One GPU. A batch is padded to the next captured size, copied from pinned memory, and the graph replayed.

    Tolerance: float16 keeps 11 bits, and 36 layers add their roundings up.
    """

    name = "torch-cuda"
    tolerance = 2e-2
    lanes = 1
    warm_sizes: tuple[int, ...] = ()  # each size was run when it was captured

    def __init__(self, artifact: Artifact, device: int, max_batch: int) -> None:
        """Load onto GPU number `device` and capture. Raises: ArtifactError, EngineUnavailable."""
        require_gpu(device)
        self._device = torch.device("cuda", device)
        self.best_batch = max_batch
        torch.backends.cudnn.benchmark = True  # the shapes are few and fixed
        with torch.cuda.device(self._device), torch.inference_mode():
            network = fused(network_of(artifact)).to(self._device, torch.float16, memory_format=torch.channels_last)
            side = artifact.manifest.preprocessing.side_px
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
            self._graphs = {size: _Captured(network, size, side, self._stream, self._pool) for size in sizes(max_batch)}

    def infer(self, batch: PixelBatch) -> Logits:
        """See `Engine.infer`."""
        parts = [batch[start : start + self.best_batch] for start in range(0, len(batch), self.best_batch)]
        return np.concatenate([self._infer(part) for part in parts])

    def settle(self) -> None:
        """See `Engine.settle`."""

    def _infer(self, batch: PixelBatch) -> Logits:
        captured = self._graphs[min(size for size in self._graphs if size >= len(batch))]
        # The static memory was made in inference mode, and can be written in it alone.
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            return captured.replay(batch)


class _Captured:
    """The network at one batch size: static memory on both sides, and the graph between."""

    def __init__(self, network: Network, size: int, side_px: int, stream: torch.cuda.Stream, pool: Any) -> None:
        shape = (size, side_px, side_px, 3)
        self._pixels = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        self._staged = torch.zeros(shape, dtype=torch.uint8).pin_memory()
        self._stream = stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                logits = network(self._pixels).float()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream):
            self._logits = network(self._pixels).float()  # [size, K]
        self._answered = torch.empty(logits.shape, dtype=torch.float32).pin_memory()

    def replay(self, batch: PixelBatch) -> Logits:
        n = len(batch)
        self._staged[:n].numpy()[...] = batch
        self._pixels[:n].copy_(self._staged[:n], non_blocking=True)
        self._graph.replay()
        self._answered.copy_(self._logits, non_blocking=True)
        self._stream.synchronize()
        return self._answered[:n].numpy().copy()  # the next batch overwrites it


def require_gpu(device: int) -> None:
    """Raises: EngineUnavailable when torch cannot use that GPU, saying what it and the driver are made for."""
    if not torch.cuda.is_available():
        raise EngineUnavailable(
            f"This machine's GPU cannot be used by torch {torch.__version__}, made for CUDA {torch.version.cuda}: its "
            "driver is too old or does not answer. Choose a newer driver (on SageMaker: InferenceAmiVersion), or "
            "CLASSIFIER_ENGINE=openvino-fp32 to run on the processor."
        )
    if device >= torch.cuda.device_count():
        raise EngineUnavailable(f"There is no GPU number {device}: this process sees {torch.cuda.device_count()}.")


def sizes(max_batch: int) -> list[int]:
    """The batch sizes to capture: powers of two below `max_batch`, and itself."""
    return [2**power for power in range(max_batch.bit_length()) if 2**power < max_batch] + [max_batch]


def fused(network: Network) -> Network:
    """With each batch norm folded into the convolution before it."""
    network.conv1, network.bn1 = fuse_conv_bn_eval(network.conv1, network.bn1), torch.nn.Identity()
    for block in network.modules():
        if isinstance(block, BasicBlock):
            block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), torch.nn.Identity()
            block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), torch.nn.Identity()
            if block.downsample is not None:
                block.downsample = fuse_conv_bn_eval(block.downsample[0], block.downsample[1])
    return network
