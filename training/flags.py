"""Settings as flags and hyperparameters: how text becomes fields, and what is said of text that does not.

Each field is a flag (`--learning-rate`, underscores accepted) and a SageMaker hyperparameter (`learning_rate`); an
unknown name is refused and the known are listed.
"""

import argparse
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from training.errors import ConfigError


class Settings(BaseModel):
    """A frozen model whose fields are settings with a description each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    OTHERS: ClassVar[tuple[str, ...]] = ()
    """Names that are known besides, for the list of the known."""

    @classmethod
    def create(cls, values: Mapping[str, object]) -> Self:
        """Validate. Raises: ConfigError that names each value that is not allowed."""
        for name in values:
            if name not in cls.model_fields:
                raise ConfigError(unknown_name(name, [*cls.model_fields, *cls.OTHERS]))
        try:
            return cls.model_validate(dict(values))
        except ValidationError as exc:
            problems: dict[str, str] = {}  # one sentence a setting, not one for each part of a tuple
            for error in exc.errors():
                name = str(error["loc"][0]) if error["loc"] else ""
                problems.setdefault(name, cls._problem(name, values, error))
            raise ConfigError("; ".join(problems.values())) from exc

    @classmethod
    def _problem(cls, name: str, values: Mapping[str, object], error: Any) -> str:
        if not name:  # of the settings together
            return str(error["ctx"]["error"])
        description = cls.model_fields[name].description
        if error["type"] == "missing" and name not in values:
            return f"{flag(name)} is missing: {description}"
        what = "" if error["type"] == "value_error" else f" ({description})"
        return f"{flag(name)} {values[name]}: {_plain(error)}{what}"


def split(values: Mapping[str, object], model: type[Settings]) -> tuple[dict[str, object], dict[str, object]]:
    """Values by field name -> those of `model`, and the rest."""
    mine = {name: value for name, value in values.items() if name in model.model_fields}
    return mine, {name: value for name, value in values.items() if name not in mine}


def unknown_name(name: str, known: Sequence[str], what: str = "hyperparameter") -> str:
    """A sentence that refuses a name and says which is meant, or lists the known ones; `what` it would be."""
    plain = {text.lstrip("-").replace("-", "_"): text for text in known}
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), plain, 1)
    if close:
        return f"Unknown {what} {name}. Did you mean {plain[close[0]]}?"
    return f"Unknown {what} {name}. Known are: {', '.join(dict.fromkeys(known))}."


def parse_flags(
    arguments: Sequence[str],
    program: str,
    description: str,
    models: Iterable[type[Settings]],
    others: Mapping[str, str],
    epilog: str | None = None,
    besides: Sequence[str] = (),
) -> dict[str, object]:
    """The values given on the command line, by field name; `others`: further flags and their descriptions, or other
    descriptions of fields; `besides`: flags that the command has read before, as they are typed.

    Raises: ConfigError.
    """
    parser = _Parser(
        prog=f"python -m {program}", description=description, epilog=epilog, argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )  # fmt: skip
    described = dict(others)
    allowed: dict[str, str] = {}
    for model in models:
        for name, field in model.model_fields.items():
            default = (
                "" if field.is_required() or field.default is None else f" (default: {_shown(name, field.default)})"
            )
            described.setdefault(name, f"{field.description}{default}")
            if get_origin(field.annotation) is Literal:
                allowed[name] = f"{{{','.join(get_args(field.annotation))}}}"
    for name, text in described.items():
        flags = [flag(name)] + ([f"--{name}"] if "_" in name else [])
        parser.add_argument(*flags, dest=name, metavar=allowed.get(name, "X"), help=text.replace("%", "%%"))
    known, rest = parser.parse_known_args(list(arguments))
    if rest:
        word = rest[0].split("=")[0]
        if word in besides:
            raise ConfigError(misplaced(word, program))
        what = "flag" if word.startswith("-") else "argument"
        raise ConfigError(unknown_name(word, [*map(flag, described), *besides], what))
    return vars(known)


def misplaced(word: str, program: str) -> str:
    """A sentence about a flag that stands before the command it belongs to."""
    return f"{word} stands before the command; it goes after it: python -m {program} ... {word}"


def parse_hyperparameters(values: Mapping[str, str]) -> dict[str, object]:
    """SageMaker's hyperparameters: strings, JSON-quoted by the SDK (`"\\"1\\""`) or not (`"1"`).

    Names that SageMaker adds for itself (`sagemaker_*`, `_tuning_*`) are left out.
    """
    return {name: _unquoted(value) for name, value in values.items() if not name.startswith(("sagemaker_", "_tuning_"))}


def flag(name: str) -> str:
    """`learning_rate` -> `--learning-rate`."""
    return f"--{name.replace('_', '-')}"


def _plain(error: Any) -> str:
    """What pydantic says of a value, in plain words."""
    words = _WORDS.get(error["type"])
    return words.format(**error.get("ctx", {})) if words else str(error["msg"]).removeprefix("Value error, ")


_WORDS = {
    **dict.fromkeys(("int_parsing", "int_from_float", "int_type"), "give a whole number"),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), "give a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "give true or false"),
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "give {expected}",
    "string_pattern_mismatch": "must match {pattern}",
}
"""By pydantic's type of error; its own sentences are those of a program."""


def _unquoted(value: str) -> object:
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return decoded if isinstance(decoded, str) else value


def _shown(name: str, value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return (":" if name.endswith("_range") else ",").join(str(part) for part in value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists what there is")
