"""What the tuner may try, and for how long: the flags of `python -m training.hpo` beyond those of a training run.

The ranges lie around the published reference (learning rate 0.0175, batch size 128, 70 epochs), which is also the
first trial, unless a recipe says otherwise. A hyperparameter that is given as a value of its own (`--epochs 30`) is
fixed and not tuned.
"""

import argparse
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from training.config import TrainingConfig
from training.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SOURCES = {"learning_rate": "learning_rate_range", "batch_size": "batch_sizes", "epochs": "epochs_range"}
"""The hyperparameters that are tuned, and the setting that says what they are chosen from."""

Metric = Literal["validation_accuracy", "validation_loss"]


class TuningConfig(BaseModel):
    """The settings of a study."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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

    @classmethod
    def create(cls, values: Mapping[str, object]) -> Self:
        """Validate. Raises: ConfigError that names each value that is not allowed."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as exc:
            problems = {}  # one sentence a setting, not one for each part of a range
            for error in exc.errors():
                name = str(error["loc"][0])
                what = "" if error["type"] == "value_error" else f" ({cls.model_fields[name].description})"
                problems[name] = f"--{name.replace('_', '-')} {values[name]}: {error['msg']}{what}"
            raise ConfigError("; ".join(problems.values())) from exc

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


def split(values: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Values by field name -> those of `TuningConfig`, and the rest, which are a training run's.

    Raises: ConfigError when a hyperparameter is both fixed and given a range.
    """
    tuning = {name: value for name, value in values.items() if name in TuningConfig.model_fields}
    training = {name: value for name, value in values.items() if name not in tuning}
    for name, source in SOURCES.items():
        if name in training and source in tuning:
            raise ConfigError(f"{_flag(name)} fixes what {_flag(source)} would tune; give one of the two.")
    return tuning, training


def parse_tuning_arguments(arguments: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """The tuning flags by field name, and the arguments that are none of them. Raises: ConfigError."""
    parser = _Parser(
        prog="python -m training.hpo",
        description="Find the learning rate, batch size and number of epochs that validate best; `python -m "
        "training.train_model --from-tuning OUTPUT/best.json` then trains with them.",
        epilog="Needed: --data DIR and --output DIR, the study's folder; a study that lies there is continued, by "
        "several processes at once if you like. All other flags of python -m training.train_model are taken too, "
        "and are the same in every trial; its --help lists them.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in TuningConfig.model_fields.items():
        default = "" if field.default is None else f" (default: {_shown(name, field.default)})"
        flags = [_flag(name)] + ([f"--{name}"] if "_" in name else [])
        parser.add_argument(*flags, dest=name, metavar="X", help=f"{field.description}{default}")
    known, rest = parser.parse_known_args(list(arguments))
    return vars(known), rest


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(name: str, value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return (":" if name.endswith("_range") else ",").join(f"{part:g}" for part in value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists what there is")
