"""What SageMaker says inside a training job: the only place of `training` that reads the environment.

Under AWS's training toolkit SM_* variables tell it, in a plain container the files below /opt/ml do
(https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html).
Elsewhere there is neither, and nothing is assumed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from training.config import parse_hyperparameters
from training.errors import ConfigError

ROOT = Path("/opt/ml")
TRAIN_CHANNELS = ("training", "train")
VALIDATION_CHANNELS = ("validation", "val", "valid", "test")
WEIGHTS_CHANNELS = ("weights", "pretrained")


def sagemaker_values(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> dict[str, object]:
    """The settings that a SageMaker job implies; empty elsewhere.

    `data` and `validation`: the channels of that name. `weights`: the folder of that channel. `output`: the model
    folder. And the job's hyperparameters.

    Raises: ConfigError when hyperparameters.json cannot be read.
    """
    hyperparameters = root / "input" / "config" / "hyperparameters.json"
    if not hyperparameters.is_file() and "SM_MODEL_DIR" not in environ:
        return {}
    values: dict[str, object] = {"output": environ.get("SM_MODEL_DIR", str(root / "model"))}
    for name, channels in (("data", TRAIN_CHANNELS), ("validation", VALIDATION_CHANNELS)):
        folder = _channel(channels, root, environ)
        if folder is not None:
            values[name] = str(folder)
    weights = _channel(WEIGHTS_CHANNELS, root, environ)
    if weights is not None:
        values["weights"] = str(weights)
    if hyperparameters.is_file():
        try:
            given = json.loads(hyperparameters.read_text())
            values |= parse_hyperparameters({str(name): str(value) for name, value in given.items()})
        except (ValueError, AttributeError, OSError) as exc:
            raise ConfigError(f"{hyperparameters} cannot be read as a JSON object: {exc}.") from exc
    return values


def _channel(names: tuple[str, ...], root: Path, environ: Mapping[str, str]) -> Path | None:
    for name in names:
        folder = Path(environ.get(f"SM_CHANNEL_{name.upper()}", str(root / "input" / "data" / name)))
        if folder.is_dir():
            return folder
    return None
