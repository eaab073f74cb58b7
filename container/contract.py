"""`python -m container.contract IMAGE --model DIR`: does an image keep SageMaker's rules for hosting?

Any image, from anybody: it is started with `docker run IMAGE serve` the way SageMaker does (the model read-only) and
asked over HTTP. One line for each rule (container/rules.py), PASS or FAIL and what was seen; what is about time is
measured once more before it fails, as this machine may be busy. What AWS does not ask for is marked (recommended), such
as a start with a read-only root and without network. `--docker-options='--gpus all'` gives it a GPU.
Exit status: 0 when all hold, 1 when one does not, recommended or not, 2 for wrong arguments, 128 plus the number of the
signal that ended it.
"""

import argparse
import contextlib
import http.client
import json
import logging
import shlex
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from container.engine import ContainerError, docker, exit_status, require_engine
from container.rules import (
    OF_THE_IMAGE,
    OF_THE_SERVICE,
    STARTUP_LIMIT_S,
    TIMED,
    Result,
    Subject,
    start,
)
from container.running import picture
from container.starts import OF_OTHER_STARTS

log = logging.getLogger("container")

STARTS = "`serve` starts with the model read-only, and /ping is 200 within 8 minutes"
NOT_REACHED: Result = (False, "not reached")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m container.contract",
        description="Check an image against SageMaker's rules for hosting.",
        epilog="Exit status: 0 when all hold, 1 when one does not, recommended or not, 2 for wrong arguments.",
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--model", type=Path, default=Path("artifacts/model"), help="folder to mount at /opt/ml/model")
    parser.add_argument("--payload", type=Path, help="file to send to /invocations (default: a PNG of noise)")
    parser.add_argument("--content-type", default="image/png", help="its media type (default: image/png)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="as in docker run")
    parser.add_argument(
        "--patience", type=float, default=120, metavar="S", help="for a start that must fail to end (default: 120)"
    )
    parser.add_argument(
        "--docker-options", default="", metavar="WORDS", help="more words for docker run, such as '--gpus all'"
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if not given.image:
        parser.error("IMAGE is empty; give the name of an image, such as resnet34-sagemaker:serve")
    if given.model.is_file():
        parser.error(f"--model {given.model} is a file; give the folder that SageMaker would unpack it into")
    if not given.model.is_dir():
        parser.error(f"--model {given.model}: there is no such folder")
    if not given.patience > 0:
        parser.error(f"--patience {given.patience:g}: give seconds above 0")
    if given.payload and not given.payload.is_file():
        parser.error(f"--payload {given.payload}: there is no such file")
    payload = given.payload.read_bytes() if given.payload else picture()
    environment = dict(item.partition("=")[::2] for item in given.env)
    options = tuple(shlex.split(given.docker_options))
    subject = Subject(given.image, given.model, payload, given.content_type, environment, given.patience, options)

    def command() -> int:
        broken, count = [], 0
        with contextlib.closing(check(subject)) as checked:
            for rule, (ok, seen) in checked:
                log.info("%s  %s: %s", "PASS" if ok else "FAIL", rule, seen)
                count += 1
                broken += [] if ok else [rule]
        demanded = [rule for rule in broken if not rule.endswith("(recommended)")]
        verdict = f"{len(demanded)} that SageMaker demands do not" if demanded else "all that SageMaker demands do"
        log.info("%d of %d rules hold, %s", count - len(broken), count, verdict)
        return 1 if broken else 0

    return exit_status(command, "; what it had started is removed")


def check(subject: Subject) -> Generator[tuple[str, Result]]:
    """Every rule in turn, with whether it holds and what was seen. Raises: ContainerError without engine or image."""
    require_engine()
    try:
        inspected: dict[str, Any] = json.loads(docker("image", "inspect", subject.image))[0]
    except ContainerError as exc:
        if "no such image" not in str(exc).lower():
            raise
        raise ContainerError(
            f"There is no image {subject.image} here: fetch it with 'docker pull {subject.image}', or 'make image' "
            "builds ours."
        ) from exc
    for rule, judge in OF_THE_IMAGE.items():
        yield rule, judge(inspected)
    usual = yield from _of_the_service(subject)
    for rule, judge_start in OF_OTHER_STARTS.items():  # that a start ends says nothing where none succeeds
        yield rule, NOT_REACHED if usual is None else judged(judge_start, subject, usual)


def _of_the_service(subject: Subject) -> Generator[tuple[str, Result], None, str | None]:
    """One container, asked everything, then told to stop. Returns: what it logged; None where it did not start."""
    with contextlib.ExitStack() as stack:
        try:
            service = stack.enter_context(start(subject))
            ready_s, before = service.wait_until_ready(STARTUP_LIMIT_S)
        except ContainerError as exc:
            yield STARTS, (False, str(exc))
            for rule in OF_THE_SERVICE:
                yield rule, NOT_REACHED
            return None
        yield STARTS, (True, f"/ping 200 after {ready_s:.1f} s" + (f", {sorted(before)} before" if before else ""))
        for rule, judge in OF_THE_SERVICE.items():
            yield rule, judged(judge, service, subject, times=2 if rule in TIMED else 1)
        return service.log()


def judged(judge: Callable[..., Result], *what: object, times: int = 1) -> Result:
    """Ask a rule, up to `times` until it holds; what fails on the way is the rule's failure."""
    try:
        ok, seen = judge(*what)
    except (OSError, http.client.HTTPException, ContainerError) as exc:
        ok, seen = False, str(exc) or type(exc).__name__
    if ok or times == 1:
        return ok, seen
    ok, again = judged(judge, *what, times=times - 1)
    return ok, f"{again} (before that: {seen})"


if __name__ == "__main__":
    sys.exit(main())
