"""Convolutions over maps of at most 2 x 2 pixels, rewritten as the matrix products they are.

At 32 px the last two blocks of a ResNet see such maps. Of a 3 x 3 filter over one pixel, eight taps only ever meet
padding, yet they are read and multiplied; and oneDNN gives AMX, which multiplies 16 rows at once, the pixels of one row
of one image at a time: one or two. As a product, the images of a batch are the rows, and only taps that meet a pixel
are kept. The same sums in another order: of integers the very same, of float32 up to rounding. What OpenVINO fuses with
them is another kernel, so that a value between two levels of int8 may go to either.

Forward pass at 32 px, 2 cores with AMX, OpenVINO 2026.4, two lanes, batches of 16, images/s: int8 11,500 (4,900 as
convolutions), bfloat16 8,400 (1,900), float32 1,800 (1,100); single images: int8 1,100 (900), bfloat16 1,100 (1,000),
float32 550 (650).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from service.model.openvino_graph import DECOMPRESSION, no_telemetry

if TYPE_CHECKING:
    import openvino

MAX_PIXELS = 4
"""Of a map, before and after the convolution. Beyond, most of a product's matrix would be zeros: a 3 x 3 filter over
2 x 2 pixels meets each from each, over 4 x 4 it meets 100 of 256."""

Array = npt.NDArray[Any]


def flatten_small_maps(model: "openvino.Model") -> int:
    """Rewrite what can be, in place; how many convolutions were.

    Between them additions, ReLUs and quantization go on as `[N, C h w]` too, so that they are fused as before.
    """
    return _Flattener().rewrite(model)


class _Flattener:
    def __init__(self) -> None:
        with no_telemetry():
            import openvino
            from openvino import opset13

        self.ov: Any = openvino
        self.op: Any = opset13
        self.flat: dict[str, Any] = {}
        """By the name (not the friendly one, which others may have) of a node with one output `[N, C, h, w]`, the node
        `[N, C h w]` that takes its place."""
        self.reshaped: dict[tuple[str, int], Any] = {}

    def rewrite(self, model: "openvino.Model") -> int:
        count, nodes = 0, list(model.get_ordered_ops())
        for node in nodes:
            kind = node.get_type_name()
            made = self.product(node) if kind == "Convolution" else self.followed(node, kind)
            if made is not None:
                count += kind == "Convolution"
                self.flat[node.get_name()] = made
        for node in nodes:
            if node.get_name() in self.flat:
                self.hand_over(node)
        model.validate_nodes_and_infer_types()
        return count

    def product(self, node: Any) -> Any:
        """The matrix product that this convolution is; None where its maps are large, or its filters unusual."""
        before, after = _map_of(node.input_value(0)), _map_of(node.output(0))
        filters = _Filters.of(node.input_value(1).get_node())
        if before is None or after is None or filters is None:
            return None
        if max(before[1] * before[2], after[1] * after[2]) > MAX_PIXELS:
            return None
        attributes = node.get_attributes()
        if list(attributes["dilations"]) != [1, 1] or attributes["auto_pad"] not in ("explicit", "valid"):
            return None
        matrix = dense(filters.values, before, after, attributes["strides"], attributes["pads_begin"])
        weights = filters.rebuilt(self, matrix, after[1] * after[2])
        made = self.op.matmul(self.flattened(node.input_value(0)), weights, transpose_a=False, transpose_b=True)
        made.set_friendly_name(node.get_friendly_name())
        return made

    def followed(self, node: Any, kind: str) -> Any:
        """The same operation on what is flat already; None where it is another, or nothing flat comes in."""
        if kind not in ("Add", "Relu", "FakeQuantize") or not any(self.is_flat(value) for value in _inputs(node)):
            return None
        shape = _map_of(node.output(0))
        if shape is None:
            return None
        values = [self.operand(value, shape) for value in _inputs(node)]
        if any(value is None for value in values):
            return None
        if kind == "Add":
            made = self.op.add(*values)
        elif kind == "Relu":
            made = self.op.relu(*values)
        else:
            made = self.op.fake_quantize(*values, node.get_attributes()["levels"])
        made.set_friendly_name(node.get_friendly_name())
        return made

    def operand(self, value: Any, shape: tuple[int, int, int]) -> Any:
        """An input of a flat operation: a map, one number, or one for each channel."""
        node = value.get_node()
        if node.get_type_name() != "Constant":
            return self.flattened(value) if _map_of(value) == shape else None
        given = node.data
        if given.size == 1:
            return self.constant(given.reshape(1, 1), node.get_element_type())
        channels, height, width = shape
        if given.shape != (1, channels, 1, 1):
            return None
        return self.constant(np.repeat(given.reshape(1, -1), height * width, 1), node.get_element_type())

    def is_flat(self, value: Any) -> bool:
        return value.get_node().get_name() in self.flat

    def flattened(self, value: Any) -> Any:
        if self.is_flat(value):
            return self.flat[value.get_node().get_name()]
        key = value.get_node().get_name(), value.get_index()
        if key not in self.reshaped:
            self.reshaped[key] = self.op.reshape(value, np.array([0, -1]), special_zero=True)
        return self.reshaped[key]

    def hand_over(self, node: Any) -> None:
        """Let those who are not flat themselves have the flat one's result, as a map or, of one pixel, as its mean."""
        flat, shape, as_map = self.flat[node.get_name()], _map_of(node.output(0)), None
        assert shape is not None, node  # only maps become flat
        for target in list(node.output(0).get_target_inputs()):
            taker = target.get_node()
            if taker.get_name() in self.flat:
                continue
            if shape[1:] == (1, 1) and _is_mean_of_map(taker):
                taker.output(0).replace(flat.output(0))
                continue
            if as_map is None:
                as_map = self.op.reshape(flat, np.array([0, *shape]), special_zero=True)
            target.replace_source_output(as_map.output(0))

    def constant(self, values: Array, kind: Any) -> Any:
        tensor = self.ov.Tensor(np.ascontiguousarray(values), list(values.shape), kind)
        return self.ov.op.Constant(tensor, shared_memory=False)


class _Filters:
    """What a convolution multiplies by: a constant, maybe stored in fewer bits and converted, maybe scaled then."""

    def __init__(self, chain: list[Any], scale: Array | None) -> None:
        self.chain = chain
        """From the constant on, without the scaling."""
        self.scale = scale
        """For each output channel, or none."""

    @classmethod
    def of(cls, node: Any) -> "_Filters | None":
        scale = None
        if node.get_type_name() == "Multiply":
            factor = node.input_value(1).get_node()
            if factor.get_type_name() != "Constant" or factor.get_element_type().get_type_name() != "f32":
                return None
            scale, node = factor.data, node.input_value(0).get_node()
        chain = [node]
        if node.get_type_name() == "Convert":
            chain.insert(0, node.input_value(0).get_node())
        if chain[0].get_type_name() != "Constant" or len(chain[0].data.shape) != 4:
            return None
        found = cls(chain, scale)
        return found if scale is None or scale.shape == (len(found.values), 1, 1, 1) else None

    @property
    def values(self) -> Array:
        """`[O, I, kh, kw]`, of bfloat16 its bits."""
        found: Array = self.chain[0].data
        return found.view(np.uint16) if self.chain[0].get_element_type().get_type_name() == "bf16" else found

    def rebuilt(self, flattener: _Flattener, matrix: Array, pixels: int) -> Any:
        """A node `[O h w, I h w]` that holds `matrix` as the filters were held."""
        node = flattener.constant(matrix, self.chain[0].get_element_type())
        for convert in self.chain[1:]:
            node = flattener.op.convert(node, convert.get_element_type().to_dtype())
            if DECOMPRESSION in convert.get_rt_info():
                node.get_rt_info()[DECOMPRESSION] = ""
        if self.scale is None:
            return node
        scale = np.repeat(self.scale.reshape(-1, 1), pixels, 0)
        return flattener.op.multiply(node, flattener.op.constant(scale, np.float32))


def dense(filters: Array, before: tuple[int, int, int], after: tuple[int, int, int], strides: Any, pads: Any) -> Array:
    """The matrix `[O oh ow, I h w]` that does to a flat map what `filters`, `[O, I, kh, kw]`, do to a map.

    `before` is (I, h, w), `after` (O, oh, ow); `pads`: pixels of zeros above and left.
    """
    outputs, inputs, *size = filters.shape
    matrix = np.zeros((outputs, *after[1:], inputs, *before[1:]), filters.dtype)
    for to_y, from_y, tap_y in _taps(before[1], after[1], size[0], strides[0], pads[0]):
        for to_x, from_x, tap_x in _taps(before[2], after[2], size[1], strides[1], pads[1]):
            matrix[:, to_y, to_x, :, from_y, from_x] = filters[:, :, tap_y, tap_x]
    return matrix.reshape(outputs * after[1] * after[2], inputs * before[1] * before[2])


def _taps(before: int, after: int, size: int, stride: int, pad: int) -> Iterator[tuple[int, int, int]]:
    """Along one axis: which pixel of the result takes which pixel by which tap."""
    for to in range(after):
        for tap in range(size):
            if 0 <= (at := to * stride - pad + tap) < before:
                yield to, at, tap


def _inputs(node: Any) -> list[Any]:
    return [node.input_value(index) for index in range(node.get_input_size())]


def _map_of(value: Any) -> tuple[int, int, int] | None:
    """(C, h, w) of a value `[N, C, h, w]`; None where it is no map, or its size is open."""
    shape = value.get_partial_shape()
    if shape.rank.is_dynamic or shape.rank.get_length() != 4 or any(shape[axis].is_dynamic for axis in (1, 2, 3)):
        return None
    return shape[1].get_length(), shape[2].get_length(), shape[3].get_length()


def _is_mean_of_map(node: Any) -> bool:
    if node.get_type_name() != "ReduceMean" or node.get_attributes()["keep_dims"]:
        return False
    axes = node.input_value(1).get_node()
    return axes.get_type_name() == "Constant" and sorted(axes.data.tolist()) == [2, 3]
