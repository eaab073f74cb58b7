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
        running = [
            j.training_job_name for j in self.backend.training_jobs.values() if j.training_job_status == "InProgress"
        ]
        return {
            "endpoints": list(self.backend.endpoints), "endpoint configurations": list(self.backend.endpoint_configs),
            "models": list(self.backend._models), "model packages": list(self.backend.model_packages),
            "model package groups": list(self.backend.model_package_groups), "running jobs": running,
            "servers": self.hosting.running(),
        }  # fmt: skip

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
        """As a new account has them, with one GPU asked for and given."""
        quotas = {
            "ml.g5.xlarge for training job usage": 1, "ml.g5.xlarge for spot training job usage": 0,
            "ml.g4dn.xlarge for endpoint usage": 1, "ml.c6i.xlarge for endpoint usage": 4,
        }  # fmt: skip
        return {"Quotas": [{"QuotaName": name, "Value": float(value)} for name, value in quotas.items()]}

    def simulate(self, body: bytes) -> bytes:
        """SimulatePrincipalPolicy: the inline policies of a role, `Allow` statements only; users may do all."""
        given = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        actions = [value for name, value in given.items() if name.startswith("ActionNames.member.")]
        allowed = self._allowed(given["PolicySourceArn"])
        results = "".join(
            f"<member><EvalActionName>{escape(action)}</EvalActionName><EvalResourceName>*</EvalResourceName>"
            f"<EvalDecision>{'allowed' if self._matches(action, allowed) else 'implicitDeny'}</EvalDecision></member>"
            for action in actions
        )
        return (
            '<SimulatePrincipalPolicyResponse xmlns="https://iam.amazonaws.com/doc/2010-05-08/">'
            f"<SimulatePrincipalPolicyResult><IsTruncated>false</IsTruncated><EvaluationResults>{results}"
            "</EvaluationResults></SimulatePrincipalPolicyResult></SimulatePrincipalPolicyResponse>"
        ).encode()

    def _allowed(self, arn: str) -> list[str]:
        if ":role/" not in arn:
            return ["*"]
        iam, name = self.client("iam"), arn.rsplit("/", 1)[1]
        found: list[str] = []
        for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
            document = iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]
            document = json.loads(document) if isinstance(document, str) else document
            for statement in document["Statement"]:
                if statement["Effect"] == "Allow":
                    given = statement["Action"]
                    found += [given] if isinstance(given, str) else given
        return found

    @staticmethod
    def _matches(action: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(action.lower(), pattern.lower()) for pattern in patterns)
