"""The ECR side of a push: whose account, which repository, the token; each refusal names the IAM action it lacks.

boto3 (group `sagemaker`) is imported when it is needed, so that a build works without it.
"""

import base64
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from container.engine import ContainerError

log = logging.getLogger("container")

PUSH_ACTIONS = (
    "ecr:BatchCheckLayerAvailability", "ecr:InitiateLayerUpload", "ecr:UploadLayerPart", "ecr:CompleteLayerUpload",
    "ecr:PutImage", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer",
)  # fmt: skip
"""What docker does with the token, and the check of what arrived."""
REPOSITORY_ACTIONS = (
    "ecr:DescribeRepositories", "ecr:CreateRepository", "ecr:GetLifecyclePolicy", "ecr:PutLifecyclePolicy",
)  # fmt: skip
LIFECYCLE = {
    "rules": [
        {
            "rulePriority": 1,
            "description": "Layers that no tag names any more",
            "selection": {
                "tagStatus": "untagged", "countType": "sinceImagePushed", "countUnit": "days", "countNumber": 7,
            },
            "action": {"type": "expire"},
        },
    ]
}  # fmt: skip
"""What has a tag stays until somebody deletes it: ECR cannot know which images endpoints use, and one that scales out
pulls its image again, however old and however many were pushed since."""

_UNKNOWN_KEY = {"InvalidClientTokenId", "UnrecognizedClientException", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
_DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"}


@dataclass(frozen=True)
class Repository:
    """Where images go."""

    account: str
    region: str
    name: str
    uri: str
    """ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME"""

    @property
    def registry(self) -> str:
        """The host."""
        return self.uri.partition("/")[0]


class Ecr:
    """One account's ECR in one region."""

    def __init__(self, region: str | None = None, profile: str | None = None) -> None:
        """Find out whose credentials these are. Raises: ContainerError."""
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError as exc:
            raise ContainerError("Pushing needs boto3: uv sync --inexact --group sagemaker.") from exc
        self._broken: type[Exception] = BotoCoreError
        try:
            # boto3 reads AWS_DEFAULT_REGION alone, AWS's other tools AWS_REGION first.
            session = boto3.Session(region_name=region or os.environ.get("AWS_REGION") or None, profile_name=profile)
            if session.region_name is None:
                raise ContainerError("No AWS region is set: give --region, or set AWS_REGION (such as eu-central-1).")
            self.region: str = session.region_name
            config = Config(connect_timeout=10, read_timeout=60, retries={"mode": "standard", "max_attempts": 5})
            self._sts, self._ecr = (
                session.client(name, region_name=self.region, config=config) for name in ("sts", "ecr")
            )
        except BotoCoreError as exc:
            raise ContainerError(f"AWS cannot be called: {str(exc).rstrip('.')}.") from exc
        identity = self._call(self._sts.get_caller_identity, "sts:GetCallerIdentity")
        self.account: str = identity["Account"]
        self.arn: str = identity["Arn"]

    def repository(self, name: str) -> Repository:
        """The repository of that name; made where it is not there: scanned on push, tags immutable.

        Raises: ContainerError.
        """
        found = self._call(
            self._ecr.describe_repositories, "ecr:DescribeRepositories", absent="RepositoryNotFoundException",
            repositoryNames=[name], registryId=self.account,
        )  # fmt: skip
        if found:
            described = found["repositories"][0]
            if described.get("imageTagMutability") == "MUTABLE":
                log.warning("%s was there before, with tags that can be moved; it is left so.", name)
        else:
            described = self._call(
                self._ecr.create_repository, "ecr:CreateRepository", repositoryName=name,
                imageTagMutability="IMMUTABLE", imageScanningConfiguration={"scanOnPush": True},
            )["repository"]  # fmt: skip
            log.info("created the repository %s (scanned on push, tags immutable)", described["repositoryUri"])
        policy = self._call(
            self._ecr.get_lifecycle_policy, "ecr:GetLifecyclePolicy", absent="LifecyclePolicyNotFoundException",
            repositoryName=name,
        )  # fmt: skip
        if not policy:
            self._call(
                self._ecr.put_lifecycle_policy, "ecr:PutLifecyclePolicy", repositoryName=name,
                lifecyclePolicyText=json.dumps(LIFECYCLE),
            )  # fmt: skip
        return Repository(self.account, self.region, name, described["repositoryUri"])

    def password(self) -> str:
        """The token that docker's login takes for the user AWS; good for 12 hours. Raises: ContainerError."""
        answer = self._call(self._ecr.get_authorization_token, "ecr:GetAuthorizationToken")
        token = base64.b64decode(answer["authorizationData"][0]["authorizationToken"]).decode()
        return token.partition(":")[2]

    def _call(self, operation: Callable[..., Any], action: str, absent: str | None = None, **values: Any) -> Any:
        """Call AWS; None where the answer is the error `absent`. Raises: ContainerError naming the IAM action."""
        from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

        try:
            return operation(**values)
        except ClientError as exc:
            code, text = exc.response["Error"]["Code"], exc.response["Error"].get("Message", "").rstrip(".")
            if code == absent:
                return None
            raise ContainerError(self._sentence(code, text, action)) from exc
        except (NoCredentialsError, PartialCredentialsError) as exc:
            raise ContainerError(
                "There are no AWS credentials: 'aws configure', 'aws sso login' or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY provide them."
            ) from exc
        except self._broken as exc:
            raise ContainerError(
                f"AWS ({action}, region {self.region}) did not answer: {str(exc).rstrip('.')}. See to the network, and "
                "that there is a region of that name."
            ) from exc

    def _sentence(self, code: str, text: str, action: str) -> str:
        if code in _EXPIRED:
            return "The AWS credentials have expired: renew them ('aws sso login', or a new session token)."
        if code in _UNKNOWN_KEY:
            return f"AWS does not accept these credentials ({code}): 'aws sts get-caller-identity' must work first."
        if code in _DENIED or "not authorized to perform" in text:
            who = getattr(self, "arn", "These credentials")
            return (
                f"{who} may not do {action}: allow it in IAM; 'python -m container.push --policy' prints all it takes."
            )
        return f"AWS refused {action}: {text or code} ({code})."


def policy(account: str, region: str, repository: str) -> str:
    """The smallest IAM policy with which a push works, as JSON."""
    partition = {"cn": "aws-cn", "us-gov": "aws-us-gov"}.get(region.rsplit("-", 2)[0], "aws")
    arn = f"arn:{partition}:ecr:{region}:{account}:repository/{repository}"
    statements = [
        {"Effect": "Allow", "Action": ["ecr:GetAuthorizationToken"], "Resource": "*"},
        {"Effect": "Allow", "Action": [*REPOSITORY_ACTIONS, *PUSH_ACTIONS], "Resource": arn},
    ]
    return json.dumps({"Version": "2012-10-17", "Statement": statements}, indent=2)
