"""`python -m container.build`: builds one of the images, in the form that SageMaker takes.

    python -m container.build [--target serve|serve-cpu|train] [--tag NAME] [--base-image IMAGE] [--fresh]

SageMaker takes one image for linux/amd64 in Docker's own media types. BuildKit's attestations would make an OCI index
of it, which CreateModel refuses, so they are turned off (https://github.com/moby/buildkit/issues/5480).
"""

import argparse
import logging
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from container.engine import docker, exit_status, require_engine

log = logging.getLogger("container")

ROOT = Path(__file__).parent.parent
TARGETS = ("serve", "serve-cpu", "train")
NAME = "resnet34-sagemaker"
PLATFORM = "linux/amd64"


def main(arguments: Sequence[str] | None = None) -> int:
    """Build; returns the exit status: 0, or with a sentence on stderr 1, or 128 plus the number of a signal."""
    parser = argparse.ArgumentParser(prog="python -m container.build", description="Build one of the images.")
    parser.add_argument("--target", choices=TARGETS, default="serve")
    parser.add_argument("--tag", help=f"name of the image (default: {NAME}:TARGET)")
    parser.add_argument(
        "--base-image",
        default=os.environ.get("BASE_IMAGE", ""),
        help="build on this image instead of the pinned one (default: $BASE_IMAGE)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="every layer anew, on the newest base of that name: with today's upgrades"
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def command() -> int:
        tag = build(given.target, given.tag or f"{NAME}:{given.target}", given.base_image, given.fresh)
        size = int(docker("image", "inspect", "--format", "{{.Size}}", tag))
        log.info("built %s: %.0f MB", tag, size / 1e6)
        return 0

    return exit_status(command)


def build(target: str, tag: str, base_image: str = "", fresh: bool = False) -> str:
    """Build `target` as `tag`, all of it anew if `fresh`. Returns: the tag. Raises: ContainerError."""
    require_engine()
    labels = {"SOURCE": source(), "VERSION": version(), "REVISION": revision()}
    command = ["build", "--file", str(ROOT / "container" / "Dockerfile"), "--target", target, "--platform", PLATFORM]
    for name, value in {**labels, "BASE_IMAGE": base_image}.items():
        command += ["--build-arg", f"{name}={value}"]
    if fresh:
        command += ["--no-cache"] if base_image else ["--no-cache", "--pull"]  # a base of one's own may be nowhere else
    command += [*media_types(tag), str(ROOT)]
    docker(*command, env={"BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}, show=True)
    return tag


def media_types(tag: str) -> list[str]:
    """The flags that name the image and keep it to Docker's media types, as far as this docker knows them.

    `docker build` is buildx from Docker 23 on; the builder of 20.10, also beside a buildx, knows no others.
    """
    if "--provenance" not in docker("build", "--help"):
        return ["--tag", tag]
    flags = ["--provenance=false", "--sbom=false"]
    if "containerd.snapshotter" in docker("info", "--format", "{{.DriverStatus}}"):
        return [*flags, "--output", f"type=image,name={tag},oci-mediatypes=false"]
    return [*flags, "--tag", tag]


def version() -> str:
    """The project's, from pyproject.toml."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def revision() -> str:
    """The commit, with "-dirty" where files differ from it; "unknown" outside of a repository."""
    commit = _git("rev-parse", "HEAD")
    return "unknown" if not commit else f"{commit}-dirty" if _git("status", "--porcelain") else commit


def source(url: str | None = None) -> str:
    """Where the code is (default: the remote origin), without whoever may fetch it there; "unknown" for a folder."""
    url = _git("remote", "get-url", "origin") if url is None else url
    parts = urlsplit(url)
    if parts.netloc:
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    host, colon, path = url.rpartition("@")[2].partition(":")  # as ssh has it: git@host:path
    return f"{host}:{path}" if colon and "/" not in host and not path.startswith("//") else "unknown"


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(  # noqa: S603
            ["git", "-C", str(ROOT), *arguments],  # noqa: S607
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
