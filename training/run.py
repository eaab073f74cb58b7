"""One training run: settings -> data -> network -> epochs -> artifact."""

import logging
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from service.model.architecture import Architecture
from service.model.artifact import Artifact
from service.model.machine import cores
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training.config import TrainingConfig
from training.data.layouts import open_dataset
from training.data.loader import Loader
from training.errors import ConfigError, DivergedError
from training.evaluation import EpochMetrics, Evaluation
from training.export import export
from training.loop import Trainer
from training.pretrained import load_pretrained, require_available

log = logging.getLogger(__name__)


def run(config: TrainingConfig) -> Artifact:
    """Train as `config` says and write the artifact; nothing is written before the last epoch is over.

    Raises: TrainingError.
    """
    log.info("settings: %s", " ".join(f"{name}={value}" for name, value in config.model_dump(mode="json").items()))
    _require_writable(config.output)
    device = pick_device(config.device)
    require_available(config.weights)  # before the images, whose decoding may take long
    torch.manual_seed(config.seed)
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    dataset = open_dataset(
        config.data,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        broken_files=config.broken_files,
        validation_root=config.validation,
    )
    log.info(
        "data: %s, %d classes, %d images to train on, %d to validate on",
        dataset.name, len(dataset.classes), len(dataset.train), len(dataset.validation),
    )  # fmt: skip
    preprocessing = Preprocessing(side_px=config.side)
    architecture = Architecture(
        num_classes=len(dataset.classes), hidden_units=config.hidden_units, frozen=config.frozen
    )
    network = Network(architecture, preprocessing)
    pretrained = load_pretrained(network, config.weights)
    if pretrained == "none" and config.frozen:
        log.warning("frozen blocks without pretrained weights stay random; --freeze none trains them")
    train = Loader(dataset.train, config.side, config.batch_size, config.loader_workers, "train")
    validation = Loader(dataset.validation, config.side, config.batch_size, config.loader_workers, "validation")
    trainer = make_trainer(config, network, device, steps=steps_per_epoch(len(train), config.batch_size))
    started_s = time.monotonic()
    history: list[EpochMetrics] = []
    for epoch in range(1, config.epochs + 1):
        metrics, evaluation = _epoch(trainer, train, validation, epoch, config.epochs)
        history.append(metrics)
        log.info("%s %s", metrics.line(config.epochs), _remaining(started_s, epoch, config.epochs))
    if not math.isfinite(evaluation.loss):
        raise DivergedError(f"The validation loss is {evaluation.loss}; start again with a smaller --learning-rate.")
    artifact = export(
        network, preprocessing, config, dataset, validation,
        pretrained=pretrained, history=history, evaluation=evaluation,
    )  # fmt: skip
    log.info(
        "validation: accuracy %.2f %%, top-5 %.2f %%, loss %.4f, n=%d; artifact %s version %s in %s",
        100 * evaluation.accuracy, 100 * evaluation.top5_accuracy, evaluation.loss, evaluation.n,
        artifact.manifest.name, artifact.manifest.version, artifact.folder,
    )  # fmt: skip
    return artifact


def make_trainer(config: TrainingConfig, network: Network, device: torch.device, steps: int) -> Trainer:
    """Optimizer, schedule and precision for `network`, which is moved to `device`. Raises: ConfigError."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    log.info("training %s parameters on %s in %s", f"{count:,}", device, "bf16" if bf16 else "fp32")
    if bf16 or device.type == "cuda":
        # Measured on 2 cores of an AVX512-BF16 EPYC, torch 2.13, 32 px, batch 128: bf16 447 img/s with it, 407
        # without; fp32 299 with it, 341 without (n = 8 steps).
        network.to(memory_format=torch.channels_last)
    network.to(device)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":  # Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101
        # Fused: 24 ms a step instead of 76 for all of ResNet-34 on 2 EPYC cores, torch 2.13 (n = 5).
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(
            trained, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
    scheduler = None
    if config.schedule == "one-cycle":
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, one_cycle(steps * config.epochs))
    generator = torch.Generator().manual_seed(config.seed)
    return Trainer(
        network, optimizer, scheduler,
        device=device, bf16=bf16, augmentation=config.augment, generator=generator,
    )  # fmt: skip


def one_cycle(total_steps: int) -> Callable[[int], float]:
    """The share of the peak learning rate at each step: up in a line over the first tenth, down along a cosine.

    After Smith & Topin 2017 (https://arxiv.org/abs/1708.07120) and Loshchilov & Hutter 2016
    (https://arxiv.org/abs/1608.03983); momentum stays as it is.
    """
    rising = max(1, total_steps // 10)

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (total_steps - rising + 1)))

    return share


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches of one epoch; a last batch of a single image is left out (see `Trainer`)."""
    full, rest = divmod(images, batch_size)
    return full + (rest > 1)


def pick_device(name: str) -> torch.device:
    """The device asked for, or the best there is. Raises: ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise ConfigError(f"--device {name}: this machine has none that PyTorch can use; --device cpu always works.")
    return torch.device(name)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _epoch(
    trainer: Trainer, train: Loader, validation: Loader, epoch: int, epochs: int
) -> tuple[EpochMetrics, Evaluation]:
    """Train and validate once; validation is in float32, so its last figures are those of the exported weights."""
    started_s = time.perf_counter()
    learning_rate = trainer.learning_rate
    train_loss, train_accuracy = trainer.train_epoch(train, f"epoch {epoch}/{epochs} train")
    measured = trainer.evaluate(validation, f"epoch {epoch}/{epochs} validation")
    metrics = EpochMetrics(
        epoch, train_loss, train_accuracy, measured.loss, measured.accuracy, learning_rate,
        time.perf_counter() - started_s,
    )  # fmt: skip
    return metrics, measured


def _remaining(started_s: float, done: int, epochs: int) -> str:
    left_s = (time.monotonic() - started_s) / done * (epochs - done)
    return f"remaining_minutes={left_s / 60:.1f}"


def _require_writable(output: Path) -> None:
    """Find out now, not after the last epoch."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as exc:
        raise ConfigError(f"--output {output}: the folder cannot be written to ({exc.strerror}).") from exc
