"""How torch is set up for a run: threads, and the layout of weights that convolutions are fast with."""

from collections.abc import Callable

import pytest
import torch

from service.model.architecture import Architecture
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training import devices, prefix_engines
from training.config import TrainingConfig
from training.distributed import ALONE
from training.interruption import Interruption
from training.loop import Trainer

Settings = Callable[..., TrainingConfig]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("torchs", "cores", "expected"), [(8, 3, 3), (3, 8, 3), (3, 3, 3)])
def test_torch_takes_every_core_that_the_process_may_use_and_no_more(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, torchs: int, cores: int, expected: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(devices, "cores", lambda: cores)
    torch.set_num_threads(torchs)  # what it has by itself: the machine's cores, or OMP_NUM_THREADS
    try:
        devices.set_up_torch(settings())
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def network(side: int = 32) -> Network:
    frozen = ("stem", "layer1", "layer2", "layer3")
    return Network(Architecture(num_classes=3, hidden_units=4, frozen=frozen), Preprocessing(side_px=side))


def last(network: Network) -> set[bool]:
    """Whether the channels of the convolutions' weights lie last."""
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    return {
        module.weight.is_contiguous(memory_format=torch.channels_last)
        for module in convolutions
        if module.kernel_size != (1, 1)  # of one place both layouts are the same
    }


@pytest.mark.parametrize(("side", "bf16", "expected"), [(64, False, True), (32, True, True), (32, False, False)])
def test_steps_have_channels_last_where_that_is_faster(
    settings: Settings, side: int, bf16: bool, expected: bool
) -> None:
    trained = network(side)
    Trainer(
        trained, settings(side=side), images=20, device=CPU, bf16=bf16, group=ALONE, callbacks=(),
        interruption=Interruption(),
    )  # fmt: skip
    assert last(trained) == {expected}


def test_the_pass_that_fills_the_cache_has_channels_last() -> None:
    passed = network()
    assert last(passed) == {False}
    prefix_engines._torch(passed, CPU, "fp32")
    assert last(passed) == {True}
