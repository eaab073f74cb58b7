"""Convolutions over a few pixels as matrix products: the same function, whatever the weights are held in."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from service.model import network
from service.model.network import SmallMapConv2d
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
    product = SmallMapConv2d.of(plain)
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


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the maps that convolutions of any width gave as gathered products."""
    monkeypatch.setattr(network, "_is_faster_gathered", lambda pixels, *_: 0 < pixels <= 16)
    sizes: list[tuple[int, int]] = []
    gathered = network._Shape.gathered

    def noted(shape: network._Shape, input: torch.Tensor) -> torch.Tensor:
        sizes.append((shape.height, shape.width))
        return gathered(shape, input)

    monkeypatch.setattr(network._Shape, "gathered", noted)
    return sizes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pixels", [(2, 2), (3, 4), (4, 2), (7, 8)])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1), (1, 2), (5, 3), ((3, 1), (1, 2))])
def test_torchs_convolution_to_a_few_pixels_has_the_same_results_and_gradients(
    pixels: tuple[int, int], size: Any, stride: Any, layout: torch.memory_format, products: list[tuple[int, int]]
) -> None:
    padding = size // 2 if isinstance(size, int) else (1, 0)
    plain = nn.Conv2d(4, 5, size, stride, padding, bias=False, dtype=torch.float64)
    plain.weight.data = plain.weight.data.to(memory_format=layout)
    product = SmallMapConv2d.of(plain)
    given = torch.randn(3, 4, *pixels, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    expected = plain(given)
    few = expected.shape[2] * expected.shape[3] <= 16 and product._taps_of_one_pixel(given) is None
    torch.testing.assert_close(product(given), expected)
    assert products == ([expected.shape[2:]] if few else [])
    if few:
        assert torch.autograd.gradcheck(lambda x, w: functional_of(product, x, w), (given, plain.weight))


def functional_of(product: SmallMapConv2d, given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.func.functional_call(product, {"weight": weight}, (given,))
    return result


def test_torchs_product_is_nearly_as_exact_in_bfloat16_as_the_convolution(products: list[tuple[int, int]]) -> None:
    exact = nn.Conv2d(300, 64, 3, padding=1, bias=False)
    product = SmallMapConv2d.of(exact)
    given = torch.randn(16, 300, 4, 4)
    results: list[list[torch.Tensor]] = []
    for convolution in (exact, product):
        for in_bf16 in (False, True):
            variable = given.clone().requires_grad_()
            exact.weight.grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
                result = convolution(variable)
            assert result.dtype == (torch.bfloat16 if in_bf16 else torch.float32)
            result.backward(torch.ones_like(result) / 7)
            assert exact.weight.grad is not None and variable.grad is not None
            assert exact.weight.grad.dtype == variable.grad.dtype == torch.float32
            results.append([result.detach().float(), exact.weight.grad, variable.grad])
    assert products == [(4, 4)] * 4  # forward and backward
    # A result, and a filter's gradient, are rounded once; a pixel's gradient is a sum of nine that are rounded each.
    for rounding, *found in zip((1.05, 1.05, 1.5), *results, strict=True):
        reference, by_onednn, same, by_product = found
        torch.testing.assert_close(same, reference, rtol=1e-4, atol=1e-4)
        error = (by_product - reference).square().mean()
        assert error <= rounding * (by_onednn - reference).square().mean()


def test_what_needs_no_gradient_gets_none(products: list[tuple[int, int]]) -> None:
    product = SmallMapConv2d.of(nn.Conv2d(4, 5, 3, padding=1, bias=False))
    given = torch.randn(2, 4, 2, 2, requires_grad=True)
    product.weight.requires_grad_(False)
    product(given).sum().backward()
    assert product.weight.grad is None
    assert given.grad is not None
    product.weight.requires_grad_(True)
    product(given.detach()).sum().backward()
    assert product.weight.grad is not None
    with torch.no_grad():
        assert product(given).grad_fn is None


@pytest.mark.parametrize(
    ("channels", "pixels", "dtype"),
    [(64, 2, torch.bfloat16), (128, 4, torch.bfloat16), (256, 4, torch.float32), (512, 7, torch.bfloat16)],
)
def test_convolutions_that_would_be_slower_gathered_are_not(
    channels: int, pixels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network._Shape, "gathered", None)
    convolution = SmallMapConv2d.of(nn.Conv2d(channels, 5, 3, padding=1, bias=False, dtype=dtype))
    assert convolution(torch.randn(1, channels, pixels, pixels, dtype=dtype)).shape == (1, 5, pixels, pixels)


@pytest.mark.parametrize(
    ("channels", "pixels", "dtype", "in_bf16"),
    [(128, 2, torch.float32, False), (256, 4, torch.bfloat16, False), (256, 4, torch.float32, True)],
)
def test_convolutions_that_are_faster_gathered_are(
    channels: int, pixels: int, dtype: torch.dtype, in_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network._Shape, "gathered", None)
    convolution = SmallMapConv2d.of(nn.Conv2d(channels, 5, 3, padding=1, bias=False, dtype=dtype))
    with pytest.raises(TypeError), torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        convolution(torch.randn(1, channels, pixels, pixels, dtype=dtype))


def test_torchs_product_takes_types_as_the_convolution_does(products: list[tuple[int, int]]) -> None:
    plain = nn.Conv2d(4, 5, 3, padding=1, bias=False)
    for convolution in (plain, SmallMapConv2d.of(plain)):
        with pytest.raises(RuntimeError, match="type"):
            convolution(torch.randn(1, 4, 2, 2, dtype=torch.float64))
    exact = SmallMapConv2d.of(plain.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert exact(torch.randn(1, 4, 2, 2, dtype=torch.float64)).dtype == torch.float64


def test_gradients_of_torchs_product_are_exact_within_autocast_and_of_no_images_zero(
    products: list[tuple[int, int]],
) -> None:
    product = SmallMapConv2d.of(nn.Conv2d(64, 32, 3, padding=1, bias=False))
    given = torch.randn(8, 64, 2, 2)
    result = product(given)
    factor = torch.randn_like(result)
    (outside,) = torch.autograd.grad(result, product.weight, factor)
    result = product(given)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(result, product.weight, factor)
    assert torch.equal(inside, outside)
    empty = torch.zeros(0, 64, 2, 2, requires_grad=True)
    product(empty).sum().backward()
    assert product.weight.grad is not None and not product.weight.grad.any()
    assert empty.grad is not None


@pytest.mark.parametrize("pixels", [1, 2, 4, 7])
def test_a_bias_that_a_folded_batch_norm_brings_is_added(pixels: int, products: list[tuple[int, int]]) -> None:
    convolution = SmallMapConv2d.of(nn.Conv2d(4, 5, 3, padding=1, bias=False)).eval()
    norm = nn.BatchNorm2d(5).eval()
    norm.running_mean, norm.running_var = torch.randn(5), torch.rand(5) + 0.5
    given = torch.randn(3, 4, pixels, pixels)
    expected = norm(convolution(given))
    folded = fuse_conv_bn_eval(convolution, norm)
    assert isinstance(folded, SmallMapConv2d)
    torch.testing.assert_close(folded(given), expected)
