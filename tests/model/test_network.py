"""The network: frozen blocks stay as they were to the bit, the head has its additional layer, numbers agree."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models import resnet34

from service.model.architecture import BLOCKS, Architecture, Block
from service.model.network import STEM, Network
from service.model.preprocess import Preprocessing

CLASSES = 7


def build(frozen: tuple[Block, ...] = ("stem", "layer1", "layer2", "layer3"), hidden_units: int = 16) -> Network:
    torch.manual_seed(0)
    architecture = Architecture(num_classes=CLASSES, hidden_units=hidden_units, frozen=frozen)
    return Network(architecture, Preprocessing(side_px=32))


def batch(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)


def train(network: Network, steps: int) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for step in range(steps):
        network.train()
        loss = nn.functional.cross_entropy(network(batch(4, step)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        network.eval()  # as an evaluation in between does


def bits(network: Network) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in network.state_dict().items()}


def block_of(name: str) -> str:
    first = name.split(".")[0]
    return "stem" if first in STEM else first


@pytest.fixture(scope="module")
def trained_network() -> Network:
    """A network that is only looked at, its running statistics no longer the initial ones."""
    network = build(frozen=())
    train(network, 2)
    return network.eval()


@pytest.mark.parametrize("frozen", [("stem", "layer1", "layer2", "layer3"), ("layer2",)], ids=",".join)
def test_training_changes_not_one_bit_of_frozen_blocks_and_every_tensor_of_the_others(
    frozen: tuple[Block, ...],
) -> None:
    network = build(frozen)
    before = bits(network)
    train(network, 4)
    changed = {name for name, content in bits(network).items() if content != before[name]}
    assert {block_of(name) for name in before} == {*BLOCKS, "fc"}
    assert changed == {name for name in before if block_of(name) not in frozen}
    assert any(name.endswith("running_var") for name in changed)
    assert any(name.endswith("num_batches_tracked") for name in changed)


@pytest.mark.parametrize("frozen", [(), BLOCKS, ("layer1",), ("stem", "layer3", "layer4")], ids=",".join)
def test_only_frozen_blocks_are_in_eval_mode_and_without_gradient(frozen: tuple[Block, ...]) -> None:
    network = build(frozen)
    for _ in range(2):
        assert network.training
        for name, module in network.named_modules():
            if name and name != "relu":
                assert module.training == (block_of(name) not in frozen), name
        for name, parameter in network.named_parameters():
            assert parameter.requires_grad == (block_of(name) not in frozen), name
        assert network.eval() is network
        assert not any(module.training for module in network.modules())
        assert network.train() is network


def test_the_additional_layer_is_there() -> None:
    network = build(hidden_units=300)
    hidden, activation, classes = network.fc
    assert (hidden.in_features, hidden.out_features) == (512, 300)
    assert isinstance(activation, nn.ReLU)
    assert (classes.in_features, classes.out_features) == (300, CLASSES)
    assert {name for name in network.state_dict() if name.startswith("fc.")} == {
        "fc.hidden.weight", "fc.hidden.bias", "fc.classes.weight", "fc.classes.bias",
    }  # fmt: skip


def test_the_reference_has_512_hidden_units_and_trains_layer4_and_the_head() -> None:
    architecture = Architecture(num_classes=100)
    assert (architecture.hidden_units, architecture.frozen) == (512, ("stem", "layer1", "layer2", "layer3"))


def test_frozen_blocks_are_kept_in_the_networks_order_and_once() -> None:
    given = ("layer3", "stem", "layer3")
    assert Architecture(num_classes=2, frozen=given).frozen == ("stem", "layer3")


@pytest.mark.parametrize("wrong", [{"frozen": ("fc",)}, {"num_classes": 1}, {"hidden_units": 0}, {"depth": 50}])
def test_an_architecture_that_cannot_be_built_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Architecture.model_validate({"num_classes": 2, **wrong})


def test_normalisation_is_imagenets_formula(trained_network: Network) -> None:
    seen: list[Tensor] = []
    hook = trained_network.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = batch(2)
    with torch.inference_mode():
        trained_network(images)
    hook.remove()
    planes = images.permute(0, 3, 1, 2).double() / 255  # [2, 3, 32, 32]
    mean = torch.tensor([0.485, 0.456, 0.406]).double().view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).double().view(1, 3, 1, 1)
    torch.testing.assert_close(seen[0].double(), (planes - mean) / std, atol=1e-5, rtol=0)


def test_normalisation_travels_in_the_manifest_not_in_the_weights(trained_network: Network) -> None:
    assert not {"mean", "std"} & set(trained_network.state_dict())


def test_the_backbone_is_torchvisions_resnet34(trained_network: Network) -> None:
    reference = resnet34()
    reference.fc = nn.Identity()
    state = {name: tensor for name, tensor in trained_network.state_dict().items() if not name.startswith("fc.")}
    reference.load_state_dict(state)
    features: list[Tensor] = []
    hook = trained_network.fc.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    images = batch(2)
    with torch.inference_mode():
        trained_network(images)
        normalised = (images.permute(0, 3, 1, 2) - trained_network.mean) / trained_network.std
        expected = reference.eval()(normalised)
    hook.remove()
    assert features[0].shape == (2, 512)
    torch.testing.assert_close(features[0], expected)


def test_a_batch_equals_its_images_one_by_one(trained_network: Network) -> None:
    images = batch(5)
    with torch.inference_mode():
        together = trained_network(images)
        singles = torch.cat([trained_network(image[None]) for image in images])
    assert together.shape == (5, CLASSES)
    assert together.dtype == torch.float32
    assert together.std(0).min() > 0
    torch.testing.assert_close(together, singles, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side_px", [8, 33, 64])
def test_other_sides_give_logits_too(trained_network: Network, side_px: int) -> None:
    with torch.inference_mode():
        logits = trained_network(torch.zeros(1, side_px, side_px, 3, dtype=torch.uint8))
    assert logits.shape == (1, CLASSES)
    assert logits.isfinite().all()
