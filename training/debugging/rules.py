"""What a rule is: parameters by AWS's names, fed with observations in order, it answers with firings.

Definitions and defaults: "List of Debugger built-in rules",
https://docs.aws.amazon.com/sagemaker/latest/dg/debugger-built-in-rules.html, and the page of each rule. Where ours
differ, the rule's docstring says how and why.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, get_args

from training.debugging.observations import COLLECTIONS, Kind, Observation
from training.errors import ConfigError

Value = str | float | int | bool | None


@dataclass(frozen=True)
class Firing:
    """A disease that a rule found."""

    step: int
    tensor: str
    value: float | None
    """The figure that crossed the threshold; None where it is not a finite number."""
    threshold: float | None
    message: str
    """What was seen, one sentence."""
    advice: str
    """What people do about it."""


@dataclass(frozen=True)
class Pace:
    """In steps, how often a run is observed and how long its epochs are."""

    interval: int
    """Steps between observations; the first step is always observed."""
    epoch: int
    """Steps of an epoch."""
    batch: int
    """Images of a step."""

    @classmethod
    def told_by(cls, seen: Observation) -> "Pace | None":
        """That of the run whose "start" was seen; None where it does not say."""
        figures = [seen.stats.get(each.name, math.nan) for each in fields(cls)]
        return cls(*map(int, figures)) if all(figure >= 1 for figure in figures) else None

    def of_observation(self, count: int, after: int = 0) -> int:
        """The step at which the `count`-th observation after step `after` is made."""
        if after < 1 < self.interval:  # the first step's is one of them
            return max(1, (count - 1) * self.interval)
        return (after // self.interval + count) * self.interval

    def of_epoch(self, count: int) -> int:
        """The last step of epoch `count`."""
        return count * self.epoch

    def of_images(self, count: int) -> int:
        """The step at which so many images have been seen by an observation."""
        steps = -(-count // self.batch)
        return -(-steps // self.interval) * self.interval if steps > 1 else 1


@dataclass
class Rule(ABC):
    """Base of the rules: a dataclass whose fields are the parameters. `observe` keeps what it needs of the past."""

    advice: ClassVar[str] = ""
    kinds: ClassVar[tuple[Kind, ...]] = ()
    """The kinds of observations that it looks at."""
    judged = False
    """Whether enough was seen for it to fire, had there been the disease. Not a field: no parameter."""

    @abstractmethod
    def observe(self, seen: Observation) -> Iterator[Firing]:
        """Look at the next observation; in the order of steps. Yields: a firing for each disease found."""

    def judges_from(self, pace: Pace) -> int:
        """The step of a run from which on it can judge, if it sees what it looks at."""
        return 1

    @property
    def name(self) -> str:
        """AWS's name of the rule, which is that of the class."""
        return type(self).__name__

    @property
    def parameters(self) -> dict[str, Value]:
        """The parameters by name."""
        return asdict(self)

    def fire(self, seen: Observation, value: float, threshold: float | None, message: str) -> Firing:
        """A firing about the tensor of `seen`."""
        return Firing(
            seen.step, seen.name, value if math.isfinite(value) else None, threshold, message, self.advice
        )  # fmt: skip


def create(rule: type[Rule], given: Mapping[str, object]) -> Rule:
    """A rule with parameters as AWS passes them: strings, or values of the right type.

    Raises: ConfigError for an unknown parameter or a value of another type.
    """
    known = {field.name: 0 if int in get_args(field.type) else field.default for field in fields(rule)}
    values: dict[str, Value] = {}
    for name, value in given.items():
        if name in ("rule_to_invoke", "base_trial"):  # for AWS's own machinery
            continue
        if name not in known:
            raise ConfigError(f"Rule {rule.__name__} has no parameter {name}; known are: {', '.join(known) or 'none'}.")
        try:
            values[name] = _as_type_of(known[name], value)
        except (TypeError, ValueError) as exc:
            raise ConfigError(
                f"Rule {rule.__name__}, parameter {name}: {value!r} is not of the type of the default {known[name]!r}."
            ) from exc
    for name in known:
        if name.endswith("_regex"):
            patterns(values.get(name))
    unknown = [each for each in patterns(values.get("collection_names")) if each not in COLLECTIONS]
    if unknown:
        raise ConfigError(
            f"Rule {rule.__name__}: there is no collection {unknown[0]}; known are: {', '.join(COLLECTIONS)}."
        )
    return rule(**values)


def patterns(value: object) -> list[str]:
    """A comma-separated string as a list of regular expressions. Raises: ConfigError."""
    found = [part.strip() for part in str(value).split(",") if part.strip()] if value is not None else []
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as exc:
            raise ConfigError(f"{pattern} is not a regular expression ({exc}).") from exc
    return found


def selected(seen: Observation, collection_names: str | None, tensor_regex: str | None, default: str) -> bool:
    """Whether AWS's two selectors (their union; `default` collections where neither is given) take a tensor."""
    if any(re.search(pattern, seen.name) for pattern in patterns(tensor_regex)):
        return True
    collections = patterns(collection_names if collection_names or tensor_regex else default)
    return any(seen.kind == COLLECTIONS[name][0] and re.search(COLLECTIONS[name][1], seen.name) for name in collections)


def _as_type_of(default: object, value: object) -> Value:
    if isinstance(default, bool):
        text = str(value).strip().lower()
        if text not in ("true", "false"):
            raise ValueError
        return text == "true"
    if isinstance(default, int) and not isinstance(value, bool):
        number = float(str(value))
        if not math.isfinite(number) or number != int(number):
            raise ValueError
        return int(number)
    if isinstance(default, float) and not isinstance(value, bool):
        number = float(str(value))
        if not math.isfinite(number):
            raise ValueError
        return number
    if default is None or isinstance(default, str):
        if isinstance(value, (list, tuple)):
            return ",".join(str(part) for part in value)
        if value is None or isinstance(value, (str, int, float)):
            return value
    raise TypeError
