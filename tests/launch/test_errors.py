"""Errors of AWS become sentences: what happened, what to do."""

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError

from training.launch.errors import JobFailed, failure_advice, refused
from training.launch.policies import CALLER_ACTIONS
from training.launch.session import unreachable

SENTENCES = [
    ("ThrottlingException", "Rate exceeded", "throttles sagemaker CreateModel"),
    ("ExpiredTokenException", "The security token included in the request is expired", "have expired"),
    ("UnrecognizedClientException", "The security token is invalid", "does not know these credentials"),
    ("ResourceInUse", "It exists", "was refused: ResourceInUse: It exists"),
    ("ResourceInUse", "It exists", "`status` shows what is there. Then the same command goes on"),
    ("InternalFailure", "An error.", "InternalFailure: An error. That is AWS's own fault; wait a minute, the same"),
    ("BucketAlreadyExists", "Taken", "give another --bucket"),
    ("ValidationException", "1 error", "Mend what AWS names there (a flag, or a setting of the account), then the"),
    ("CapacityError", "Unable to provision", "try again later"),
]


@pytest.mark.parametrize(("code", "text", "said"), SENTENCES)
def test_a_code_becomes_a_sentence(code: str, text: str, said: str) -> None:
    error = refused("sagemaker", "CreateModel", {"Code": code, "Message": text})
    assert said in str(error)
    assert (error.code, error.operation) == (code, "CreateModel")


def test_a_denial_names_the_missing_action_and_its_resource() -> None:
    text = (
        "User: arn:aws:iam::123456789012:user/ann is not authorized to perform: iam:PassRole on resource: "
        "arn:aws:iam::123456789012:role/r because no identity-based policy allows it"
    )
    error = refused("sagemaker", "CreateTrainingJob", {"Code": "AccessDeniedException", "Message": text})
    assert str(error).startswith("Permission iam:PassRole on arn:aws:iam::123456789012:role/r is missing")
    assert error.is_denied


def test_a_denial_without_words_names_the_operation() -> None:
    error = refused("s3", "PutObject", {"Code": "AccessDenied", "Message": "Access Denied"})
    assert "Permission s3:PutObject is missing" in str(error)


@pytest.mark.parametrize(
    ("service", "operation", "action"),
    [
        ("s3", "HeadBucket", "s3:ListBucket"),
        ("s3", "HeadObject", "s3:GetObject"),
        ("s3", "UploadPart", "s3:PutObject"),
        ("s3", "GetPublicAccessBlock", "s3:GetBucketPublicAccessBlock"),
        ("s3", "PutPublicAccessBlock", "s3:PutBucketPublicAccessBlock"),
        ("service-quotas", "ListServiceQuotas", "servicequotas:ListServiceQuotas"),
        ("cloudwatch-logs", "GetLogEvents", "logs:GetLogEvents"),
        ("application-auto-scaling", "PutScalingPolicy", "application-autoscaling:PutScalingPolicy"),
        ("sagemaker-runtime", "InvokeEndpoint", "sagemaker:InvokeEndpoint"),
        ("ecr", "DescribeImages", "ecr:DescribeImages"),
    ],
)
def test_the_action_is_one_that_iam_knows(service: str, operation: str, action: str) -> None:
    error = refused(service, operation, {"Code": "AccessDenied", "Message": "Access Denied"})
    assert f"Permission {action} is missing" in str(error)
    assert action in CALLER_ACTIONS


def test_a_quota_is_named_with_its_value() -> None:
    text = (
        "The account-level service limit 'ml.g5.xlarge for training job usage' is 0 Instances, with current "
        "utilization of 0 Instances and a request delta of 1 Instances."
    )
    error = refused("sagemaker", "CreateTrainingJob", {"Code": "ResourceLimitExceeded", "Message": text})
    assert str(error).startswith("The quota 'ml.g5.xlarge for training job usage' is 0 (")
    assert "servicequotas" in str(error)


def test_what_sagemaker_calls_a_validation_error_may_be_something_missing() -> None:
    assert refused(
        "sagemaker", "DescribeModel", {"Code": "ValidationException", "Message": 'Could not find "m".'}
    ).is_missing
    assert not refused("sagemaker", "DescribeModel", {"Code": "ValidationException", "Message": "Bad name"}).is_missing


def test_no_credentials_and_no_network_are_told_apart() -> None:
    assert "no AWS credentials" in str(unreachable("sts", "GetCallerIdentity", NoCredentialsError()))
    gone = EndpointConnectionError(endpoint_url="https://sts.eu-central-9.amazonaws.com")
    assert "cannot be reached" in str(unreachable("sts", "GetCallerIdentity", gone))


def test_a_failed_job_shows_its_reason_and_its_last_lines() -> None:
    shown = str(JobFailed("Job j", "AlgorithmError: no images", ["one", "two"], failure_advice("AlgorithmError")))
    assert shown.startswith("Job j failed: AlgorithmError: no images\n")
    assert "\n    one\n    two\n" in shown


def test_the_trace_below_a_containers_sentence_is_left_to_the_log() -> None:
    reason = "AlgorithmError: no images.\n\nTraceback (most recent call last):\n  File x\nValueError: y, exit code: 1"
    assert str(JobFailed("Job j", reason, [])).startswith("Job j failed: AlgorithmError: no images., exit code: 1\n")
