"""What `delete` leaves at AWS, each with the flag or command that removes it."""

import logging
from collections import Counter
from collections.abc import Iterator

from training.launch import data, ownership
from training.launch.errors import AwsError
from training.launch.logs import TRAINING, TRANSFORM
from training.launch.names import PARTS, Project
from training.launch.opening import Options, command_line
from training.launch.session import Aws

log = logging.getLogger("training")


def tell(aws: Aws, project: Project, options: Options, ended: bool) -> None:
    """Say what stays and how it goes. `ended`: the project has records of jobs. What may not be asked is no error."""
    found: list[tuple[str, str]] = []
    looks = [_bucket(aws, project)]
    if not options.with_data:
        looks.insert(0, _objects(aws, project, command_line(options, "delete --data")))
    if not options.with_role:
        looks.insert(0, _role(aws, project, command_line(options, "delete --role")))
    if ended:
        found.append(("AWS's records of jobs that have ended", "they cost nothing"))
        looks.append(_log_groups(aws))
    for look in looks:
        try:
            found += look
        except AwsError as exc:
            if not exc.is_missing:
                log.info("what else stays cannot be told (%s)", exc.code)
    found.append(("images in ECR, of all projects, where `make push` brought some", "aws ecr batch-delete-image"))
    log.info("what stays:\n%s", "\n".join(f"  {what}: {how}" for what, how in found))


def _objects(aws: Aws, project: Project, remove: str) -> Iterator[tuple[str, str]]:
    count: Counter[bool] = Counter()
    size: Counter[bool] = Counter()
    for key, each in data.listed(aws, f"{project.uri()}/"):
        part, slash, _ = key.removeprefix(f"{project.key()}/").partition("/")
        ours = bool(slash) and part in PARTS
        count[ours] += 1
        size[ours] += each
    for ours, how in ((True, remove), (False, "these commands did not write them, and leave them")):
        if count[ours]:
            yield f"objects in {project.uri()}/, {count[ours]} files, {size[ours] / 1e6:.1f} MB", how


def _role(aws: Aws, project: Project, remove: str) -> Iterator[tuple[str, str]]:
    name = project.role
    if ownership.has_tags(project, aws.client("iam").get_role(RoleName=name)["Role"].get("Tags", ())):
        yield f"role {name}", remove


def _bucket(aws: Aws, project: Project) -> Iterator[tuple[str, str]]:
    aws.client("s3").head_bucket(Bucket=project.bucket, ExpectedBucketOwner=aws.account)
    yield f"bucket {project.bucket}, which others may use", f"aws s3 rb s3://{project.bucket}, once it is empty"


def _log_groups(aws: Aws) -> Iterator[tuple[str, str]]:
    listed = aws.client("logs").describe_log_groups(logGroupNamePrefix="/aws/sagemaker/T")["logGroups"]
    for name in (each["logGroupName"] for each in listed):
        if name in (TRAINING, TRANSFORM):
            remove = f"aws logs delete-log-group --region {aws.region} --log-group-name {name}"
            yield f"log group {name}, of the jobs of all projects", remove
