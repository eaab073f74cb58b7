"""Our code for images that have none of it: AWS's PyTorch images, or others with SageMaker's training toolkit.

The toolkit unpacks an archive from S3, installs its requirements.txt and runs the program that hyperparameters name
(https://github.com/aws/sagemaker-training-toolkit, README; the SDK's `SourceCode` does the same). torch and torchvision
are the image's own.
"""

import gzip
import hashlib
import io
import json
import re
import tarfile
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from training.errors import ConfigError
from training.launch import data
from training.launch.names import Project
from training.launch.session import Aws

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("service", "training")
ENDINGS = (".py", ".toml", ".html", ".j2", ".css", ".js")
OF_THE_IMAGE = ("torch", "torchvision")
SETUP = {"training": "make setup", "mlflow": "uv sync --inexact --group mlflow"}
"""What installs the packages of each group that can be sent."""
PROGRAM = "sagemaker_entry.py"
ARCHIVE = "sourcedir.tar.gz"

_ENTRY = '''"""What the training toolkit starts: the same as `python -m training`, with our folder to import from."""
import sys
from training.__main__ import main
sys.exit(main())
'''


def groups_of(values: Mapping[str, str]) -> tuple[str, ...]:
    """The groups of packages that a training with these hyperparameters needs."""
    return ("training", "mlflow") if values.get("mlflow_uri") else ("training",)


def require_sendable(values: Mapping[str, str], rules: bool = False) -> None:
    """Raises: ConfigError where the training, or with `rules` AWS's, which read its tensors, need what is not sent."""
    if rules or values.get("debugger") == "on":
        given, what = ("--debugger", "it") if rules else ('debugger = "on" in --recipe', "the line")
        raise ConfigError(
            f"--send-code: {given} needs smdebug, whose old packages are sent to no other image; leave {what} out, or "
            "train in our own (`make image TARGET=train`, without --send-code)."
        )


def archive(groups: Sequence[str] = ("training",), root: Path = ROOT) -> bytes:
    """The tar.gz of our packages, their requirements and the program; the same bytes for the same content."""
    contents = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for package in PACKAGES
        for path in sorted((root / package).rglob("*"))
        if path.suffix in ENDINGS and path.is_file()
    }
    contents |= {PROGRAM: _ENTRY.encode(), "requirements.txt": requirements(groups, root).encode()}
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name, content in sorted(contents.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def requirements(groups: Sequence[str] = ("training",), root: Path = ROOT) -> str:
    """What a training with these groups of packages needs beside torch, in the versions installed here.

    Raises: ConfigError where one of them is not installed.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text())
    wanted = [(each, SETUP["training"]) for each in project["project"]["dependencies"]]
    wanted += [(each, SETUP[group]) for group in groups for each in project["dependency-groups"][group]]
    lines = []
    for each, setup in wanted:
        if not isinstance(each, str) or (name := re.split(r"[^\w.-]", each, maxsplit=1)[0]) in OF_THE_IMAGE:
            continue
        _, semicolon, marker = each.partition(" ;")
        try:
            lines.append(f"{name}=={metadata.version(name)}{semicolon}{marker}")
        except metadata.PackageNotFoundError as exc:
            if not semicolon:  # else it is not for machines like this one, and the training does without
                raise ConfigError(f"--send-code: {exc.name} is not installed here; `{setup}` first.") from exc
    return "\n".join([*lines, ""])


def hyperparameters(
    aws: Aws, project: Project, dry_run: bool, groups: Sequence[str] = ("training",)
) -> dict[str, str]:  # fmt: skip
    """What tells the toolkit where our code is, which is uploaded now. Raises: ConfigError, AwsError."""
    packed = archive(groups)
    key = f"code/{hashlib.sha256(packed).hexdigest()[:16]}/{ARCHIVE}"
    if not dry_run:
        data.ensure_bucket(aws, project)
        aws.client("s3").put_object(Bucket=project.bucket, Key=project.key(key), Body=packed)
    values = {
        "sagemaker_program": PROGRAM,
        "sagemaker_submit_directory": project.uri(key),
        "sagemaker_container_log_level": 20,
        "sagemaker_region": aws.region,
    }
    return {name: json.dumps(value) for name, value in values.items()}
