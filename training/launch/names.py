"""Names and tags: what a project's things are called, so that a repeated command finds what an earlier one made.

Every name follows from the project and, where content matters, from a digest of the whole request. The same request
has the same name: what exists under it is what was asked for.
"""

import hashlib
import json
import re
from dataclasses import dataclass

from training.errors import ConfigError

DEFAULT_PROJECT = "resnet34"
PROJECT_TAG, MAKER_TAG, MAKER = "project", "made-by", "training.launch"
MAX_PROJECT = 18
"""A tuning job's name has 32 characters at most: project, kind, digest, attempt."""
PARTS = (
    "async", "batch", "captured", "checkpoints", "code", "data", "debugger", "jobs", "models", "profiler",
    "tensorboard",
)  # fmt: skip
"""The folders below the project's prefix in S3 that these commands write, themselves or through AWS. Objects carry no
tags of ours where AWS writes them, so the folder says whose they are: `delete --data` removes these, and no others."""


def digest(value: object) -> str:
    """Eight hexadecimal digits that follow from `value` as JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Project:
    """Everything of a project carries its name: in AWS's lists, in S3, and as a tag (for bills and for `delete`)."""

    name: str
    bucket: str

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"[a-z0-9](-?[a-z0-9]){{0,{MAX_PROJECT - 1}}}", self.name) or len(self.name) > MAX_PROJECT:
            raise ConfigError(
                f"--project {self.name}: 1 to {MAX_PROJECT} small letters, digits and single hyphens are allowed."
            )

    @property
    def tags(self) -> list[dict[str, str]]:
        """What everything that can carry tags is given."""
        return [{"Key": PROJECT_TAG, "Value": self.name}, {"Key": MAKER_TAG, "Value": MAKER}]

    @property
    def endpoint(self) -> str:
        """The one endpoint of a project; its address does not change when the model does."""
        return self.name

    @property
    def package_group(self) -> str:
        """The model registry's group."""
        return self.name

    @property
    def role(self) -> str:
        """The name of the role that `iam-role` makes."""
        return f"{self.name}-sagemaker"

    def of(self, kind: str, content: object) -> str:
        """`PROJECT-kind-digest`, of a thing that follows from `content`."""
        return f"{self.name}-{kind}-{digest(content)}"

    def owns(self, kind: str, name: str) -> bool:
        """Whether `name` is one that `of` gives for this kind, with an attempt's number behind it or without.

        The whole name is looked at: what project `a-train` has begins with `a-train-` as well.
        """
        return re.fullmatch(rf"{re.escape(self.name)}-{kind}-[0-9a-f]{{8}}(-\d+)?", name) is not None

    def key(self, *parts: str) -> str:
        """A key in S3 below the project's prefix, in one of PARTS; without `parts` the prefix."""
        assert not parts or parts[0].partition("/")[0] in PARTS, f"{parts[0]} would not be deleted"
        return "/".join((self.name, *parts))

    def uri(self, *parts: str) -> str:
        """The s3:// address of such a key."""
        return f"s3://{self.bucket}/{self.key(*parts)}"


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/key` -> ("bucket", "some/key"). Raises: ConfigError."""
    found = re.fullmatch(r"s3://([^/]+)/?(.*)", uri)
    if not found:
        raise ConfigError(f"{uri} is no S3 address; one looks like s3://bucket/folder/file.")
    return found[1], found[2]
