"""InvokeEndpoint and InvokeEndpointAsync: passed on to the container, errors wrapped as SageMaker wraps them."""

import contextlib
import json
import threading
import uuid
from typing import TYPE_CHECKING, Any

from tests.rehearsal.control_plane import Refusal
from training.launch.names import split_uri

if TYPE_CHECKING:
    from tests.rehearsal.control_plane import ControlPlane
    from tests.rehearsal.hosting import Server

REAL_TIME_BYTES, SERVERLESS_BYTES = 25 * 2**20, 4 * 2**20


class Runtime:
    """The data plane."""

    def __init__(self, plane: "ControlPlane") -> None:
        self._plane = plane

    def answer(self, environ: dict[str, Any], body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        name = environ["PATH_INFO"].split("/")[2]
        config = self._config(name)
        headers = {
            "Content-Type": environ.get("CONTENT_TYPE") or "application/octet-stream",
            "Accept": environ.get("HTTP_ACCEPT") or "*/*",
        }
        if environ["PATH_INFO"].endswith("/async-invocations"):
            return self._later(environ, name, config, headers)
        if "AsyncInferenceConfig" in config:
            raise Refusal("ValidationError", f"Endpoint {name} is asynchronous: use InvokeEndpointAsync.")
        variant = config["ProductionVariants"][0]
        limit = SERVERLESS_BYTES if "ServerlessConfig" in variant else REAL_TIME_BYTES
        if len(body) > limit:
            raise Refusal("ValidationError", f"1 validation error detected: the body has more than {limit} bytes.")
        server = self._servers(name)[variant["VariantName"]]
        for shadow in config.get("ShadowProductionVariants", ()):
            arguments = (name, shadow["VariantName"], self._servers(name), body, headers)
            threading.Thread(target=self._shadow, args=arguments, daemon=True).start()
        try:
            status, answered, content = server.ask("POST", "/invocations", body, headers)
        except OSError as exc:
            raise Refusal("ModelError", f"Invocation timed out or failed: {exc}", 424, OriginalStatusCode=500) from exc
        if status >= 300:
            text = content.decode(errors="replace")
            raise Refusal(
                "ModelError", f'Received client error ({status}) from primary with message "{text}".', 424,
                OriginalStatusCode=status, OriginalMessage=text, LogStreamArn="",
            )  # fmt: skip
        self._plane.hosting.capture(name, variant["VariantName"], body, headers["Content-Type"], content)
        kept = [
            ("Content-Type", answered.get("content-type", "")),
            ("x-Amzn-Invoked-Production-Variant", variant["VariantName"]),
        ]  # fmt: skip
        return 200, kept, content

    def _config(self, name: str) -> dict[str, Any]:
        endpoint = self._plane.backend.endpoints.get(name)
        if endpoint is None or name not in self._plane.hosting.servers:
            raise Refusal("ValidationError", f"Endpoint {name} of account 123456789012 not found.")
        return self._plane.hosting.configs[endpoint.endpoint_config_name]

    def _servers(self, name: str) -> dict[str, "Server"]:
        return self._plane.hosting.servers[name]

    def _later(
        self, environ: dict[str, Any], name: str, config: dict[str, Any], headers: dict[str, str]
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        if "AsyncInferenceConfig" not in config:
            raise Refusal("ValidationError", f"Endpoint {name} is not asynchronous.")
        source = environ["HTTP_X_AMZN_SAGEMAKER_INPUTLOCATION"]
        headers["Content-Type"] = environ.get("HTTP_X_AMZN_SAGEMAKER_CONTENT_TYPE", headers["Content-Type"])
        headers["Accept"] = environ.get("HTTP_X_AMZN_SAGEMAKER_ACCEPT", headers["Accept"])
        given = config["AsyncInferenceConfig"]["OutputConfig"]
        identity = str(uuid.uuid4())
        output = f"{given['S3OutputPath'].rstrip('/')}/{identity}.out"
        failed = f"{given['S3FailurePath'].rstrip('/')}/{identity}-error.out"
        server = self._servers(name)[config["ProductionVariants"][0]["VariantName"]]
        threading.Thread(target=self._run, args=(server, source, output, failed, headers), daemon=True).start()
        kept = [
            ("X-Amzn-SageMaker-OutputLocation", output), ("X-Amzn-SageMaker-FailureLocation", failed),
            ("Content-Type", "application/json"),
        ]  # fmt: skip
        return 202, kept, json.dumps({"InferenceId": identity}).encode()

    def _run(self, server: "Server", source: str, output: str, failed: str, headers: dict[str, str]) -> None:
        s3, (bucket, key) = self._plane.client("s3"), split_uri(source)
        body = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        status, _, content = server.ask("POST", "/invocations", body, headers)
        bucket, key = split_uri(output if status == 200 else failed)
        s3.put_object(Bucket=bucket, Key=key, Body=content)

    def _shadow(
        self, name: str, variant: str, servers: dict[str, "Server"], body: bytes, headers: dict[str, str]
    ) -> None:  # fmt: skip
        with contextlib.suppress(OSError, KeyError):  # nobody waits for it, and the endpoint may be gone meanwhile
            status, _, content = servers[variant].ask("POST", "/invocations", body, headers)
            if status < 300:
                self._plane.hosting.capture(name, variant, body, headers["Content-Type"], content)
