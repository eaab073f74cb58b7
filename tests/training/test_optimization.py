"""Optimizer groups, the learning rate's course, and the moving average against one made by hand."""

import io
import itertools

import pytest
import torch

from service.model.architecture import BLOCKS, Architecture, Block
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training.config import TrainingConfig
from training.optimization import Ema, make_optimizer, moving_tensors, schedule, set_rate

FROZEN: tuple[Block, ...] = ("stem", "layer1", "layer2", "layer3")


def config(**values: object) -> TrainingConfig:
    return TrainingConfig.create({"data": "in", "output": "out", **values})


def network(frozen: tuple[Block, ...] = ()) -> Network:
    torch.manual_seed(0)
    return Network(Architecture(num_classes=3, hidden_units=4, frozen=frozen), Preprocessing(side_px=8))


def step(net: Network, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.nn.functional.cross_entropy(net(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()


# The learning rate's course -------------------------------------------------------------------------------------


def test_a_constant_rate_is_constant() -> None:
    assert {schedule("constant", 10, 0)(step) for step in range(10)} == {1.0}


@pytest.mark.parametrize("name", ["constant", "one-cycle", "cosine"])
def test_a_warm_up_rises_in_a_line_to_the_peak(name: str) -> None:
    share = schedule(name, 100, 20)
    assert [share(i) for i in range(20)] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert max(share(i) for i in range(100)) == 1.0


def test_one_cycle_rises_over_its_first_tenth_and_falls_to_almost_nothing() -> None:
    share = schedule("one-cycle", 100, 0)
    assert share(0) == pytest.approx(0.1)
    assert share(9) == 1.0
    assert share(54) == pytest.approx(0.5, abs=0.02)
    assert 0 < share(99) < 0.001


def test_cosine_begins_near_its_peak_and_passes_half_in_the_middle() -> None:
    share = schedule("cosine", 99, 0)
    assert share(0) == pytest.approx(1, abs=1e-3)
    assert share(49) == pytest.approx(0.5)
    assert 0 < share(98) < 0.001


@pytest.mark.parametrize("name", ["one-cycle", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 500])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_a_schedule_of_any_length_is_positive_up_to_one_and_falls_after_its_peak(
    name: str, total: int, warmup: int
) -> None:
    values = [schedule(name, total, warmup)(step) for step in range(total)]
    assert all(0 < value <= 1 for value in values)
    rising = max(warmup, total // 10, 1) if name == "one-cycle" else warmup
    falling = values[rising:]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("name", ["one-cycle", "cosine"])
@pytest.mark.parametrize("warmup", [0, 30])
def test_the_rate_makes_no_jump(name: str, warmup: int) -> None:
    values = [schedule(name, 1000, warmup)(step) for step in range(1000)]
    steepest = max(1 / max(warmup, 100 if name == "one-cycle" else 0, 1) if warmup or name == "one-cycle" else 0, 0.01)
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) <= steepest * 1.01


# Groups ---------------------------------------------------------------------------------------------------------


def test_every_trained_parameter_is_in_one_group_and_no_frozen_one() -> None:
    net = network(FROZEN)
    groups = make_optimizer(config(weight_decay=0.1), net, 1.0).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    assert len(held) == len(set(held))


def test_biases_and_batch_norms_are_not_decayed() -> None:
    for group in make_optimizer(config(weight_decay=0.1), network(), 1.0).param_groups:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}
        assert group["weight_decay"] in (0.0, 0.1)


def test_layer_decay_lowers_the_rate_block_by_block_towards_the_stem() -> None:
    net = network()
    groups = make_optimizer(config(layer_decay=0.5), net, 0.8).param_groups
    peak = {id(p): group["peak"] for group in groups for p in group["params"]}
    expected = {"fc": 0.8, "layer4": 0.4, "layer3": 0.2, "layer2": 0.1, "layer1": 0.05, "stem": 0.025}
    blocks = {block: net.block_modules(block) for block in BLOCKS} | {"fc": [net.fc]}
    for name, modules in blocks.items():
        for parameter in (p for module in modules for p in module.parameters()):
            assert peak[id(parameter)] == pytest.approx(expected[name])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimizer_is_fused_and_follows_the_share_of_the_peak(name: str) -> None:
    optimizer = make_optimizer(config(optimizer=name, layer_decay=0.5, momentum=0.7), network(), 0.8)
    assert optimizer.defaults["fused"]
    assert isinstance(optimizer, torch.optim.AdamW if name == "adamw" else torch.optim.SGD)
    assert set_rate(optimizer, 0.5) == pytest.approx(0.4)
    assert all(group["lr"] == pytest.approx(group["peak"] * 0.5) for group in optimizer.param_groups)
    if name == "sgd":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.7}


# The moving average ---------------------------------------------------------------------------------------------


def test_the_average_equals_one_made_by_hand() -> None:
    net = network(FROZEN)
    optimizer = make_optimizer(config(), net, 0.05)
    ema = Ema(net, 0.5)
    by_hand = {name: tensor.clone().double() for name, tensor in moving_tensors(net).items()}
    for t in range(1, 13):
        step(net, optimizer)
        ema.update()
        decay = min(0.5, (1 + t) / (10 + t))
        for name, tensor in moving_tensors(net).items():
            by_hand[name] = by_hand[name] * decay + tensor.double() * (1 - decay)
    ema.swap()
    for name, tensor in moving_tensors(net).items():
        torch.testing.assert_close(tensor.double(), by_hand[name], rtol=1e-5, atol=1e-6, msg=name)


def test_two_swaps_leave_everything_as_it_was() -> None:
    net = network(FROZEN)
    optimizer = make_optimizer(config(), net, 0.05)
    ema = Ema(net, 0.9)
    step(net, optimizer)
    ema.update()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    ema.swap()
    assert not torch.equal(net.fc.classes.weight, before["fc.classes.weight"])
    ema.swap()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_what_moves_is_what_is_trained_and_its_batch_norms_statistics() -> None:
    net = network(FROZEN)
    names = set(moving_tensors(net))
    assert names == {
        name for name, tensor in net.state_dict().items()
        if name.startswith(("layer4.", "fc.")) and tensor.is_floating_point()
    }  # fmt: skip
    assert "layer4.0.bn1.running_mean" in names
    net.unfreeze()
    assert set(moving_tensors(net)) == {n for n, t in net.state_dict().items() if t.is_floating_point()}


def test_an_average_goes_on_after_a_round_trip_through_a_file_as_if_it_had_not_stopped() -> None:
    ways = []
    for stopped in (False, True):
        net = network(FROZEN)
        optimizer = make_optimizer(config(), net, 0.05)
        ema = Ema(net, 0.9)
        for number in range(6):
            if stopped and number == 3:
                file = io.BytesIO()
                torch.save(ema.state_dict(), file)
                file.seek(0)
                ema = Ema(net, 0.9)
                ema.load_state_dict(torch.load(file, weights_only=True))
            step(net, optimizer)
            ema.update()
        ema.swap()
        ways.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    assert all(torch.equal(tensor, ways[1][name]) for name, tensor in ways[0].items())
