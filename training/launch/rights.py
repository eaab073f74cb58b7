"""Who may do what, as IAM simulates it: whoever runs the commands, and the role that jobs and endpoints run as."""

import re
from collections.abc import Iterator, Mapping, Sequence

from training.errors import TrainingError
from training.launch import policies, roles
from training.launch.checks import Check, Plan
from training.launch.errors import AwsError
from training.launch.names import Project
from training.launch.session import Aws

_CONTEXT = [
    {"ContextKeyName": name, "ContextKeyType": "string", "ContextKeyValues": [value]}
    for name, value in (("iam:PassedToService", policies.SERVICE), ("iam:AWSServiceName", policies.SCALING_SERVICE))
]
"""What policies may ask of iam:PassRole and iam:CreateServiceLinkedRole."""
_STOPPERS = ("s3:", "ecr:")
"""Without them no job starts; without the rest of a role's rights it has no log, no metrics, no way back by alarms."""


def of_caller(aws: Aws, project: Project, plan: Plan) -> Iterator[Check]:
    """Whether whoever calls may do all that the commands do. Raises: AwsError."""
    arn = aws.identity["Arn"]
    if arn.endswith(":root"):
        yield Check("permissions", "WARN", "you are the account's root user, who may do all", "Use a role of your own.")
        return
    passed = _role(aws, project, plan)
    asked = policies.caller_actions(project, aws.partition, aws.region, aws.account, passed)
    try:
        denied, unsure = _refused(aws, _policies_of(aws, arn), asked)
    except AwsError as exc:
        yield Check(
            "permissions", "WARN", f"cannot be looked at ({exc.code})", "iam:SimulatePrincipalPolicy would tell."
        )  # fmt: skip
        return
    if policies.LINK in denied and (is_there := _has_linked_role(aws)) is not False:
        denied.remove(policies.LINK)
        unsure += [policies.LINK] if is_there is None else []
    if denied:
        yield Check("permissions", "FAIL", f"{len(denied)} are missing", f"Ask for: {', '.join(denied)}")
    if unsure:
        yield Check(
            "permissions", "WARN", f"{len(unsure)} depend on conditions that cannot be simulated",
            f"They are: {', '.join(unsure)}",
        )  # fmt: skip
    if not denied and not unsure:
        yield Check("permissions", "PASS", f"all {len(policies.CALLER_ACTIONS)} actions that the commands use")


def of_role(aws: Aws, project: Project, plan: Plan) -> Iterator[Check]:
    """Whether the role may do what jobs and endpoints do."""
    arn = _role(aws, project, plan)
    if arn is None:
        return
    asked = policies.role_actions(project, aws.partition, aws.region, aws.account)
    try:
        denied, unsure = _refused(aws, arn, asked)
    except AwsError as exc:
        yield Check(
            "role", "WARN", f"what it may do cannot be looked at ({exc.code})",
            "`iam-role --policy` prints what it must be allowed to.",
        )  # fmt: skip
        return
    if denied:
        stops = any(action.startswith(_STOPPERS) for action in denied)
        yield Check(
            "role", "FAIL" if stops else "WARN", f"it may not do {len(denied)} things that jobs do",
            f"Let it, or have `iam-role` make one that may: {', '.join(denied)}; `iam-role --policy` prints on what.",
        )  # fmt: skip
    elif unsure:
        yield Check("role", "WARN", "what it may do depends on conditions", f"They are of: {', '.join(unsure)}")
    else:
        yield Check("role", "PASS", f"it may read and write {project.bucket}, pull images, write logs and metrics")


def _role(aws: Aws, project: Project, plan: Plan) -> str | None:
    """The role that jobs are to run as; None where there is none, which is said under "role"."""
    try:
        return roles.find_role(aws, project, plan.role)
    except TrainingError:
        return None


def _refused(aws: Aws, source: str, asked: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """Which of these actions, by resource, the policies of `source` do not allow, and of which IAM cannot tell.

    Raises: AwsError.
    """
    denied: list[str] = []
    unsure: list[str] = []
    for resource, actions in asked.items():
        answer = aws.client("iam").simulate_principal_policy(
            PolicySourceArn=source, ActionNames=list(actions), ResourceArns=[resource], ContextEntries=_CONTEXT
        )
        for each in answer["EvaluationResults"]:
            if each["EvalDecision"] != "allowed":
                (unsure if each.get("MissingContextValues") else denied).append(each["EvalActionName"])
    return list(dict.fromkeys(denied)), list(dict.fromkeys(unsure))


def _has_linked_role(aws: Aws) -> bool | None:
    """Whether the account has the role that autoscaling of endpoints runs as; None where that may not be asked.

    Raises: AwsError.
    """
    try:
        aws.client("iam").get_role(RoleName=policies.LINKED_ROLE)
        return True
    except AwsError as exc:
        if not (exc.is_missing or exc.is_denied):
            raise
        return None if exc.is_denied else False


def _policies_of(aws: Aws, arn: str) -> str:
    """Whose policies count for this caller: of a session the role's, whose path the session does not tell."""
    found = re.fullmatch(r"(arn:[^:]+):sts::(\d+):assumed-role/([^/]+)/.+", arn)
    if not found:
        return arn
    try:
        return str(aws.client("iam").get_role(RoleName=found[3])["Role"]["Arn"])
    except AwsError:
        return f"{found[1]}:iam::{found[2]}:role/{found[3]}"
