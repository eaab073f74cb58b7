"""IAM: the role that jobs and endpoints run as, and what whoever starts them must be allowed to do."""

import json
import logging
import re
import time
from collections.abc import Callable, Collection
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
        "sagemaker:DeleteModelPackageGroup",
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
        "sagemaker:InvokeEndpointAsync",
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


def permissions(project: Project, partition: str = "aws", mlflow: Collection[str] = ()) -> dict[str, Any]:
    """What jobs and endpoints of the project may do, and no more: its bucket, its images, logs, metrics.

    `mlflow`: ARNs of the MLflow apps or tracking servers that jobs report to.
    """
    bucket = f"arn:{partition}:s3:::{project.bucket}"
    statements: list[tuple[list[str], str | list[str]]] = [
        (["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"], f"{bucket}/*"),
        (["s3:ListBucket", "s3:GetBucketLocation"], bucket),
        # DescribeAlarms: an update goes back by them.
        # https://docs.aws.amazon.com/sagemaker/latest/dg/deployment-guardrails-configuration.html
        (["ecr:GetAuthorizationToken", "cloudwatch:PutMetricData", "cloudwatch:DescribeAlarms"], "*"),
        (
            ["ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage"],
            f"arn:{partition}:ecr:*:*:repository/*",
        ),
        (
            ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"],
            f"arn:{partition}:logs:*:*:log-group:/aws/sagemaker/*",
        ),
    ]
    if mlflow:  # an app asks for both
        statements.append((["sagemaker:CallMlflowAppApi", _MLFLOW], sorted(mlflow)))
    listed = [{"Effect": "Allow", "Action": actions, "Resource": resource} for actions, resource in statements]
    return {"Version": "2012-10-17", "Statement": listed}


def mlflow_of(aws: Aws, project: Project) -> set[str]:
    """The ARNs of MLflow that the project's role may report to already. Raises: AwsError."""
    try:
        found = aws.client("iam").get_role_policy(RoleName=role_name(project), PolicyName=POLICY)["PolicyDocument"]
    except AwsError as exc:
        if exc.is_missing:
            return set()
        raise
    statements = _listed(found.get("Statement"))
    return {arn for each in statements if _MLFLOW in _listed(each.get("Action")) for arn in _listed(each["Resource"])}


def create_role(aws: Aws, project: Project, mlflow: str | None = None) -> str:
    """Make the role, or bring it up to date; returns its ARN. What MLflow it could report to before, it still can.

    Raises: LaunchError where somebody else made the role of that name; AwsError.
    """
    iam, name = aws.client("iam"), role_name(project)
    reports: set[str] = {mlflow} if mlflow else set()
    try:
        found = iam.get_role(RoleName=name)["Role"]
        arn = str(found["Arn"])
        if not has_tags(project, found.get("Tags", [])):
            raise LaunchError(
                f"The role {arn} was not made by these commands, so it is left as it is; use it with --role {arn}, or "
                "give another --project."
            )
        kept = mlflow_of(aws, project) - reports
        if kept:
            log.info("it may report to %s as before; `delete --role` takes that away", ", ".join(sorted(kept)))
        reports |= kept
        iam.update_assume_role_policy(RoleName=name, PolicyDocument=json.dumps(trust_policy()))
        what = "was there, its policies are up to date"
    except AwsError as exc:
        if not exc.is_missing:
            raise
        made = iam.create_role(
            RoleName=name,
            AssumeRolePolicyDocument=json.dumps(trust_policy()),
            Description=f"SageMaker jobs and endpoints of {project.name}",
            Tags=project.tags,
        )
        arn, what = str(made["Role"]["Arn"]), "is made (IAM takes some seconds to tell SageMaker of it)"
    iam.put_role_policy(
        RoleName=name, PolicyName=POLICY, PolicyDocument=json.dumps(permissions(project, aws.partition, reports))
    )  # fmt: skip
    log.info("role %s %s", arn, what)
    return arn


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
    policy = role.get("AssumeRolePolicyDocument") or {}
    document = json.loads(policy) if isinstance(policy, str) else policy
    for statement in _listed(document.get("Statement")):
        principal = statement.get("Principal")
        services = principal.get("Service") if isinstance(principal, dict) else None
        if statement.get("Effect") == "Allow" and SERVICE in _listed(services):
            return True
    return False


def _listed(value: Any) -> list[Any]:
    """What a policy may state as one thing or as a list of them."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _own_role(aws: Aws) -> list[str]:
    """The name of the role we run as, in a SageMaker notebook or on an EC2 machine."""
    parts = aws.identity["Arn"].split(":")[-1].split("/")
    return [parts[1]] if parts[0] == "assumed-role" else []
