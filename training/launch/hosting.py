"""How an endpoint is to run: its kind, instances, limits and scaling, and the configuration that says so to AWS.

A configuration's name follows from its content, so `same name` is `same configuration`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training.errors import ConfigError
from training.launch import cost
from training.launch.amis import ami_for, has_gpu
from training.launch.names import Project

Kind = Literal["realtime", "serverless", "async"]
INSTANCE = "ml.g4dn.xlarge"
"""One T4: the cheapest GPU that CUDA 13 still runs on."""
MEMORY_MB, MAX_CONCURRENCY = 4096, 5
"""Of a serverless endpoint; the second of an asynchronous one, too."""
VARIANT, SHADOW = "main", "shadow"
STARTUP_S = 600
"""The container's own start is seconds; pulling a CUDA image of gigabytes is not counted, loading from disk is."""
SERVERLESS_STARTUP_S = 180
"""AWS's, the model's download included: https://docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints-invoke.html"""


@dataclass(frozen=True)
class Limits:
    """AWS's, of a request."""

    payload_mb: int
    timeout_s: int


LIMITS: dict[Kind, Limits] = {"realtime": Limits(25, 60), "serverless": Limits(4, 60), "async": Limits(1024, 3600)}
"""In MiB and for an answer; an asynchronous one that asks for no InvocationTimeoutSeconds has 900 s.

All kinds: https://docs.aws.amazon.com/sagemaker/latest/dg/hosting-faqs.html; serverless-endpoints-invoke.html and
async-inference-invoke-endpoint.html there say more.
"""
DEFAULTS = {"CLASSIFIER_MAX_PAYLOAD_BYTES": "26214400", "CLASSIFIER_MAX_BODY_BYTES": "536870912"}
"""The service's own: the bytes of one body, and of all at once, which are no fewer."""
_NUMBER = re.compile(r"\d+(\.\d*)?")


@dataclass(frozen=True)
class Targets:
    """What autoscaling keeps to: it adds instances where there is more for each, and takes them away where less."""

    requests: float = 1200.0
    """A minute: 20 a second, well below what an instance answers (see the README), so that the minutes a new one takes
    to start are bridged. To be set from a load test of one's own pictures."""
    concurrency: float = 16.0
    """Requests at once: half of a batch, of which the engine takes 32."""
    backlog: float = 5.0
    """Requests that wait, of an asynchronous endpoint."""


@dataclass(frozen=True)
class Hosting:
    """How the endpoint is to run."""

    kind: Kind = "realtime"
    instance: str = INSTANCE
    min_count: int = 1
    max_count: int = 1
    ami: str | None = None
    """InferenceAmiVersion; None: the one that CUDA 13 needs, see `amis`."""
    startup_s: int = STARTUP_S
    capture_percent: int = 0
    """Share of requests and answers that are stored in S3."""
    memory_mb: int = MEMORY_MB
    """Serverless only; 1024 to 6144."""
    max_concurrency: int = MAX_CONCURRENCY
    """Serverless: requests at once before 429. Async: requests at once per instance."""
    targets: Targets = Targets()

    def __post_init__(self) -> None:
        least = 0 if self.kind == "async" else 1
        if not least <= self.min_count <= self.max_count:
            raise ConfigError(
                f"--min {self.min_count} --max {self.max_count}: --min is at least {least} and not more than --max; "
                "only an asynchronous endpoint can go down to 0 instances."
            )
        if self.max_count < 1:
            raise ConfigError(
                f"--min {self.min_count} --max {self.max_count}: --max is at least 1 (where it is not given, it is as "
                "--min); give --max 1, say."
            )
        if self.kind == "serverless" and self.memory_mb not in range(1024, 6145, 1024):
            raise ConfigError(f"--memory {self.memory_mb}: serverless endpoints have 1024, 2048, ... or 6144 MB.")
        if self.kind == "serverless" and self.startup_s != STARTUP_S:
            raise ConfigError(
                f"--startup-seconds {self.startup_s}: AWS gives serverless endpoints {SERVERLESS_STARTUP_S} s, no more "
                "and no less; leave it out."
            )
        if self.kind == "serverless" and self.capture_percent:
            # https://docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints.html, Feature exclusions
            raise ConfigError(
                f"--capture-percent {self.capture_percent}: AWS stores no requests of serverless endpoints; leave it "
                "out, or take --kind realtime."
            )

    def price(self, shadow: bool = False) -> str:
        """What it costs, as a line; with a shadow, both variants together."""
        if self.kind == "serverless":
            return cost.serverless(self.memory_mb)
        return cost.endpoint(self.instance, self.min_count, self.max_count, shadow)


def counts_of(kind: Kind, least: int | None, most: int | None) -> tuple[int, int]:
    """Its instances at least and at most, where `least` and `most` were given. Raises: ConfigError where an endpoint of
    this kind has no instances.
    """
    given = [f"{flag} {count}" for flag, count in (("--min", least), ("--max", most)) if count is not None]
    if kind == "serverless" and given:
        raise ConfigError(
            f"{' '.join(given)}: a serverless endpoint has no instances to count; --max-concurrency says how many "
            "requests it takes at once."
        )
    low = 1 if least is None else least
    return low, low if most is None else most


def require_limits(kind: Kind, variables: Mapping[str, str]) -> None:
    """Raises: ConfigError where the container's variables allow requests that AWS does not, or end its start."""
    mb, timeout_s = LIMITS[kind].payload_mb, LIMITS[kind].timeout_s
    for name, most, shown in (
        ("CLASSIFIER_MAX_PAYLOAD_BYTES", mb * 2**20, f"sends {kind} endpoints no more than {mb} MB"),
        ("CLASSIFIER_DEADLINE_S", timeout_s, f"waits for {kind} endpoints no longer than {timeout_s} s"),
    ):
        given = variables.get(name, "")
        if _NUMBER.fullmatch(given) and float(given) > most:
            more = "" if kind == "async" else ", or take --kind async"
            raise ConfigError(f"--env {name}={given}: AWS {shown}; give {most} at most{more}.")
    payload, body = (variables.get(name) or default for name, default in DEFAULTS.items())
    if _NUMBER.fullmatch(payload) and _NUMBER.fullmatch(body) and float(body) < float(payload):
        raise ConfigError(
            f"CLASSIFIER_MAX_BODY_BYTES={body}, all bodies at once, is less than CLASSIFIER_MAX_PAYLOAD_BYTES="
            f"{payload}, and the container would not start; give --env CLASSIFIER_MAX_BODY_BYTES={payload} at least."
        )


def require_shadow(kind: Kind) -> None:
    """Raises: ConfigError where an endpoint of this kind can have none."""
    if kind != "realtime":
        raise ConfigError(f"--shadow needs a real-time endpoint, not {kind}.")


def config_request(project: Project, model: str, hosting: Hosting, shadow: str | None = None) -> dict[str, Any]:
    """CreateEndpointConfig's arguments; the name is the digest of the rest."""
    if shadow:
        require_shadow(hosting.kind)
    wanted: dict[str, Any] = {"ProductionVariants": [_variant(VARIANT, model, hosting)]}
    if shadow:
        # Gets a copy of every request; its answers go to the capture in S3, not to callers.
        wanted["ShadowProductionVariants"] = [_variant(SHADOW, shadow, hosting)]
    if hosting.capture_percent:
        wanted["DataCaptureConfig"] = {
            "EnableCapture": True,
            "InitialSamplingPercentage": hosting.capture_percent,
            "DestinationS3Uri": project.uri("captured"),
            "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
            "CaptureContentTypeHeader": {"JsonContentTypes": ["application/json"]},
        }
    if hosting.kind == "async":
        wanted["AsyncInferenceConfig"] = {
            "OutputConfig": {
                "S3OutputPath": project.uri("async", "output"), "S3FailurePath": project.uri("async", "failed")
            },
            "ClientConfig": {"MaxConcurrentInvocationsPerInstance": hosting.max_concurrency},
        }  # fmt: skip
    if hosting.kind != "serverless":
        # AWS reads the container's /metrics (Prometheus) every minute.
        wanted["MetricsConfig"] = {"EnableEnhancedMetrics": True, "EnableDetailedObservability": True}
    return {"EndpointConfigName": project.of("config", wanted), **wanted, "Tags": project.tags}


def _variant(name: str, model: str, hosting: Hosting) -> dict[str, Any]:
    variant: dict[str, Any] = {"VariantName": name, "ModelName": model, "InitialVariantWeight": 1.0}
    if hosting.kind == "serverless":
        variant["ServerlessConfig"] = {
            "MemorySizeInMB": hosting.memory_mb, "MaxConcurrency": hosting.max_concurrency
        }  # fmt: skip
        return variant
    variant |= {
        "InstanceType": hosting.instance,
        "InitialInstanceCount": max(1, hosting.min_count),
        "ContainerStartupHealthCheckTimeoutInSeconds": hosting.startup_s,
        "ModelDataDownloadTimeoutInSeconds": hosting.startup_s,
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
    }
    if has_gpu(hosting.instance):
        variant["InferenceAmiVersion"] = hosting.ami or ami_for(hosting.instance)
    return variant
