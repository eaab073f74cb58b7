"""IAM's policies: what whoever runs the commands must be allowed, what the jobs' role may do and who may take it."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from training.launch.names import Project

SERVICE = "sagemaker.amazonaws.com"
SCALING_SERVICE = "sagemaker.application-autoscaling.amazonaws.com"
LINKED_ROLE, LINK = "AWSServiceRoleForApplicationAutoScaling_SageMakerEndpoint", "iam:CreateServiceLinkedRole"
"""What AWS makes, in the caller's name, when an account's first endpoint is to scale; and the permission for that.

https://docs.aws.amazon.com/autoscaling/application/userguide/application-auto-scaling-service-linked-roles.html
"""
_MLFLOW = "sagemaker-mlflow:*"
_OBJECTS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
_OF_BUCKET = re.compile(r"arn:[^:]+:s3:::([^/*?]+)/\*")

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
        "s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:CreateBucket", "s3:GetBucketPublicAccessBlock",
        "s3:PutBucketPublicAccessBlock",
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
    passed = role or f"arn:{partition}:iam::{account}:role/{project.role}"
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


def buckets_of(policy: Mapping[str, Any]) -> set[str]:
    """The names of the buckets to whose objects a policy like `permissions` lets write."""
    found = {resource for resource, actions in pairs(policy) if set(_OBJECTS) <= actions}
    return {match[1] for match in map(_OF_BUCKET.fullmatch, found) if match}


def mlflow_of(policy: Mapping[str, Any]) -> set[str]:
    """The ARNs of MLflow to which a policy like `permissions` lets report."""
    return {resource for resource, actions in pairs(policy) if _MLFLOW in actions}


def pairs(policy: Mapping[str, Any]) -> list[tuple[str, set[str]]]:
    """A policy's resources, each with the actions that are allowed on it."""
    return _grouped(
        (resource, action)
        for statement in _listed(policy.get("Statement"))
        if statement.get("Effect") == "Allow"
        for resource in _listed(statement.get("Resource"))
        for action in _listed(statement.get("Action"))
    )


def shown(policy: Mapping[str, Any]) -> str:
    """What a policy allows, a line for each resource, to read."""
    return _told(pairs(policy))


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, str]:
    """What `after` allows besides, and what it no longer does, as `shown` shows it; "" for nothing."""
    had, has = ({(to, do) for to, actions in pairs(each) for do in actions} for each in (before, after))
    return _told(_grouped(has - had)), _told(_grouped(had - has))


def _grouped(found: Iterable[tuple[str, str]]) -> list[tuple[str, set[str]]]:
    by_resource: dict[str, set[str]] = {}
    for resource, action in found:
        by_resource.setdefault(resource, set()).add(action)
    return sorted(by_resource.items())


def _told(found: Iterable[tuple[str, set[str]]]) -> str:
    return "\n".join(f"  {', '.join(sorted(actions))} on {resource}" for resource, actions in found)


def trusts_sagemaker(role: dict[str, Any]) -> bool:
    """Whether the role's trust policy lets SageMaker take it. Services must be named: a principal `*` is no service."""
    for statement in _listed(document(role.get("AssumeRolePolicyDocument")).get("Statement")):
        principal = statement.get("Principal")
        services = principal.get("Service") if isinstance(principal, dict) else None
        if statement.get("Effect") == "Allow" and SERVICE in _listed(services):
            return True
    return False


def document(policy: Any) -> dict[str, Any]:
    """A policy, which may come as text."""
    found: dict[str, Any] = json.loads(policy) if isinstance(policy, str) else policy or {}
    return found


def _listed(value: Any) -> list[Any]:
    """What a policy may state as one thing or as a list of them."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
