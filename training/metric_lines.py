"""The lines of a run that carry figures, and beside them the expressions with which SageMaker reads them.

SageMaker searches what a job writes to its log with the expressions of `AlgorithmSpecification.MetricDefinitions`:
at most 40, each of at most 500 characters with one group
(https://docs.aws.amazon.com/sagemaker/latest/dg/define-train-metrics.html). Each expression here names the line it
reads from its start, so that a figure of the same name elsewhere, of the settings or of the validation pass, say, is
never taken for it. What stands before a line (a time, a host, a rank) does no harm.

    epoch 1/70 train images=1280/50000 batch_loss=4.6052 batch_accuracy=0.0100 remaining_minutes=41.5
    epoch=1/70 train_loss=3.9120 train_accuracy=0.1010 validation_loss=... seconds=31.2 remaining_minutes=35.9
"""

from training.epoch_metrics import EpochMetrics

TRAIN, VALIDATION = "train", "validation"
"""The passes that batch lines are written in."""

OBJECTIVE = "validation:accuracy"
"""The metric that a search maximises."""


def pass_title(epoch: int, epochs: int, which: str) -> str:
    """How the lines and the bar of a pass begin; `which`: TRAIN or VALIDATION."""
    return f"epoch {epoch}/{epochs} {which}"


def batch_line(title: str, images: int, total: int, loss: float, accuracy: float) -> str:
    """How far a pass is, with the figures of its last batch; `title` as of `pass_title`, accuracy in 0..1."""
    return f"{title} images={images}/{total} batch_loss={loss:.4f} batch_accuracy={accuracy:.4f}"


def epoch_line(metrics: EpochMetrics, epochs: int) -> str:
    """An epoch as `name=value` pairs; more may follow on the line."""
    return (
        f"epoch={metrics.epoch}/{epochs}"
        f" train_loss={metrics.train_loss:.4f} train_accuracy={metrics.train_accuracy:.4f}"
        f" validation_loss={metrics.validation_loss:.4f} validation_accuracy={metrics.validation_accuracy:.4f}"
        f" learning_rate={metrics.learning_rate:.4g} seconds={metrics.seconds:.4g}"
    )


def remaining(seconds: float) -> str:
    """The time that is left of a run, to end a line with."""
    return f"remaining_minutes={seconds / 60:.1f}"


_NUMBER = "([-+.0-9aefin]+)"  # also 1e-05, nan, inf: the letters of these, and no character more
_OTHER = "[-+.0-9aefin]+"
_EPOCH = "epoch=[0-9]+/[0-9]+ "
_BATCH = f"epoch [0-9]+/[0-9]+ {TRAIN} images=[0-9]+/[0-9]+ "


def _epoch_regex(name: str) -> str:
    """Reads `name` from an epoch's line, passing over each pair before it by name."""
    names = [
        "train_loss",
        "train_accuracy",
        "validation_loss",
        "validation_accuracy",
        "learning_rate",
        "seconds",
    ]
    before = "".join(f"{each}={_OTHER} " for each in names[: names.index(name)])
    return f"{_EPOCH}{before}{name}={_NUMBER}"


METRIC_DEFINITIONS: list[dict[str, str]] = [
    {"Name": "train:loss", "Regex": _epoch_regex("train_loss")},
    {"Name": "train:accuracy", "Regex": _epoch_regex("train_accuracy")},
    {"Name": "validation:loss", "Regex": _epoch_regex("validation_loss")},
    {"Name": OBJECTIVE, "Regex": _epoch_regex("validation_accuracy")},
    {"Name": "learning_rate", "Regex": _epoch_regex("learning_rate")},
    {"Name": "epoch:seconds", "Regex": _epoch_regex("seconds")},
    {"Name": "batch:loss", "Regex": f"{_BATCH}batch_loss={_NUMBER}"},
    {"Name": "batch:accuracy", "Regex": f"{_BATCH}batch_loss={_OTHER} batch_accuracy={_NUMBER}"},
]
"""What CreateTrainingJob is given."""
