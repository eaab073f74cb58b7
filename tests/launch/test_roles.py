"""Which roles SageMaker may take, by their trust policy in any form that IAM allows."""

import json
from typing import Any

import pytest

from tests.launch.in_process import Account
from tests.launch.telling import problem, told
from training.launch.errors import LaunchError
from training.launch.names import Project
from training.launch.policies import permissions, trust_policy, trusts_sagemaker
from training.launch.roles import create_role, find_role, made_before

OURS: dict[str, Any] = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}}
OTHER: dict[str, Any] = {"Effect": "Allow", "Principal": {"AWS": "*"}}


@pytest.mark.parametrize(
    ("statement", "trusted"),
    [
        ([OURS], True),
        (OURS, True),
        ([OTHER, {**OURS, "Principal": {"Service": ["ec2.amazonaws.com", "sagemaker.amazonaws.com"]}}], True),
        ({**OURS, "Principal": {"Service": "ec2.amazonaws.com"}}, False),
        ({**OURS, "Effect": "Deny"}, False),
        ({**OURS, "Principal": "*"}, False),
        (OTHER, False),
        ([], False),
        (None, False),
    ],
)
def test_a_trust_policy_is_understood_in_every_form(statement: object, trusted: bool) -> None:
    policy = {"Version": "2012-10-17", "Statement": statement}
    assert trusts_sagemaker({"AssumeRolePolicyDocument": policy}) is trusted
    assert trusts_sagemaker({"AssumeRolePolicyDocument": json.dumps(policy)}) is trusted


def test_the_policy_that_iam_role_writes_is_one_of_them() -> None:
    assert trusts_sagemaker({"AssumeRolePolicyDocument": trust_policy()})
    assert not trusts_sagemaker({})


def test_a_role_is_found_by_its_arn_its_name_or_the_project_and_refused_where_sagemaker_may_not_take_it(
    here: Account,
) -> None:
    project, iam = Project("found", "bucket"), here.client("iam")
    arn = "arn:aws:iam::123456789012:role/service-role/elsewhere"
    assert find_role(here.aws, project, arn) == arn
    with pytest.raises(LaunchError, match=r"iam-role --project found` makes one, .* with --policy it prints"):
        find_role(here.aws, project, None)
    made = create_role(here.aws, project)
    assert find_role(here.aws, project, None) == made == create_role(here.aws, project)
    trusting = json.dumps(trust_policy())
    iam.create_role(RoleName="named", Path="/service-role/", AssumeRolePolicyDocument=trusting)
    assert find_role(here.aws, project, "named") == "arn:aws:iam::123456789012:role/service-role/named"
    of_ec2 = {**OURS, "Principal": {"Service": "ec2.amazonaws.com"}}
    iam.create_role(RoleName="of-ec2", AssumeRolePolicyDocument=json.dumps({"Statement": [of_ec2]}))
    with pytest.raises(LaunchError, match="SageMaker may not take it; its trust policy must be"):
        find_role(here.aws, project, "of-ec2")


@pytest.mark.parametrize("operation", ["CreateRole", "PutRolePolicy"])
def test_a_role_whose_making_broke_off_is_finished_by_the_repeat(
    here: Account, caplog: pytest.LogCaptureFixture, operation: str
) -> None:
    project = Project(f"half-{operation.lower()}", "b")
    here.order(operation=operation, code="AccessDenied", message="no", status=403, times=1)
    sentence = problem(caplog, "iam-role", "--project", project.name)
    assert f"Permission iam:{operation} is missing" in sentence
    made = made_before(here.aws, project)
    assert (made is None) is (operation == "CreateRole") and (made is None or made.policy == {})
    told(caplog, "iam-role", "--project", project.name)
    made = made_before(here.aws, project)
    assert made and trusts_sagemaker({"AssumeRolePolicyDocument": made.trust})
    assert made.policy["Statement"]


def test_a_role_of_that_name_that_somebody_else_made_is_left_as_it_is(here: Account) -> None:
    iam, policy = here.client("iam"), json.dumps({"Statement": [OTHER]})
    iam.create_role(RoleName="taken-sagemaker", AssumeRolePolicyDocument=policy)
    with pytest.raises(LaunchError, match="was not made by these commands"):
        create_role(here.aws, Project("taken", "bucket"))
    assert iam.get_role(RoleName="taken-sagemaker")["Role"]["AssumeRolePolicyDocument"] == json.loads(policy)
    assert not iam.list_role_policies(RoleName="taken-sagemaker")["PolicyNames"]


def test_what_a_role_may_report_to_stays_when_it_is_made_again(here: Account, caplog: pytest.LogCaptureFixture) -> None:
    arns = [f"arn:aws:sagemaker:eu-central-1:123456789012:mlflow-app/{name}" for name in ("one", "two")]
    command = ("iam-role", "--project", "reports")
    for given in (["--mlflow", arns[0]], ["--mlflow", arns[1]]):
        told(caplog, *command, *given)
    said = told(caplog, *command)
    assert f"it may report to {arns[0]}, {arns[1]} as before; `delete --role` takes that away" in said
    assert all(arn in told(caplog, *command, "--dry-run") for arn in arns)
    made = made_before(here.aws, Project("reports", "b"))
    assert made and made.mlflow == set(arns)
    assert "as before" not in told(caplog, "iam-role", "--project", "reports-not")


def test_the_bucket_of_another_region_stays_the_roles_and_a_dry_run_says_what_would_change(
    here: Account, caplog: pytest.LogCaptureFixture
) -> None:
    command = ("iam-role", "--project", "regions")
    home, away = (f"sagemaker-{region}-123456789012" for region in ("eu-central-1", "us-east-1"))
    assert "would make role regions-sagemaker" in told(caplog, *command, "--dry-run")
    told(caplog, *command)
    assert "regions-sagemaker is there; nothing of it would change" in told(caplog, *command, "--dry-run")
    said = told(caplog, *command, "--region", "us-east-1", "--dry-run")
    assert f"it may use bucket {home} as before" in said and "would make" not in said
    assert (
        f"is there; it would be allowed to, besides:\n  s3:GetBucketLocation, s3:ListBucket on arn:aws:s3:::{away}\n"
        in said
    )
    assert f" on arn:aws:s3:::{away}/*" in said and "no longer" not in said and f"arn:aws:s3:::{home}" not in said
    told(caplog, *command, "--region", "us-east-1")
    made = made_before(here.aws, Project("regions", home))
    assert made and made.buckets == {home, away}
    here.client("iam").put_role_policy(
        RoleName="regions-sagemaker", PolicyName="training-launch",
        PolicyDocument=json.dumps(
            {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}}
        ),
    )  # fmt: skip
    assert "it would no longer be allowed to:\n  s3:* on *" in told(caplog, *command, "--dry-run")
    assert permissions(Project("regions", home), others=[home]) == permissions(Project("regions", home))


def test_who_removes_the_role_is_told_that_other_regions_lose_it(
    here: Account, caplog: pytest.LogCaptureFixture
) -> None:
    told(caplog, "iam-role", "--project", "global")
    lost = "role global-sagemaker is one for all regions, as IAM is: jobs and endpoints of the project in other regions"
    assert lost in told(caplog, "delete", "--project", "global", "--role", "--dry-run")
    assert "lose it" not in told(caplog, "delete", "--project", "global", "--dry-run")
