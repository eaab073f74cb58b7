"""An artifact's networks as OpenVINO runs them on a processor, for evaluation: one batch at a time, no HTTP.

Graph and arithmetic are those of the service's engines (`service.engines.openvino`), which training does not import.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from service.model.artifact import Artifact
from service.model.errors import ArtifactError
from service.model.machine import cores
from service.model.openvino_graph import build, core, has_bf16, read_int8
from service.model.resize import PixelBatch
from service.model.small_maps import flatten_small_maps
from training.errors import ConfigError

Run = Callable[[PixelBatch], npt.NDArray[np.float32]]


def openvino_runner(artifact: Artifact, precision: str) -> Run:
    """The function uint8 `[n, S, S, 3]` -> float32 `[n, K]` in "fp32", "bf16" or "int8".

    Raises: ArtifactError without the network or with one that is none; ConfigError where the processor has no bfloat16;
    ImportError without OpenVINO.
    """
    manifest = artifact.manifest
    if precision == "bf16" and not has_bf16():
        raise ConfigError("This processor does not compute in bfloat16; evaluate with --engine openvino-fp32.")
    if precision != "int8":
        model: Any = build(manifest.architecture, manifest.preprocessing, artifact.weights())
    elif manifest.quantization is None:
        raise ArtifactError("The artifact has no int8 network; `python -m training.quantize` adds one.")
    else:
        model = read_int8(artifact)
    flatten_small_maps(model)
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",  # of int8: what is not quantized
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": cores(),
    }
    compiled: Any = core().compile_model(model, "CPU", hints)
    return lambda batch: np.array(compiled(np.ascontiguousarray(batch))[0], np.float32)
