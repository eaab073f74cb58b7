"""The project's endpoint as it is before a deployment: its kind, how it scales, which model it serves."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.model.manifest import Manifest
from training.errors import ConfigError
from training.launch import autoscaling, endpoint, registry
from training.launch.errors import AwsError
from training.launch.hosting import Kind
from training.launch.names import Project
from training.launch.session import Aws

log = logging.getLogger("training")

GONE = ("Failed", "Deleting")
"""What a deployment makes anew, so that nothing of it counts."""
_CALLED: dict[Kind, str] = {"realtime": "a real-time", "serverless": "a serverless", "async": "an asynchronous"}


@dataclass(frozen=True)
class Live:
    """An endpoint of the project's."""

    endpoint: Mapping[str, Any]
    """As DescribeEndpoint tells it."""
    config: Mapping[str, Any] | None = None
    """As DescribeEndpointConfig does; None where it was deleted, or is of no matter any more."""
    scaling: autoscaling.Scaling = autoscaling.NONE
    interrupted: bool = False
    """Whether an update that broke off had taken its autoscaling off: what is there may be a part of it."""


def look(aws: Aws, project: Project) -> Live | None:
    """The project's endpoint; None where there is none. Raises: LaunchError where others made it; AwsError."""
    found = endpoint.find_ours(aws, project)
    if found is None or found["EndpointStatus"] in GONE:
        return None if found is None else Live(found)
    scaling, noted = autoscaling.found(aws, project), autoscaling.taken_off(aws, found["EndpointArn"])
    if noted is not None and scaling[0] is None:
        log.warning(
            "an update that broke off left endpoint %s without its autoscaling, from %d to %d instances; a deployment "
            "that says nothing else turns it on again", project.endpoint, *noted,
        )  # fmt: skip
        scaling = ({"MinCapacity": noted[0], "MaxCapacity": noted[1]}, scaling[1])
    return Live(found, endpoint.config_of(aws, found), scaling, noted is not None)


def kind_of(config: Mapping[str, Any]) -> Kind:
    """What an endpoint of this configuration is."""
    if config["ProductionVariants"][0].get("ServerlessConfig"):
        return "serverless"
    return "async" if config.get("AsyncInferenceConfig") else "realtime"


def is_asynchronous(aws: Aws, name: str) -> bool:
    """Whether the endpoint is; no where it is not there, or may not be asked about. Raises: AwsError."""
    try:
        found = endpoint.find(aws, name)
        config = None if found is None else endpoint.config_of(aws, found)
    except AwsError as exc:
        if exc.is_denied:
            return False
        raise
    return config is not None and kind_of(config) == "async"


def require_kind(project: Project, now: Live | None, wanted: Kind, remove: str) -> None:
    """Raises: ConfigError where the endpoint is of another kind, which an update does not change; `remove` does.

    https://docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints-update.html
    """
    if now is None or now.config is None or kind_of(now.config) == wanted:
        return
    raise ConfigError(
        f"Endpoint {project.endpoint} is {_CALLED[kind_of(now.config)]} one, and --kind {wanted} asks for "
        f"{_CALLED[wanted]} one, which no update makes of it: give another --project, or remove it first (`{remove}`)."
    )


def tell_replaced(aws: Aws, now: Live | None, new: Manifest) -> None:
    """Say which version is replaced by which, where the classes are others, and where the measured accuracy falls.
    Raises: AwsError.
    """
    facts: dict[str, str] = {}
    if now is not None and now.config is not None:
        _, facts = registry.registered(aws, now.config["ProductionVariants"][0]["ModelName"])
    if "version" not in facts or facts["version"] == new.version:
        return
    before = registry.accuracy_of(facts)
    after = (new.metrics.get("validation") or {}).get("accuracy")
    log.info(
        "version %s%s takes the place of %s%s", new.version, _shown(after), facts["version"], _shown(before)
    )  # fmt: skip
    noted = registry.class_facts(new.classes)
    if facts.get("classes_digest", noted["classes_digest"]) != noted["classes_digest"]:
        is_now, was = registry.classes_of(noted), registry.classes_of(facts)
        shown = f": {is_now[0]} instead of {was[0]} ({is_now[1]} instead of {was[1]})" if is_now and was else ""
        log.warning("other classes%s: whoever calls the endpoint gets other labels", shown)
    if before is not None and after is not None and after < before:
        log.warning(
            "the measured accuracy falls from %.2f %% to %.2f %%; `deploy --model` with the model of before goes back",
            100 * before, 100 * after,
        )  # fmt: skip


def _shown(accuracy: float | None) -> str:
    return "" if accuracy is None else f" (validation accuracy {100 * accuracy:.2f} %)"
