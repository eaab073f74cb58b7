"""What a project has at AWS, read from AWS: shown by `status`, removed by `delete`, in an order that works."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from training.launch import autoscaling, data, endpoint, registry, roles
from training.launch.attempts import TRAINING_JOBS, TRANSFORM_JOBS, TUNING_JOBS
from training.launch.errors import AwsError
from training.launch.names import MAKER, MAKER_TAG, PROJECT_TAG, Project
from training.launch.session import Aws
from training.launch.wait import POLL_S, wait

log = logging.getLogger("training")


@dataclass(frozen=True)
class Thing:
    """Something at AWS, and how it goes away."""

    kind: str
    name: str
    state: str
    remove: Callable[[], object] | None
    """None where nothing is left to do: a job that has ended costs nothing and stays in AWS's records."""


def things(aws: Aws, project: Project, *, with_data: bool = False, with_role: bool = False) -> list[Thing]:
    """All that carries the project's name and, where AWS lists it, our tag; in the order to remove it.

    `with_data`: the project's objects in S3 too (data, models, outputs, checkpoints). Raises: AwsError.
    """
    found = [*_endpoint(aws, project), *_running(aws, project), *_hosting(aws, project), *_packages(aws, project)]
    found += _alarms(aws, project)
    found += _logs(aws, project)
    if with_data:
        found += _objects(aws, project)
    if with_role:
        found += _role(aws, project)
    return found


def remove(aws: Aws, found: list[Thing], poll_s: float = POLL_S) -> int:
    """Remove each; what is gone already is no error. Returns: how many were removed. Raises: AwsError."""
    count = 0
    for thing in found:
        if thing.remove is None:
            continue
        try:
            thing.remove()
        except AwsError as exc:
            if not exc.is_missing:
                raise
        count += 1
        log.info("removed %s %s", thing.kind, thing.name)
    return count


def _endpoint(aws: Aws, project: Project) -> Iterator[Thing]:
    target, policies = autoscaling.found(aws, project)
    if target or policies:
        bounds = f"{target['MinCapacity']} to {target['MaxCapacity']} instances" if target else "policies only"
        yield Thing("autoscaling", autoscaling.resource(project), bounds, lambda: autoscaling.remove(aws, project))
    there = endpoint.find(aws, project.endpoint)
    if there and _ours(aws, project, there["EndpointArn"]):
        yield Thing("endpoint", project.endpoint, there["EndpointStatus"], lambda: _delete_endpoint(aws, project))


def _delete_endpoint(aws: Aws, project: Project, poll_s: float = 2.0) -> None:
    client = aws.client("sagemaker")
    there = endpoint.find(aws, project.endpoint)
    if there and there["EndpointStatus"] in ("Creating", "Updating", "SystemUpdating", "RollingBack"):
        wait(  # AWS refuses to delete before that is over
            lambda: endpoint.find(aws, project.endpoint) or {"EndpointStatus": "Deleted"},
            lambda found: str(found["EndpointStatus"]),
            lambda found: found["EndpointStatus"] in ("InService", "Failed", "Deleted"),
            f"endpoint {project.endpoint}",
            None,
            poll_s,
        )
    client.delete_endpoint(EndpointName=project.endpoint)
    wait(
        lambda: endpoint.find(aws, project.endpoint) or {"EndpointStatus": "Deleted"},
        lambda found: str(found["EndpointStatus"]),
        lambda found: found["EndpointStatus"] == "Deleted",
        f"endpoint {project.endpoint}",
        None,
        poll_s,
    )


def _running(aws: Aws, project: Project) -> Iterator[Thing]:
    client = aws.client("sagemaker")
    for job in TUNING_JOBS.listed(aws, f"{project.name}-t-"):
        name, state = job["HyperParameterTuningJobName"], job["HyperParameterTuningJobStatus"]
        yield Thing(
            "tuning job",
            name,
            state,
            _stop(state, partial(client.stop_hyper_parameter_tuning_job, HyperParameterTuningJobName=name)),
        )
    for job in TRAINING_JOBS.listed(aws, f"{project.name}-"):
        name, state = job["TrainingJobName"], job["TrainingJobStatus"]
        if job["TrainingJobName"].startswith(f"{project.name}-train-"):
            yield Thing(
                "training job", name, state, _stop(state, partial(client.stop_training_job, TrainingJobName=name))
            )
    for job in TRANSFORM_JOBS.listed(aws, f"{project.name}-batch-"):
        name, state = job["TransformJobName"], job["TransformJobStatus"]
        yield Thing(
            "batch transform", name, state, _stop(state, partial(client.stop_transform_job, TransformJobName=name))
        )


def _stop(state: str, stop: Callable[[], object]) -> Callable[[], object] | None:
    return stop if state == "InProgress" else None


def _hosting(aws: Aws, project: Project) -> Iterator[Thing]:
    client = aws.client("sagemaker")
    for page in client.get_paginator("list_endpoint_configs").paginate(NameContains=f"{project.name}-config-"):
        for each in page["EndpointConfigs"]:
            name = each["EndpointConfigName"]
            if name.startswith(f"{project.name}-config-"):
                yield Thing(
                    "endpoint configuration", name, "", partial(client.delete_endpoint_config, EndpointConfigName=name)
                )
    for page in client.get_paginator("list_models").paginate(NameContains=f"{project.name}-"):
        for each in page["Models"]:
            name = each["ModelName"]
            if name.startswith((f"{project.name}-model-", f"{project.name}-batchmodel-")):
                yield Thing("model", name, "", partial(client.delete_model, ModelName=name))


def _packages(aws: Aws, project: Project) -> Iterator[Thing]:
    client, group = aws.client("sagemaker"), project.package_group
    for arn in registry.packages(aws, group):
        yield Thing(
            "model package", arn.split("/", 1)[1], "", partial(client.delete_model_package, ModelPackageName=arn)
        )
    try:
        client.describe_model_package_group(ModelPackageGroupName=group)
    except AwsError as exc:
        if not exc.is_missing and exc.code != "ValidationException":
            raise
        return
    yield Thing(
        "model package group", group, "", lambda: client.delete_model_package_group(ModelPackageGroupName=group)
    )


def _alarms(aws: Aws, project: Project) -> Iterator[Thing]:
    client = aws.client("cloudwatch")
    names = [f"{project.name}-{name}" for name in ("5xx", "latency", "wake")]
    for alarm in client.describe_alarms(AlarmNames=names)["MetricAlarms"]:
        name = alarm["AlarmName"]
        yield Thing("alarm", name, alarm["StateValue"], partial(client.delete_alarms, AlarmNames=[name]))


def _logs(aws: Aws, project: Project) -> Iterator[Thing]:
    group = f"/aws/sagemaker/Endpoints/{project.endpoint}"
    client = aws.client("logs")
    found = client.describe_log_groups(logGroupNamePrefix=group)["logGroups"]
    if any(each["logGroupName"] == group for each in found):
        yield Thing("log group", group, "", lambda: client.delete_log_group(logGroupName=group))


def _objects(aws: Aws, project: Project) -> Iterator[Thing]:
    try:
        sizes = [size for _, size in data.listed(aws, f"{project.uri()}/")]
    except AwsError as exc:
        if not exc.is_missing:
            raise
        return
    if sizes:
        yield Thing(
            "objects in S3",
            f"{project.uri()}/",
            f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB",
            lambda: delete_objects(aws, project),
        )


def delete_objects(aws: Aws, project: Project) -> None:
    """Remove all objects below the project's prefix; the bucket stays, others may use it."""
    s3 = aws.client("s3")
    keys = [{"Key": key} for key, _ in data.listed(aws, f"{project.uri()}/")]
    for first in range(0, len(keys), 1000):
        s3.delete_objects(Bucket=project.bucket, Delete={"Objects": keys[first : first + 1000], "Quiet": True})


def _role(aws: Aws, project: Project) -> Iterator[Thing]:
    name = roles.role_name(project)
    try:
        aws.client("iam").get_role(RoleName=name)
    except AwsError as exc:
        if not exc.is_missing:
            raise
        return
    yield Thing("role", name, "", lambda: roles.delete_role(aws, project))


def _ours(aws: Aws, project: Project, arn: str) -> bool:
    """Whether we made it: an endpoint that happens to be called like the project is left alone."""
    tags: dict[str, Any] = {
        tag["Key"]: tag["Value"] for tag in aws.client("sagemaker").list_tags(ResourceArn=arn)["Tags"]
    }
    return tags.get(PROJECT_TAG) == project.name and tags.get(MAKER_TAG) == MAKER
