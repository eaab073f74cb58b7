"""What the commands share: the account and project that the flags name."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from training.launch.names import Project
from training.launch.session import Aws, connect

Options = argparse.Namespace


def opened(options: Options) -> tuple[Aws, Project]:
    """The account and the project that the flags name. Raises: ConfigError, AwsError."""
    aws = connect(options.region, options.profile)
    bucket = options.bucket or f"sagemaker-{aws.region}-{aws.account}"
    return aws, Project(options.project, bucket)


def as_json(values: Sequence[Any]) -> str:
    """The values as indented JSON, for people to read."""
    return "\n".join(json.dumps(value, indent=2, default=str) for value in values)
