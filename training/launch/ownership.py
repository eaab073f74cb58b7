"""Whose a thing is: names may be anyone's, our tags say that we made it. Nothing else is changed or removed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from training.launch.errors import AwsError, LaunchError
from training.launch.names import Project
from training.launch.session import Aws


def has_tags(project: Project, tags: Iterable[Mapping[str, str]]) -> bool:
    """Whether the project's tags are among these, which AWS lists as `Key` and `Value`."""
    given = {tag["Key"]: tag["Value"] for tag in tags}
    return all(given.get(tag["Key"]) == tag["Value"] for tag in project.tags)


def is_ours(aws: Aws, project: Project, arn: str) -> bool:
    """Whether this endpoint or model package group of SageMaker's carries the project's tags. Raises: AwsError."""
    given = tags_of(aws, arn)
    return has_tags(project, [{"Key": key, "Value": value} for key, value in given.items()])


def tags_of(aws: Aws, arn: str) -> dict[str, str]:
    """The tags of something of SageMaker's; none where it is not there. Raises: AwsError."""
    pages = aws.client("sagemaker").get_paginator("list_tags").paginate(ResourceArn=arn)
    try:
        return {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}
    except AwsError as exc:
        if exc.is_missing:  # it went away just now
            return {}
        raise


def require(aws: Aws, project: Project, arn: str, what: str) -> None:
    """Raises: LaunchError where `what` is not the project's; AwsError."""
    if not is_ours(aws, project, arn):
        raise _of_others(project, what)


def alarms(aws: Aws, project: Project, names: Sequence[str]) -> list[tuple[dict[str, Any], bool]]:
    """CloudWatch's alarms of these names that are there, each with whether it is the project's. Raises: AwsError."""
    client, found = aws.client("cloudwatch"), []
    for alarm in client.describe_alarms(AlarmNames=list(names))["MetricAlarms"]:
        try:
            tags = client.list_tags_for_resource(ResourceARN=alarm["AlarmArn"])["Tags"]
        except AwsError as exc:
            if exc.is_missing:  # it went away just now
                continue
            raise
        found.append((alarm, has_tags(project, tags)))
    return found


def require_alarms(aws: Aws, project: Project, names: Sequence[str]) -> None:
    """Raises: LaunchError where one of these alarms is there and others made it, who may count on it; AwsError."""
    for alarm, ours in alarms(aws, project, names):
        if not ours:
            raise _of_others(project, f"Alarm {alarm['AlarmName']}")


def _of_others(project: Project, what: str) -> LaunchError:
    tags = ", ".join(f"{tag['Key']}={tag['Value']}" for tag in project.tags)
    return LaunchError(
        f"{what} was not made by these commands (it has not the tags {tags}), so it is left as it is; give another "
        "--project."
    )
