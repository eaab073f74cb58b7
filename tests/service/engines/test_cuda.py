"""What of the engine for GPUs runs without one."""

import copy

import pytest
import torch

from service.engines.cuda import fused
from service.model.architecture import Architecture
from service.model.network import Network
from service.model.preprocess import Preprocessing


@pytest.mark.parametrize("side_px", [32, 64, 96])
def test_the_network_with_its_batch_norms_folded_in_is_the_network(side_px: int) -> None:
    torch.manual_seed(0)
    network = Network(Architecture(num_classes=5, hidden_units=8, frozen=()), Preprocessing(side_px=side_px))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    batch = torch.randint(0, 256, (4, side_px, side_px, 3), dtype=torch.uint8)
    with torch.inference_mode():
        for _ in range(20):  # the running statistics are the images' then
            network(batch)
        expected = network.eval()(batch)
        found = fused(copy.deepcopy(network))(batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
