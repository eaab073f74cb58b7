"""metrics.jsonl: what a run did, the same whether it was interrupted or not."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from training.callbacks import Callback, RunContext, Step, tell
from training.config import TrainingConfig
from training.data.dataset import ArrayImages, Dataset
from training.epoch_metrics import EpochMetrics
from training.metrics_log import FILE, STEP_LINES, MetricsLog

BATCH = 10
STEPS_PER_EPOCH = 4


class Interrupted(Exception):
    pass


def train(
    callbacks: Sequence[Callback], folder: Path, epochs: int, first_step: int = 1, kill_after: int | None = None,
    rate: float = 0.01,
) -> None:  # fmt: skip
    """Train a small network; each epoch's images and the weights at its start follow from its number alone."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (BATCH * STEPS_PER_EPOCH, 8, 8, 3), dtype=np.uint8)
    images = ArrayImages(pixels, rng.integers(0, 3, len(pixels)))
    torch.manual_seed(0)
    network: Any = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    tell(
        callbacks, "on_run_start",
        RunContext(
            TrainingConfig(data=folder, output=folder, epochs=epochs), network, criterion,
            Dataset("small", ("a", "b", "c"), images, images, {}), folder, torch.device("cpu"),
            STEPS_PER_EPOCH, STEPS_PER_EPOCH * epochs, first_step,
        ),
    )  # fmt: skip
    error: BaseException | None = None
    try:
        for number in range(1, STEPS_PER_EPOCH * epochs + 1):
            epoch, place = (number - 1) // STEPS_PER_EPOCH + 1, (number - 1) % STEPS_PER_EPOCH
            batch = slice(place * BATCH, (place + 1) * BATCH)
            labels = torch.from_numpy(images.labels[batch])
            logits = network(torch.from_numpy(pixels[batch]).float() / 255)
            loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if number < first_step:  # what a checkpoint would restore
                continue
            hits = (logits.argmax(1) == labels).sum()
            tell(callbacks, "on_step_end", Step(number, epoch, rate, labels, loss.detach(), hits, 0.0, 0.5))
            if number == kill_after:
                raise Interrupted
            if place == STEPS_PER_EPOCH - 1:
                final = float(loss.detach())
                tell(callbacks, "on_epoch_end", EpochMetrics(epoch, final, 0.5, final, 0.5, rate, 2.0))
    except Interrupted as exc:
        error = exc
    finally:
        tell(callbacks, "on_run_end", error)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_every_step_and_every_epoch_has_its_line(tmp_path: Path) -> None:
    train([MetricsLog()], tmp_path, epochs=2)
    written = lines(tmp_path)
    assert [(line["kind"], line.get("step", line["epoch"])) for line in written] == [
        ("step", 1), ("step", 2), ("step", 3), ("step", 4), ("epoch", 1),
        ("step", 5), ("step", 6), ("step", 7), ("step", 8), ("epoch", 2),
    ]  # fmt: skip
    assert list(written[0]) == [
        "kind", "step", "epoch", "batch_loss", "batch_accuracy", "learning_rate", "seconds",
    ]  # fmt: skip
    assert list(written[4]) == [
        "kind", "epoch", "epochs", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
        "learning_rate", "seconds",
    ]  # fmt: skip
    assert written[7]["batch_loss"] < written[0]["batch_loss"]
    assert (written[4]["epoch"], written[4]["epochs"]) == (1, 2)
    assert 0 <= written[0]["batch_accuracy"] <= 1


@pytest.mark.parametrize("killed_after", [1, 3, 4, 6, 8])
@pytest.mark.parametrize("back_by", [0, 2])
def test_a_resumed_run_leaves_the_file_of_one_without_interruption(
    tmp_path: Path, killed_after: int, back_by: int
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    train([MetricsLog()], whole, epochs=3)
    train([MetricsLog()], resumed, epochs=3, kill_after=killed_after)
    with (resumed / FILE).open("a") as file:
        file.write('{"kind": "step", "st')  # cut off by a kill
    first = max(1, killed_after + 1 - back_by)
    if first % STEPS_PER_EPOCH == 1 and first > 1:  # killed before the epoch's line: the checkpoint lies before it, too
        first -= 1
    train([MetricsLog()], resumed, epochs=3, first_step=first)
    assert (resumed / FILE).read_text() == (whole / FILE).read_text()
    assert [path.name for path in resumed.iterdir()] == [FILE]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    train([MetricsLog()], tmp_path, epochs=3)
    train([MetricsLog()], tmp_path, epochs=1)
    assert len(lines(tmp_path)) == STEPS_PER_EPOCH + 1


def test_a_long_run_has_a_bounded_number_of_lines_with_each_epochs_last_step(tmp_path: Path) -> None:
    epochs = 600
    train([MetricsLog()], tmp_path, epochs)
    steps = [line["step"] for line in lines(tmp_path) if line["kind"] == "step"]
    assert len(steps) <= STEP_LINES + epochs
    assert {STEPS_PER_EPOCH * epoch for epoch in range(1, epochs + 1)} <= set(steps)
    assert {1, 3} & set(steps) == set()


def test_a_loss_that_is_no_number_is_null(tmp_path: Path) -> None:
    train([MetricsLog()], tmp_path, epochs=3, rate=float("nan"))
    assert lines(tmp_path)[-1]["train_loss"] is None
    assert "NaN" not in (tmp_path / FILE).read_text()


def test_a_file_that_cannot_be_written_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).mkdir()
    with caplog.at_level(logging.WARNING):
        train([MetricsLog()], tmp_path, epochs=2)
    assert [record.message for record in caplog.records if FILE in record.message] == caplog.messages
    assert len(caplog.messages) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_a_disk_that_fills_up_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watcher = MetricsLog()

    class Fills(Callback):
        def on_step_end(self, step: Step) -> None:
            if step.number == 3:
                assert watcher._file is not None
                watcher._file.close()
                watcher._file = open("/dev/full", "w")  # noqa: PTH123, SIM115

    with caplog.at_level(logging.WARNING):
        train([Fills(), watcher], tmp_path, epochs=2)
    assert len(caplog.messages) == 1
    assert "No space left" in caplog.text
