"""The network as an OpenVINO model, built from the artifact's weights: no torch, no second copy of them on disk.

The same function as `service.model.network.Network` in eval mode, with each batch norm folded into its convolution.
Whoever calls it has OpenVINO; importing this module does not need it.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from service.model.architecture import Architecture
from service.model.errors import ArtifactError
from service.model.preprocess import Preprocessing

if TYPE_CHECKING:
    import openvino

    from service.model.artifact import Artifact

BLOCK_SIZES = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}
"""Residual units per block of ResNet-34 (He et al. 2015, https://arxiv.org/abs/1512.03385, table 1)."""

BATCH_NORM_EPS = 1e-5
"""As `torch.nn.BatchNorm2d` has it by default, and torchvision's ResNet leaves it."""

DECOMPRESSION = "decompression_0"
"""Marks a conversion that is to stay where it is, as ov::mark_as_decompression does: else it is computed beforehand."""

Array = npt.NDArray[Any]


@contextmanager
def no_telemetry() -> Iterator[None]:
    """What is imported in here finds no `openvino_telemetry`, as if it was not installed.

    With it, importing OpenVINO or nncf writes an id into ~/intel and reports to Google Analytics (seen in OpenVINO
    2026.4, openvino/tools/ovc/__init__.py, and nncf 3.4, nncf/telemetry/wrapper.py; both do without).
    """
    modules: dict[str, Any] = sys.modules
    absent = object()
    before = modules.get("openvino_telemetry", absent)
    modules["openvino_telemetry"] = None
    try:
        yield
    finally:
        if before is absent:
            del modules["openvino_telemetry"]
        else:
            modules["openvino_telemetry"] = before


@cache
def core() -> "openvino.Core":
    """The one OpenVINO core of this process. Raises: ImportError without OpenVINO.

    Its CPU plugin gives the thread that makes it another stack for signals, and puts the one before back when it goes.
    Two cores that go in another order than they came leave a stack that was freed, and the next signal kills the
    process (seen in OpenVINO 2026.4: SIGTERM to a process with two cores, SIGSEGV in kill(2)).
    """
    with no_telemetry():
        import openvino

    made = openvino.Core()
    made.get_property("CPU", "OPTIMIZATION_CAPABILITIES")  # loads the plugin: here, and for good
    return made


def build(
    architecture: Architecture, preprocessing: Preprocessing, weights: Mapping[str, Array], *, bf16: bool = False
) -> "openvino.Model":
    """A model with input `pixels`, uint8 `[?, S, S, 3]`, and output `logits`, float32 `[?, K]`.

    With `bf16` it holds its filters and matrices in bfloat16, half the memory: for those who compute in bfloat16, to
    whom they are the same numbers.

    Raises: ArtifactError when `weights` do not fit the architecture; ImportError without OpenVINO.
    """
    try:
        return _Builder(architecture, weights, bf16).model(preprocessing)
    except KeyError as exc:
        raise ArtifactError(f"The weights do not fit the architecture stated: {exc.args[0]} is missing.") from exc


def has_bf16() -> bool:
    """Whether this processor has instructions for bfloat16; without, OpenVINO would imitate them, slowly."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def read_int8(artifact: "Artifact") -> "openvino.Model":
    """The artifact's int8 network, of the input and output that `build` gives. Raises: ArtifactError; ImportError."""
    graph, weights = artifact.read("int8_graph"), artifact.read("int8_weights")
    try:
        model = core().read_model(graph, weights)
        shapes = [model.input(0).partial_shape.to_string(), model.output(0).partial_shape.to_string()]
    except RuntimeError as exc:  # its hash was right, so whoever wrote it wrote no such model
        detail = ascii(" ".join(str(exc).split())[:300])
        raise ArtifactError(f"{artifact.path('int8_graph')} is not a model OpenVINO can read: {detail}") from exc
    side, classes = artifact.manifest.preprocessing.side_px, len(artifact.manifest.classes)
    expected = [f"[?,{side},{side},3]", f"[?,{classes}]"]
    if shapes != expected:
        raise ArtifactError(f"{artifact.path('int8_graph')} maps {' to '.join(shapes)}, not {' to '.join(expected)}.")
    return model


class _Builder:
    def __init__(self, architecture: Architecture, weights: Mapping[str, Array], bf16: bool) -> None:
        with no_telemetry():
            from openvino import opset13

        self.op: Any = opset13
        self.architecture = architecture
        self.weights = weights
        self.bf16 = bf16

    def model(self, preprocessing: Preprocessing) -> "openvino.Model":
        import openvino

        side = preprocessing.side_px
        pixels = self.op.parameter([-1, side, side, 3], np.uint8, name="pixels")
        planes = self.op.transpose(self.op.convert(pixels, np.float32), np.array([0, 3, 1, 2]))  # [N, 3, S, S]
        mean, std = (
            np.array(each, np.float32).reshape(1, 3, 1, 1) * 255 for each in (preprocessing.mean, preprocessing.std)
        )
        node = self.op.multiply(self.op.subtract(planes, mean), 1 / std)
        node = self.op.relu(self.convolution(node, "conv1", "bn1", stride=2, width=64, depth=3, size=7))
        node = self.op.max_pool(node, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)  # [N, 64, S/4, S/4]
        depth = 64
        for block, (name, size) in enumerate(BLOCK_SIZES.items()):
            width = 64 * 2**block
            for unit in range(size):
                stride = 2 if unit == 0 and block else 1
                node = self.residual(node, f"{name}.{unit}", stride, width, depth)
                depth = width
        pooled = self.op.reduce_mean(node, np.array([2, 3]), keep_dims=False)  # [N, 512]
        hidden = self.op.relu(self.linear(pooled, "fc.hidden", depth, self.architecture.hidden_units))
        logits = self.linear(hidden, "fc.classes", self.architecture.hidden_units, self.architecture.num_classes)
        result = self.op.result(logits, name="logits")
        result.output(0).set_names({"logits"})
        pixels.output(0).set_names({"pixels"})
        return openvino.Model([result], [pixels], "resnet34")

    def residual(self, node: Any, name: str, stride: int, width: int, depth: int) -> Any:
        inner = self.op.relu(self.convolution(node, f"{name}.conv1", f"{name}.bn1", stride, width, depth))
        inner = self.convolution(inner, f"{name}.conv2", f"{name}.bn2", 1, width, width)
        if stride != 1 or depth != width:
            node = self.convolution(node, f"{name}.downsample.0", f"{name}.downsample.1", stride, width, depth, size=1)
        return self.op.relu(self.op.add(inner, node))

    def convolution(self, node: Any, name: str, norm: str, stride: int, width: int, depth: int, size: int = 3) -> Any:
        """Convolution and batch norm in one: w' = w g / sqrt(v + eps), b' = b - m g / sqrt(v + eps)."""
        variance = self.take(f"{norm}.running_var", width).astype(np.float64)
        scale = self.take(f"{norm}.weight", width) / np.sqrt(variance + BATCH_NORM_EPS)
        filters = self.take(f"{name}.weight", width, depth, size, size) * scale.astype(np.float32)[:, None, None, None]
        offsets = self.take(f"{norm}.bias", width) - self.take(f"{norm}.running_mean", width) * scale
        pad = [size // 2] * 2
        made = self.op.convolution(node, self.constant(filters), [stride] * 2, pad, pad, [1, 1], name=name)
        return self.op.add(made, offsets.astype(np.float32).reshape(1, -1, 1, 1))

    def linear(self, node: Any, name: str, inputs: int, outputs: int) -> Any:
        matrix = self.take(f"{name}.weight", outputs, inputs)
        made = self.op.matmul(node, self.constant(matrix), transpose_a=False, transpose_b=True, name=name)
        return self.op.add(made, self.take(f"{name}.bias", outputs).reshape(1, -1))

    def constant(self, values: Array) -> Any:
        """A node with a copy of `values`, float32.

        Made here, because the operations make theirs through a Python list: 1.0 s for these 86 MB and 70 MiB that stay
        with the allocator, against 0.06 s (OpenVINO 2026.4, utils/types.py, make_constant_node; an EPYC core).
        """
        import openvino

        if not self.bf16:
            return openvino.op.Constant(np.ascontiguousarray(values), shared_memory=False)
        halves = openvino.Tensor(bfloat16(values), list(values.shape), openvino.Type.bf16)
        node = openvino.op.Constant(halves, shared_memory=False)  # shared, it would outlive its memory
        node = self.op.convert(node, np.float32)
        node.get_rt_info()[DECOMPRESSION] = ""
        return node

    def take(self, name: str, *shape: int) -> Array:
        found = self.weights[name]
        if found.shape != shape:
            raise ArtifactError(
                f"The weights do not fit the architecture stated: {name} is {list(found.shape)}, not {list(shape)}."
            )
        return found.astype(np.float32, copy=False)


def bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """The upper halves of finite float32 numbers, rounded to nearest, ties to even, as processors round them."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    upper: npt.NDArray[np.uint16] = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    return upper
