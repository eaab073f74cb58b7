"""Convolutions over a few pixels as matrix products: the same function, whatever the weights are held in."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from service.model.network import PixelConv2d
from service.model.openvino_graph import DECOMPRESSION, bfloat16, core, no_telemetry
from service.model.small_maps import dense, flatten_small_maps

with no_telemetry():
    import openvino
    from openvino import opset13 as op

KINDS = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16, "int8": openvino.Type.i8}


def convolutions(model: Any) -> int:
    return sum(node.get_type_name() == "Convolution" for node in model.get_ops())


def held_as(kind: str, filters: np.ndarray) -> Any:
    """A node of the filters as the service's networks hold them."""
    if kind == "float32":
        return op.constant(filters)
    values = bfloat16(filters) if kind == "bfloat16" else np.clip(filters * 100, -127, 127).astype(np.int8)
    constant = openvino.op.Constant(openvino.Tensor(values, list(values.shape), KINDS[kind]), shared_memory=False)
    node = op.convert(constant, np.float32)
    if kind == "bfloat16":
        node.get_rt_info()[DECOMPRESSION] = ""
        return node
    return op.multiply(node, np.linspace(0.005, 0.02, len(filters), dtype=np.float32).reshape(-1, 1, 1, 1))


def unit(kind: str, pixels: int, stride: int, quantize: bool) -> Any:
    """A residual unit of 6 channels, over `pixels` x `pixels`, and what follows it."""
    random = np.random.default_rng(0)
    given = op.parameter([-1, 6, pixels, pixels], np.float32, name="given")
    node: Any = given
    sides = []
    for number, step in enumerate((stride, 1)):
        weights = held_as(kind, random.standard_normal((6, 6, 3, 3), np.float32))
        node = op.convolution(node, weights, [step, step], [1, 1], [1, 1], [1, 1], name=f"conv{number}")
        node = op.add(node, random.standard_normal((1, 6, 1, 1), np.float32))
        if quantize:
            low, high = (op.constant(np.float32(bound)) for bound in (-8, 8))
            node = op.fake_quantize(node, low, high, low, high, 256)
        sides.append(node)
        node = op.relu(node)
    node = op.relu(op.add(*sides))
    mean = op.reduce_mean(node, np.array([2, 3]), keep_dims=False)
    largest = op.reduce_max(node, np.array([2, 3]), keep_dims=False)
    return openvino.Model([op.result(mean), op.result(largest), op.result(node)], [given], "unit")


def run(model: Any, batch: np.ndarray) -> list[np.ndarray]:
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(value) for value in compiled(batch).values()]


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("pixels", "stride"), [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_products_are_the_convolutions(kind: str, pixels: int, stride: int, quantize: bool, n: int) -> None:
    batch = np.random.default_rng(1).standard_normal((n, 6, pixels, pixels), np.float32)
    plain, rewritten = unit(kind, pixels, stride, quantize), unit(kind, pixels, stride, quantize)
    assert (convolutions(rewritten), flatten_small_maps(rewritten), convolutions(rewritten)) == (2, 2, 0)
    step = 16 / 255 if quantize else 0  # a sum that lies between two levels may go either way
    for found, expected in zip(run(rewritten, batch), run(plain, batch), strict=True):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 2 * step + 1e-5 * np.abs(expected).max()


def test_larger_maps_stay_convolutions() -> None:
    model = unit("float32", 3, 1, False)
    assert (flatten_small_maps(model), convolutions(model)) == (0, 2)
    half = unit("float32", 4, 2, True)  # 4 x 4 -> 2 x 2 -> 2 x 2: what comes in is too large for the first
    plain = unit("float32", 4, 2, True)
    batch = np.random.default_rng(1).standard_normal((3, 6, 4, 4), np.float32)
    assert (flatten_small_maps(half), convolutions(half)) == (1, 1)
    for found, expected in zip(run(half, batch), run(plain, batch), strict=True):
        np.testing.assert_allclose(found, expected, atol=0.13)


def test_what_it_was_not_made_for_is_left_alone() -> None:
    given = op.parameter([-1, 6, 2, 2], np.float32)
    filters = op.parameter([6, 6, 3, 3], np.float32)  # no constant
    dilated = op.convolution(given, np.ones((6, 6, 3, 3), np.float32), [1, 1], [2, 2], [2, 2], [2, 2])
    unknown = op.convolution(given, filters, [1, 1], [1, 1], [1, 1], [1, 1])
    model = openvino.Model([op.result(dilated), op.result(unknown)], [given, filters], "odd")
    assert (flatten_small_maps(model), convolutions(model)) == (0, 2)


@pytest.mark.parametrize(("pixels", "stride"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_the_matrix_is_the_convolution(pixels: int, stride: int) -> None:
    filters, batch = torch.randn(5, 4, 3, 3), torch.randn(2, 4, pixels, pixels)
    expected = functional.conv2d(batch, filters, stride=stride, padding=1)
    after = (5, expected.shape[2], expected.shape[3])
    matrix = torch.from_numpy(dense(filters.numpy(), (4, pixels, pixels), after, (stride, stride), (1, 1)))
    torch.testing.assert_close(functional.linear(batch.flatten(1), matrix), expected.flatten(1))


@pytest.mark.parametrize("pixels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1), (1, 2)])
def test_torchs_convolution_to_one_pixel_has_the_same_results_and_gradients(
    pixels: int, size: int, stride: int
) -> None:
    plain = nn.Conv2d(4, 5, size, stride, size // 2, bias=False)
    product = PixelConv2d.of(plain)
    assert product.weight is plain.weight
    given = torch.randn(3, 4, pixels, pixels, requires_grad=True)
    results = []
    for convolution in (plain, product):
        result = convolution(given)
        (result**2).sum().backward()
        assert plain.weight.grad is not None and given.grad is not None
        results.append((result, plain.weight.grad, given.grad))
        plain.weight.grad = given.grad = None
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
