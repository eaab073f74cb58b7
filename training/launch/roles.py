"""IAM: the role that jobs and endpoints run as: made, found, removed. What it may do is in `policies`."""

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import ConfigError
from training.launch import policies
from training.launch.errors import AwsError, LaunchError
from training.launch.names import Project
from training.launch.ownership import has_tags
from training.launch.session import Aws

log = logging.getLogger("training")

POLICY = "training-launch"
ARN = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+")
"""What SageMaker takes for a role."""

ASKS, ASK_EVERY_S = 12, 5.0
"""How often a new role is offered to SageMaker again, to which IAM may take a minute to tell of it."""


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
        return policies.mlflow_of(self.policy)

    @property
    def buckets(self) -> set[str]:
        """The names of the buckets that its jobs may write to."""
        return policies.buckets_of(self.policy)


def made_before(aws: Aws, project: Project) -> Made | None:
    """The project's role; None where there is none. Raises: LaunchError where somebody else made it; AwsError."""
    iam, name = aws.client("iam"), project.role
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
    return policies.permissions(project, aws.partition, given | reports, buckets)


def create_role(aws: Aws, project: Project, mlflow: str | None = None) -> str:
    """Make the role, or bring it up to date; returns its ARN. What MLflow and which buckets it could use before, it
    still can.

    Raises: LaunchError where somebody else made the role of that name; AwsError.
    """
    iam, name = aws.client("iam"), project.role
    before = made_before(aws, project)
    policy = allowed(aws, project, before, mlflow)
    if before:
        iam.update_assume_role_policy(RoleName=name, PolicyDocument=json.dumps(policies.trust_policy()))
        arn, what = before.arn, "was there, its policies are up to date"
    else:
        made = iam.create_role(
            RoleName=name,
            AssumeRolePolicyDocument=json.dumps(policies.trust_policy()),
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
        may = policies.shown(policy)
        log.info("would make role %s, taken by %s, which may:\n%s", project.role, policies.SERVICE, may)
        return
    gains, loses = policies.difference(before.policy, policy)
    parts = [f"it would be allowed to, besides:\n{gains}"] if gains else []
    parts += [f"it would no longer be allowed to:\n{loses}"] if loses else []
    if policies.document(before.trust) != policies.trust_policy():
        parts.append(f"its trust policy would become {json.dumps(policies.trust_policy())}")
    log.info("role %s is there; %s", before.arn, "\n".join(parts) or "nothing of it would change")


def delete_role(aws: Aws, project: Project) -> None:
    """Remove the role that `create_role` made; one that is not there is no error."""
    iam, name = aws.client("iam"), project.role
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
    candidates = [given] if given else [project.role, *_own_role(aws)]
    for name in candidates:
        try:
            role = iam.get_role(RoleName=name)["Role"]
        except AwsError as exc:
            if given or not (exc.is_missing or exc.is_denied):
                raise
            continue
        if policies.trusts_sagemaker(role):
            return str(role["Arn"])
        if given:
            raise LaunchError(
                f"--role {given}: SageMaker may not take it; its trust policy must be "
                f"{json.dumps(policies.trust_policy())}"
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


def _own_role(aws: Aws) -> list[str]:
    """The name of the role we run as, in a SageMaker notebook or on an EC2 machine."""
    parts = aws.identity["Arn"].split(":")[-1].split("/")
    return [parts[1]] if parts[0] == "assumed-role" else []
