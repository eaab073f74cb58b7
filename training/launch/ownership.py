"""Whose a thing is: names may be anyone's, our tags say that we made it. Nothing else is changed or removed."""

from collections.abc import Iterable, Mapping

from training.launch.errors import AwsError, LaunchError
from training.launch.names import Project
from training.launch.session import Aws


def has_tags(project: Project, tags: Iterable[Mapping[str, str]]) -> bool:
    """Whether the project's tags are among these, which AWS lists as `Key` and `Value`."""
    given = {tag["Key"]: tag["Value"] for tag in tags}
    return all(given.get(tag["Key"]) == tag["Value"] for tag in project.tags)


def is_ours(aws: Aws, project: Project, arn: str) -> bool:
    """Whether this endpoint or model package group of SageMaker's carries the project's tags. Raises: AwsError."""
    pages = aws.client("sagemaker").get_paginator("list_tags").paginate(ResourceArn=arn)
    try:
        return has_tags(project, [tag for page in pages for tag in page["Tags"]])
    except AwsError as exc:
        if exc.is_missing:  # it went away just now
            return False
        raise


def require(aws: Aws, project: Project, arn: str, what: str) -> None:
    """Raises: LaunchError where `what` is not the project's; AwsError."""
    if not is_ours(aws, project, arn):
        tags = ", ".join(f"{tag['Key']}={tag['Value']}" for tag in project.tags)
        raise LaunchError(
            f"{what} was not made by these commands (it has not the tags {tags}), so it is left as it is; give another "
            "--project."
        )
