"""Instance types as they are typed: what AWS would refuse after minutes of uploading is told at once."""

import difflib
import logging
from collections.abc import Mapping
from typing import Any

from training.errors import ConfigError
from training.launch.session import Aws

log = logging.getLogger("training")

FLAGS = {"instance": "--instance", "hosting_instance": "--hosting-instance", "batch_instance": "--batch-instance"}
_SHAPES = {"deploy": "ProductionVariantInstanceType", "batch": "TransformInstanceType"}
"""SageMaker's lists of types, as boto3 has them, by command; elsewhere --instance is for training."""
_USES = {"hosting_instance": "deploy", "batch_instance": "batch"}
"""The command that uses what another flag names."""


def look_at(aws: Aws, options: Mapping[str, Any]) -> None:
    """Raises: ConfigError where a flag's type is none of SageMaker's by its form. Warns of one that boto3 does not
    list, which may be newer than boto3."""
    for name, flag in FLAGS.items():
        given = options.get(name)
        if given is None:
            continue
        known = _known(aws, _USES.get(name, str(options.get("command"))))
        close = difflib.get_close_matches(given if given.startswith("ml.") else f"ml.{given}", known, 1)
        meant = f" Did you mean {close[0]}?" if close else ""
        parts = given.split(".")
        if len(parts) != 3 or parts[0] != "ml":
            raise ConfigError(
                f"{flag} {given}: SageMaker's instance types look like ml.g5.xlarge or ml.c6i.xlarge.{meant}"
            )
        if given not in known:
            log.warning("%s %s is none of the types that boto3 lists for this.%s", flag, given, meant)


def _known(aws: Aws, command: str) -> list[str]:
    """Of boto3's own model: nothing is asked of AWS."""
    shape = _SHAPES.get(command, "TrainingInstanceType")
    return list(aws.client("sagemaker").meta.service_model.shape_for(shape).enum)
