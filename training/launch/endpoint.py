"""The endpoint at AWS: created or updated in place, waited for; what a failure leaves is removed.

An update is blue/green: AWS starts the new instances beside the old, moves the traffic over when they answer
/ping, watches the alarms, and goes back by itself.
"""

import logging
from collections.abc import Mapping
from typing import Any

from training.launch import ownership
from training.launch.errors import AwsError, JobFailed, LaunchError, failure_advice
from training.launch.hosting import VARIANT, Hosting
from training.launch.logs import ENDPOINTS, LogTail
from training.launch.names import Project
from training.launch.session import Aws
from training.launch.wait import POLL_S, wait

log = logging.getLogger("training")

ALARM_PERIOD_S, ALARM_PERIODS = 60, 2
"""An alarm is raised by so many bad periods, one after the other."""
LATENCY_S = 10.0
CANARY_S = 300
"""How long the first new instance of several is watched before the others get traffic."""
BAKE_S = 600
"""How long the old instances stay, and cost, once the new ones have all the traffic: only until then can an alarm bring
them back. https://docs.aws.amazon.com/sagemaker/latest/dg/deployment-guardrails-blue-green.html"""
PROVISION_S = 1800
"""What AWS may take besides, to find machines and to pull the image."""
MAX_UPDATE_S = 28800
"""AWS's."""
CHANGING = ("Creating", "Updating", "SystemUpdating", "RollingBack")
"""What AWS is at work on, and refuses to update or delete meanwhile. Besides: InService, Failed (never came up),
Deleting, OutOfService and UpdateRollbackFailed (nothing but deleting helps)."""
STAYS = (
    "The new model's version stays in the registry and its archive in S3, where a repeated command finds them; "
    "`delete --data` removes all of it."
)
"""Of a deployment that failed: the model itself is sound."""
BEFORE_S = 900
"""How far back the log of an endpoint that is broken already is read."""


def ensure_config(aws: Aws, wanted: Mapping[str, Any]) -> None:
    """Make the configuration unless it is there. Raises: AwsError."""
    client, name = aws.client("sagemaker"), wanted["EndpointConfigName"]
    try:
        client.describe_endpoint_config(EndpointConfigName=name)
        return
    except AwsError as exc:
        if not exc.is_missing:
            raise
    try:
        client.create_endpoint_config(**wanted)
    except AwsError as exc:
        if not exc.is_there_already:
            raise


def find(aws: Aws, name: str) -> dict[str, Any] | None:
    """DescribeEndpoint, None where there is none. Raises: AwsError."""
    try:
        return dict(aws.client("sagemaker").describe_endpoint(EndpointName=name))
    except AwsError as exc:
        if exc.is_missing:
            return None
        raise


def find_ours(aws: Aws, project: Project) -> dict[str, Any] | None:
    """The project's endpoint; None where there is none. Raises: LaunchError where others made it; AwsError."""
    found = find(aws, project.endpoint)
    if found:
        ownership.require(aws, project, found["EndpointArn"], f"Endpoint {project.endpoint}")
    return found


def models_of(config: Mapping[str, Any]) -> set[str]:
    """The Models that a configuration's variants host."""
    return {v["ModelName"] for v in [*config["ProductionVariants"], *(config.get("ShadowProductionVariants") or ())]}


def config_of(aws: Aws, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of the endpoint that `found` describes; None where it was deleted. Raises: AwsError."""
    try:
        name = found["EndpointConfigName"]
        return dict(aws.client("sagemaker").describe_endpoint_config(EndpointConfigName=name))
    except AwsError as exc:
        if exc.is_missing:
            return None
        raise


def changes_machines(aws: Aws, before: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether the endpoint is to run on another instance type than it does. Raises: AwsError.

    Yes where its configuration was deleted, so that nobody knows.
    """
    if before["EndpointConfigName"] == wanted["EndpointConfigName"]:
        return False
    old = config_of(aws, before)
    new = wanted["ProductionVariants"][0]
    return old is None or old["ProductionVariants"][0].get("InstanceType") != new.get("InstanceType")


def put_alarms(aws: Aws, project: Project) -> list[str]:
    """The alarms that undo an update: errors, and answers that take too long. Returns: their names.

    Raises: LaunchError where others made one of the name; AwsError.
    """
    client = aws.client("cloudwatch")
    dimensions = [{"Name": "EndpointName", "Value": project.endpoint}, {"Name": "VariantName", "Value": VARIANT}]
    alarms = (
        ("5xx", "Invocation5XXErrors", "Sum", 5.0),
        ("latency", "ModelLatency", "Average", LATENCY_S * 1e6),  # microseconds
    )
    names = [f"{project.name}-{name}" for name, *_ in alarms]
    ownership.require_alarms(aws, project, names)
    for name, (_, metric, statistic, threshold) in zip(names, alarms, strict=True):
        client.put_metric_alarm(
            AlarmName=name, Namespace="AWS/SageMaker", MetricName=metric, Dimensions=dimensions,
            Statistic=statistic, Period=ALARM_PERIOD_S, EvaluationPeriods=ALARM_PERIODS, Threshold=threshold,
            ComparisonOperator="GreaterThanThreshold", TreatMissingData="notBreaching", Tags=project.tags,
        )  # fmt: skip
    return names


def deployment(hosting: Hosting, alarms: list[str]) -> dict[str, Any]:
    """UpdateEndpoint's DeploymentConfig: one new instance first where there are several, else all at once.

    The alarms watch from the first request on, until the old instances go.
    """
    traffic: dict[str, Any] = {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 0}  # between steps, of which it has one
    if hosting.min_count > 1:
        canary = {"Type": "INSTANCE_COUNT", "Value": 1}
        traffic = {"Type": "CANARY", "CanarySize": canary, "WaitIntervalInSeconds": CANARY_S}
    # The model's download and the container's start may take startup_s each.
    longest_s = PROVISION_S + 2 * hosting.startup_s + traffic["WaitIntervalInSeconds"] + BAKE_S
    return {
        "BlueGreenUpdatePolicy": {
            "TrafficRoutingConfiguration": traffic,
            "TerminationWaitInSeconds": BAKE_S,
            "MaximumExecutionTimeoutInSeconds": min(MAX_UPDATE_S, longest_s),
        },
        "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": name} for name in alarms]},
    }


def create_or_update(
    aws: Aws, project: Project, wanted: Mapping[str, Any], hosting: Hosting, poll_s: float = POLL_S
) -> str:
    """Bring the endpoint to the configuration and wait until it is in service. Safe to repeat at any point.

    Returns: "created", "updated" or "unchanged". Raises: JobFailed, after removing an endpoint that could not be
    created, or when AWS went back to the old configuration, which then still answers, or could not; LaunchError where
    others made the endpoint; StoppedWaiting; AwsError.
    """
    client, name, config = aws.client("sagemaker"), project.endpoint, wanted["EndpointConfigName"]
    found = find_ours(aws, project)
    if found and found["EndpointStatus"] == "Failed":
        log.info("endpoint %s failed earlier (%s); it is made anew", name, found.get("FailureReason", "no reason"))
        client.delete_endpoint(EndpointName=name)
        wait_until_gone(aws, name, poll_s)
        found = None
    elif found and found["EndpointStatus"] == "Deleting":
        wait_until_gone(aws, name, poll_s)
        found = None
    elif found and found["EndpointStatus"] != "InService":
        begun = found["EndpointStatus"]
        log.info("endpoint %s is %s already", name, begun)
        found = _settled(aws, project, found, poll_s)
        if found["EndpointConfigName"] == config:
            return "created" if begun == "Creating" else "updated"
    ensure_config(aws, wanted)
    if found is None:
        _create(aws, project, config)
        action = "created"
    elif found["EndpointConfigName"] == config:
        log.info("endpoint %s is in service with this very configuration", name)
        return "unchanged"
    else:
        given: dict[str, Any] = {}
        if hosting.kind == "realtime" and "ShadowProductionVariants" not in wanted:
            given["DeploymentConfig"] = deployment(hosting, put_alarms(aws, project))
        else:
            # AWS bakes and rolls back what has the variants that it had, in real time or asynchronous; 10 s are no
            # alarm for the latter. https://docs.aws.amazon.com/sagemaker/latest/dg/deployment-guardrails-exclusions.html
            log.info("no alarm watches this update: with a shadow, serverless or asynchronous, it is checked by /ping")
        client.update_endpoint(
            EndpointName=name, EndpointConfigName=config,
            RetainAllVariantProperties=hosting.max_count > hosting.min_count,  # what autoscaling has reached stays
            **given,
        )  # fmt: skip
        action = "updated"
    _settled(aws, project, dict(client.describe_endpoint(EndpointName=name)), poll_s, config)
    return action


def _create(aws: Aws, project: Project, config: str) -> None:
    """Raises: LaunchError where another command makes the endpoint this moment, otherwise; AwsError."""
    name = project.endpoint
    try:
        aws.client("sagemaker").create_endpoint(EndpointName=name, EndpointConfigName=config, Tags=project.tags)
    except AwsError as exc:
        if not exc.is_there_already:
            raise
        now = find_ours(aws, project)
        if now is None or now["EndpointConfigName"] != config:
            raise LaunchError(
                f"Endpoint {name} is being made by another command this moment, and not as this one asks; wait for "
                "that, and repeat this command where it is to be as asked here."
            ) from exc
        log.info(
            "endpoint %s with this very configuration is being made by another command, or by this one whose answer "
            "was lost",
            name,
        )


def wait_while_changing(aws: Aws, name: str, poll_s: float = POLL_S, tail: LogTail | None = None) -> dict[str, Any]:
    """Until AWS is not at work on the endpoint. Returns: its description, of status Deleted where it is gone."""
    return wait(
        lambda: find(aws, name) or {"EndpointStatus": "Deleted"},
        lambda endpoint: str(endpoint["EndpointStatus"]),
        lambda endpoint: endpoint["EndpointStatus"] not in CHANGING,
        f"endpoint {name}", tail, poll_s,
    )  # fmt: skip


def wait_until_gone(aws: Aws, name: str, poll_s: float = POLL_S) -> None:
    """Until an endpoint that is being deleted is. Raises: AwsError; StoppedWaiting."""
    wait(
        lambda: find(aws, name) or {"EndpointStatus": "Deleted"},
        lambda endpoint: str(endpoint["EndpointStatus"]),
        lambda endpoint: endpoint["EndpointStatus"] == "Deleted",
        f"endpoint {name}", None, poll_s,
    )  # fmt: skip


def _settled(
    aws: Aws, project: Project, found: Mapping[str, Any], poll_s: float, config: str | None = None
) -> dict[str, Any]:
    """Wait for what AWS does with the endpoint, which `found` describes as it began, with its new instances' log.

    Returns: the description of one that is in service, with `config` if that is given. Raises: JobFailed.
    """
    changing = found["EndpointStatus"] in CHANGING
    begun_s = found["CreationTime" if found["EndpointStatus"] == "Creating" else "LastModifiedTime"].timestamp()
    since_ms = int(1000 * (begun_s if changing else begun_s - BEFORE_S))
    tail = LogTail(aws, f"{ENDPOINTS}/{project.endpoint}", "", since_ms, new_streams=changing)
    settled = wait_while_changing(aws, project.endpoint, poll_s, tail if changing else None)
    if settled["EndpointStatus"] == "InService" and config in (None, settled["EndpointConfigName"]):
        return settled
    raise _failed(aws, project, settled, tail.last_lines(), poll_s)


def _failed(
    aws: Aws, project: Project, endpoint: Mapping[str, Any], lines: list[str], poll_s: float
) -> LaunchError:  # fmt: skip
    """What to raise for an endpoint that is not as wanted; removes one that never was in service."""
    name, status, reason = project.endpoint, endpoint["EndpointStatus"], str(endpoint.get("FailureReason", ""))
    what, advice = f"Endpoint {name}", failure_advice(reason)
    if status == "InService":
        what, reason = f"The update of endpoint {name}", reason or "AWS went back to the old configuration"
        also = f"The model that was there before still answers. {STAYS}"
    elif status == "Failed":
        try:
            aws.client("sagemaker").delete_endpoint(EndpointName=name)
            wait_until_gone(aws, name, poll_s)
            also = f"The endpoint is removed, so that it costs nothing; nothing else runs. {STAYS}"
        except AwsError as exc:  # the failure itself is what must be told
            also = f"The endpoint could not be removed ({exc}); `delete` does it."
    elif status in ("Deleting", "Deleted"):
        reason, also = reason or f"it is {status}", "Someone else removes it; the same command makes it anew."
    else:
        reason = reason or f"it is {status}"
        also = (
            f"It is {status}, and costs what it costs; nothing but removing helps: `python -m training.launch delete "
            f"--project {project.name}`, then deploy again."
        )
    return JobFailed(what, reason, lines, f"{advice} {also}".strip())
