"""Which rules watch a run, as a list like AWS's rule configurations:

    [{"rule": "LossNotDecreasing", "parameters": {"diff_percent": "0.5"}, "action": "stop"}, {"rule": "DeadRelu"}]

in a JSON file, or as `[[rules]]` tables in a TOML file. Without a list: all rules, none of which ends the run.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from training.debugging import rules_metrics, rules_tensors
from training.debugging.rules import Rule, create
from training.debugging.verdicts import RuleSet, Verdict
from training.errors import ConfigError

RULES: dict[str, type[Rule]] = {rule.__name__: rule for rule in (*rules_tensors.ALL, *rules_metrics.ALL)}
KEYS = ("rule", "parameters", "action")


def create_rules(configurations: object = None) -> RuleSet:
    """The rules of a list of configurations; None: all of them, with AWS's defaults. Raises: ConfigError."""
    if configurations is None:
        configurations = [{"rule": name} for name in RULES]
    if not isinstance(configurations, list):
        raise ConfigError(f'Rules are a list such as [{{"rule": "DeadRelu"}}]; given is {configurations!r}.')
    return RuleSet([_verdict(each) for each in configurations])


def read_rules(path: Path) -> RuleSet:
    """The rules of a .json or .toml file. Raises: ConfigError."""
    try:
        if path.suffix == ".toml":
            return create_rules(_listed(path, tomllib.loads(path.read_text(encoding="utf-8"))))
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} cannot be read as a list of rules: {exc}") from exc
    return create_rules(_listed(path, given))


def _listed(path: Path, given: object) -> object:
    rules = given.get("rules") if isinstance(given, Mapping) else given
    if rules is None:
        raise ConfigError(f"{path} lists no rules; give `[[rules]]` tables (TOML) or a list (JSON) of them.")
    return rules


def _verdict(configuration: object) -> Verdict:
    if isinstance(configuration, str):
        configuration = {"rule": configuration}
    if not isinstance(configuration, Mapping) or "rule" not in configuration:
        raise ConfigError(f'A rule is an object such as {{"rule": "DeadRelu"}}; given is {configuration!r}.')
    unknown = [key for key in configuration if key not in KEYS]
    if unknown:
        raise ConfigError(f"A rule's configuration has no {unknown[0]!r}; known are: {', '.join(KEYS)}.")
    name = configuration["rule"]
    if not isinstance(name, str) or name not in RULES:
        raise ConfigError(f"There is no rule {name!r}; known are: {', '.join(RULES)}.")
    parameters = configuration.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"Rule {name}: parameters are an object such as {{}}; given is {parameters!r}.")
    action = configuration.get("action")
    if action not in (None, "", "none", "stop"):
        raise ConfigError(f'Rule {name}: the action {action!r} is unknown; known are "none" and "stop".')
    return Verdict(create(RULES[name], parameters), stop=action == "stop")
