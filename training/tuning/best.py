"""best.json: what a study found, in the form that `train_model --from-tuning best.json` takes.

`hyperparameters` holds what was tuned, `settings` what was the same in every trial, so that a training with both
equals the best trial. Places (data, output) and the machine's settings do not travel: they are the next machine's.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from service.model.files import replace
from training.config import LOCAL, TrainingConfig
from training.errors import ConfigError

FORMAT = 1


def settings_of(config: TrainingConfig, tuned: Collection[str]) -> dict[str, object]:
    """The settings that are the same in every trial, as JSON holds them."""
    return config.model_dump(mode="json", exclude=set(LOCAL.union(tuned)))


def write_best(
    path: Path, hyperparameters: Mapping[str, object], settings: Mapping[str, object], facts: Mapping[str, object]
) -> None:
    """Write whole or not at all. `facts`: what the trial reached, on which data, after how many trials."""
    content = {"format": FORMAT, "hyperparameters": dict(hyperparameters), "settings": dict(settings), **facts}
    replace(path, f"{json.dumps(content, indent=2)}\n".encode())


def read_best(path: Path) -> dict[str, object]:
    """The settings of the best trial by field name of `TrainingConfig`, without data and output.

    Raises: ConfigError when the file is missing, is no best.json, or says what a training run does not know.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise ConfigError(f"{path} is missing; `python -m training.hpo --output DIR` writes DIR/best.json.") from exc
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}.") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} is not JSON ({exc}); give the best.json of `python -m training.hpo`.") from exc
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{path} is no best.json of format {FORMAT}; `python -m training.hpo` writes one.")
    values: dict[str, object] = {}
    for part in ("settings", "hyperparameters"):
        if not isinstance(content.get(part), dict):
            raise ConfigError(f'{path} has no object "{part}"; tune again, or take another best.json.')
        values |= content[part]
    misplaced = sorted(LOCAL & values.keys())
    if misplaced:
        raise ConfigError(f"{path} sets {', '.join(misplaced)}, which belong to the machine: give them as flags.")
    try:
        TrainingConfig.create({**values, "data": ".", "output": "."})
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return values
