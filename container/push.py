"""`python -m container.push`: brings an image to ECR so that SageMaker takes it, and writes down where it is.

    python -m container.push [--target serve] [--image NAME] [--repository NAME] [--region R] [--profile P]

The tag is the version, the target and a hash of the image's content (container/content.py), so that the same content
has the same tag, whenever and from whichever commit it was built, and another content never the same one (the
repository's tags are immutable). What is there already is not sent again; either way its manifest is read back and
checked.

Written to artifacts/image.json (`--output`), for deployment to read; one entry for each target, the others stay:

    {"serve": {"uri": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/resnet34-sagemaker:0.1.0-serve-3f2a9c41d7e0",
               "digest": "sha256:...", "media_type": "application/vnd.docker.distribution.manifest.v2+json",
               "platform": "linux/amd64", "compressed_bytes": 2912345678, "cuda": "13.0", "account": "123456789012",
               "region": "eu-central-1", "revision": "0f9c...", "pushed_at": "2026-11-22T18:00:00+00:00"},
     "serve-cpu": {..., "cuda": null}, "train": {...}}

`uri` is what CreateModel and CreateTrainingJob take. `cuda` is null where the image has none, and so needs no
InferenceAmiVersion (container/drivers.py has the one it needs). Exit status: 0, or 1 with one sentence on stderr.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from container.build import NAME, PLATFORM, ROOT, TARGETS
from container.content import REVISION_LABEL, content_hash
from container.ecr import PUSH_ACTIONS, Ecr, Repository, policy
from container.engine import ContainerError, docker, exit_status, require_engine
from container.registry import SCHEMA_2, Pushed, look
from container.rules import CUDA_LABEL

log = logging.getLogger("container")

OUTPUT = ROOT / "artifacts" / "image.json"
TARGET_LABEL = "resnet34.target"
VERSION_LABEL = "org.opencontainers.image.version"
WITHOUT_DOCKER = (
    "Without docker 'python -m training.launch train --image URI --send-code' trains in AWS's own PyTorch image."
)
USER = "AWS"
"""The user that ECR's tokens are for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Push; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m container.push", description="Push an image to ECR for SageMaker.")
    parser.add_argument("--target", choices=TARGETS, default="serve", help="which of the images (default: serve)")
    parser.add_argument("--image", help=f"its name here (default: {NAME}:TARGET)")
    parser.add_argument("--repository", default=NAME, help=f"its name in ECR (default: {NAME})")
    parser.add_argument("--region", help="AWS region (default: that of the environment or profile)")
    parser.add_argument("--profile", help="AWS profile")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file to note the URI in")
    parser.add_argument("--policy", action="store_true", help="print the IAM policy that a push needs, and end")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if given.policy:
        sys.stdout.write(policy("ACCOUNT", given.region or "REGION", given.repository) + "\n")
        return 0

    def command() -> int:
        entry = push(
            given.image or f"{NAME}:{given.target}", given.target, given.repository, given.region, given.profile
        )
        note(given.output, given.target, entry)
        sys.stdout.write(f"{entry['uri']}\n")
        return 0

    return exit_status(command)


def push(
    image: str, target: str, repository_name: str = NAME, region: str | None = None, profile: str | None = None
) -> dict[str, Any]:
    """Push the local `image`. Returns: its entry for the file, see above. Raises: ContainerError."""
    try:
        require_engine()
    except ContainerError as exc:
        if target != "train":
            raise
        raise ContainerError(f"{exc} {WITHOUT_DOCKER}") from exc
    inspected = inspect(image, target)
    ecr = Ecr(region, profile)
    log.info("account %s, region %s, as %s", ecr.account, ecr.region, ecr.arn)
    repository = ecr.repository(repository_name)
    labels = inspected["Config"].get("Labels") or {}
    password = ecr.password()
    log.info("reading %s for its tag", image)
    tag = content_tag(labels.get(VERSION_LABEL, ""), target, content_hash(image))
    pushed = look(repository.registry, repository.name, tag, USER, password)
    if pushed is None:
        _send(image, repository, tag, password)
        pushed = look(repository.registry, repository.name, tag, USER, password)
        if pushed is None:
            raise ContainerError(f"docker says it pushed {tag}, and {repository.uri} does not have it; push again.")
    else:
        log.info("%s:%s is there already", repository.uri, tag)
    problem = pushed.problem(PLATFORM)
    if problem is not None:
        raise ContainerError(
            f"{problem} The tag is immutable and follows from the content: first remove what has it, 'aws ecr "
            f"batch-delete-image --region {repository.region} --repository-name {repository.name} --image-ids "
            f"imageTag={tag}'."
        )
    log.info("%s, %s, %.0f MB compressed", pushed.media_type, pushed.platform, pushed.compressed_bytes / 1e6)
    return entry_of(repository, tag, pushed, labels)


def inspect(image: str, target: str) -> dict[str, Any]:
    """What docker knows of the local image.

    Raises: ContainerError when there is none, SageMaker takes none of its form or for its machines, or it is ours of
    another target or without labels.
    """
    try:
        found: dict[str, Any] = json.loads(docker("image", "inspect", image))[0]
    except ContainerError as exc:
        if "no such image" not in str(exc).lower():
            raise
        raise ContainerError(f"There is no image {image} here: build it with 'make image TARGET={target}'.") from exc
    platform = f"{found['Os']}/{found['Architecture']}"
    if platform != PLATFORM:
        raise ContainerError(
            f"{image} is for {platform}, SageMaker's instances are {PLATFORM}: 'make image TARGET={target}' builds "
            "for them."
        )
    media_type = (found.get("Descriptor") or {}).get("mediaType", SCHEMA_2)  # containerd's store alone tells
    if media_type != SCHEMA_2:
        raise ContainerError(
            f"{image} is {media_type} in docker's store and would be pushed so, and SageMaker takes {SCHEMA_2} alone: "
            f"'make image TARGET={target}' builds that, 'docker compose build' need not."
        )
    labels = found["Config"].get("Labels") or {}
    if labels.get(TARGET_LABEL, target) != target:
        raise ContainerError(
            f"{image} is the image {labels[TARGET_LABEL]}, not {target}: push it with 'make push "
            f"TARGET={labels[TARGET_LABEL]} IMAGE={image}', or leave IMAGE out."
        )
    if labels.get(VERSION_LABEL) == "":  # our Dockerfile, which was told none
        raise ContainerError(f"{image} does not say its version: build it with 'make image TARGET={target}'.")
    return found


def content_tag(version: str, target: str, content: str) -> str:
    """`0.1.0-serve-3f2a9c41d7e0`, with the first of `content_hash`."""
    return "-".join(part for part in (version, target, content[:12]) if part)


def entry_of(repository: Repository, tag: str, pushed: Pushed, labels: dict[str, str]) -> dict[str, Any]:
    """What the file says about one image."""
    return {
        "uri": f"{repository.uri}:{tag}",
        **asdict(pushed),
        "cuda": labels.get(CUDA_LABEL),
        "account": repository.account,
        "region": repository.region,
        "revision": labels.get(REVISION_LABEL, "unknown"),
        "pushed_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def note(path: Path, target: str, entry: dict[str, Any]) -> None:
    """Put the entry into the file, which is replaced as a whole. Raises: ContainerError when it cannot be written."""
    try:
        entries = json.loads(path.read_text()) if path.is_file() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(json.dumps({**entries, target: entry}, indent=2) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError, TypeError) as exc:
        raise ContainerError(f"The image is pushed as {entry['uri']}, and {path} cannot be written: {exc}.") from exc


def _send(image: str, repository: Repository, tag: str, password: str) -> None:
    """Log in, tag and push. Raises: ContainerError."""
    name = f"{repository.uri}:{tag}"
    with _logged_in(repository.registry, password) as env:
        docker("tag", image, name)
        try:
            docker("push", name, env=env, show=True)
        except ContainerError as exc:
            raise ContainerError(_push_sentence(str(exc))) from exc
        finally:
            docker("rmi", "--no-prune", name)


@contextlib.contextmanager
def _logged_in(registry: str, password: str) -> Iterator[dict[str, str]]:
    """docker's environment with a configuration of its own, so that no token stays on the disk."""
    host = (
        os.environ.get("DOCKER_HOST") or docker("context", "inspect", "--format", "{{.Endpoints.docker.Host}}").strip()
    )  # the context is named in the user's configuration
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="docker-config-"))
            # An entry of its own keeps docker from the helper it finds on PATH, which would keep the token.
            (Path(folder) / "config.json").write_text(json.dumps({"auths": {registry: {}}}))
        except OSError as exc:
            raise ContainerError(
                f"There is no place for the folder that docker's login takes: {exc.strerror or exc}; 'df -h' shows "
                "what is full, TMPDIR names another place."
            ) from exc
        env = {"DOCKER_CONFIG": folder, "DOCKER_HOST": host}
        docker("login", "--username", USER, "--password-stdin", registry, stdin=password, env=env)
        yield env


def _push_sentence(sentence: str) -> str:
    """Say what is missing where the registry refused."""
    action = re.search(r"not authorized to perform:? (ecr:\w+)", sentence)
    if action:
        return f"The push lacks {action[1]}: allow it in IAM; 'python -m container.push --policy' prints all it takes."
    if re.search(r"denied|unauthorized|no basic auth credentials|403 Forbidden", sentence, re.IGNORECASE):
        return (
            f"The registry refused the push ({sentence.rstrip('.')}): it takes {', '.join(PUSH_ACTIONS)}; "
            "'python -m container.push --policy' prints the policy."
        )
    return sentence


if __name__ == "__main__":
    sys.exit(main())
