"""AWS on this machine: moto's server, and before it what moto lacks, answered by us and counted as ours.

moto keeps buckets, roles, models, logs and the rest. Ours: jobs that really run, endpoints that really answer, the
operations of `control_plane`, a check of every request against AWS's own service model (lengths, patterns, allowed
values: botocore does not look at them, AWS does), and faults that a test orders:

    POST /rehearsal/faults [{"operation": "CreateModel", "code": "ThrottlingException", "message": "...", "times": 2}]
    GET  /rehearsal/answers -> {"sagemaker CreateTrainingJob": "moto and rehearsal", ...}
    GET  /rehearsal/leftovers, /rehearsal/traces -> {"endpoints": [], ...}: what runs or costs; what else there is

It has one region, and refuses what is asked of another. By hand: `make rehearse-cloud`.
"""

import argparse
import base64
import faulthandler
import hashlib
import io
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs

import botocore.session
import regex
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.rehearsal.containers import DockerEngine, Engine, ProcessEngine
from tests.rehearsal.control_plane import REGION, ControlPlane, Refusal
from tests.rehearsal.runtime import Runtime
from training.launch.flags import between

Answer = tuple[int, list[tuple[str, str]], bytes]
JSON_SERVICES = ("sagemaker", "application-autoscaling", "logs", "servicequotas", "ecr")
MODEL_NAMES = {"servicequotas": "service-quotas"}


class Cloud:
    """The WSGI application."""

    def __init__(self, engine: Engine, work: Path) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._faults: list[dict[str, Any]] = []
        self._answers: dict[str, str] = {}
        self._models: dict[str, Any] = {}
        self.checksums: dict[str, list[str]] = {}
        """The SHA-256 that each object or part came with, or nothing, by operation."""
        self.plane = ControlPlane(engine, work)
        self.runtime = Runtime(self.plane)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "")
        body = environ["wsgi.input"].read() if chunked else environ["wsgi.input"].read(length)
        try:
            status, headers, content = self._answer(environ, body)
        except Refusal as exc:
            status, headers, content = refusal(service_of(environ), exc)
        start_response(f"{status} {'OK' if status < 400 else 'Error'}", headers)
        return [content]

    def _answer(self, environ: dict[str, Any], body: bytes) -> Answer:
        path = environ["PATH_INFO"]
        if path.startswith("/rehearsal/"):
            return self._own(path, body)
        service, operation = service_of(environ), operation_of(environ, body)
        _require_region(service, environ)
        self._raise_fault(operation)
        if service == "s3" and operation in ("PutObject", "UploadPart"):
            self._check_sum(environ, operation, body)
        if service == "sagemaker" and re.search(r"/endpoints/[^/]+/(async-)?invocations$", path):
            self._count(service, operation, "rehearsal")
            return self.runtime.answer(environ, body)
        if environ.get("HTTP_X_AMZ_TARGET") and service in JSON_SERVICES:
            given = json.loads(body or b"{}")
            self._validate(service, operation, given)
            handler = self.plane.handler(service, operation)
            if handler:
                asked = False

                def forward() -> dict[str, Any]:
                    nonlocal asked
                    asked = True
                    return self._moto_json(environ, body)

                answer = handler(given, forward)
                self._count(service, operation, "moto and rehearsal" if asked else "rehearsal")
                return 200, [("Content-Type", "application/x-amz-json-1.1")], json.dumps(answer, default=str).encode()
        if service == "iam" and operation == "SimulatePrincipalPolicy":
            self._count(service, operation, "rehearsal")
            return 200, [("Content-Type", "text/xml")], self.plane.simulate(body)
        self._count(service, operation, "moto")
        return self._ask_moto(environ, body)

    def _moto_json(self, environ: dict[str, Any], body: bytes) -> dict[str, Any]:
        status, _, content = self._ask_moto(environ, body)
        answer = json.loads(content or b"{}")
        if status >= 300:
            code = str(answer.get("__type", "ValidationException")).rsplit("#", 1)[-1]
            raise Refusal(code, answer.get("message") or answer.get("Message") or "", status)
        return dict(answer)

    def _ask_moto(self, environ: dict[str, Any], body: bytes) -> Answer:
        copied = {**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        copied.pop("HTTP_TRANSFER_ENCODING", None)
        copied.pop("wsgi.input_terminated", None)
        app = self._moto.get_application(copied)
        copied["wsgi.input"] = io.BytesIO(body)
        seen: list[Any] = []

        def start(status: str, headers: list[tuple[str, str]], _info: Any = None) -> None:
            seen[:] = [int(status.split()[0]), headers]

        content = b"".join(app(copied, start))
        return seen[0], seen[1], content

    def _own(self, path: str, body: bytes) -> Answer:
        if path == "/rehearsal/faults":
            with self._lock:
                self._faults = json.loads(body)
            return 200, [], b"{}"
        if path == "/rehearsal/answers":
            with self._lock:
                return 200, [("Content-Type", "application/json")], json.dumps(self._answers).encode()
        if path == "/rehearsal/leftovers":
            return 200, [("Content-Type", "application/json")], json.dumps(self.plane.leftovers()).encode()
        if path == "/rehearsal/traces":
            return 200, [("Content-Type", "application/json")], json.dumps(self.plane.traces()).encode()
        return 404, [], b""

    def _raise_fault(self, operation: str) -> None:
        with self._lock:
            for fault in self._faults:
                if fault["operation"] == operation and fault.get("times", 1) > 0:
                    fault["times"] = fault.get("times", 1) - 1
                    if "do" in fault:  # something that happens this moment, where the cloud is in the test's process
                        fault["do"]()
                        return
                    raise Refusal(fault["code"], fault["message"], fault.get("status", 400))

    def take_fault(self, name: str) -> dict[str, Any] | None:
        """An ordered fault of a job or endpoint, rather than of a request: `TrainingJob`, `TransformJob`,
        `Endpoint`.
        """
        with self._lock:
            for fault in self._faults:
                if fault["operation"] == name and fault.get("times", 1) > 0:
                    fault["times"] = fault.get("times", 1) - 1
                    return fault
        return None

    def _check_sum(self, environ: dict[str, Any], operation: str, body: bytes) -> None:
        """As S3 does, where the sum is a header: what arrives is what was sent."""
        given = environ.get("HTTP_X_AMZ_CHECKSUM_SHA256", "")
        with self._lock:
            self.checksums.setdefault(operation, []).append(given)
        if given and given != base64.b64encode(hashlib.sha256(body).digest()).decode():
            raise Refusal("BadDigest", "The SHA256 you specified did not match the calculated checksum.")

    def _count(self, service: str, operation: str, who: str) -> None:
        with self._lock:
            self._answers[f"{service} {operation}"] = who

    def _validate(self, service: str, operation: str, given: dict[str, Any]) -> None:
        with self._lock:
            if service not in self._models:
                name = MODEL_NAMES.get(service, service)
                self._models[service] = botocore.session.get_session().get_service_model(name)
            shape = self._models[service].operation_model(operation).input_shape
        problems = list(violations(given, shape, "")) if shape else []
        if problems:
            text = f"{len(problems)} validation error(s) detected: {'; '.join(problems)}"
            raise Refusal("ValidationException", text)


def violations(value: Any, shape: Any, where: str) -> Iterable[str]:
    """What AWS's service model says against `value`: botocore checks types and required members, not these."""
    if shape.type_name == "structure":
        for name, each in value.items():
            if name in shape.members:
                yield from violations(each, shape.members[name], f"{where}.{name}".lstrip("."))
    elif shape.type_name == "list":
        yield from _bounds(len(value), shape, where, "length")
        for number, each in enumerate(value):
            yield from violations(each, shape.member, f"{where}.{number + 1}")
    elif shape.type_name == "map":
        yield from _bounds(len(value), shape, where, "length")
        for name, each in value.items():
            yield from violations(name, shape.key, f"{where}.{name}")
            yield from violations(each, shape.value, f"{where}.{name}")
    elif shape.type_name == "string":
        yield from _bounds(len(value), shape, where, "length")
        if shape.enum and value not in shape.enum:
            yield f"Value '{value}' at '{where}' is none of {shape.enum[:5]}..."
        pattern = shape.metadata.get("pattern")
        if pattern and not _matches(pattern, value):
            yield f"Value '{value}' at '{where}' does not match {pattern}"
    elif shape.type_name in ("integer", "long", "float", "double"):
        yield from _bounds(value, shape, where, "value")


def _bounds(number: float, shape: Any, where: str, what: str) -> Iterable[str]:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    if (low is not None and number < low) or (high is not None and number > high):
        yield f"The {what} {number} at '{where}' is not within {low} and {high}"


def _matches(pattern: str, value: str) -> bool:
    """Java's expressions; the one or other that Python cannot read proves nothing."""
    try:
        return regex.fullmatch(pattern, value) is not None
    except regex.error:
        return True


def service_of(environ: dict[str, Any]) -> str:
    """The service that the request is signed for; "" where it is not signed."""
    return _signed_for(environ)[1]


def _signed_for(environ: dict[str, Any]) -> tuple[str, str]:
    """Region and service; "" where the request is not signed."""
    found = re.search(r"Credential=[^/]+/\d+/([^/]+)/([^/]+)/aws4_request", environ.get("HTTP_AUTHORIZATION", ""))
    return (found[1], found[2]) if found else ("", "")


def _require_region(service: str, environ: dict[str, Any]) -> None:
    """Raises: Refusal for a region that is not the rehearsal's. IAM and STS have none, and moto has buckets of each."""
    region = _signed_for(environ)[0]
    if region not in ("", REGION) and service not in ("iam", "sts", "s3"):
        raise Refusal("ValidationException", f"The rehearsal has one region, {REGION}; {region} was asked for.")


def operation_of(environ: dict[str, Any], body: bytes) -> str:
    """The operation's name, as boto3 knows it, as far as it can be told."""
    target = environ.get("HTTP_X_AMZ_TARGET")
    if target:
        return str(target).rsplit(".", 1)[-1]
    if environ["PATH_INFO"].endswith("/async-invocations"):
        return "InvokeEndpointAsync"
    if environ["PATH_INFO"].endswith("/invocations"):
        return "InvokeEndpoint"
    if service_of(environ) == "s3":
        kind = "Object" if "/" in environ["PATH_INFO"].strip("/") else "Bucket"
        verb = environ["REQUEST_METHOD"].capitalize()
        if environ.get("QUERY_STRING", "").startswith("publicAccessBlock"):
            return f"{verb}PublicAccessBlock"
        part = "UploadPart" if "uploadId" in environ.get("QUERY_STRING", "") else ""
        return part or ("ListObjectsV2" if "list-type=2" in environ.get("QUERY_STRING", "") else f"{verb}{kind}")
    action = parse_qs(body.decode(errors="ignore")).get("Action") if b"Action=" in body[:4096] else None
    return action[0] if action else f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"


def refusal(service: str, exc: Refusal) -> Answer:
    """An error in the form that the service's clients read."""
    if service in ("s3", "iam", "sts", "monitoring"):
        text = f"<Code>{exc.code}</Code><Message>{exc.message}</Message>"
        inner = f"<Error>{text}</Error>" if service == "s3" else f"<ErrorResponse><Error>{text}</Error></ErrorResponse>"
        return exc.status, [("Content-Type", "text/xml")], f'<?xml version="1.0"?>{inner}'.encode()
    body = {"__type": exc.code, "message": exc.message, **exc.more}
    headers = [("Content-Type", "application/x-amz-json-1.1"), ("x-amzn-ErrorType", exc.code)]
    return exc.status, headers, json.dumps(body).encode()


BY_HAND = """\
AWS on this machine: one region, an empty account, and an image as `make push` leaves one. In another terminal, in the
same folder:

  export {variables}
  .venv/bin/python -m tests.rehearsal.pictures artifacts/rehearsal/drawn
  .venv/bin/python -m training.launch iam-role
  .venv/bin/python -m training.launch train --image {image} --data artifacts/rehearsal/drawn/data \\
    --output artifacts/rehearsal/model --weights none --epochs 5 --batch-size 8 --learning-rate 0.03 \\
    --quantize off --poll-seconds 1
  .venv/bin/python -m training.launch deploy --image {image} --poll-seconds 1
  .venv/bin/python -m training.launch invoke artifacts/rehearsal/drawn/pictures

and any other command of training.launch; `preflight`, `tune` and `batch` take the same --image. Jobs and endpoints run
on this machine. All of it ends by Ctrl-C or with this terminal, which is to stay its own.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until the process is told to end, or its standard input closes (its starter or terminal has gone)."""
    faulthandler.register(signal.SIGUSR1)  # where every thread is, into the log
    parser = argparse.ArgumentParser(
        prog="python -m tests.rehearsal.cloud",
        description="AWS on this machine, to try training.launch's commands by hand without an account. It says how it "
        "is reached, keeps all that it is given in memory, and ends by Ctrl-C or with its terminal.",
    )
    parser.add_argument(
        "--port", type=between(0, 65535), default=0, help="of 127.0.0.1, where it answers (default: one that is free)"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR",
        help="folder where each job and endpoint has its own /opt/ml while it runs (default: one that is removed at "
        "the end)",
    )  # fmt: skip
    parser.add_argument(
        "--train-image", help="run jobs in containers of this image, with --serve-image (default: as processes)"
    )
    parser.add_argument("--serve-image", help="run endpoints and batches in containers of this image")
    parser.add_argument(
        "--bare", action="store_true", help="for programs: no image in the registry, and the address alone on stdout"
    )
    options = parser.parse_args(arguments)
    in_docker = options.train_image and options.serve_image
    if not in_docker and (options.train_image or options.serve_image):
        parser.error("--train-image and --serve-image go together")
    engine = DockerEngine(options.train_image, options.serve_image) if in_docker else ProcessEngine()
    with TemporaryDirectory(prefix="rehearsal-", ignore_cleanup_errors=True) as scratch:
        cloud = Cloud(engine, options.work or Path(scratch))
        server = make_server("127.0.0.1", options.port, cloud, threaded=True)
        url = f"http://127.0.0.1:{server.server_port}"
        cloud.plane.connect(url, cloud.take_fault)
        print(url, flush=True)

        def end(*_: object) -> None:
            threading.Thread(target=server.shutdown, daemon=True).start()

        def until_alone() -> None:
            sys.stdin.read()
            end()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, end)
        threading.Thread(target=until_alone, daemon=True).start()
        if not options.bare:
            logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for each request
            threading.Thread(target=_tell, args=(url,), daemon=True).start()  # which asks this very server
        try:
            server.serve_forever()
        finally:
            cloud.plane.close()


def _tell(url: str) -> None:
    """How it is used by hand, once there is an image."""
    from tests.rehearsal.start import IMAGE, Rehearsal

    reached = Rehearsal(url, Path(os.devnull))
    reached.push_image()
    variables = " ".join(f"{name}={value}" for name, value in reached.variables.items())
    print(BY_HAND.format(variables=variables, image=IMAGE), flush=True)


if __name__ == "__main__":
    main()
