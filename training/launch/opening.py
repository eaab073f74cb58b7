"""What the commands share: the account and project that the flags name."""

import argparse
import json
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from training.errors import ConfigError
from training.launch import instances
from training.launch.errors import AwsError
from training.launch.names import DEFAULT_PROJECT, Project
from training.launch.session import Aws, NoRegion, connect

log = logging.getLogger("training")

Options = argparse.Namespace
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
"""What S3 allows, and of old in us-east-1."""


def opened(options: Options) -> tuple[Aws, Project]:
    """The account and the project that the flags name. Raises: ConfigError, AwsError."""
    aws = connected(options)
    return aws, project_of(aws, options)


def connected(options: Options) -> Aws:
    """AWS in the region that the flags name; what is mistyped is told. No credentials are needed. Raises: ConfigError,
    AwsError.
    """
    _project(options, "")
    if options.bucket and not BUCKET.fullmatch(options.bucket):
        raise ConfigError(
            f"--bucket {options.bucket}: give a name alone, of 3 to 63 small letters, digits, dots and hyphens."
        )
    aws = connect(options.region, options.profile)
    instances.look_at(aws, vars(options))
    return aws


def project_of(aws: Aws, options: Options) -> Project:
    """The project that the flags name, whose bucket is the account's unless one is given. Raises: AwsError."""
    return _project(options, options.bucket or f"sagemaker-{aws.region}-{aws.account}")


def opened_or_placeholders(options: Options) -> tuple[str, Project]:
    """AWS's partition and the project; where AWS cannot be asked, words in capitals stand for what it would tell.

    Raises: ConfigError.
    """
    try:
        aws = connected(options)
    except NoRegion:
        log.info("no region is set: REGION and ACCOUNT stand for yours, and the partition is taken to be aws")
        return "aws", _project(options, options.bucket or "sagemaker-REGION-ACCOUNT")
    try:
        return aws.partition, project_of(aws, options)
    except AwsError as exc:
        log.info("AWS cannot be asked (%s): ACCOUNT stands for your account's number", exc.code)
        bucket = options.bucket or f"sagemaker-{aws.region}-ACCOUNT"
        return aws.boto.get_partition_for_region(aws.region), _project(options, bucket)


def _project(options: Options, bucket: str) -> Project:
    return Project(options.project, bucket)


def command_line(options: Options, words: str) -> str:
    """`python -m training.launch WORDS`, for the same project, region, profile and bucket: to be copied."""
    given = {name: getattr(options, name) for name in ("project", "region", "profile", "bucket")}
    if given["project"] == DEFAULT_PROJECT:
        del given["project"]
    named = [f"--{name} {shlex.quote(text)}" for name, text in given.items() if text]
    return " ".join(["python -m training.launch", words, *named])


def as_lines(values: Mapping[str, object]) -> str:
    """Names and values below each other, for people to read, without passwords in addresses."""
    width = max(map(len, values))
    return _masked("\n".join(f"  {name:<{width}}  {value}" for name, value in values.items()))


def as_json(values: Sequence[Any]) -> str:
    """The values as indented JSON, for people to read, without passwords in addresses."""
    shown = "\n".join(json.dumps(value, indent=2, default=str) for value in values)
    return _masked(shown)


def _masked(text: str) -> str:
    return re.sub(r"://[^/@\s]+@", "://***@", text)  # the name and password of an address
