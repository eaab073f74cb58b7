"""IAM: the role that jobs and endpoints run as, and what whoever starts them must be allowed to do."""

import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import ConfigError
from training.launch.errors import AwsError, LaunchError
from training.launch.names import Project
from training.launch.ownership import has_tags
from training.launch.session import Aws

log = logging.getLogger("training")

SERVICE = "sagemaker.amazonaws.com"
SCALING_SERVICE = "sagemaker.application-autoscaling.amazonaws.com"
LINKED_ROLE, LINK = "AWSServiceRoleForApplicationAutoScaling_SageMakerEndpoint", "iam:CreateServiceLinkedRole"
"""What AWS makes, in the caller's name, when an account's first endpoint is to scale; and the permission for that.

https://docs.aws.amazon.com/autoscaling/application/userguide/application-auto-scaling-service-linked-roles.html
"""
POLICY = "training-launch"
_MLFLOW = "sagemaker-mlflow:*"
_OBJECTS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
_OF_BUCKET = re.compile(r"arn:[^:]+:s3:::([^/*?]+)/\*")
ARN = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+")
"""What SageMaker takes for a role."""

ASKS, ASK_EVERY_S = 12, 5.0
"""How often a new role is offered to SageMaker again, to which IAM may take a minute to tell of it."""

_CALLER: dict[str, tuple[str, ...]] = {
    "*": (
        "sagemaker:ListTrainingJobs", "sagemaker:ListHyperParameterTuningJobs", "sagemaker:ListModels",
        "sagemaker:ListModelPackages", "sagemaker:ListEndpointConfigs", "sagemaker:ListTransformJobs",
        "logs:DescribeLogGroups", "cloudwatch:DescribeAlarms", "application-autoscaling:DescribeScalableTargets",
        "application-autoscaling:DescribeScalingPolicies", "servicequotas:ListServiceQuotas",
        "servicequotas:ListAWSDefaultServiceQuotas",
    ),
    "sagemaker:{here}:training-job/{name}-train-0": (
        "sagemaker:CreateTrainingJob", "sagemaker:DescribeTrainingJob", "sagemaker:StopTrainingJob",
        "sagemaker:AddTags", "sagemaker:ListTags",
    ),
    "sagemaker:{here}:hyper-parameter-tuning-job/{name}-t-0": (
        "sagemaker:CreateHyperParameterTuningJob", "sagemaker:DescribeHyperParameterTuningJob",
        "sagemaker:StopHyperParameterTuningJob", "sagemaker:ListTrainingJobsForHyperParameterTuningJob",
    ),
    "sagemaker:{here}:model/{name}-model-0": (
        "sagemaker:CreateModel", "sagemaker:DescribeModel", "sagemaker:DeleteModel",
    ),
    "sagemaker:{here}:model-package-group/{name}": (
        "sagemaker:CreateModelPackageGroup", "sagemaker:DescribeModelPackageGroup",
        "sagemaker:DeleteModelPackageGroup", "sagemaker:ListTags",
    ),
    "sagemaker:{here}:model-package/{name}/1": (
        "sagemaker:CreateModelPackage", "sagemaker:DescribeModelPackage", "sagemaker:UpdateModelPackage",
        "sagemaker:DeleteModelPackage",
    ),
    "sagemaker:{here}:endpoint-config/{name}-config-0": (
        "sagemaker:CreateEndpointConfig", "sagemaker:DescribeEndpointConfig", "sagemaker:DeleteEndpointConfig",
    ),
    "sagemaker:{here}:endpoint/{name}": (
        "sagemaker:CreateEndpoint", "sagemaker:DescribeEndpoint", "sagemaker:UpdateEndpoint",
        "sagemaker:UpdateEndpointWeightsAndCapacities", "sagemaker:DeleteEndpoint", "sagemaker:InvokeEndpoint",
        "sagemaker:InvokeEndpointAsync", "sagemaker:AddTags", "sagemaker:ListTags",
    ),
    "sagemaker:{here}:transform-job/{name}-batch-0": (
        "sagemaker:CreateTransformJob", "sagemaker:DescribeTransformJob", "sagemaker:StopTransformJob",
    ),
    "{role}": ("iam:PassRole", "iam:GetRole"),
    f"iam::{{account}}:role/aws-service-role/{SCALING_SERVICE}/{LINKED_ROLE}": (LINK,),
    "s3:::{bucket}": (
        "s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:CreateBucket", "s3:PutBucketPublicAccessBlock",
    ),
    "s3:::{bucket}/{name}/0": ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"),
    "logs:{here}:log-group:/aws/sagemaker/Endpoints/{name}:log-stream:0": (
        "logs:DescribeLogStreams", "logs:GetLogEvents", "logs:DeleteLogGroup",
    ),
    **{
        f"logs:{{here}}:log-group:/aws/sagemaker/{kind}:log-stream:0": ("logs:DescribeLogStreams", "logs:GetLogEvents")
        for kind in ("TrainingJobs", "TransformJobs")
    },
    "cloudwatch:{here}:alarm:{name}-0": (
        "cloudwatch:PutMetricAlarm", "cloudwatch:DeleteAlarms", "cloudwatch:TagResource",
        "cloudwatch:ListTagsForResource",
    ),
    "application-autoscaling:{here}:scalable-target/0": (
        "application-autoscaling:RegisterScalableTarget", "application-autoscaling:DeregisterScalableTarget",
        "application-autoscaling:PutScalingPolicy", "application-autoscaling:DeleteScalingPolicy",
    ),
    "ecr:{here}:repository/resnet34-sagemaker": ("ecr:DescribeImages",),
}  # fmt: skip
"""What the commands call for whoever runs them, by a resource of the project such as they call it for."""

CALLER_ACTIONS = tuple(dict.fromkeys(action for actions in _CALLER.values() for action in actions))
"""All of them. `preflight` would also like iam:SimulatePrincipalPolicy; for `iam-role` see ROLE_ACTIONS."""

ROLE_ACTIONS = (
    "iam:CreateRole", "iam:TagRole", "iam:GetRolePolicy", "iam:PutRolePolicy", "iam:UpdateAssumeRolePolicy",
    "iam:DeleteRolePolicy", "iam:DeleteRole",
)  # fmt: skip
"""What `iam-role` and `delete --role` call besides: an administrator's, whom not everyone is."""


def caller_actions(
    project: Project, partition: str, region: str, account: str, role: str | None = None
) -> dict[str, tuple[str, ...]]:
    """CALLER_ACTIONS by the ARN of a thing of the project, or `*` where an action knows no resources.

    A policy that is limited to the project allows nothing on `*`, so it must be asked about the project's own.
    `role`: ARN of the role that jobs are given; None: of the one that `iam-role` makes.
    """
    passed = role or f"arn:{partition}:iam::{account}:role/{role_name(project)}"
    values = {
        "here": f"{region}:{account}", "account": account, "name": project.name, "bucket": project.bucket,
        "role": passed.split(":", 2)[2],
    }  # fmt: skip
    return {
        "*" if resource == "*" else f"arn:{partition}:{resource.format_map(values)}": actions
        for resource, actions in _CALLER.items()
    }


def role_actions(project: Project, partition: str, region: str, account: str) -> dict[str, tuple[str, ...]]:
    """What `permissions` allows, by the ARN of a thing of the project's, or `*`: to ask whether a role may do it."""
    bucket, here = f"arn:{partition}:s3:::{project.bucket}", f"{region}:{account}"
    instances = {
        f"{bucket}/*": f"{bucket}/{project.key('jobs', '0')}",
        f"arn:{partition}:ecr:*:*:repository/*": f"arn:{partition}:ecr:{here}:repository/resnet34-sagemaker",
        f"arn:{partition}:logs:*:*:log-group:/aws/sagemaker/*": (
            f"arn:{partition}:logs:{here}:log-group:/aws/sagemaker/TrainingJobs:log-stream:0"
        ),
    }
    return {
        instances.get(statement["Resource"], statement["Resource"]): tuple(statement["Action"])
        for statement in permissions(project, partition)["Statement"]
    }


def role_name(project: Project) -> str:
    """What `iam-role` makes."""
    return f"{project.name}-sagemaker"


def trust_policy() -> dict[str, Any]:
    """Who may take the role: SageMaker."""
    statement = {"Effect": "Allow", "Principal": {"Service": SERVICE}, "Action": "sts:AssumeRole"}
    return {"Version": "2012-10-17", "Statement": [statement]}


def permissions(
    project: Project, partition: str = "aws", mlflow: Collection[str] = (), others: Collection[str] = ()
) -> dict[str, Any]:  # fmt: skip
    """What jobs and endpoints of the project may do, and no more: its bucket, its images, logs, metrics.

    `mlflow`: ARNs of the MLflow apps or tracking servers that jobs report to; `others`: further buckets, such as the
    project has in other regions.
    """
    buckets = [f"arn:{partition}:s3:::{name}" for name in (project.bucket, *sorted(set(others) - {project.bucket}))]
    statements: list[tuple[list[str], list[str]]] = [
        (list(_OBJECTS), [f"{bucket}/*" for bucket in buckets]),
        (["s3:ListBucket", "s3:GetBucketLocation"], buckets),
        # DescribeAlarms: an update goes back by them.
        # https://docs.aws.amazon.com/sagemaker/latest/dg/deployment-guardrails-configuration.html
        (["ecr:GetAuthorizationToken", "cloudwatch:PutMetricData", "cloudwatch:DescribeAlarms"], ["*"]),
        (
            ["ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage"],
            [f"arn:{partition}:ecr:*:*:repository/*"],
        ),
        (
            ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"],
            [f"arn:{partition}:logs:*:*:log-group:/aws/sagemaker/*"],
        ),
    ]
    listed = [
        {"Effect": "Allow", "Action": actions, "Resource": resources if resources[1:] else resources[0]}
        for actions, resources in statements
    ]
    if mlflow:  # an app asks for both
        actions = ["sagemaker:CallMlflowAppApi", _MLFLOW]
        listed.append({"Effect": "Allow", "Action": actions, "Resource": sorted(mlflow)})
    return {"Version": "2012-10-17", "Statement": listed}


@dataclass(frozen=True)
class Made:
    """The project's role as `iam-role` made it earlier."""

    arn: str
    trust: Any
    """Its trust policy."""
    policy: Mapping[str, Any]
    """What it may do; empty where that was taken from it."""

    @property
    def mlflow(self) -> set[str]:
        """The ARNs of MLflow that it may report to."""
        return {resource for resource, actions in pairs(self.policy) if _MLFLOW in actions}

    @property
    def buckets(self) -> set[str]:
        """The names of the buckets that its jobs may write to."""
        found = {resource for resource, actions in pairs(self.policy) if set(_OBJECTS) <= actions}
        return {match[1] for match in map(_OF_BUCKET.fullmatch, found) if match}


def made_before(aws: Aws, project: Project) -> Made | None:
    """The project's role; None where there is none. Raises: LaunchError where somebody else made it; AwsError."""
    iam, name = aws.client("iam"), role_name(project)
    try:
        found = iam.get_role(RoleName=name)["Role"]
    except AwsError as exc:
        if exc.is_missing:
            return None
        raise
    arn = str(found["Arn"])
    if not has_tags(project, found.get("Tags", [])):
        raise LaunchError(
            f"The role {arn} was not made by these commands, so it is left as it is; use it with --role {arn}, or "
            "give another --project."
        )
    try:
        policy = iam.get_role_policy(RoleName=name, PolicyName=POLICY)["PolicyDocument"]
    except AwsError as exc:
        if not exc.is_missing:
            raise
        policy = {}
    return Made(arn, found.get("AssumeRolePolicyDocument"), policy)


def allowed(aws: Aws, project: Project, before: Made | None, mlflow: str | None = None) -> dict[str, Any]:
    """What `create_role` lets the role do: what the project takes in this region, and the buckets and MLflow that it
    might use `before`, as by another region's `iam-role`. Raises: AwsError.
    """
    given: set[str] = {mlflow} if mlflow else set()
    reports, buckets = (before.mlflow - given, before.buckets - {project.bucket}) if before else (set(), set())
    if reports:
        log.info("it may report to %s as before; `delete --role` takes that away", ", ".join(sorted(reports)))
    if buckets:
        log.info(
            "it may use bucket %s as before, as of another region; `delete --role` takes that away",
            ", ".join(sorted(buckets)),
        )  # fmt: skip
    return permissions(project, aws.partition, given | reports, buckets)


def create_role(aws: Aws, project: Project, mlflow: str | None = None) -> str:
    """Make the role, or bring it up to date; returns its ARN. What MLflow and which buckets it could use before, it
    still can.

    Raises: LaunchError where somebody else made the role of that name; AwsError.
    """
    iam, name = aws.client("iam"), role_name(project)
    before = made_before(aws, project)
    policy = allowed(aws, project, before, mlflow)
    if before:
        iam.update_assume_role_policy(RoleName=name, PolicyDocument=json.dumps(trust_policy()))
        arn, what = before.arn, "was there, its policies are up to date"
    else:
        made = iam.create_role(
            RoleName=name,
            AssumeRolePolicyDocument=json.dumps(trust_policy()),
            Description=f"SageMaker jobs and endpoints of {project.name}",
            Tags=project.tags,
        )
        arn, what = str(made["Role"]["Arn"]), "is made (IAM takes some seconds to tell SageMaker of it)"
    iam.put_role_policy(RoleName=name, PolicyName=POLICY, PolicyDocument=json.dumps(policy))
    log.info("role %s %s", arn, what)
    return arn


def tell_plan(aws: Aws, project: Project, mlflow: str | None = None) -> None:
    """Say what `create_role` would do. Raises: as it does."""
    before = made_before(aws, project)
    policy = allowed(aws, project, before, mlflow)
    if before is None:
        log.info("would make role %s, taken by %s, which may:\n%s", role_name(project), SERVICE, _told(pairs(policy)))
        return
    had, has = ({(to, do) for to, actions in pairs(each) for do in actions} for each in (before.policy, policy))
    gains, loses = (_told(_grouped(each)) for each in (has - had, had - has))
    parts = [f"it would be allowed to, besides:\n{gains}"] if gains else []
    parts += [f"it would no longer be allowed to:\n{loses}"] if loses else []
    if _document(before.trust) != trust_policy():
        parts.append(f"its trust policy would become {json.dumps(trust_policy())}")
    log.info("role %s is there; %s", before.arn, "\n".join(parts) or "nothing of it would change")


def pairs(policy: Mapping[str, Any]) -> list[tuple[str, set[str]]]:
    """A policy's resources, each with the actions that are allowed on it."""
    return _grouped(
        (resource, action)
        for statement in _listed(policy.get("Statement"))
        if statement.get("Effect") == "Allow"
        for resource in _listed(statement.get("Resource"))
        for action in _listed(statement.get("Action"))
    )


def _grouped(found: Iterable[tuple[str, str]]) -> list[tuple[str, set[str]]]:
    by_resource: dict[str, set[str]] = {}
    for resource, action in found:
        by_resource.setdefault(resource, set()).add(action)
    return sorted(by_resource.items())


def _told(found: Iterable[tuple[str, set[str]]]) -> str:
    return "\n".join(f"  {', '.join(sorted(actions))} on {resource}" for resource, actions in found)


def delete_role(aws: Aws, project: Project) -> None:
    """Remove the role that `create_role` made; one that is not there is no error."""
    iam, name = aws.client("iam"), role_name(project)
    for call, arguments in (("delete_role_policy", {"PolicyName": POLICY}), ("delete_role", {})):
        try:
            getattr(iam, call)(RoleName=name, **arguments)
        except AwsError as exc:
            if not exc.is_missing:
                raise


def find_role(aws: Aws, project: Project, given: str | None) -> str:
    """The ARN of the role to use: the given one, the project's, or the execution role this machine runs as.

    SageMaker wants the whole ARN, its path included, which a name alone does not tell.

    Raises: LaunchError that says what makes one where there is none; ConfigError where an ARN is none; AwsError.
    """
    if given and given.startswith("arn:"):
        if not ARN.fullmatch(given):
            raise ConfigError(f"--role {given}: a role's ARN looks like arn:aws:iam::123456789012:role/NAME.")
        return given
    iam = aws.client("iam")
    candidates = [given] if given else [role_name(project), *_own_role(aws)]
    for name in candidates:
        try:
            role = iam.get_role(RoleName=name)["Role"]
        except AwsError as exc:
            if given or not (exc.is_missing or exc.is_denied):
                raise
            continue
        if trusts_sagemaker(role):
            return str(role["Arn"])
        if given:
            raise LaunchError(
                f"--role {given}: SageMaker may not take it; its trust policy must be {json.dumps(trust_policy())}"
            )
    raise LaunchError(
        "There is no role for SageMaker to run as. "
        f"`python -m training.launch iam-role --project {project.name}` makes one, or give --role ARN; with --policy "
        "it prints what such a role must have."
    )


def until_role_is_known(call: Callable[[], object]) -> None:
    """Make a call that gives SageMaker a role; again, for a minute, where that is too new to be known there.

    Raises: AwsError.
    """
    for again in range(ASKS + 1):
        try:
            call()
            return
        except AwsError as exc:
            if not exc.is_role_unknown or again == ASKS:
                raise
        if again == 0:
            log.info("SageMaker cannot take the role yet, as when it was just made: tried again for a minute")
        time.sleep(ASK_EVERY_S)


def trusts_sagemaker(role: dict[str, Any]) -> bool:
    """Whether the role's trust policy lets SageMaker take it. Services must be named: a principal `*` is no service."""
    for statement in _listed(_document(role.get("AssumeRolePolicyDocument")).get("Statement")):
        principal = statement.get("Principal")
        services = principal.get("Service") if isinstance(principal, dict) else None
        if statement.get("Effect") == "Allow" and SERVICE in _listed(services):
            return True
    return False


def _document(policy: Any) -> dict[str, Any]:
    """A policy, which may come as text."""
    found: dict[str, Any] = json.loads(policy) if isinstance(policy, str) else policy or {}
    return found


def _listed(value: Any) -> list[Any]:
    """What a policy may state as one thing or as a list of them."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _own_role(aws: Aws) -> list[str]:
    """The name of the role we run as, in a SageMaker notebook or on an EC2 machine."""
    parts = aws.identity["Arn"].split(":")[-1].split("/")
    return [parts[1]] if parts[0] == "assumed-role" else []
