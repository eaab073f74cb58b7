"""What tests of the loop share: drawn pictures, a backbone whose every layer does something, settings, processes."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from service.model.architecture import Architecture
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training.config import TrainingConfig

ROOT = Path(__file__).parents[2]
CLASSES, PER_CLASS = ("dark", "light", "red"), 14
FROZEN = "stem,layer1,layer2,layer3"

Settings = Callable[..., TrainingConfig]
Launch = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="session")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes: 33 images to train on (three batches of 9, one of 6) and 9 to validate on."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("shades") / "data"
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            pixels = rng.integers(0, 160, (32, 32, 3)) + (80 * number if number < 2 else np.array([90, 0, 0]))
            buffer = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
            (root / name / f"{i:02}.png").write_bytes(buffer.getvalue())
    return root


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network none of whose layers is trivial (a fresh one's residual branches are zero)."""
    path = tmp_path_factory.mktemp("backbone") / "backbone.pth"
    save_backbone(path, 0)
    return path


def save_backbone(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    network = Network(Architecture(num_classes=2, hidden_units=1), Preprocessing(side_px=32))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 0.8)
            torch.nn.init.normal_(module.bias, 0, 0.2)
            torch.nn.init.normal_(module.running_mean, 0, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    torch.save(network.state_dict(), path)


@pytest.fixture
def settings(shades: Path, backbone: Path, tmp_path: Path) -> Settings:
    """Settings of a small run from the frozen backbone; keywords change them."""

    def make(**values: object) -> TrainingConfig:
        small: dict[str, Any] = {
            "data": shades, "output": tmp_path / "model", "cache_folder": tmp_path / "features",
            "weights": str(backbone), "freeze": FROZEN, "hidden_units": 8, "epochs": 2, "batch_size": 9,
            "learning_rate": 0.01, "validation_fraction": 0.2, "device": "cpu", "feature_cache": "off",
            "report": False, "quantize": "off",
        }  # fmt: skip
        return TrainingConfig.create({**small, **values})

    return make


def flags(config: TrainingConfig) -> list[str]:
    """The command line that says what `config` holds."""
    given = config.model_dump(mode="json", exclude_none=True)
    return [f"--{name}={','.join(v) or 'none' if isinstance(v, list) else v}" for name, v in given.items()]


@pytest.fixture
def launch(tmp_path: Path) -> Any:
    """`launch(config, log)` starts `python -m training.train_model` as a process; it is killed after the test."""
    running: list[subprocess.Popen[bytes]] = []

    def start(config: TrainingConfig, log: Path, *before: str) -> subprocess.Popen[bytes]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
        command = [sys.executable, "-m", *before, "training.train_model", *flags(config)]
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1"}, stdout=out, stderr=out,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs are deaf to it
            )  # fmt: skip
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
