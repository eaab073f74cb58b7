"""How good a network is: figures of a pass over labelled images, and of an epoch."""

from dataclasses import asdict, dataclass


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

    def line(self, epochs: int) -> str:
        """The epoch as one line of `name=value` pairs."""
        figures = {name: f"{value:.4g}" for name, value in asdict(self).items() if name != "epoch"}
        for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
            figures[name] = f"{getattr(self, name):.4f}"
        return " ".join([f"epoch={self.epoch}/{epochs}", *(f"{name}={value}" for name, value in figures.items())])
