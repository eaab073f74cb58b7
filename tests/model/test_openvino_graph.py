"""The OpenVINO model is the network: same logits from the same weights."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.engines.openvino import has_bf16
from service.model.architecture import Architecture
from service.model.errors import ArtifactError
from service.model.network import Network
from service.model.openvino_graph import bfloat16, build, core
from service.model.preprocess import Preprocessing


@pytest.fixture(scope="module")
def network() -> Network:
    """Random weights, and batch norms that have seen images: their scales and means differ from channel to channel."""
    torch.manual_seed(0)
    network = Network(Architecture(num_classes=7, hidden_units=12), Preprocessing(side_px=40))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = None  # the plain average
            module.training = True
    with torch.no_grad():
        network(torch.randint(0, 256, (16, 40, 40, 3), dtype=torch.uint8))
    return network.eval()


def weights_of(network: Network) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("side_px", [32, 40, 75])
def test_the_logits_are_the_networks(network: Network, n: int, side_px: int) -> None:
    model = build(network.architecture, Preprocessing(side_px=side_px), weights_of(network))
    batch = torch.randint(0, 256, (n, side_px, side_px, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = network(batch).numpy()
    logits = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(batch.numpy())[0]
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    values = np.random.default_rng(3).standard_normal((100, 100), np.float32) * 10.0 ** np.arange(-50, 50, dtype=float)
    values = np.clip(values, -3e38, 3e38).astype(np.float32)
    values[0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, 0, -0.0]  # two ties: one goes down, one up
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bfloat16(values), expected)


def test_weights_held_in_bfloat16_are_the_same_to_who_computes_in_it(network: Network) -> None:
    weights, preprocessing = weights_of(network), Preprocessing(side_px=40)
    models = [build(network.architecture, preprocessing, weights, bf16=bf16) for bf16 in (False, True)]
    whole, half = (
        sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")
        for model in models
    )  # fmt: skip
    assert half < 0.51 * whole
    batch = np.random.default_rng(4).integers(0, 256, (3, 40, 40, 3), np.uint8)
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if has_bf16() else "f32"}
    expected, found = (core().compile_model(model, "CPU", hint)(batch)[0] for model in models)
    tolerance = 0 if has_bf16() else 5e-2 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_input_and_output_are_named_and_typed(network: Network) -> None:
    model = build(network.architecture, Preprocessing(side_px=40), weights_of(network))
    pixels, logits = model.input("pixels"), model.output("logits")
    assert (pixels.partial_shape.to_string(), pixels.element_type.to_string()) == ("[?,40,40,3]", "u8")
    assert (logits.partial_shape.to_string(), logits.element_type.to_string()) == ("[?,7]", "f32")


def test_weights_of_another_architecture_are_refused(network: Network) -> None:
    weights = weights_of(network)
    with pytest.raises(ArtifactError, match=r"fc.hidden.weight is \[12, 512\], not \[13, 512\]"):
        build(Architecture(num_classes=7, hidden_units=13), Preprocessing(side_px=40), weights)
    del weights["layer3.5.bn2.running_var"]
    with pytest.raises(ArtifactError, match=r"layer3.5.bn2.running_var is missing"):
        build(network.architecture, Preprocessing(side_px=40), weights)


SIGNALLED = """
import os, signal, sys
from service.model.openvino_graph import core
from service.engines.openvino import has_bf16

core(); has_bf16(); core.__wrapped__()  # a second one comes and goes, as nncf makes them
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
os.kill(os.getpid(), signal.SIGTERM)
print(heard)
"""


def test_a_signal_is_heard_after_openvino_was_used() -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", SIGNALLED], cwd=root, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "[1]\n")
