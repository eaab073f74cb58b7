"""IAM: the role that jobs and endpoints run as, and what whoever starts them must be allowed to do."""

import json
import logging
from typing import Any

from training.launch.errors import AwsError, LaunchError
from training.launch.names import Project
from training.launch.session import Aws

log = logging.getLogger("training")

SERVICE = "sagemaker.amazonaws.com"
POLICY = "training-launch"

CALLER_ACTIONS = (
    "sagemaker:CreateTrainingJob", "sagemaker:DescribeTrainingJob", "sagemaker:ListTrainingJobs",
    "sagemaker:StopTrainingJob", "sagemaker:CreateHyperParameterTuningJob",
    "sagemaker:DescribeHyperParameterTuningJob", "sagemaker:ListHyperParameterTuningJobs",
    "sagemaker:ListTrainingJobsForHyperParameterTuningJob", "sagemaker:StopHyperParameterTuningJob",
    "sagemaker:CreateModel", "sagemaker:DescribeModel", "sagemaker:ListModels", "sagemaker:DeleteModel",
    "sagemaker:CreateModelPackageGroup", "sagemaker:DescribeModelPackageGroup", "sagemaker:CreateModelPackage",
    "sagemaker:ListModelPackages", "sagemaker:DescribeModelPackage", "sagemaker:UpdateModelPackage",
    "sagemaker:DeleteModelPackage", "sagemaker:DeleteModelPackageGroup",
    "sagemaker:CreateEndpointConfig", "sagemaker:DescribeEndpointConfig", "sagemaker:ListEndpointConfigs",
    "sagemaker:DeleteEndpointConfig", "sagemaker:CreateEndpoint", "sagemaker:DescribeEndpoint",
    "sagemaker:UpdateEndpoint", "sagemaker:DeleteEndpoint", "sagemaker:InvokeEndpoint",
    "sagemaker:InvokeEndpointAsync", "sagemaker:CreateTransformJob", "sagemaker:DescribeTransformJob",
    "sagemaker:ListTransformJobs", "sagemaker:StopTransformJob", "sagemaker:AddTags", "sagemaker:ListTags",
    "iam:PassRole", "iam:GetRole", "s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject",
    "s3:CreateBucket", "s3:PutBucketPublicAccessBlock", "logs:DescribeLogStreams", "logs:GetLogEvents",
    "logs:DescribeLogGroups", "logs:DeleteLogGroup", "cloudwatch:TagResource",
    "cloudwatch:PutMetricAlarm", "cloudwatch:DescribeAlarms",
    "cloudwatch:DeleteAlarms", "application-autoscaling:RegisterScalableTarget",
    "application-autoscaling:DescribeScalableTargets", "application-autoscaling:DeregisterScalableTarget",
    "application-autoscaling:PutScalingPolicy", "application-autoscaling:DescribeScalingPolicies",
    "application-autoscaling:DeleteScalingPolicy", "ecr:DescribeImages", "ecr:BatchGetImage",
    "servicequotas:ListServiceQuotas",
)  # fmt: skip
"""What this package calls on behalf of whoever runs it."""


def role_name(project: Project) -> str:
    """What `iam-role` makes."""
    return f"{project.name}-sagemaker"


def trust_policy() -> dict[str, Any]:
    """Who may take the role: SageMaker."""
    statement = {"Effect": "Allow", "Principal": {"Service": SERVICE}, "Action": "sts:AssumeRole"}
    return {"Version": "2012-10-17", "Statement": [statement]}


def permissions(project: Project, partition: str = "aws", mlflow: str | None = None) -> dict[str, Any]:
    """What jobs and endpoints of the project may do, and no more: its bucket, its images, logs, metrics.

    `mlflow`: ARN of the MLflow app or tracking server that jobs report to.
    """
    bucket = f"arn:{partition}:s3:::{project.bucket}"
    statements = [
        (["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"], f"{bucket}/*"),
        (["s3:ListBucket", "s3:GetBucketLocation"], bucket),
        (["ecr:GetAuthorizationToken", "cloudwatch:PutMetricData"], "*"),
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
        statements.append((["sagemaker:CallMlflowAppApi", "sagemaker-mlflow:*"], mlflow))
    listed = [{"Effect": "Allow", "Action": actions, "Resource": resource} for actions, resource in statements]
    return {"Version": "2012-10-17", "Statement": listed}


def create_role(aws: Aws, project: Project, mlflow: str | None = None) -> str:
    """Make the role, or bring it up to date; returns its ARN. Raises: AwsError."""
    iam, name = aws.client("iam"), role_name(project)
    try:
        arn = str(iam.get_role(RoleName=name)["Role"]["Arn"])
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
        RoleName=name, PolicyName=POLICY, PolicyDocument=json.dumps(permissions(project, aws.partition, mlflow))
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

    Raises: LaunchError that shows the policies where there is none; AwsError.
    """
    if given and given.startswith("arn:"):
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
        "There is no role for SageMaker to run as. `make iam-role` makes one, or give --role ARN. It needs this trust "
        f"policy:\n{json.dumps(trust_policy(), indent=2)}\nand these permissions:\n"
        f"{json.dumps(permissions(project), indent=2)}"
    )


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
