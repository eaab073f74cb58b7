"""What the commands share: the account and project that the flags name."""

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from training.errors import ConfigError
from training.launch import instances
from training.launch.names import DEFAULT_PROJECT, Project
from training.launch.session import Aws, connect

Options = argparse.Namespace
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
"""What S3 allows, and of old in us-east-1."""


def opened(options: Options) -> tuple[Aws, Project]:
    """The account and the project that the flags name. Raises: ConfigError, AwsError."""
    aws = connect(options.region, options.profile)
    if options.bucket and not BUCKET.fullmatch(options.bucket):
        raise ConfigError(
            f"--bucket {options.bucket}: give a name alone, of 3 to 63 small letters, digits, dots and hyphens."
        )
    instances.look_at(aws, vars(options))
    bucket = options.bucket or f"sagemaker-{aws.region}-{aws.account}"
    return aws, Project(options.project, bucket)


def command_line(options: Options, words: str) -> str:
    """`python -m training.launch WORDS`, for the same project, region, profile and bucket: to be copied."""
    given = {name: getattr(options, name) for name in ("project", "region", "profile", "bucket")}
    if given["project"] == DEFAULT_PROJECT:
        del given["project"]
    named = [f"--{name} {shlex.quote(text)}" for name, text in given.items() if text]
    return " ".join(["python -m training.launch", words, *named])


def as_json(values: Sequence[Any]) -> str:
    """The values as indented JSON, for people to read, without passwords in addresses."""
    shown = "\n".join(json.dumps(value, indent=2, default=str) for value in values)
    return re.sub(r"://[^/@\s]+@", "://***@", shown)  # the name and password of an address
