"""SageMaker's rules for hosting, each a function that looks and says what it saw: of an image, of a running service.

Sources: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html, batch-transform.html, and
botocore's service model (Custom-Attributes, MetricsConfig, CreateTransformJob). What is ours and no rule of AWS's is
named "recommended": an image that breaks it is hosted all the same. Rules that take other starts: `container.starts`.
"""

import base64
import hashlib
import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

from container.engine import docker
from container.running import (
    Load,
    Running,
    Stopped,
    direct_network,
    picture,
    running,
)  # fmt: skip

STARTUP_LIMIT_S = 8 * 60
PING_LIMIT_S = 2.0
CONNECT_LIMIT_S = 0.25
INVOCATION_LIMIT_S = 60
STOP_LIMIT_S = 30
MAX_PAYLOAD_BYTES = 25 * 2**20
MAX_ATTRIBUTES = 1024
SEND_LIMIT_S = 5
"""For requests to be on their way; who takes one at a time leaves others in its queue."""
BATCH_LIMIT_MB = 100
"""Of a request of batch transform, and of all that are sent at once (CreateTransformJob)."""
LOAD_CLIENTS, LOAD_S = 16, 4
BIND_LABEL = "com.amazonaws.sagemaker.capabilities.accept-bind-to-port"
MULTI_MODELS_LABEL = "com.amazonaws.sagemaker.capabilities.multi-models"
STREAMING_LABEL = "com.amazonaws.sagemaker.capabilities.bidirectional-streaming"
CUDA_LABEL = "com.amazonaws.sagemaker.inference.cuda.verified_versions"
_SAMPLE = re.compile(r'[a-zA-Z_:][\w:]*(\{([a-zA-Z_]\w*="([^"\\]|\\.)*",?)*\})? (\S+)( [\d.]+)?( # \{.*)?')
"""name{label="value",...} value [timestamp] [exemplar]"""

Result = tuple[bool, str]
"""Whether a rule holds, and what was seen."""


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
    options: tuple[str, ...] = ()
    """More words for `docker run`, such as --gpus=all."""


def start(
    subject: Subject, command: Sequence[str] = ("serve",), model: Path | None = None, port: int = 8080, **more: str
) -> AbstractContextManager[Running]:
    """A container as SageMaker runs it: what it asks of all, the model read-only, and nothing that is up to the user,
    as network isolation is. `more` are variables.
    """
    return running(
        subject.image, command, model or subject.model, port, {**subject.environment, **more}, subject.options,
        direct_network(), read_only=False,
    )  # fmt: skip


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
    """SageMaker's word follows it: a shell's own script never sees that, tini takes it for a program.

    Without one `serve` itself is run, found on PATH or not, which the start shows.
    """
    words = image["Config"].get("Entrypoint") or []
    if not words:
        return True, "there is none, `serve` is looked for on PATH"
    program = list(words)
    if Path(program[0]).name == "env":
        program = list(dropwhile(lambda word: word.startswith("-") or "=" in word, program[1:]))
    name = Path(program[0]).name if program else "env"
    if name in ("bash", "sh", "ash", "dash", "ksh", "zsh"):
        flags = list(takewhile(lambda word: word.startswith("-"), program[1:]))
        script = next(iter(program[len(flags) + 1 :]), "")
        if any(re.fullmatch(r"-[a-z]*c", flag) for flag in flags) and not re.search(r"\$\{?[@*1]", script):
            return False, f"shell form, which swallows `serve` and SIGTERM: {words}"
    return name not in ("tini", "tini-static"), str(words)


def _cuda_label(image: dict[str, Any]) -> Result:
    """AWS's own images carry it, and steer the host's driver by it (github.com/aws/deep-learning-containers)."""
    variables = dict(each.partition("=")[::2] for each in image["Config"].get("Env") or [])
    if variables.get("NVIDIA_VISIBLE_DEVICES", "void") in ("", "void", "none"):
        return True, "it asks for no GPU (NVIDIA_VISIBLE_DEVICES)"
    version = (image["Config"].get("Labels") or {}).get(CUDA_LABEL)
    return re.fullmatch(r"\d+\.\d+(,\d+\.\d+)*", version or "") is not None, f"{CUDA_LABEL}={version}"


def _user(image: dict[str, Any]) -> Result:
    user = image["Config"].get("User") or "root"
    return user.partition(":")[0] in ("root", "0"), user


OF_THE_IMAGE: dict[str, Callable[[dict[str, Any]], Result]] = {
    "it is for linux/amd64": _platform,
    "its manifest is no OCI index": _media_type,
    "ENTRYPOINT, if there is one, passes `serve` on (exec form), and is not tini": _entrypoint,
    "it runs as root": _user,
    "an image for GPUs says its CUDA version in a label (recommended)": _cuda_label,
}  # fmt: skip


def works_at_once(service: Running, subject: Subject) -> Result:
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


def _pings(service: Running, _: Subject, method: str = "GET") -> Result:
    answer = service.ask(method, "/ping", timeout_s=10)
    ok = answer.status == 200 and answer.seconds < PING_LIMIT_S
    return ok, f"{answer.status} in {answer.seconds * 1000:.0f} ms"


def _pings_by_post(service: Running, subject: Subject) -> Result:
    """The newer text speaks of POST; what is known to ask uses GET."""
    return _pings(service, subject, "POST")


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
        Accept="application/json", X_Amzn_SageMaker_Inference_Id="a" * 64, X_Amzn_SageMaker_Session_Id="s" * 256,
        X_Amzn_SageMaker_Target_Variant="blue", X_Amzn_SageMaker_Target_Model="m.tar.gz", X_Unheard_Of="x" * 1000,
    )  # fmt: skip
    return answer.status == 200, str(answer.status)


def _custom_attributes(service: Running, subject: Subject) -> Result:
    """The caller gets what the container sets, its own or what came (botocore, InvokeEndpoint)."""
    header = "x-amzn-sagemaker-custom-attributes"
    sent = f"trace={'x' * (MAX_ATTRIBUTES - 6)}"
    answer = service.ask(
        "POST", "/invocations", subject.payload, Content_Type=subject.content_type,
        X_Amzn_SageMaker_Custom_Attributes=sent,
    )  # fmt: skip
    back = answer.headers.get(header)
    how = "not sent back" if back is None else "sent back" if back == sent else f"sent back as {back[:60]!r}"
    visible = back is None or (len(back) <= MAX_ATTRIBUTES and back.isascii() and back.isprintable())
    return answer.status == 200 and visible, f"{answer.status}, {MAX_ATTRIBUTES:,} characters {how}"


def _answers_under_load(service: Running, subject: Subject) -> Result:
    with Load(service, subject.payload, subject.content_type, LOAD_CLIENTS) as load:
        time.sleep(LOAD_S)
    lost = load.statuses.count(0)
    ok = bool(load.statuses) and not lost and load.slowest_s < INVOCATION_LIMIT_S
    return ok, (
        f"at most {load.slowest_s:.1f} s (n = {len(load.statuses)}) by {LOAD_CLIENTS} clients"
        f"{f', {lost} without an answer' if lost else ''}"
    )


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
        requests, payload_mb, strategy = (
            said[name] for name in ("MaxConcurrentTransforms", "MaxPayloadInMB", "BatchStrategy")
        )
    except (ValueError, KeyError, TypeError):
        return False, f"{answer.status} {answer.body[:80]!r}"
    ok = (
        answer.status == 200
        and strategy in ("SINGLE_RECORD", "MULTI_RECORD", "SingleRecord", "MultiRecord")
        and type(requests) is type(payload_mb) is int
        and requests >= 1
        and payload_mb >= 1
        and requests * payload_mb <= BATCH_LIMIT_MB
    )
    limits = f", where {BATCH_LIMIT_MB} MB may be under way at once, in whole numbers from 1"
    return ok, f"{answer.status} {json.dumps(said)}{'' if ok else limits}"


def _metrics(service: Running, _: Subject) -> Result:
    """What MetricsConfig.EnableDetailedObservability has SageMaker scrape (prometheus.io/docs/instrumenting)."""
    answer = service.ask("GET", "/metrics", timeout_s=10)
    if answer.status == 404:
        return True, "404, so SageMaker's detailed metrics are the host's alone"
    kind = answer.headers.get("content-type", "without a type").partition(";")[0]
    lines = answer.body.decode(errors="replace").splitlines()
    samples = [line for line in lines if line.strip() and not line.startswith("#")]
    wrong = next((line for line in samples if not _SAMPLE.fullmatch(line)), None)
    if answer.status != 200 or kind not in ("text/plain", "application/openmetrics-text"):
        return False, f"{answer.status} {kind}"
    return bool(samples) and wrong is None, f"{len(samples)} samples" if wrong is None else f"no sample: {wrong[:60]!r}"


def labels_of(image: str) -> dict[str, str]:
    """The image's labels. Raises: ContainerError."""
    return json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", image)) or {}


def _several_models(service: Running, subject: Subject) -> Result:
    """A claim that SageMaker believes: it then loads models over /models, which must be there."""
    if labels_of(subject.image).get(MULTI_MODELS_LABEL) != "true":
        return True, "it hosts one model"
    status = service.ask("GET", "/models", timeout_s=10).status
    return status == 200, f"GET /models answers {status}"


def _streams(service: Running, subject: Subject) -> Result:
    """A claim that SageMaker believes: it then opens a WebSocket there (RFC 6455, section 4)."""
    if labels_of(subject.image).get(STREAMING_LABEL) != "true":
        return True, "it does not stream in both directions"
    key = base64.b64encode(os.urandom(16)).decode()
    answer = service.ask(
        "GET", "/invocations-bidirectional-stream", timeout_s=10, Connection="Upgrade", Upgrade="websocket",
        Sec_WebSocket_Version="13", Sec_WebSocket_Key=key,
    )  # fmt: skip
    digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode(), usedforsecurity=False).digest()
    accepted = answer.headers.get("sec-websocket-accept") == base64.b64encode(digest).decode()
    return answer.status == 101 and accepted, f"GET /invocations-bidirectional-stream answers {answer.status}"


def _logs_something(service: Running, _: Subject) -> Result:
    lines = service.log().splitlines()
    return bool(lines), f"{len(lines)} lines on stdout and stderr"


def _stop(service: Running, subject: Subject) -> Stopped:
    """SIGTERM while requests are under way, once for the rules about it.

    The last byte of one is held back until the signal is sent, so that one is open then, however fast the service.
    """
    if service.stopped is not None:
        return service.stopped
    body = picture(1000) if subject.content_type == "image/png" else subject.payload
    statuses: list[int] = []
    sent, signalled = threading.Semaphore(0), threading.Event()

    def client(last: bool) -> None:
        connection = http.client.HTTPConnection(service.host, service.port, timeout=STOP_LIMIT_S)
        try:
            connection.putrequest("POST", "/invocations")
            connection.putheader("Content-Type", subject.content_type)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body[:-1] if last else body)
            sent.release()
            if last and signalled.wait(STOP_LIMIT_S):
                connection.send(body[-1:])
            statuses.append(connection.getresponse().status)
        except (OSError, http.client.HTTPException):
            statuses.append(0)

    threads = [threading.Thread(target=client, args=(number == 0,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    until_s = time.monotonic() + SEND_LIMIT_S
    for _ in threads:
        sent.acquire(timeout=max(0, until_s - time.monotonic()))
    time.sleep(0.05)  # for what lies in the kernel's queue to be accepted
    answered = len(statuses)
    started_s = time.monotonic()
    service.signal("SIGTERM")
    signalled.set()
    code = service.wait_for_exit(STOP_LIMIT_S)
    took_s = time.monotonic() - started_s
    for thread in threads:
        thread.join(STOP_LIMIT_S)
    service.stopped = Stopped(code, took_s, len(threads) - answered, list(statuses))
    return service.stopped


def _stops(service: Running, subject: Subject) -> Result:
    stopped = _stop(service, subject)
    if stopped.code is None:
        return False, f"still running after {STOP_LIMIT_S} s"
    return True, f"after {stopped.seconds:.1f} s"


def _drains(service: Running, subject: Subject) -> Result:
    """The platform takes an instance out of the way first, as far as it can; nobody looks at the exit code."""
    stopped = _stop(service, subject)
    code = "none" if stopped.code is None else stopped.code
    return stopped.code == 0 and stopped.statuses == [200] * 8, (
        f"exit code {code}, {stopped.under_way} requests under way, all answered {stopped.statuses}"
    )


OF_THE_SERVICE: dict[str, Callable[[Running, Subject], Result]] = {
    "/invocations works as soon as /ping is 200": works_at_once,
    "it accepts connections within 250 ms": _connects,
    "/ping answers within 2 s": _pings,
    "/ping answers POST as well (recommended)": _pings_by_post,
    "/ping answers within 2 s under load": _pings_under_load,
    "/invocations answers within 60 s under load": _answers_under_load,
    "/invocations ignores headers it does not know": _ignores_headers,
    "Custom-Attributes that it sends are at most 1,024 visible characters": _custom_attributes,
    "/invocations takes 25 MB, as much as SageMaker passes on (recommended)": _takes_25_mb,
    "a payload it cannot read gets 4xx, and harms nothing (recommended)": _refuses_rubbish,
    "/execution-parameters fits batch transform, or is 404": _tells_batch_transform,
    "/metrics is text for Prometheus, or 404 (optional)": _metrics,
    "what is labelled multi-models answers /models": _several_models,
    "what is labelled bidirectional-streaming takes a WebSocket": _streams,
    "it logs to stdout or stderr (recommended)": _logs_something,
    "it ends within 30 s of SIGTERM": _stops,
    "after SIGTERM what was accepted is answered, and the exit code is 0 (recommended)": _drains,
}  # fmt: skip
TIMED = {
    "it accepts connections within 250 ms",
    "/ping answers within 2 s",
    "/ping answers POST as well (recommended)",
    "/ping answers within 2 s under load",
    "/invocations answers within 60 s under load",
}
"""What a machine that is busy with other things may fail once."""
