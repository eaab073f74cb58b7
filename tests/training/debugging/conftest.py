"""A small real training run that drives callbacks as `training/callbacks.py` says."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from service.model.architecture import Architecture
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training.callbacks import Callback, RunContext, Step, StopTraining, tell
from training.config import TrainingConfig
from training.data.dataset import ArrayImages, Dataset
from training.epoch_metrics import EpochMetrics
from training.errors import DivergedError

FEATURES = 24


class Small(nn.Module):
    """`[N, 24]` -> logits `[N, K]`: two layers with batch norm and one ReLU that is used inplace."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 32, bias=False)  # batch norm would take it away
        self.bn = nn.BatchNorm1d(32)
        self.relu = nn.ReLU(inplace=True)
        self.classes = nn.Linear(32, classes)

    def forward(self, batch: Tensor) -> Tensor:
        return self.classes(self.relu(self.bn(self.hidden(batch))))


class Tail(Network):
    """The real network, which also takes what the frozen blocks would have computed."""

    def forward(self, batch: Tensor, *, from_features: bool = False) -> Tensor:
        if not from_features:
            return super().forward(batch)
        return self.fc(torch.flatten(self.avgpool(self.layer4(batch)), 1))


@dataclass
class Data:
    """Inputs and labels to train and to validate on."""

    inputs: Tensor
    labels: Tensor
    validation_inputs: Tensor
    validation_labels: Tensor
    forward: dict[str, Any] = field(default_factory=dict)
    """What the network is called with besides the inputs."""


@dataclass
class Run:
    """What a run left."""

    folder: Path
    network: nn.Module
    losses: list[float]
    error: BaseException | None

    @property
    def verdicts(self) -> dict[str, dict[str, Any]]:
        return {entry["rule"]: entry for entry in json.loads((self.folder / "rules.json").read_text())["rules"]}

    def status(self, rule: str) -> str:
        return self.verdicts[rule]["status"]


def clouds(count: int, shares: Sequence[float] = (1, 1, 1, 1), spread: float = 1.0, seed: int = 0) -> Data:
    """Points around a centre for each class; `shares`: how frequent the classes are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1, (len(shares), FEATURES))
    chances = np.array(shares) / sum(shares)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        labels = rng.choice(len(shares), n, p=chances)
        points = centres[labels] + rng.normal(0, spread, (n, FEATURES))
        return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)

    return Data(*draw(count), *draw(200))


@dataclass
class Training:
    """Trains and returns what is left; settings are those of a tiny run."""

    folder: Path

    def __call__(
        self,
        network: nn.Module,
        data: Data,
        callbacks: Sequence[Callback],
        *,
        folder: str = "run",
        epochs: int = 4,
        learning_rate: float = 0.05,
        batch_size: int = 20,
        first_step: int = 1,
        after_step: Callable[[int], None] = lambda number: None,
    ) -> Run:
        path = self.folder / folder
        path.mkdir(exist_ok=True)
        classes = tuple(str(each) for each in range(int(data.labels.max()) + 1))
        nothing = ArrayImages(np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0, np.int64))
        per_epoch = len(data.labels) // batch_size
        criterion = nn.CrossEntropyLoss()
        context = RunContext(
            TrainingConfig.create({"data": path, "output": path, "epochs": epochs, "batch_size": batch_size}), network,
            criterion,
            Dataset("points", classes, nothing, nothing, {}), path, torch.device("cpu"),
            per_epoch, per_epoch * epochs, first_step,
        )  # fmt: skip
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=learning_rate, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        losses: list[float] = []
        error: BaseException | None = None
        tell(callbacks, "on_run_start", context)
        try:
            number = first_step - 1
            for epoch in range(number // per_epoch + 1, epochs + 1):
                tell(callbacks, "on_epoch_start", epoch)
                network.train()
                hits, before = 0, len(losses)
                for rows in torch.randperm(len(data.labels), generator=generator).split(batch_size)[:per_epoch]:
                    number += 1
                    tell(callbacks, "on_step_start", number)
                    logits = network(data.inputs[rows], **data.forward)
                    loss = criterion(logits, data.labels[rows])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    right = (logits.argmax(1) == data.labels[rows]).sum()
                    step = Step(number, epoch, learning_rate, data.labels[rows], loss.detach(), right, 0.0)
                    tell(callbacks, "on_backward_end", step)
                    optimizer.step()
                    step.seconds = 0.01
                    tell(callbacks, "on_step_end", step)
                    losses.append(step.loss)
                    hits += int(right)
                    if not math.isfinite(step.loss):
                        raise DivergedError("the loss is not finite")
                    after_step(number)
                tell(callbacks, "on_validation_start", epoch)
                network.eval()
                with torch.inference_mode():
                    logits = network(data.validation_inputs, **data.forward)
                    validation = criterion(logits, data.validation_labels)
                right = (logits.argmax(1) == data.validation_labels).float().mean()
                mean = sum(losses[before:]) / (len(losses) - before)
                accuracy = hits / (per_epoch * batch_size)
                metrics = EpochMetrics(epoch, mean, accuracy, float(validation), float(right), learning_rate, 1.0)
                tell(callbacks, "on_epoch_end", metrics)
        except (StopTraining, DivergedError) as exc:
            error = exc
        finally:
            tell(callbacks, "on_run_end", error)
        return Run(path, network, losses, error)


@pytest.fixture
def train(tmp_path: Path) -> Training:
    return Training(tmp_path)


@pytest.fixture
def small() -> Callable[..., nn.Module]:
    """A network with the same initial weights each time."""

    def make(classes: int = 4) -> nn.Module:
        torch.manual_seed(0)
        return Small(classes)

    return make


@pytest.fixture
def points() -> Callable[..., Data]:
    return clouds


@pytest.fixture
def tail() -> Callable[[], tuple[nn.Module, Data]]:
    """The real network with blocks 1 to 3 frozen, and cached features instead of images."""

    def make() -> tuple[nn.Module, Data]:
        torch.manual_seed(0)
        frozen = ("stem", "layer1", "layer2", "layer3")
        network = Tail(Architecture(num_classes=4, hidden_units=16, frozen=frozen), Preprocessing(side_px=32))
        features = torch.randn(24, 256, 2, 2).relu()
        labels = torch.arange(24) % 4
        return network, Data(features, labels, features[:8], labels[:8], {"from_features": True})

    return make
