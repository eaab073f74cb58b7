"""SageMaker's control plane as far as moto lacks it, kept in moto's own records where it has them."""

import fnmatch
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

import boto3
from botocore.config import Config
from moto.sagemaker.models import sagemaker_backends

from tests.rehearsal.containers import Engine

ACCOUNT, REGION = "123456789012", "eu-central-1"

Forward = Callable[[], dict[str, Any]]
Handler = Callable[[dict[str, Any], Forward], dict[str, Any]]


class Refusal(Exception):
    """An error to answer with."""

    def __init__(self, code: str, message: str, status: int = 400, **more: Any) -> None:
        super().__init__(message)
        self.code, self.message, self.status, self.more = code, message, status, more


class ControlPlane:
    """Operations by name; `forward` asks moto the same."""

    def __init__(self, engine: Engine, work: Path) -> None:
        from tests.rehearsal.hosting import Hosting
        from tests.rehearsal.jobs import Jobs

        self.engine, self.work, self.lock = engine, work, threading.RLock()
        self.take_fault: Callable[[str], dict[str, Any] | None] = lambda _: None
        self.jobs, self.hosting = Jobs(self), Hosting(self)
        self._url = ""
        self._clients: dict[str, Any] = {}

    def connect(self, url: str, take_fault: Callable[[str], dict[str, Any] | None]) -> None:
        """Where this very cloud is reached: what jobs read and write goes through its front door."""
        self._url, self.take_fault = url, take_fault

    def client(self, service: str) -> Any:
        with self.lock:
            if service not in self._clients:
                self._clients[service] = boto3.client(
                    service, region_name=REGION, endpoint_url=self._url, aws_access_key_id="rehearsal",
                    aws_secret_access_key="rehearsal", config=Config(max_pool_connections=32),
                )  # fmt: skip
            return self._clients[service]

    @property
    def backend(self) -> Any:
        """moto's records."""
        return sagemaker_backends[ACCOUNT][REGION]

    def handler(self, service: str, operation: str) -> Handler | None:
        """What answers, None: moto alone."""
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()
        if service == "servicequotas":
            return getattr(self, f"quota_{name}", None)
        if service != "sagemaker":
            return None
        for part in (self, self.jobs, self.hosting):
            found = getattr(part, f"on_{name}", None)
            if found:
                return found
        return None

    def close(self) -> None:
        """End whatever runs."""
        try:
            self.jobs.close()
            self.hosting.close()
        finally:
            self.engine.close()

    def leftovers(self) -> dict[str, list[str]]:
        """What runs or costs: empty lists when all is cleaned up."""
        records, at_work = self.backend, ("InProgress", "Stopping")
        running = [j.training_job_name for j in records.training_jobs.values() if j.training_job_status in at_work]
        running += [j.transform_job_name for j in records.transform_jobs.values() if j.transform_job_status in at_work]
        running += [
            j.hyper_parameter_tuning_job_name
            for j in records.hyper_parameter_tuning_jobs.values()
            if j.hyper_parameter_tuning_job_status in at_work
        ]
        return {
            "endpoints": list(self.backend.endpoints), "endpoint configurations": list(self.backend.endpoint_configs),
            "models": list(self.backend._models), "model packages": list(self.backend.model_packages),
            "model package groups": list(self.backend.model_package_groups), "running jobs": running,
            "servers": self.hosting.running(),
        }  # fmt: skip

    def traces(self) -> dict[str, list[str]]:
        """What else an account is to be without when all is cleaned up, data and role too: it costs little or nothing.

        What stays by design is left out: buckets, images, the records and logs of jobs.
        """
        s3, place = self.client("s3"), {"ServiceNamespace": "sagemaker"}
        pages = [
            page
            for bucket in s3.list_buckets()["Buckets"]
            for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket["Name"])
        ]
        groups = self.client("logs").describe_log_groups(logGroupNamePrefix="/aws/sagemaker/Endpoints/")["logGroups"]
        targets = self.client("application-autoscaling").describe_scalable_targets(**place)["ScalableTargets"]
        return {
            "objects in S3": [
                f"s3://{page['Name']}/{each['Key']}" for page in pages for each in page.get("Contents", ())
            ],
            "alarms": [a["AlarmName"] for a in self.client("cloudwatch").describe_alarms()["MetricAlarms"]],
            "scalable targets": [target["ResourceId"] for target in targets],
            "log groups": [group["logGroupName"] for group in groups],
            "roles": [role["RoleName"] for role in self.client("iam").list_roles()["Roles"]],
        }

    # The registry: moto has no way to remove from it.

    def on_delete_model_package(self, given: dict[str, Any], _: Forward) -> dict[str, Any]:
        arn = given["ModelPackageName"]
        if arn not in self.backend.model_packages:
            raise Refusal("ValidationException", f"ModelPackage {arn} does not exist.")
        del self.backend.model_packages[arn]
        return {}

    def on_delete_model_package_group(self, given: dict[str, Any], _: Forward) -> dict[str, Any]:
        name = given["ModelPackageGroupName"]
        if name not in self.backend.model_package_groups:
            raise Refusal("ValidationException", f"ModelPackageGroup {name} does not exist.")
        if any(p.model_package_group_name == name for p in self.backend.model_packages.values()):
            raise Refusal("ConflictException", f"Model Package Group {name} is not empty.")
        del self.backend.model_package_groups[name]
        return {}

    def quota_list_service_quotas(self, given: dict[str, Any], _: Forward) -> dict[str, Any]:
        """As an account has them that asked for what the README's commands take."""
        quotas = {
            "ml.g5.xlarge for training job usage": 2, "ml.g5.xlarge for spot training job usage": 1,
            "ml.g4dn.xlarge for endpoint usage": 6, "ml.c6i.xlarge for endpoint usage": 4,
            "ml.m5.xlarge for training job usage": 2, "ml.m5.xlarge for endpoint usage": 4,
            "ml.m5.xlarge for transform job usage": 1,
        }  # fmt: skip
        return _quotas(quotas)

    def quota_list_a_w_s_default_service_quotas(self, given: dict[str, Any], _: Forward) -> dict[str, Any]:
        """Those that nobody asked to change are not among the account's own."""
        serverless = "Maximum total concurrency that can be allocated across all serverless endpoints"
        return _quotas(
            {
                "ml.c6i.2xlarge for transform job usage": 1, "ml.c5.xlarge for transform job usage": 0, serverless: 10,
                "ml.g5.xlarge for training job usage": 0,
            }
        )  # fmt: skip

    def simulate(self, body: bytes) -> bytes:
        """SimulatePrincipalPolicy: the inline policies of a role, `Allow` statements only; users may do all."""
        given = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        actions = [value for name, value in given.items() if name.startswith("ActionNames.member.")]
        resource = given.get("ResourceArns.member.1", "*")
        allowed = self._allowed(given["PolicySourceArn"])

        def decided(action: str) -> str:
            may = any(_matches(action, may) and _matches(resource, on) for may, on in allowed)
            return "allowed" if may else "implicitDeny"

        results = "".join(
            f"<member><EvalActionName>{escape(action)}</EvalActionName><EvalResourceName>{escape(resource)}"
            f"</EvalResourceName><EvalDecision>{decided(action)}</EvalDecision></member>"
            for action in actions
        )
        return (
            '<SimulatePrincipalPolicyResponse xmlns="https://iam.amazonaws.com/doc/2010-05-08/">'
            f"<SimulatePrincipalPolicyResult><IsTruncated>false</IsTruncated><EvaluationResults>{results}"
            "</EvaluationResults></SimulatePrincipalPolicyResult></SimulatePrincipalPolicyResponse>"
        ).encode()

    def _allowed(self, arn: str) -> list[tuple[list[str], list[str]]]:
        """Actions and resources of each statement."""
        if ":role/" not in arn:
            return [(["*"], ["*"])]
        iam, name = self.client("iam"), arn.rsplit("/", 1)[1]
        if arn not in [role["Arn"] for role in iam.list_roles()["Roles"]]:  # the path counts
            raise Refusal("NoSuchEntity", f"The entity {arn} cannot be found.", 404)
        found = []
        for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
            document = iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]
            document = json.loads(document) if isinstance(document, str) else document
            for statement in document["Statement"]:
                if statement["Effect"] == "Allow":
                    actions, resources = statement["Action"], statement["Resource"]
                    found.append((_listed(actions), _listed(resources)))
        return found


def _quotas(values: dict[str, int]) -> dict[str, Any]:
    return {"Quotas": [{"QuotaName": name, "Value": float(value)} for name, value in values.items()]}


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _matches(text: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(text.lower(), pattern.lower()) for pattern in patterns)
