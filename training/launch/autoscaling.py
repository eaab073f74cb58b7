"""Autoscaling of the endpoint's variant: the number of instances follows requests and concurrency, within bounds."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from training.errors import ConfigError
from training.launch import ownership
from training.launch.endpoint import wait_while_changing
from training.launch.errors import AwsError
from training.launch.hosting import VARIANT, Hosting, Kind, Targets
from training.launch.names import Project
from training.launch.session import Aws
from training.launch.wait import POLL_S

log = logging.getLogger("training")

NAMESPACE, DIMENSION = "sagemaker", "sagemaker:variant:DesiredInstanceCount"
TARGETS: Mapping[Kind, tuple[str, ...]] = {
    "realtime": ("requests", "concurrency"), "async": ("backlog",), "serverless": ()
}  # fmt: skip
"""What an endpoint of a kind scales by: fields of Targets, ends of the policies' names and of the flags'."""
UNITS = {"requests": "requests a minute", "concurrency": "requests at once", "backlog": "requests that wait"}
"""What each of them counts, of one instance."""
SCALE_OUT_S, SCALE_IN_S = 60, 300
POLICY_FIELDS = (
    "PolicyName", "PolicyType", "TargetTrackingScalingPolicyConfiguration", "StepScalingPolicyConfiguration",
)  # fmt: skip
"""What PutScalingPolicy takes of what DescribeScalingPolicies tells."""

TAKEN_OFF = "autoscaling-taken-off"
"""The endpoint's tag that tells between how many instances it scaled before an update for which that was taken off:
`1-3`; `no`: it was turned on again."""

Scaling = tuple[Mapping[str, Any] | None, Sequence[Mapping[str, Any]]]
"""A scalable target, None where there is none, and its policies."""
NONE: Scaling = (None, ())


def resource(project: Project) -> str:
    """The variant's name in application-autoscaling."""
    return f"endpoint/{project.endpoint}/variant/{VARIANT}"


def policies(project: Project, hosting: Hosting) -> dict[str, dict[str, Any]]:
    """Policy name -> target tracking configuration. With several, the one that wants most instances wins."""

    def tracking(target: float, metric: dict[str, Any]) -> dict[str, Any]:
        return {"TargetValue": target, "ScaleOutCooldown": SCALE_OUT_S, "ScaleInCooldown": SCALE_IN_S, **metric}

    if hosting.kind == "async":
        dimensions = [{"Name": "EndpointName", "Value": project.endpoint}]
        backlog = {
            "MetricName": "ApproximateBacklogSizePerInstance", "Namespace": "AWS/SageMaker",
            "Dimensions": dimensions, "Statistic": "Average",
        }  # fmt: skip
        metric = {"CustomizedMetricSpecification": backlog}
        return {f"{project.name}-backlog": tracking(hosting.targets.backlog, metric)}
    predefined = {
        "requests": (hosting.targets.requests, "SageMakerVariantInvocationsPerInstance"),
        "concurrency": (hosting.targets.concurrency, "SageMakerVariantConcurrentRequestsPerModelHighResolution"),
    }
    return {
        f"{project.name}-{name}": tracking(
            target, {"PredefinedMetricSpecification": {"PredefinedMetricType": kind}}
        )
        for name, (target, kind) in predefined.items()
    }  # fmt: skip


def require_targets(kind: Kind, given: Mapping[str, float]) -> None:
    """Raises: ConfigError where an endpoint of this kind does not scale by a target that was `given`."""
    wrong = [flag_of(name) for name in given if name not in TARGETS[kind]]
    if wrong:
        by = " and ".join(map(flag_of, TARGETS[kind]))
        does = f"scales by {by}" if by else "is scaled by AWS alone"
        raise ConfigError(f"{', '.join(wrong)}: a {kind} endpoint {does}.")


def flag_of(target: str) -> str:
    """`requests` -> `--scale-at-requests`."""
    return f"--scale-at-{target}"


def targets(project: Project, was: Scaling, given: Mapping[str, float]) -> Targets:
    """What an endpoint is to keep to: what is `given`, else what it keeps to as it `was`, else ours."""
    return Targets(**{**_found_targets(project, was), **given})


def _found_targets(project: Project, was: Scaling) -> dict[str, float]:
    """What the policies that are ours keep to; there may be others, and none of ours."""
    return {
        name: float(policy["TargetTrackingScalingPolicyConfiguration"]["TargetValue"])
        for policy in was[1]
        for name in sum(TARGETS.values(), ())
        if policy["PolicyName"] == f"{project.name}-{name}" and policy.get("TargetTrackingScalingPolicyConfiguration")
    }


def _aim(hosting: Hosting, targets: Mapping[str, float] | None = None) -> str:
    """What an instance is to have at most, by all `targets` or these, with the flags that say so."""
    return " or ".join(
        f"{getattr(hosting.targets, name):g} {UNITS[name]} ({flag_of(name)})"
        for name in TARGETS[hosting.kind] if targets is None or name in targets
    )  # fmt: skip


def scales(hosting: Hosting) -> bool:
    """Whether there is room between its counts."""
    return hosting.kind != "serverless" and hosting.max_count > hosting.min_count


def wakes(hosting: Hosting) -> bool:
    """Whether it goes down to 0 instances, from where nothing but an alarm would bring it up."""
    return hosting.kind == "async" and hosting.min_count == 0


def apply(aws: Aws, project: Project, hosting: Hosting, before: tuple[int, int] | None = None) -> None:
    """Scale between the hosting's counts; without room between them, not at all. Safe to repeat.

    `before`: the counts it scaled between, to be told where these are others.
    Raises: LaunchError where others made the alarm that wakes an endpoint of 0 instances; AwsError.
    """
    if not scales(hosting):
        remove(aws, project)
        return
    if wakes(hosting):  # before it may go down to 0
        ownership.require_alarms(aws, project, [wake(project)])
    client, place = aws.client("application-autoscaling"), _place(project)
    client.register_scalable_target(**place, MinCapacity=hosting.min_count, MaxCapacity=hosting.max_count)
    wanted = policies(project, hosting)
    for name, tracking in wanted.items():
        client.put_scaling_policy(
            **place, PolicyName=name, PolicyType="TargetTrackingScaling",
            TargetTrackingScalingPolicyConfiguration=tracking,
        )  # fmt: skip
    if wakes(hosting):
        _wake(aws, project)
        wanted |= {wake(project): {}}
    for policy in found(aws, project)[1]:
        if policy["PolicyName"] not in wanted:
            _delete_policy(aws, project, policy["PolicyName"])
    log.info(
        "endpoint %s scales from %d to %d instances (%s)%s", project.endpoint, hosting.min_count, hosting.max_count,
        ", ".join(wanted), "" if before == (hosting.min_count, hosting.max_count) else _told(before),
    )  # fmt: skip


def keeps(was: Scaling, asked: bool) -> bool:
    """Whether a deployment leaves the scaling as it `was`; `asked`: --min or --max was given."""
    return bounds(was) is not None and not asked


def tell_plan(project: Project, hosting: Hosting, was: Scaling, asked: bool, now: Mapping[str, Any] | None) -> None:
    """Say how a deployment would have the endpoint scale; `was`, `asked`: as `bring` is given them, `now`: as
    DescribeEndpoint tells the endpoint.
    """
    wanted, before = (hosting.min_count, hosting.max_count), bounds(was)
    has = None if now is None else _count_of(now)
    if keeps(was, asked):
        log.info("would let it scale from %d to %d instances, as before", *wanted)
    elif scales(hosting):
        names = [*policies(project, hosting), *([wake(project)] if wakes(hosting) else ())]
        log.info("would let it scale from %d to %d instances (%s)%s", *wanted, ", ".join(names), _told(before))
        log.info("would add instances where one has more than %s", _aim(hosting))
    elif before:
        log.info("would end its scaling, which is from %d to %d instances; instances then: %d", *before, wanted[0])
    elif asked and has not in (None, wanted[0]):
        log.info("would set its instances to %d: it has %d, and does not scale", wanted[0], has)


def bring(
    aws: Aws, project: Project, hosting: Hosting, was: Scaling, asked: bool, poll_s: float = POLL_S, *,
    interrupted: bool = False, arn: str | None = None,
) -> None:  # fmt: skip
    """Let an endpoint that is in service scale as asked, and say what that changes. Safe to repeat.

    `was`: what `found` told before the deployment, which may have removed it; `asked`: --min, --max or a target was
    given, else it is to be so again; `interrupted`: a command before this one had taken it off, and was killed, so
    that `was` may not be all of it; `arn`: of an endpoint that was there before, whose note is crossed out.

    Raises: LaunchError as `apply` does; AwsError; StoppedWaiting.
    """
    before, kept = bounds(was), keeps(was, asked)
    if not kept or interrupted:
        apply(aws, project, hosting, before)
    elif found(aws, project)[0] is None:
        restore(aws, project, *was)
    if arn is not None:
        forget(aws, arn)
    if kept:
        end = "--max 1" if hosting.min_count == 1 else "--min {0} --max {0}".format(max(1, hosting.min_count))
        log.info(
            "endpoint %s scales from %d to %d instances as before; %s ends that",
            project.endpoint, hosting.min_count, hosting.max_count, end,
        )  # fmt: skip
    if scales(hosting):
        if aim := _aim(hosting, _found_targets(project, was) if kept and not interrupted else None):
            log.info("instances are added where one has more than %s", aim)
    elif asked and hosting.kind != "serverless":
        # Without `before` too: a command that broke off may have ended the scaling, and not have got to the count.
        had = _set_count(aws, project, hosting.min_count, poll_s)
        if before:
            log.info(
                "endpoint %s no longer scales%s; instances: %d", project.endpoint, _told(before), hosting.min_count
            )  # fmt: skip
        elif had is not None:
            log.info("endpoint %s had %d instances and does not scale; now: %d", project.endpoint, had,
                     hosting.min_count)  # fmt: skip


def remember(aws: Aws, arn: str, scaling: Scaling) -> None:
    """Note on the endpoint how it scales, before that is taken off: a command may be killed, the tag stays.

    Raises: AwsError.
    """
    between = bounds(scaling)
    if between is not None:
        _note(aws, arn, "{}-{}".format(*between))


def taken_off(aws: Aws, arn: str) -> tuple[int, int] | None:
    """What `remember` noted, None where nothing is to be turned on again. Raises: AwsError."""
    low, _, high = ownership.tags_of(aws, arn).get(TAKEN_OFF, "").partition("-")
    return (int(low), int(high)) if low.isdecimal() and high.isdecimal() else None


def forget(aws: Aws, arn: str) -> None:
    """It scales as it is to: the note is crossed out, for which AWS asks no other right than for the note.

    Raises: AwsError.
    """
    if taken_off(aws, arn) is not None:
        _note(aws, arn, "no")


def _note(aws: Aws, arn: str, text: str) -> None:
    aws.client("sagemaker").add_tags(ResourceArn=arn, Tags=[{"Key": TAKEN_OFF, "Value": text}])


def bounds(scaling: Scaling) -> tuple[int, int] | None:
    """The instances between which it scales, None where it does not."""
    target = scaling[0]
    return None if target is None else (int(target["MinCapacity"]), int(target["MaxCapacity"]))


def _told(before: tuple[int, int] | None) -> str:
    return "" if before is None else f", before from {before[0]} to {before[1]}"


def _set_count(aws: Aws, project: Project, count: int, poll_s: float) -> int | None:
    """So many instances, whatever scaling had reached: that stays when the scaling is removed.

    Returns: how many there were; None where they were as many.
    """
    client, name = aws.client("sagemaker"), project.endpoint
    had = _count_of(client.describe_endpoint(EndpointName=name))
    if had in (None, count):
        return None
    client.update_endpoint_weights_and_capacities(
        EndpointName=name, DesiredWeightsAndCapacities=[{"VariantName": VARIANT, "DesiredInstanceCount": count}]
    )
    wait_while_changing(aws, name, poll_s)
    return had


def _count_of(described: Mapping[str, Any]) -> int | None:
    """How many instances an endpoint is to have, as DescribeEndpoint tells it; None where that counts none."""
    variants = described.get("ProductionVariants") or []
    return next((each.get("DesiredInstanceCount") for each in variants if each["VariantName"] == VARIANT), None)


def wake(project: Project) -> str:
    """The name of the policy that adds the first instance, and of the alarm that calls it."""
    return f"{project.name}-wake"


def _wake(aws: Aws, project: Project) -> None:
    """From 0 instances there is no backlog per instance to track: an alarm adds the first."""
    made = aws.client("application-autoscaling").put_scaling_policy(
        **_place(project), PolicyName=wake(project), PolicyType="StepScaling",
        StepScalingPolicyConfiguration={
            "AdjustmentType": "ChangeInCapacity", "MetricAggregationType": "Average", "Cooldown": SCALE_IN_S,
            "StepAdjustments": [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}],
        },
    )  # fmt: skip
    aws.client("cloudwatch").put_metric_alarm(
        AlarmName=wake(project), Namespace="AWS/SageMaker", MetricName="HasBacklogWithoutCapacity",
        Dimensions=[{"Name": "EndpointName", "Value": project.endpoint}], Statistic="Average", Period=60,
        EvaluationPeriods=1, Threshold=1.0, ComparisonOperator="GreaterThanOrEqualToThreshold",
        TreatMissingData="missing", AlarmActions=[made["PolicyARN"]], Tags=project.tags,
    )  # fmt: skip


def found(aws: Aws, project: Project) -> Scaling:
    """The scalable target, None where there is none, and its policies. Raises: AwsError."""
    client = aws.client("application-autoscaling")
    place = {"ServiceNamespace": NAMESPACE, "ScalableDimension": DIMENSION}
    targets = client.describe_scalable_targets(**place, ResourceIds=[resource(project)])["ScalableTargets"]
    listed = client.describe_scaling_policies(**place, ResourceId=resource(project))["ScalingPolicies"]
    return (targets[0] if targets else None), listed


def remove(aws: Aws, project: Project) -> None:
    """No more scaling; where there was none, nothing happens. Raises: AwsError."""
    target, listed = found(aws, project)
    for policy in listed:
        with _unless_gone():
            _delete_policy(aws, project, policy["PolicyName"])
    if target:
        with _unless_gone():
            aws.client("application-autoscaling").deregister_scalable_target(**_place(project))


def restore(aws: Aws, project: Project, target: Mapping[str, Any] | None, listed: Sequence[Mapping[str, Any]]) -> None:
    """Put back what `found` told before it was removed. The endpoint must be in service. Raises: LaunchError as
    `apply` does; AwsError.
    """
    if target is None:
        return
    client, place = aws.client("application-autoscaling"), _place(project)
    client.register_scalable_target(**place, MinCapacity=target["MinCapacity"], MaxCapacity=target["MaxCapacity"])
    for policy in listed:
        if policy["PolicyName"] == wake(project):
            ownership.require_alarms(aws, project, [wake(project)])
            _wake(aws, project)  # with its alarm, which must name the new policy
            continue
        given = {name: policy[name] for name in POLICY_FIELDS if policy.get(name)}
        client.put_scaling_policy(**place, **given)


def _delete_policy(aws: Aws, project: Project, name: str) -> None:
    if name == wake(project):  # alarms of target tracking go by themselves
        for alarm, ours in ownership.alarms(aws, project, [name]):
            if ours:
                aws.client("cloudwatch").delete_alarms(AlarmNames=[alarm["AlarmName"]])
    aws.client("application-autoscaling").delete_scaling_policy(**_place(project), PolicyName=name)


@contextmanager
def _unless_gone() -> Iterator[None]:
    """Another command, or the endpoint's end, may remove it this moment."""
    try:
        yield
    except AwsError as exc:
        if not exc.is_missing:
            raise


def _place(project: Project) -> dict[str, str]:
    return {"ServiceNamespace": NAMESPACE, "ResourceId": resource(project), "ScalableDimension": DIMENSION}
