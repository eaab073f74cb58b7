"""A study over a real, tiny training: a linear network on points of two classes, with callbacks as in the real loop.

`python tiny_tuning.py LOG:FOLDER:TRIALS:SECONDS ...` runs each as a process of its own, forked from one that has
imported torch. SECONDS are what an epoch takes at least, for tests that come in between.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from service.model.architecture import Architecture
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training.callbacks import Callback, RunContext, Step, StopTraining, tell
from training.config import TrainingConfig
from training.data.dataset import ArrayImages, Dataset
from training.epoch_metrics import EpochMetrics, Evaluation
from training.errors import DivergedError
from training.tuning.config import TuningConfig
from training.tuning.trials import Prepare, Train, Tuner

POINTS = 64
DATASET = {"name": "points", "classes": 2}


@dataclass
class Fitted:
    evaluation: Evaluation
    history: list[EpochMetrics]


def points() -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy points `[N, 8]` and their classes `[N]`; half to train on, half to validate on."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2 * POINTS) % 2
    return torch.randn(2 * POINTS, 8, generator=generator) + labels[:, None], labels


def context(config: TrainingConfig, steps: int) -> RunContext:
    """What the loop tells callbacks; the network is the real one, made once."""
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8).numpy()
    images = ArrayImages(pixels, torch.arange(2).numpy())
    return RunContext(
        config, NETWORK, nn.CrossEntropyLoss(), Dataset("points", ("a", "b"), images, images, {}), config.output,
        torch.device("cpu"), steps, steps * config.epochs, 1,
    )  # fmt: skip


NETWORK = Network(Architecture(num_classes=2, hidden_units=4), Preprocessing(side_px=32))


def training(epoch_s: float = 0.0, made: list[TrainingConfig] | None = None) -> Train:
    """A training that notes its settings in `made`."""
    inputs, labels = points()

    def train(config: TrainingConfig, callbacks: Sequence[Callback]) -> Fitted:
        if made is not None:
            made.append(config)
        torch.manual_seed(config.seed)
        layer = nn.Linear(8, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=config.learning_rate, momentum=config.momentum)
        steps = math.ceil(POINTS / config.batch_size)
        error: BaseException | None = None
        measured = Evaluation(math.nan, 0.0, 0.0, POINTS)
        tell(callbacks, "on_run_start", context(config, steps))
        history: list[EpochMetrics] = []
        try:
            for epoch in range(1, config.epochs + 1):
                for start in range(0, POINTS, config.batch_size):
                    batch = slice(start, min(start + config.batch_size, POINTS))
                    logits = layer(inputs[batch])
                    loss = nn.functional.cross_entropy(logits, labels[batch])
                    if not math.isfinite(loss.item()):
                        raise DivergedError(f"The loss is {loss.item()}; start again with a smaller --learning-rate.")
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    hits = (logits.argmax(1) == labels[batch]).sum()
                    tell(callbacks, "on_step_end",
                         Step(1, epoch, config.learning_rate, labels[batch], loss.detach(), hits, 0.0))  # fmt: skip
                time.sleep(epoch_s)
                measured = evaluated(layer, inputs[POINTS:], labels[POINTS:])
                history.append(EpochMetrics(epoch, loss.item(), 0.0, measured.loss, measured.accuracy, 0.0, 0.0))
                tell(callbacks, "on_epoch_end", history[-1])
        except StopTraining as exc:
            error = exc
        except BaseException as exc:
            tell(callbacks, "on_run_end", exc)
            raise
        tell(callbacks, "on_run_end", error)
        return Fitted(measured, history)

    return train


@torch.inference_mode()
def evaluated(layer: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    logits = layer(inputs)
    accuracy = float((logits.argmax(1) == labels).float().mean())
    return Evaluation(float(nn.functional.cross_entropy(logits, labels)), accuracy, 1.0, len(labels))


def preparation(
    epoch_s: float = 0.0, made: list[TrainingConfig] | None = None, dataset: Mapping[str, object] = DATASET
) -> Prepare:
    return lambda _config: (training(epoch_s, made), dataset)


def tuner(
    folder: Path,
    prepare: Prepare,
    fixed: Mapping[str, object] | None = None,
    **tuning: object,
) -> Tuner:
    """A tuner with small ranges."""
    ranges = {"epochs_range": "2:6", "batch_sizes": "8,16,32", **tuning}
    values = {"data": folder, "output": folder, **(fixed or {})}
    return Tuner(TuningConfig.create(ranges), values, TrainingConfig.create(values), prepare)


def run_forked(job: str) -> int:
    """Start one study; its log begins with its process id. Returns: the process id."""
    log, folder, trials, epoch_s = job.split(":")
    pid = os.fork()
    if pid:
        return pid
    logging.basicConfig(level=logging.INFO, filename=log, format="%(message)s")
    logging.info("pid %d", os.getpid())
    status = 1
    try:
        tuner(Path(folder), preparation(float(epoch_s)), trials=trials).run()
        status = 0
    except BaseException:
        logging.exception("ended")
    finally:
        logging.info("status %d", status)
        os._exit(status)


if __name__ == "__main__":
    os.nice(5)
    torch.set_num_threads(1)
    for child in [run_forked(job) for job in sys.argv[1:]]:
        os.waitpid(child, 0)
