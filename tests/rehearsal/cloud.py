"""AWS on this machine: moto's server, and before it what moto lacks, answered by us and counted as ours.

moto keeps buckets, roles, models, logs and the rest. Ours: jobs that really run, endpoints that really answer, the
operations of `control_plane`, a check of every request against AWS's own service model (lengths, patterns, allowed
values: botocore does not look at them, AWS does), and faults that a test orders:

    POST /rehearsal/faults [{"operation": "CreateModel", "code": "ThrottlingException", "message": "...", "times": 2}]
    GET  /rehearsal/answers -> {"sagemaker CreateTrainingJob": "moto and rehearsal", ...}
    GET  /rehearsal/leftovers, /rehearsal/traces -> {"endpoints": [], ...}: what runs or costs; what else there is
"""

import argparse
import base64
import faulthandler
import hashlib
import io
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import botocore.session
import regex
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.rehearsal.containers import DockerEngine, Engine, ProcessEngine
from tests.rehearsal.control_plane import ControlPlane, Refusal
from tests.rehearsal.runtime import Runtime

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
    found = re.search(r"Credential=[^/]+/\d+/[^/]+/([^/]+)/aws4_request", environ.get("HTTP_AUTHORIZATION", ""))
    return found[1] if found else ""


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


def main() -> None:
    """Run until the process is told to end, or its standard input closes (its starter has gone)."""
    faulthandler.register(signal.SIGUSR1)  # where every thread is, into the log
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal.cloud")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--train-image", help="run jobs in containers of this image; else as processes")
    parser.add_argument("--serve-image")
    options = parser.parse_args()
    in_docker = options.train_image and options.serve_image
    engine = DockerEngine(options.train_image, options.serve_image) if in_docker else ProcessEngine()
    cloud = Cloud(engine, options.work)
    server = make_server("127.0.0.1", options.port, cloud, threaded=True)
    cloud.plane.connect(f"http://127.0.0.1:{server.server_port}", cloud.take_fault)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)

    def until_alone() -> None:
        sys.stdin.read()
        server.shutdown()

    threading.Thread(target=until_alone, daemon=True).start()
    try:
        server.serve_forever()
    finally:
        cloud.plane.close()


if __name__ == "__main__":
    main()
