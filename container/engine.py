"""The docker command line, as build, push and the contract checker call it; what it fails with becomes a sentence."""

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import IO

log = logging.getLogger("container")

TELLING_LINES = 24
"""At the end of what docker prints: why it failed, the end of that step's log, and where in the Dockerfile it is."""


class ContainerError(Exception):
    """Building, pushing or checking an image cannot go on; the sentence says why and what to do."""


def docker(*arguments: str, stdin: str | None = None, env: Mapping[str, str] | None = None, show: bool = False) -> str:
    """Run `docker ARGUMENTS` and return what it prints; with `show`, each line is logged as it comes.

    Raises: ContainerError with docker's own last words, or what to do where they are known.
    """
    program = shutil.which("docker")
    if program is None:
        raise ContainerError("The command docker is not installed: https://docs.docker.com/engine/install/ says how.")
    command = [program, *arguments]
    with subprocess.Popen(  # noqa: S603  # our own words, no shell
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT if show else subprocess.PIPE,
        text=True, errors="replace", env={**os.environ, "DOCKER_BUILDKIT": "1", **(env or {})},
    ) as process:  # fmt: skip
        if not show:
            out, err = process.communicate(stdin)
        else:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            out = err = _shown(process.stdout)
    if process.returncode:
        raise ContainerError(explain(err or out, arguments[0]))
    return out


def explain(output: str, command: str) -> str:
    """One sentence for what docker printed when it failed: what a build wrote before the end is not docker's word."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("See 'docker")]
    last = lines[-1] if lines else "it said nothing"
    for pattern, sentence in _KNOWN:
        if any(re.search(pattern, line, re.IGNORECASE) for line in lines[-TELLING_LINES:]):
            return sentence.format(last=last)
    return f"docker {command} failed: {last.removesuffix('.')}."


def os_sentence(exc: OSError) -> str:
    """One sentence for what this machine refused: a file, a process, memory."""
    what = f" ({exc.filename})" if exc.filename else ""
    return f"This machine cannot go on{what}: {exc.strerror or exc}."


def require_engine() -> None:
    """Ask whether an engine answers. Raises: ContainerError."""
    docker("version", "--format", "{{.Server.Version}}")


_KNOWN = (
    (
        r"no space left on device|disk quota exceeded",
        "The disk that docker keeps images on is full; 'docker system df' shows what fills it, "
        "'docker builder prune' and 'docker image prune' free it.",
    ),
    (
        r"permission denied while trying to connect to the docker|dial unix [^:]*: connect: permission denied",
        "You may not use the docker engine: add yourself to the group docker, or call with sudo.",
    ),
    (
        r"(?:cannot|failed to) connect to the docker|is the docker daemon running|^error during connect:",
        "No docker engine answers; start one ('sudo systemctl start docker', Docker Desktop) or set DOCKER_HOST.",
    ),
    (
        r"^unknown flag|BuildKit is enabled but the buildx component is missing|the --mount option requires BuildKit",
        "This docker cannot build the image: it takes BuildKit, so Docker 20.10 or later, and from 23 on its plugin "
        "buildx ({last}).",
    ),
)  # fmt: skip


def _shown(lines: IO[str]) -> str:
    kept = []
    for line in lines:
        log.info("%s", line.rstrip())
        kept.append(line)
    return "".join(kept)
