"""The engine for CPUs: OpenVINO, in float32, bfloat16 or int8. Needs no torch."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from service.engines.base import EngineUnavailable, Logits
from service.model.artifact import Artifact
from service.model.errors import ArtifactError
from service.model.machine import give_back_memory
from service.model.openvino_graph import build, core, has_bf16, no_telemetry, read_int8
from service.model.resize import PixelBatch
from service.model.small_maps import flatten_small_maps

with no_telemetry():
    import openvino

Precision = Literal["fp32", "bf16", "int8"]

BEST_PIXELS = 8 * 224 * 224
"""Pixels per call beyond which no image takes less time, but its batch more memory and those behind it longer.

Seen on 2 cores of an AVX512-BF16 EPYC, OpenVINO 2026.4, two lanes, the service at 224 px with 32 clients, three rounds
in turns: int8 in batches of 8: 101 images/s, p99 358 ms, 316 MiB; of 16: 99/s, 470 ms, 384 MiB; bfloat16 57/s, 590 ms,
381 MiB against 57/s, 775 ms, 424 MiB. Without HTTP, int8: 88 (1), 94 (4), 89 to 100 (8), 96 to 105 (16), 71 (32). With
AMX the service, one run each, int8, 224 px: 220 (4), 248 (8), 247 (16), 229 (32); at 32 px the forward pass alone:
1,100 (1), 5,700 (8), 14,000 (32).
"""

PADDED_SIDE_PX, PADDED_SIZES = 32, (4, 16, 32)
"""Images of at most this side are padded with black ones to a batch of these sizes.

A batch of another size than the one before costs OpenVINO 1.3 ms, in which it plans anew; at 32 px that is 12 images
(int8, one core with AMX: 2.7 ms for 12 images each time, 4.1 ms for 9 to 16 in turns, 2.85 ms for 16).
"""

MAX_LANES = 8
"""More lanes than this share the threads no better, and every one needs memory of its own."""

TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}
"""Relative to the largest logit. bfloat16 keeps 8 bits, and 36 layers add their roundings up."""


class OpenVinoEngine:
    """Runs the network that the artifact's weights describe, or its int8 network.

    Under load each lane computes a batch of its own on its share of the threads: threads that share one layer wait for
    each other at its end, and burn the time that decoding and HTTP need.

    int8 is checked against the float32 logits within twice what was measured when it was quantized, and a little.
    """

    def __init__(self, artifact: Artifact, precision: Precision, threads: int, alone_threads: int) -> None:
        """Compile the network. Raises: ArtifactError, EngineUnavailable."""
        if precision == "bf16" and not has_bf16():
            raise EngineUnavailable(
                "This processor does not compute in bfloat16; choose CLASSIFIER_ENGINE=openvino-fp32, or auto."
            )
        manifest = artifact.manifest
        if precision == "int8":
            if manifest.quantization is None:
                raise ArtifactError("The artifact has no int8 network; 'python -m training.quantize' adds one.")
            model = read_int8(artifact)
            self.tolerance = 2 * manifest.quantization.self_check_difference + TOLERANCES["bf16"]
        else:
            bf16 = precision == "bf16"
            model = build(manifest.architecture, manifest.preprocessing, artifact.weights(), bf16=bf16)
            self.tolerance = TOLERANCES[precision]
        self.name = f"openvino-{precision}"
        side = manifest.preprocessing.side_px
        self._image = (side, side, 3)
        self.best_batch = max(1, BEST_PIXELS // side**2)
        # A single image takes 104 ms the first time and 86 then, after a batch of 8 (224 px, int8, one lane with AVX2).
        self.warm_sizes: tuple[int, ...] = PADDED_SIZES if side <= PADDED_SIDE_PX else ()
        self.lanes = min(threads, MAX_LANES)
        hints: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",  # of int8: what is not quantized
            "ENABLE_CPU_PINNING": False,  # a container's share of the machine is not ours to place threads on
        }
        lanes = {**hints, "NUM_STREAMS": self.lanes, "INFERENCE_NUM_THREADS": threads}
        alone = {**hints, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": alone_threads}
        with _compiling():
            flatten_small_maps(model)
            self._side_by_side = core().compile_model(model, "CPU", lanes)
        give_back_memory()  # what reading an artifact and building its network took besides
        self._alone: openvino.InferRequest | None = None
        self._unsettled: tuple[openvino.Model, dict[str, Any]] | None = (model, alone)
        self._own = threading.local()
        self._under_way = 0
        self._lock = threading.Lock()

    def settle(self) -> None:
        """See `Engine.settle`: compile for an image that comes alone, which a lane takes until then.

        Raises: EngineUnavailable.
        """
        unsettled, self._unsettled = self._unsettled, None
        if unsettled is None:
            return
        model, hints = unsettled
        with _compiling():
            alone = core().compile_model(model, "CPU", hints).create_infer_request()
            alone.infer({0: np.zeros((1, *self._image), np.uint8)})
        self._alone = alone
        del model, unsettled
        give_back_memory()

    def infer(self, batch: PixelBatch) -> Logits:
        """See `Engine.infer`. Each lane has its share of threads; once settled, an image that comes alone gets all."""
        with self._lock:
            alone = self._alone if self._under_way == 0 and len(batch) == 1 else None
            self._under_way += 1
        try:
            if alone is None:
                results: Any = self._request().infer({0: _padded(batch, self.warm_sizes)}, share_inputs=True)
            else:
                results = alone.infer({0: np.ascontiguousarray(batch)}, share_inputs=True)
            logits: Logits = results[0][: len(batch)]
            return logits
        finally:
            with self._lock:
                self._under_way -= 1

    def _request(self) -> openvino.InferRequest:
        if not hasattr(self._own, "request"):
            self._own.request = self._side_by_side.create_infer_request()
        request: openvino.InferRequest = self._own.request
        return request


@contextmanager
def _compiling() -> Iterator[None]:
    try:
        yield
    except RuntimeError as exc:
        detail = ascii(" ".join(str(exc).split())[:300])
        raise EngineUnavailable(f"OpenVINO cannot compile the network for this processor: {detail}.") from exc


def _padded(batch: PixelBatch, sizes: Sequence[int]) -> PixelBatch:
    """The batch in one piece, with black images up to the next of `sizes`."""
    size = next((size for size in sizes if size >= len(batch)), len(batch))
    if size == len(batch):
        return np.ascontiguousarray(batch)
    padded = np.zeros((size, *batch.shape[1:]), np.uint8)
    padded[: len(batch)] = batch
    return padded
