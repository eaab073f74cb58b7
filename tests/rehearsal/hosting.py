"""Endpoints and batch transform, really answered: the model unpacked from S3, `serve` run, /ping waited for."""

import base64
import contextlib
import http.client
import json
import shutil
import tarfile
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moto.core.utils import utcnow

from tests.rehearsal.logs import Stream
from training.launch.names import split_uri

if TYPE_CHECKING:
    from tests.rehearsal.containers import Running
    from tests.rehearsal.control_plane import ControlPlane, Forward

PING_S = 120
"""Until a container must answer /ping with 200. SageMaker: 8 minutes, or what the configuration says."""


class NotHealthy(Exception):
    """The container did not come up; the message is SageMaker's reason."""


class Server:
    """A running `serve` with a model."""

    def __init__(self, running: "Running", folder: Path, stream: Stream) -> None:
        self.running, self._folder, self._stream = running, folder, stream

    def ask(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}) -> Any:
        """A request to the container; returns status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.running.port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def answers(self, within_s: float) -> bool:
        """Whether /ping says 200 in time."""
        deadline_s = time.monotonic() + within_s
        while time.monotonic() < deadline_s and self.running.is_alive():
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("GET", "/ping")[0] == 200:
                    return True
            time.sleep(1)
        return False

    def stop(self) -> None:
        self.running.stop()
        self._stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class Hosting:
    """Servers by endpoint and variant."""

    def __init__(self, plane: "ControlPlane") -> None:
        self._plane = plane
        self.servers: dict[str, dict[str, Server]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        """What moto drops of an endpoint configuration (shadow variants, metrics)."""
        self.updates: dict[str, dict[str, Any]] = {}
        """The last UpdateEndpoint's arguments, by endpoint."""

    def running(self) -> list[str]:
        return [f"{name}/{variant}" for name, variants in self.servers.items() for variant in variants]

    def on_create_endpoint_config(self, given: dict[str, Any], forward: "Forward") -> dict[str, Any]:
        self._require_capture_with_instances(given)
        with self._plane.lock:  # of two at once one is refused
            self._require_new(
                "endpoint configuration", given["EndpointConfigName"], self._plane.backend.endpoint_configs
            )
            answer = forward()
        self.configs[given["EndpointConfigName"]] = given
        return answer

    def on_describe_endpoint_config(self, given: dict[str, Any], forward: "Forward") -> dict[str, Any]:
        answer = forward()
        kept = self.configs.get(given["EndpointConfigName"], {})
        more = ("ShadowProductionVariants", "MetricsConfig", "ProductionVariants")
        return {**answer, **{key: kept[key] for key in more if key in kept}}

    def on_create_endpoint(self, given: dict[str, Any], forward: "Forward") -> dict[str, Any]:
        with self._plane.lock:
            self._require_new("endpoint", given["EndpointName"], self._plane.backend.endpoints)
            answer = forward()
        endpoint = self._plane.backend.endpoints[given["EndpointName"]]
        endpoint.endpoint_status = "Creating"
        self._thread(self._bring_up, given["EndpointName"], given["EndpointConfigName"], True)
        return answer

    def on_update_endpoint(self, given: dict[str, Any], _: "Forward") -> dict[str, Any]:
        from tests.rehearsal.control_plane import Refusal

        name, config = given["EndpointName"], given["EndpointConfigName"]
        endpoint = self._plane.backend.endpoints.get(name)
        if endpoint is None or config not in self._plane.backend.endpoint_configs:
            raise Refusal("ValidationException", f"Could not find endpoint {name} or configuration {config}.")
        if endpoint.endpoint_status != "InService":
            raise Refusal("ValidationException", f"Cannot update in-progress endpoint {endpoint.arn}.")
        self._require_alarms(given)
        self._require_machines_of_before(name, endpoint.endpoint_config_name, config)
        self._require_kind_of_before(endpoint.endpoint_config_name, config)
        self.updates[name] = given
        endpoint.endpoint_status, endpoint.last_modified_time = "Updating", utcnow()
        self._thread(self._bring_up, name, config, False)
        return {"EndpointArn": endpoint.arn}

    @staticmethod
    def _require_new(what: str, name: str, there: Mapping[str, Any]) -> None:
        from tests.rehearsal.control_plane import Refusal

        if name in there:
            raise Refusal("ValidationException", f'Cannot create already existing {what} "{there[name].arn}".')

    def _require_alarms(self, given: dict[str, Any]) -> None:
        from tests.rehearsal.control_plane import Refusal

        wanted = given.get("DeploymentConfig", {}).get("AutoRollbackConfiguration", {}).get("Alarms", [])
        names = [alarm["AlarmName"] for alarm in wanted]
        if not names:
            return
        found = self._plane.client("cloudwatch").describe_alarms(AlarmNames=names)["MetricAlarms"]
        if missing := set(names) - {alarm["AlarmName"] for alarm in found}:
            raise Refusal("ValidationException", f"Could not find alarms {sorted(missing)}.")

    def _require_machines_of_before(self, name: str, before: str, config: str) -> None:
        """https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-scaling-update.html"""
        from tests.rehearsal.control_plane import Refusal

        if not self._plane.client("application-autoscaling").describe_scalable_targets(
            ServiceNamespace="sagemaker", ResourceIds=[f"endpoint/{name}/variant/main"]
        )["ScalableTargets"]:
            return
        old, new = (self.configs.get(each, {}).get("ProductionVariants", [{}])[0] for each in (before, config))
        if old and old.get("InstanceType") != new.get("InstanceType"):
            raise Refusal(
                "ValidationException", "The variant(s) \"main\" must be deregistered as scalable targets with AWS Auto "
                "Scaling before they can be updated to another instance type.",
            )  # fmt: skip

    @staticmethod
    def _require_capture_with_instances(given: dict[str, Any]) -> None:
        """https://docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints.html, Feature exclusions"""
        from tests.rehearsal.control_plane import Refusal

        if "DataCaptureConfig" in given and any("ServerlessConfig" in each for each in given["ProductionVariants"]):
            raise Refusal("ValidationException", "Data capture is not supported for serverless endpoints.")

    def _require_kind_of_before(self, before: str, config: str) -> None:
        """https://docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints-update.html, its note"""
        from tests.rehearsal.control_plane import Refusal

        old, new = (self.configs.get(each, {}).get("ProductionVariants", [{}])[0] for each in (before, config))
        if old and "ServerlessConfig" in new and "ServerlessConfig" not in old:
            raise Refusal("ValidationException", "Updating a real-time endpoint to a serverless one is not supported.")

    def on_delete_endpoint(self, given: dict[str, Any], forward: "Forward") -> dict[str, Any]:
        from tests.rehearsal.control_plane import Refusal

        endpoint = self._plane.backend.endpoints.get(given["EndpointName"])
        if endpoint is not None and endpoint.endpoint_status in ("Creating", "Updating"):
            raise Refusal("ValidationException", f"Cannot update in-progress endpoint {endpoint.arn}.")
        answer = forward()
        for server in self.servers.pop(given["EndpointName"], {}).values():
            server.stop()
        return answer

    def _bring_up(self, name: str, config: str, new: bool) -> None:
        """Blue/green: the new servers beside the old, swapped when they are healthy, else as it was."""
        backend = self._plane.backend
        endpoint = backend.endpoints[name]
        fresh: dict[str, Server] = {}
        kept = self.configs[config]
        try:
            fault = self._plane.take_fault("Endpoint")
            if fault:
                raise NotHealthy(fault["message"])
            for variant in [*kept["ProductionVariants"], *kept.get("ShadowProductionVariants", [])]:
                label = variant["VariantName"]
                fresh[label] = self.start(
                    variant["ModelName"], f"/aws/sagemaker/Endpoints/{name}", f"{label}/i-{uuid.uuid4().hex[:8]}",
                    f"The primary container for production variant {label} did not pass the ping health check. "
                    "Please check CloudWatch logs for this endpoint.",
                )  # fmt: skip
        except Exception as exc:
            for server in fresh.values():
                server.stop()
            endpoint.failure_reason = str(exc)
            endpoint.endpoint_status = "Failed" if new else "InService"
            return
        old = self.servers.get(name, {})
        self.servers[name] = fresh
        endpoint.endpoint_config_name = config
        endpoint.production_variants = endpoint._process_production_variants(kept["ProductionVariants"])
        endpoint.failure_reason = None
        endpoint.endpoint_status = "InService"
        for server in old.values():
            server.stop()

    def start(self, model: str, group: str, stream_name: str, sick: str) -> Server:
        """A server for a Model, once it is healthy. Raises: NotHealthy."""
        container = self._container(model)
        folder = self._plane.work / f"model-{uuid.uuid4().hex[:8]}"
        (folder / "model").mkdir(parents=True)
        bucket, key = split_uri(container["ModelDataUrl"])
        self._plane.client("s3").download_file(bucket, key, str(folder / "model.tar.gz"))
        stream = Stream(self._plane.client("logs"), group, stream_name)
        try:
            with tarfile.open(folder / "model.tar.gz") as tar:
                tar.extractall(folder / "model", filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(
                    folder / "model"
                )
        except (tarfile.TarError, OSError, EOFError) as exc:
            stream.close()
            raise NotHealthy(
                f"Failed to extract model data archive from URL {container['ModelDataUrl']}: {exc}"
            ) from exc
        running = self._plane.engine.serve(folder / "model", container.get("Environment", {}), stream.add)
        server = Server(running, folder, stream)
        try:
            if server.answers(PING_S):
                return server
        except BaseException:
            server.stop()
            raise
        server.stop()
        raise NotHealthy(sick)

    def _container(self, model: str) -> dict[str, Any]:
        described = self._plane.client("sagemaker").describe_model(ModelName=model)
        container = (described.get("Containers") or [described.get("PrimaryContainer")])[0]
        if "ModelPackageName" not in container:
            return dict(container)
        package = self._plane.client("sagemaker").describe_model_package(ModelPackageName=container["ModelPackageName"])
        return {**package["InferenceSpecification"]["Containers"][0], **container}

    def transform(self, given: dict[str, Any], job: Any) -> None:
        """Each object below the input as a request of its own, the answer beside it as KEY.out."""
        name = given["TransformJobName"]
        s3 = self._plane.client("s3")
        source = given["TransformInput"]["DataSource"]["S3DataSource"]["S3Uri"]
        bucket, prefix = split_uri(source)
        out_bucket, out_prefix = split_uri(given["TransformOutput"]["S3OutputPath"])
        server = None
        try:
            fault = self._plane.take_fault("TransformJob")
            if fault:
                raise NotHealthy(fault["message"])
            server = self.start(
                given["ModelName"], "/aws/sagemaker/TransformJobs", f"{name}/i-{uuid.uuid4().hex[:8]}",
                "ClientError: the container did not pass the ping health check",
            )  # fmt: skip
            status, _, parameters = server.ask("GET", "/execution-parameters")
            at_once = given.get("MaxConcurrentTransforms") or (
                json.loads(parameters)["MaxConcurrentTransforms"] if status == 200 else 1
            )
            tries = 1 + given.get("ModelClientConfig", {}).get("InvocationsMaxRetries", 0)
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
            headers = {
                "Content-Type": given["TransformInput"].get("ContentType", ""),
                "Accept": given["TransformOutput"].get("Accept", "*/*"),
            }

            def one(key: str) -> str | None:
                if job.transform_job_status == "Stopping":
                    return None
                assert server
                body = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
                for again in range(tries, 0, -1):
                    answered, _, content = server.ask("POST", "/invocations", body, headers)
                    if answered < 500 or again == 1:
                        break
                    time.sleep(1)  # a busy machine's 503, say
                if answered != 200:
                    return f"ClientError: {key}: {answered}: {content[:200].decode(errors='replace')}"
                target = f"{out_prefix.rstrip('/')}/{key[len(prefix) :].lstrip('/')}.out"
                s3.put_object(Bucket=out_bucket, Key=target, Body=content)
                return None

            with ThreadPoolExecutor(at_once) as threads:
                problems = [text for text in threads.map(one, keys) if text]
            if job.transform_job_status == "InProgress":
                job.transform_job_status = "Failed" if problems else "Completed"
                job.failure_reason = problems[0] if problems else ""
        except Exception as exc:
            if job.transform_job_status == "InProgress":
                job.transform_job_status, job.failure_reason = "Failed", str(exc)
        finally:
            if server:
                server.stop()
            if job.transform_job_status == "Stopping":
                job.transform_job_status = "Stopped"
            job.transform_end_time = job.last_modified_time

    def capture(self, endpoint: str, variant: str, body: bytes, kind: str, answer: bytes) -> None:
        """Data capture, where the configuration asks for it: one line a request below the destination."""
        config = self.configs.get(self._plane.backend.endpoints[endpoint].endpoint_config_name, {})
        wanted = config.get("DataCaptureConfig")
        if not wanted or not wanted.get("EnableCapture"):
            return
        bucket, prefix = split_uri(wanted["DestinationS3Uri"])
        said = base64.b64encode(body).decode()
        line = {
            "captureData": {
                "endpointInput": {"observedContentType": kind, "mode": "INPUT", "data": said, "encoding": "BASE64"},
                "endpointOutput": {
                    "observedContentType": "application/json", "mode": "OUTPUT", "data": answer.decode(),
                    "encoding": "JSON",
                },
            },
            "eventMetadata": {"eventId": str(uuid.uuid4())}, "eventVersion": "0",
        }  # fmt: skip
        place = f"{prefix.rstrip('/')}/{endpoint}/{variant}/{time.strftime('%Y/%m/%d/%H')}/{uuid.uuid4()}.jsonl"
        self._plane.client("s3").put_object(Bucket=bucket, Key=place, Body=json.dumps(line).encode())

    @staticmethod
    def _thread(work: Any, *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def close(self) -> None:
        for variants in self.servers.values():
            for server in variants.values():
                server.stop()
        self.servers.clear()
