"""What a project has at AWS, read from AWS: shown by `status`, removed by `delete`, in an order that works."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from training.launch import autoscaling, data, endpoint, ownership, registry, roles
from training.launch.attempts import KINDS, RUNNING
from training.launch.errors import AwsError, refused
from training.launch.logs import ENDPOINTS
from training.launch.names import PARTS, Project
from training.launch.session import Aws
from training.launch.wait import POLL_S, StoppedWaiting

log = logging.getLogger("training")

OBJECTS, ROLE = "objects in S3", "role"
JOBS = ("tuning job", "training job", "batch transform")
OF_JOBS = ("batch", "checkpoints", "debugger", "jobs", "profiler", "tensorboard")
"""The parts of the project's prefix that jobs write, also the first time in the last two minutes before they end."""


@dataclass(frozen=True)
class Thing:
    """Something at AWS, and how it goes away."""

    kind: str
    name: str
    state: str
    remove: Callable[[float], object] | None
    """Given how often to ask AWS, in seconds, where it takes a while. None where it stays: a job that has ended costs
    nothing and is kept in AWS's records; objects in S3 that these commands did not write are someone's."""
    until_over: Callable[[float], object] | None = None
    """Of a job, which goes on after it was told to stop: waits for its end."""
    needed_by_jobs: bool = False
    """A job that is being stopped still writes to it, or acts by it."""
    created: datetime | None = None
    """Where AWS's list tells it."""


def things(
    aws: Aws, project: Project, *, with_data: bool = False, with_role: bool = False, to_come: bool = True
) -> list[Thing]:
    """All that is the project's, in the order to remove it.

    Jobs, configurations and models are known by names that end in a digest; what is called like the project and nothing
    more (endpoint, model package group, alarms, role) by our tags; an endpoint's log group and autoscaling, which have
    none of their own, by the endpoint's. In S3 the folders below the project's prefix that these commands write.

    `with_data`: the project's objects in S3 too (data, models, outputs, checkpoints); `to_come`: with the folders that
    its jobs may yet write to while they are stopped. Raises: AwsError.
    """
    there = endpoint.find(aws, project.endpoint)
    ours = there is not None and ownership.is_ours(aws, project, there["EndpointArn"])
    found = [*_jobs(aws, project)]
    if ours or there is None:
        found += _scaling(aws, project)
    if ours and there:
        found.append(
            Thing(
                "endpoint", project.endpoint, there["EndpointStatus"], partial(_delete_endpoint, aws, project),
                created=there.get("CreationTime"),
            )
        )  # fmt: skip
    live = there["EndpointConfigName"] if there else None
    found += [*_hosting(aws, project, live), *_packages(aws, project), *_alarms(aws, project)]
    if ours or there is None:
        found += _logs(aws, project)
    if with_data:
        found += _objects(aws, project, to_come and any(thing.until_over for thing in found))
    if with_role:
        found += _role(aws, project)
    return found


def remove(aws: Aws, found: list[Thing], poll_s: float = POLL_S) -> None:
    """Remove each; what is gone already is no error. Jobs have ended when it returns.

    Raises: AwsError; StoppedWaiting.
    """
    try:
        _remove(found, poll_s)
    except KeyboardInterrupt as exc:
        raise StoppedWaiting(
            "Stopped. What is said to be removed is gone, what was told to stop stops; the same command goes on with "
            "the rest, `status` lists it."
        ) from (exc.__cause__ or exc)


def _remove(found: list[Thing], poll_s: float) -> None:
    stopping = [thing.until_over for thing in found if thing.until_over]
    for thing in found:
        if thing.remove is None:
            continue
        while thing.needed_by_jobs and stopping:
            stopping.pop(0)(poll_s)
        try:
            thing.remove(poll_s)
        except AwsError as exc:
            if not exc.is_missing:
                raise
        log.info("%s %s %s", "stopped" if thing.until_over else "removed", thing.kind, thing.name)
    for until_over in stopping:
        until_over(poll_s)


def _at_once(call: Callable[..., object], *arguments: object, **named: object) -> Callable[[float], object]:
    """Something to do that nobody waits for."""
    return lambda _poll_s: call(*arguments, **named)


def _jobs(aws: Aws, project: Project) -> Iterator[Thing]:
    for kind, jobs in zip(JOBS, KINDS, strict=True):
        for each in jobs.listed(aws, project):
            name, state, made = each[f"{jobs.field}Name"], each[f"{jobs.field}Status"], each.get("CreationTime")
            if state in RUNNING:
                over = partial(jobs.wait_until_over, aws, name)
                yield Thing(kind, name, state, _at_once(jobs.stop, aws, name), over, created=made)
            else:
                yield Thing(kind, name, state, None, created=made)


def _scaling(aws: Aws, project: Project) -> Iterator[Thing]:
    target, policies = autoscaling.found(aws, project)
    if target or policies:
        bounds = f"{target['MinCapacity']} to {target['MaxCapacity']} instances" if target else "policies only"
        yield Thing("autoscaling", autoscaling.resource(project), bounds, _at_once(autoscaling.remove, aws, project))


def _delete_endpoint(aws: Aws, project: Project, poll_s: float) -> None:
    name = project.endpoint
    if endpoint.wait_while_changing(aws, name, poll_s)["EndpointStatus"] not in ("Deleting", "Deleted"):
        aws.client("sagemaker").delete_endpoint(EndpointName=name)  # refused while it is changing
    endpoint.wait_until_gone(aws, name, poll_s)


def _hosting(aws: Aws, project: Project, live: str | None) -> Iterator[Thing]:
    """`live`: the configuration that the endpoint has now."""
    client = aws.client("sagemaker")
    for page in client.get_paginator("list_endpoint_configs").paginate(NameContains=f"{project.name}-config-"):
        for each in page["EndpointConfigs"]:
            name = each["EndpointConfigName"]
            if project.owns("config", name):
                gone = _at_once(client.delete_endpoint_config, EndpointConfigName=name)
                state = "current" if name == live else ""
                yield Thing("endpoint configuration", name, state, gone, created=each.get("CreationTime"))
    for page in client.get_paginator("list_models").paginate(NameContains=f"{project.name}-"):
        for each in page["Models"]:
            name = each["ModelName"]
            if project.owns("model", name) or project.owns("batchmodel", name):
                gone = _at_once(client.delete_model, ModelName=name)
                yield Thing("model", name, "", gone, created=each.get("CreationTime"))


def _packages(aws: Aws, project: Project) -> Iterator[Thing]:
    client, group = aws.client("sagemaker"), registry.find_group(aws, project)
    if group is None or not ownership.is_ours(aws, project, group["ModelPackageGroupArn"]):
        return
    for arn in registry.packages(aws, project.package_group):
        version = arn.split("/", 1)[1]
        yield Thing("model package", version, "", _at_once(client.delete_model_package, ModelPackageName=arn))
    name = project.package_group
    yield Thing(
        "model package group", name, "", _at_once(client.delete_model_package_group, ModelPackageGroupName=name)
    )  # fmt: skip


def _alarms(aws: Aws, project: Project) -> Iterator[Thing]:
    client = aws.client("cloudwatch")
    names = [f"{project.name}-{name}" for name in ("5xx", "latency", "wake")]
    for alarm, ours in ownership.alarms(aws, project, names):
        name = alarm["AlarmName"]
        if ours:
            yield Thing("alarm", name, alarm["StateValue"], _at_once(client.delete_alarms, AlarmNames=[name]))


def _logs(aws: Aws, project: Project) -> Iterator[Thing]:
    group = f"{ENDPOINTS}/{project.endpoint}"
    client = aws.client("logs")
    found = client.describe_log_groups(logGroupNamePrefix=group)["logGroups"]
    if any(each["logGroupName"] == group for each in found):
        yield Thing("log group", group, "", _at_once(client.delete_log_group, logGroupName=group))


def _objects(aws: Aws, project: Project, jobs_run: bool) -> Iterator[Thing]:
    """A thing for each folder right below the project's prefix, and for each object that lies there by itself."""
    sizes: dict[str, list[int]] = {f"{part}/": [] for part in OF_JOBS} if jobs_run else {}
    broken_off: Counter[str] = Counter()
    try:
        broken_off.update(f"{part}/" for part, _, _ in _unfinished(aws, project) if part in PARTS)
        for name in broken_off:
            sizes.setdefault(name, [])
        for key, size in data.listed(aws, f"{project.uri()}/"):
            head, slash, _ = key.removeprefix(f"{project.name}/").partition("/")
            sizes.setdefault(head + slash, []).append(size)
    except AwsError as exc:
        if not exc.is_missing:
            raise
        return
    for name, found in sorted(sizes.items()):
        part = name.removesuffix("/")
        ours = part in PARTS and name != part
        shown = f"{len(found)} files, {sum(found) / 1e6:.1f} MB" + ("" if ours else "; not written by these commands")
        if broken_off[name]:
            shown += f", {broken_off[name]} uploads that were broken off"
        elif not found:
            shown = "what jobs write while they are stopped"
        yield Thing(
            OBJECTS, f"{project.uri()}/{name}", shown,
            _at_once(delete_objects, aws, project, [part]) if ours else None, needed_by_jobs=True,
        )  # fmt: skip


def delete_objects(aws: Aws, project: Project, parts: Sequence[str] = PARTS) -> None:
    """Remove all objects in these parts of the project's prefix, and what uploads left that were broken off; the bucket
    stays, others may use it.

    Raises: AwsError, also where S3 keeps one of a thousand.
    """
    s3 = aws.client("s3")
    for part in parts:
        keys = [{"Key": key} for key, _ in data.listed(aws, f"{project.uri(part)}/")]
        for first in range(0, len(keys), 1000):
            answer = s3.delete_objects(
                Bucket=project.bucket, Delete={"Objects": keys[first : first + 1000], "Quiet": True}
            )
            for error in answer.get("Errors", ()):
                raise refused("s3", "DeleteObjects", error)
    for part, key, upload in list(_unfinished(aws, project)):
        if part in parts:
            try:
                s3.abort_multipart_upload(Bucket=project.bucket, Key=key, UploadId=upload)
            except AwsError as exc:
                if not exc.is_missing:  # it came to its end
                    raise


def _unfinished(aws: Aws, project: Project) -> Iterator[tuple[str, str, str]]:
    """Folder below the prefix, key and id of every upload in parts that was begun and not ended, as by a command that
    was killed: S3 keeps what came, bills it, and lists it among no objects. None where that may not be asked.

    Raises: AwsError.
    """
    pages = aws.client("s3").get_paginator("list_multipart_uploads")
    try:
        for page in pages.paginate(Bucket=project.bucket, Prefix=f"{project.key()}/"):
            for each in page.get("Uploads", ()):
                yield each["Key"].split("/")[1], each["Key"], each["UploadId"]
    except AwsError as exc:
        if not exc.is_denied:
            raise


def _role(aws: Aws, project: Project) -> Iterator[Thing]:
    name = project.role
    try:
        role = aws.client("iam").get_role(RoleName=name)["Role"]
    except AwsError as exc:
        if not exc.is_missing:
            raise
        return
    if ownership.has_tags(project, role.get("Tags", ())):
        gone = _at_once(roles.delete_role, aws, project)
        yield Thing(ROLE, name, "", gone, needed_by_jobs=True, created=role.get("CreateDate"))
