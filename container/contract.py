"""`python -m container.contract IMAGE --model DIR`: does an image keep SageMaker's rules for hosting?

Any image, from anybody: it is started with `docker run IMAGE serve` the way SageMaker does (model and root file system
read-only, /tmp writable, no way out to the network) and asked over HTTP. One line for each rule, PASS or FAIL and
what was seen. Exit status: 0 when all hold, 1 when one does not, 2 for wrong arguments.

The rules: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html, batch-transform.html,
and for the manifest https://github.com/aws/sagemaker-python-sdk/issues of images that CreateModel refused.
"""

import argparse
import http.client
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from container.engine import ContainerError, docker, require_engine
from container.running import Load, Running, isolated_network, picture, running

log = logging.getLogger("container")

STARTUP_LIMIT_S = 8 * 60
PING_LIMIT_S = 2.0
CONNECT_LIMIT_S = 0.25
INVOCATION_LIMIT_S = 60
STOP_LIMIT_S = 30
MAX_PAYLOAD_BYTES = 25 * 2**20
LOAD_CLIENTS, LOAD_S = 16, 4
OTHER_PORT = 9217

Result = tuple[bool, str]


@dataclass(frozen=True)
class Subject:
    """What is checked, with what."""

    image: str
    model: Path
    payload: bytes
    content_type: str
    environment: dict[str, str]
    patience_s: float
    """How long a start that cannot succeed may take until it ends; ours, the platform waits 8 minutes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m container.contract", description="Check an image against SageMaker's rules for hosting."
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--model", type=Path, default=Path("artifacts/model"), help="folder to mount at /opt/ml/model")
    parser.add_argument("--payload", type=Path, help="file to send to /invocations (default: a PNG of noise)")
    parser.add_argument("--content-type", default="image/png", help="its media type (default: image/png)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="as in docker run")
    parser.add_argument(
        "--patience", type=float, default=120, metavar="S", help="for a start that must fail to end (default: 120)"
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if not given.model.is_dir():
        parser.error(f"--model {given.model}: there is no such folder")
    payload = given.payload.read_bytes() if given.payload else picture()
    environment = dict(item.partition("=")[::2] for item in given.env)
    subject = Subject(given.image, given.model, payload, given.content_type, environment, given.patience)
    failed = 0
    try:
        for rule, (ok, seen) in check(subject):
            log.info("%s  %s: %s", "PASS" if ok else "FAIL", rule, seen)
            failed += not ok
    except ContainerError as exc:
        log.error("%s", exc)
        return 1
    return 1 if failed else 0


def check(subject: Subject) -> Iterator[tuple[str, Result]]:
    """Every rule in turn, with whether it holds and what was seen. Raises: ContainerError without engine or image."""
    require_engine()
    inspected: dict[str, Any] = json.loads(docker("image", "inspect", subject.image))[0]
    for rule, judge in _OF_THE_IMAGE.items():
        yield rule, judge(inspected)
    with isolated_network() as network:
        yield from _of_the_service(subject, network)
        for rule, judge_start in _OF_OTHER_STARTS.items():
            yield rule, _judged(judge_start, subject, network)


def _platform(image: dict[str, Any]) -> Result:
    seen = f"{image['Os']}/{image['Architecture']}"
    return seen == "linux/amd64", seen


def _media_type(image: dict[str, Any]) -> Result:
    """An engine with containerd's store tells; the older store holds no manifest and pushes Docker's schema 2."""
    seen = (image.get("Descriptor") or {}).get("mediaType")
    if seen is None:
        return True, "this engine pushes Docker's schema 2"
    return seen == "application/vnd.docker.distribution.manifest.v2+json", seen


def _entrypoint(image: dict[str, Any]) -> Result:
    words = image["Config"].get("Entrypoint") or []
    if not words:
        return False, "there is none, so that `serve` itself is looked for on PATH"
    shell = len(words) > 1 and Path(words[0]).name in ("sh", "bash") and words[1] == "-c"
    if shell:
        return False, f"shell form, which swallows `serve` and SIGTERM: {words}"
    return Path(words[0]).name != "tini", str(words)


def _user(image: dict[str, Any]) -> Result:
    user = image["Config"].get("User") or "root"
    return user.partition(":")[0] in ("root", "0"), user


_OF_THE_IMAGE: dict[str, Callable[[dict[str, Any]], Result]] = {
    "it is for linux/amd64": _platform,
    "its manifest is no OCI index": _media_type,
    "ENTRYPOINT is in exec form, and not tini": _entrypoint,
    "it runs as root": _user,
}  # fmt: skip


def _of_the_service(subject: Subject, network: str | None) -> Iterator[tuple[str, Result]]:
    """One container, asked everything, then told to stop."""
    start = "`serve` starts with model and root read-only" + (", without network" if network else "")
    with running(subject.image, model=subject.model, network=network, environment=subject.environment) as service:
        try:
            ready_s, before = service.wait_until_ready(STARTUP_LIMIT_S)
        except ContainerError as exc:
            yield start, (False, str(exc))
            for rule in _OF_THE_SERVICE:
                yield rule, (False, "not reached")
            return
        yield start, (True, f"/ping 200 after {ready_s:.1f} s" + (f", {sorted(before)} before" if before else ""))
        for rule, judge in _OF_THE_SERVICE.items():
            yield rule, _judged(judge, service, subject)


def _works_at_once(service: Running, subject: Subject) -> Result:
    """The first request after the first 200: a health that came too early shows here."""
    answer = service.ask("POST", "/invocations", subject.payload, Content_Type=subject.content_type)
    return answer.status == 200, f"{answer.status} in {answer.seconds:.2f} s: {answer.body[:60]!r}"


def _connects(service: Running, _: Subject) -> Result:
    slowest = 0.0
    for _attempt in range(20):
        started_s = time.monotonic()
        socket.create_connection((service.host, service.port), timeout=5).close()
        slowest = max(slowest, time.monotonic() - started_s)
    return slowest < CONNECT_LIMIT_S, f"at most {slowest * 1000:.1f} ms of {CONNECT_LIMIT_S * 1000:.0f}"


def _pings(service: Running, _: Subject) -> Result:
    answers = {method: service.ask(method, "/ping", timeout_s=10) for method in ("GET", "POST")}
    ok = all(answer.status == 200 and answer.seconds < PING_LIMIT_S for answer in answers.values())
    return ok, ", ".join(f"{method} {a.status} in {a.seconds * 1000:.0f} ms" for method, a in answers.items())


def _pings_under_load(service: Running, subject: Subject) -> Result:
    answers = []
    with Load(service, subject.payload, subject.content_type, LOAD_CLIENTS) as load:
        ends_s = time.monotonic() + LOAD_S
        while time.monotonic() < ends_s:
            answers.append(service.ask("GET", "/ping", timeout_s=10))
            time.sleep(0.1)
    slowest = max(answer.seconds for answer in answers)
    ok = slowest < PING_LIMIT_S and all(answer.status == 200 for answer in answers)
    others = sorted({status for status in load.statuses if status != 200})
    return ok, (
        f"at most {slowest * 1000:.0f} ms (n = {len(answers)}) beside {len(load.statuses)} invocations by "
        f"{LOAD_CLIENTS} clients{f', of which some answered {others}' if others else ''}"
    )


def _ignores_headers(service: Running, subject: Subject) -> Result:
    answer = service.ask(
        "POST", "/invocations", subject.payload, Content_Type=f"{subject.content_type}; charset=utf-8",
        Accept="application/json", X_Amzn_SageMaker_Custom_Attributes="trace=1", X_Amzn_SageMaker_Inference_Id="a-1",
        X_Amzn_SageMaker_Target_Variant="blue", X_Unheard_Of="x" * 1000,
    )  # fmt: skip
    return answer.status == 200, str(answer.status)


def _takes_25_mb(service: Running, subject: Subject) -> Result:
    side = int((MAX_PAYLOAD_BYTES / 3.01) ** 0.5)
    body = picture(side) if subject.content_type == "image/png" else os.urandom(MAX_PAYLOAD_BYTES)
    body = body[:MAX_PAYLOAD_BYTES]
    answer = service.ask("POST", "/invocations", body, INVOCATION_LIMIT_S, Content_Type=subject.content_type)
    return answer.status not in (0, 413) and answer.status < 500, (
        f"{len(body):,} bytes: {answer.status} in {answer.seconds:.1f} s"
    )


def _refuses_rubbish(service: Running, subject: Subject) -> Result:
    answer = service.ask("POST", "/invocations", b"\x00rubbish" * 100, Content_Type=subject.content_type)
    after = service.ask("GET", "/ping", timeout_s=10).status
    return 400 <= answer.status < 500 and after == 200, f"{answer.status}, /ping {after} after it"


def _tells_batch_transform(service: Running, _: Subject) -> Result:
    answer = service.ask("GET", "/execution-parameters", timeout_s=10)
    if answer.status == 404:
        return True, "404, so batch transform takes the job's own settings"
    try:
        said = json.loads(answer.body)
        wrong = {"MaxConcurrentTransforms", "BatchStrategy", "MaxPayloadInMB"} - said.keys()
        ok = (
            answer.status == 200
            and not wrong
            and said["BatchStrategy"] in ("SINGLE_RECORD", "MULTI_RECORD", "SingleRecord", "MultiRecord")
        )
    except (ValueError, AttributeError):
        return False, f"{answer.status} {answer.body[:80]!r}"
    return ok, f"{answer.status} {json.dumps(said)}"


def _logs_something(service: Running, _: Subject) -> Result:
    lines = service.log().splitlines()
    return bool(lines), f"{len(lines)} lines on stdout and stderr"


def _stops(service: Running, subject: Subject) -> Result:
    """SIGTERM while requests are under way: those that were sent are answered, the exit code is 0."""
    body = picture(1000) if subject.content_type == "image/png" else subject.payload
    statuses: list[int] = []
    sent = threading.Barrier(9)

    def client() -> None:
        connection = http.client.HTTPConnection(service.host, service.port, timeout=STOP_LIMIT_S)
        try:
            connection.request("POST", "/invocations", body, {"Content-Type": subject.content_type})
            sent.wait(STOP_LIMIT_S)
            statuses.append(connection.getresponse().status)
        except (OSError, http.client.HTTPException, threading.BrokenBarrierError):
            statuses.append(0)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    sent.wait(STOP_LIMIT_S)
    time.sleep(0.05)  # for what lies in the kernel's queue to be accepted
    started_s = time.monotonic()
    service.signal("SIGTERM")
    code = service.wait_for_exit(STOP_LIMIT_S)
    took_s = time.monotonic() - started_s
    for thread in threads:
        thread.join(STOP_LIMIT_S)
    how = f"still running after {STOP_LIMIT_S} s" if code is None else f"exit code {code} after {took_s:.1f} s"
    return code == 0 and statuses == [200] * 8, f"{how}, requests under way answered {statuses}"


_OF_THE_SERVICE: dict[str, Callable[[Running, Subject], Result]] = {
    "/invocations works as soon as /ping is 200": _works_at_once,
    "it accepts connections within 250 ms": _connects,
    "/ping answers GET and POST within 2 s": _pings,
    "/ping answers within 2 s under load": _pings_under_load,
    "/invocations ignores headers it does not know": _ignores_headers,
    "/invocations takes 25 MB": _takes_25_mb,
    "a payload it cannot read gets 4xx, and harms nothing": _refuses_rubbish,
    "/execution-parameters is there for batch transform, or 404": _tells_batch_transform,
    "it logs to stdout or stderr": _logs_something,
    "SIGTERM: what was accepted is answered, exit code 0 within 30 s": _stops,
}  # fmt: skip


def _binds_to_port(subject: Subject, network: str | None) -> Result:
    environment = {**subject.environment, "SAGEMAKER_BIND_TO_PORT": str(OTHER_PORT)}
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", subject.image)) or {}
    label = labels.get("com.amazonaws.sagemaker.capabilities.accept-bind-to-port") == "true"
    with running(
        subject.image, model=subject.model, port=OTHER_PORT, network=network, environment=environment
    ) as service:
        ready_s, _ = service.wait_until_ready(STARTUP_LIMIT_S if label else subject.patience_s)
    told = (
        "the label says so"
        if label
        else "the label com.amazonaws.sagemaker.capabilities.accept-bind-to-port is not set"
    )
    return label, f"/ping 200 on port {OTHER_PORT} after {ready_s:.1f} s, {told}"


def _missing_model(subject: Subject, network: str | None) -> Result:
    with tempfile.TemporaryDirectory() as empty:
        Path(empty).chmod(0o755)
        return _refused(subject, Path(empty), ("serve",), network)


def _corrupt_model(subject: Subject, network: str | None) -> Result:
    """The largest file with one byte turned."""
    with tempfile.TemporaryDirectory() as folder:
        broken = shutil.copytree(subject.model, Path(folder) / "model")
        Path(folder).chmod(0o755)
        largest = max((path for path in broken.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 0xFF
        largest.write_bytes(content)
        return _refused(subject, broken, ("serve",), network)


def _unknown_command(subject: Subject, network: str | None) -> Result:
    return _refused(subject, subject.model, ("sevre",), network)


def _refused(subject: Subject, model: Path, command: Sequence[str], network: str | None) -> Result:
    """A start that must end by itself, with a code other than 0 and words."""
    with running(subject.image, command, model, network=network, environment=subject.environment) as container:
        code = container.wait_for_exit(subject.patience_s)
        if code is None:
            return False, f"it still runs after {subject.patience_s:.0f} s"
        said = container.log().strip()
        return code != 0 and bool(said), f"exit code {code}: {_telling_line(said)}"


def _telling_line(said: str) -> str:
    """The first line that speaks of an error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["(it wrote nothing)"]
    return next((line for line in lines if "error" in line.lower()), lines[-1])[:300]


_OF_OTHER_STARTS: dict[str, Callable[[Subject, str | None], Result]] = {
    "it listens on SAGEMAKER_BIND_TO_PORT": _binds_to_port,
    "a missing model ends the start, and it says why": _missing_model,
    "a damaged model ends the start, and it says why": _corrupt_model,
    "a command it does not know is refused, and it says so": _unknown_command,
}  # fmt: skip


def _judged(judge: Callable[..., Result], *what: object) -> Result:
    """What fails on the way is the rule's failure."""
    try:
        return judge(*what)
    except (OSError, http.client.HTTPException, ContainerError, threading.BrokenBarrierError) as exc:
        return False, str(exc) or type(exc).__name__


if __name__ == "__main__":
    sys.exit(main())
