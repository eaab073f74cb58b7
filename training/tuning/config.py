"""What the tuner may try, and for how long: the flags of `python -m training.hpo` beyond those of a training run.

The ranges lie around the published reference (learning rate 0.0175, batch size 128, 70 epochs), which is also the
first trial, unless a recipe says otherwise. A hyperparameter that is given as a value of its own (`--epochs 30`) is
fixed and not tuned.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from training.config import TrainingConfig
from training.errors import ConfigError
from training.flags import Settings, flag, split

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SOURCES = {"learning_rate": "learning_rate_range", "batch_size": "batch_sizes", "epochs": "epochs_range"}
"""The hyperparameters that are tuned, and the setting that says what they are chosen from."""

Metric = Literal["validation_accuracy", "validation_loss"]


class TuningConfig(Settings):
    """The settings of a study."""

    trials: int = Field(10, ge=1, description="trainings in all, those of earlier calls and other processes included")
    learning_rate_range: tuple[float, float] = Field(
        (1e-4, 1e-1), description="LOW:HIGH of the learning rate, drawn evenly on a log scale"
    )
    batch_sizes: tuple[int, ...] = Field((32, 64, 128, 256), description="batch sizes to choose from, comma-separated")
    epochs_range: tuple[int, int] = Field((10, 70), description="LOW:HIGH of the number of epochs")
    timeout_minutes: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="end after so many minutes; a trial under way is stopped, and tried again when the study continues",
    )
    metric: Metric = Field(
        "validation_accuracy", description="what makes a trial good: validation_accuracy, or validation_loss (small)"
    )

    @field_validator("learning_rate_range", "epochs_range", mode="before")
    @classmethod
    def _split_colon(cls, value: object) -> object:
        if isinstance(value, str) and value.count(":") != 1:
            raise ValueError("give two numbers with a colon between them, LOW:HIGH")
        return tuple(value.split(":")) if isinstance(value, str) else value

    @field_validator("batch_sizes", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("learning_rate_range", "epochs_range")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not (0 < low <= high and math.isfinite(high)):
            raise ValueError("LOW:HIGH must be numbers above 0, LOW not above HIGH")
        return value

    @field_validator("batch_sizes")
    @classmethod
    def _batches(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 2 or len(set(value)) < len(value):
            raise ValueError("each must be at least 2, which batch norm needs, and named once")
        return value

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Which values of the metric are good."""
        return "minimize" if self.metric == "validation_loss" else "maximize"

    def distributions(self, tuned: Collection[str]) -> "dict[str, BaseDistribution]":
        """What each of the tuned hyperparameters is drawn from, for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        all_of_them: dict[str, BaseDistribution] = {
            "learning_rate": FloatDistribution(*self.learning_rate_range, log=True),
            "batch_size": CategoricalDistribution(self.batch_sizes),
            "epochs": IntDistribution(*self.epochs_range),
        }
        return {name: each for name, each in all_of_them.items() if name in tuned}

    def nearest(self, fixed: Mapping[str, object], start: TrainingConfig) -> dict[str, object]:
        """What is tried first: the values of `start`, each moved into its range."""
        low, high = self.learning_rate_range
        first, last = self.epochs_range
        all_of_them: dict[str, object] = {
            "learning_rate": min(max(start.learning_rate, low), high),
            "batch_size": min(self.batch_sizes, key=lambda size: abs(math.log(size / start.batch_size))),
            "epochs": min(max(start.epochs, first), last),
        }
        return {name: value for name, value in all_of_them.items() if name not in fixed}

    def require_possible(self, fixed: Mapping[str, object], start: TrainingConfig) -> None:
        """Each value that may be drawn goes together with the settings of `start`; those in `fixed` are not drawn.

        Raises: ConfigError.
        """
        low, high = self.epochs_range
        # Of `TrainingConfig._warmup_ends`: its warm-up is too long for few epochs, or for few after the unfreezing.
        epochs = sorted({low, min(max(start.unfreeze_at or low, low), high)})
        drawn: dict[str, Iterable[object]] = {
            "learning_rate": self.learning_rate_range, "batch_size": self.batch_sizes, "epochs": epochs,
        }  # fmt: skip
        given = {name: getattr(start, name) for name in start.model_fields_set}
        for name in drawn.keys() - fixed.keys():
            for value in drawn[name]:
                try:
                    TrainingConfig.create({**given, name: value})
                except ConfigError as exc:
                    raise ConfigError(
                        f"{flag(SOURCES[name])} holds {value}, which is not possible here: {exc}; change one of them."
                    ) from exc


def split_tuning(values: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Values by field name -> those of `TuningConfig`, and the rest, which are a training run's.

    Raises: ConfigError when a hyperparameter is both fixed and given a range.
    """
    tuning, training = split(values, TuningConfig)
    for name, source in SOURCES.items():
        if name in training and source in tuning:
            raise ConfigError(f"{flag(name)} fixes what {flag(source)} would tune; give one of the two.")
    return tuning, training
