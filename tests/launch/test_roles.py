"""Which roles SageMaker may take, by their trust policy in any form that IAM allows."""

import json
from typing import Any

import pytest

from training.launch.roles import trust_policy, trusts_sagemaker

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
