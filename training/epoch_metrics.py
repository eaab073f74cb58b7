"""How good a network is: figures of a pass over labelled images, and of an epoch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """How the network does on a set of images; accuracies in 0..1."""

    loss: float
    accuracy: float
    top5_accuracy: float
    n: int


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch. Train figures are those of its steps, as the network changed; accuracies in 0..1."""

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float
