"""What a run prints is what SageMaker reads: each expression reads its own figure, and no other line."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.epoch_metrics import EpochMetrics
from training.metric_lines import (
    METRIC_DEFINITIONS,
    OBJECTIVE,
    TRAIN,
    VALIDATION,
    batch_line,
    epoch_line,
    pass_title,
)

REGEXES = {definition["Name"]: definition["Regex"] for definition in METRIC_DEFINITIONS}
EPOCH_FIGURES = {
    "train:loss": "train_loss",
    "train:accuracy": "train_accuracy",
    "validation:loss": "validation_loss",
    "validation:accuracy": "validation_accuracy",
    "learning_rate": "learning_rate",
    "epoch:seconds": "seconds",
}
NUMBERS = st.floats(width=64)
COUNTS = st.integers(0, 10**9)
PREFIXES = st.sampled_from(
    [
        "", "10:42:59 INFO ", "2026-11-22T10:42:59.123Z ", "[1,mpirank:0,algo-1]<stdout>:", "[default0]:10:42:59 INFO ",
        "INFO:training.run:", "trial 3: ",
    ]
)  # fmt: skip
SUFFIXES = st.sampled_from(["", " remaining_minutes=1.5", " validation_accuracy=0.5 train_loss=9", "\r"])


def read(line: str) -> dict[str, str]:
    """What SageMaker would read; each expression matches at most once."""
    found = {name: re.findall(regex, line) for name, regex in REGEXES.items()}
    assert all(len(values) <= 1 for values in found.values())
    return {name: values[0] for name, values in found.items() if values}


def same(text: str, value: float, digits: str) -> bool:
    return text == format(value, digits) and (math.isnan(float(text)) if math.isnan(value) else True)


def test_the_definitions_are_within_what_sagemaker_allows() -> None:
    assert len(METRIC_DEFINITIONS) <= 40
    assert len(REGEXES) == len(METRIC_DEFINITIONS)
    assert OBJECTIVE in REGEXES
    for name, regex in REGEXES.items():
        assert len(regex) <= 500, name
        assert re.compile(regex).groups == 1, name


@given(PREFIXES, SUFFIXES, COUNTS, COUNTS, st.tuples(*[NUMBERS] * 6))
def test_an_epochs_line_is_read_back_as_printed(
    prefix: str, suffix: str, epoch: int, epochs: int, figures: tuple[float, ...]
) -> None:
    metrics = EpochMetrics(epoch, *figures)
    values = read(prefix + epoch_line(metrics, epochs) + suffix)
    assert set(values) == set(EPOCH_FIGURES)
    for name, text in values.items():
        digits = ".4g" if name in ("learning_rate", "epoch:seconds") else ".4f"
        assert same(text, getattr(metrics, EPOCH_FIGURES[name]), digits), name


@given(PREFIXES, COUNTS, COUNTS, COUNTS, NUMBERS, NUMBERS)
def test_a_training_batchs_line_is_read_back_as_printed(
    prefix: str, epoch: int, images: int, total: int, loss: float, accuracy: float
) -> None:
    values = read(prefix + batch_line(pass_title(epoch, epoch, TRAIN), images, total, loss, accuracy))
    assert set(values) == {"batch:loss", "batch:accuracy"}
    assert same(values["batch:loss"], loss, ".4f")
    assert same(values["batch:accuracy"], accuracy, ".4f")


@pytest.mark.parametrize("value", ["1e-05", "-2.5e+10", "nan", "inf", "-inf", "0", ".5", "12"])
def test_every_way_to_write_a_number_is_read(value: str) -> None:
    line = f"epoch=1/2 train_loss={value} train_accuracy={value} validation_loss={value} validation_accuracy={value}"
    assert read(line) == dict.fromkeys(list(EPOCH_FIGURES)[:4], value)
    assert math.isnan(float(value)) or float(value) == float(read(line)["train:loss"])


@pytest.mark.parametrize(
    "line",
    [
        batch_line(pass_title(1, 2, VALIDATION), 10, 20, 1.0, 0.5),
        "settings: data=/d epochs=70 learning_rate=0.0174 seconds=3 train_loss=1 validation_accuracy=1",
        "validation: accuracy 76.76 %, top-5 90.00 %, loss 1.0000, n=10000; artifact resnet34 version 1 in /m",
        "epoch=3/70 remaining_minutes=3",
        "batch_loss=1.0 batch_accuracy=0.5",
        "epoch 1/2 validation train images=1/2 batch_loss=1.0",
    ],
)
def test_no_other_line_is_read(line: str) -> None:
    assert read(line) == {}


def test_the_lines_look_as_documented() -> None:
    metrics = EpochMetrics(1, 3.912, 0.101, 3.5, 0.15, 0.017483127, 31.234)
    assert epoch_line(metrics, 70) == (
        "epoch=1/70 train_loss=3.9120 train_accuracy=0.1010 validation_loss=3.5000 validation_accuracy=0.1500"
        " learning_rate=0.01748 seconds=31.23"
    )
    assert batch_line(pass_title(1, 70, TRAIN), 1280, 50000, 4.6052, 0.01) == (
        "epoch 1/70 train images=1280/50000 batch_loss=4.6052 batch_accuracy=0.0100"
    )
