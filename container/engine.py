"""The docker command line, as build, push and the contract checker call it; what it fails with becomes a sentence.

So does what these commands themselves fail with, or are ended by.
"""

import logging
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from types import FrameType
from typing import IO

log = logging.getLogger("container")

TELLING_LINES = 24
"""At the end of what docker prints: why it failed, the end of that step's log, and where in the Dockerfile it is."""


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command."""

END_LIMIT_S = 10.0
"""How long docker's command has to end once it is told to."""


class ContainerError(Exception):
    """Building, pushing or checking an image cannot go on; the sentence says why and what to do."""


def exit_status(command: Callable[[], int], when_ended: str = "") -> int:
    """Run one of this package's commands: what it fails with is a sentence in the log, and no trace.

    SIGTERM and SIGHUP end it as Ctrl-C does, so that what it has started is removed, and so `when_ended` says; one that
    is ignored stays so.
    Returns: what `command` returns; 1 when it failed, 128 plus the signal's number when one ended it.
    """
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: old for number in ENDING if (old := signal.getsignal(number)) in defaults}
    try:
        for number in before:
            signal.signal(number, _interrupt)
        return command()
    except ContainerError as exc:
        log.error("%s", exc)
    except OSError as exc:  # no memory, no process, no place
        what = f" ({exc.filename})" if exc.filename else ""
        log.error("This machine cannot go on%s: %s.", what, exc.strerror or exc)
    except KeyboardInterrupt as exc:
        number = signal.Signals(exc.args[0]) if exc.args else signal.SIGINT
        log.error("ended by %s%s", number.name, when_ended)
        return 128 + number
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first; no other disturbs what is done then. Make sends its own on, beside the one to the group."""
    for each in ENDING:
        if signal.getsignal(each) is _interrupt:
            signal.signal(each, lambda *_: None)  # not SIG_IGN, which docker would inherit
    raise KeyboardInterrupt(number)


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
        text=True, errors="replace", env={**os.environ, "DOCKER_BUILDKIT": "1", **(env or {})}, process_group=0,
    ) as process:  # fmt: skip
        try:
            if not show:
                out, err = process.communicate(stdin)
            else:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.close()
                out = err = _shown(process.stdout)
        except BaseException:
            process.terminate()
            try:
                process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    if process.returncode:
        raise ContainerError(explain(err or out, arguments[0]))
    return out


def explain(output: str, command: str) -> str:
    """One sentence for what docker printed when it failed: what a build wrote before the end is not docker's word."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("See 'docker")]
    last = lines[-1] if lines else "it said nothing"
    at = f" at {os.environ['DOCKER_HOST']} (DOCKER_HOST)" if os.environ.get("DOCKER_HOST") else ""
    for pattern, sentence in _KNOWN + (_OF_BUILDS if command == "build" else ()):
        if any(re.search(pattern, line, re.IGNORECASE) for line in lines[-TELLING_LINES:]):
            return sentence.format(last=last.removesuffix("."), at=at)
    return f"docker {command} failed: {last.removesuffix('.')}."


def require_engine() -> None:
    """Ask whether an engine answers. Raises: ContainerError."""
    docker("version", "--format", "{{.Server.Version}}")


_KNOWN: tuple[tuple[str, str], ...] = (
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
        "No docker engine answers{at}; start one ('sudo systemctl start docker', Docker Desktop), or say with "
        "DOCKER_HOST where one is.",
    ),
)  # fmt: skip
_OF_BUILDS: tuple[tuple[str, str], ...] = (
    (
        r"failed to (resolve source metadata|create LLB definition).*"
        r"(no such host|failed to do request|denied|manifest unknown|not found)",
        "The base image cannot be fetched: {last}. Without network, BASE_IMAGE=NAME:TAG builds on an image that is "
        "here ('docker image ls').",
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
