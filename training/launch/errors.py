"""What can go wrong at AWS, as sentences: what happened, what it means here, what to do.

TrainingError
└── LaunchError        a step cannot be done; the same command can be repeated
    ├── AwsError       AWS refused a call, with its code and the operation
    └── JobFailed      something AWS ran for us failed: its reason, and the last lines of its log
"""

import re
from typing import Any

from training.errors import TrainingError

AGAIN = "the same command goes on where this one stopped."

QUOTAS = "https://console.aws.amazon.com/servicequotas/home/services/sagemaker/quotas"

THROTTLED = frozenset(
    {
        "Throttling", "ThrottlingException", "ThrottledException", "TooManyRequestsException", "RequestLimitExceeded",
        "SlowDown", "RequestThrottled", "RequestThrottledException", "ProvisionedThroughputExceededException",
    }
)  # fmt: skip
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
UNKNOWN_KEY = frozenset({"InvalidClientTokenId", "UnrecognizedClientException", "InvalidAccessKeyId", "AuthFailure"})
DENIED = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError", "403"})
CAPACITY = frozenset({"CapacityError", "InsufficientCapacityException", "InsufficientInstanceCapacity"})
MISSING = frozenset(
    {"NoSuchKey", "NoSuchBucket", "NoSuchUpload", "NoSuchEntity", "404", "ResourceNotFound",
     "ResourceNotFoundException", "ObjectNotFoundException", "RepositoryNotFoundException", "ImageNotFoundException"}
)  # fmt: skip

AT_FAULT = frozenset(
    {"InternalFailure", "InternalError", "InternalServerError", "InternalServiceException", "ServiceUnavailable",
     "ServiceUnavailableException", "ServerException", "ServiceException", "OperationAborted"}
)  # fmt: skip
TAKEN = frozenset({"ResourceInUse", "EntityAlreadyExists", "BucketAlreadyOwnedByYou"})

_PREFIXES = {
    "application-auto-scaling": "application-autoscaling", "cloudwatch-logs": "logs",
    "sagemaker-runtime": "sagemaker", "service-quotas": "servicequotas",
}  # fmt: skip
"""What IAM calls services that botocore calls otherwise."""
_S3 = {
    "HeadBucket": "ListBucket", "ListObjectsV2": "ListBucket", "HeadObject": "GetObject",
    "ListMultipartUploads": "ListBucketMultipartUploads",
    "DeleteObjects": "DeleteObject", "CreateMultipartUpload": "PutObject", "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject", "GetPublicAccessBlock": "GetBucketPublicAccessBlock",
    "PutPublicAccessBlock": "PutBucketPublicAccessBlock",
}  # fmt: skip
"""S3's operations whose permission has another name.

https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html
"""

_ACTION = re.compile(r"not authorized to perform:? ([\w-]+:\w+)(?: on resource:? (\S+))?")
_TRACE = re.compile(r"\n\nTraceback .*?(?=, exit code: \d+$|\Z)", re.DOTALL)
"""What a container adds below its sentence in /opt/ml/output/failure, and SageMaker shows the beginning of."""
_LIMIT = re.compile(r"service limit '([^']+)' is (\S+)")


class LaunchError(TrainingError):
    """A step cannot be done."""


class AwsError(LaunchError):
    """AWS refused a call."""

    def __init__(self, sentence: str, code: str, operation: str, text: str = "") -> None:
        super().__init__(sentence)
        self.code, self.operation, self.text = code, operation, text

    @property
    def is_missing(self) -> bool:
        """Whether it says that what was asked for does not exist. SageMaker says so as a ValidationException."""
        return self.code in MISSING or (
            self.code == "ValidationException"
            and bool(re.search(r"(?i)could not find|does not exist|not found|no scal\w+ \w+ found", self.text))
        )

    @property
    def is_there_already(self) -> bool:
        """Whether it says that what was to be made is there: another command made it this moment."""
        return self.code in TAKEN or (
            self.code in ("ValidationException", "ConflictException")
            and bool(re.search(r"(?i)already exist", self.text))
        )

    @property
    def is_role_unknown(self) -> bool:
        """Whether SageMaker cannot take the role it is given, as in the first seconds after that was made."""
        return self.code == "ValidationException" and bool(
            re.search(r"(?i)could not assume role|ensure that the role", self.text)
        )

    @property
    def is_denied(self) -> bool:
        """Whether a permission is missing."""
        return self.code in DENIED


class JobFailed(LaunchError):
    """What AWS ran for us failed."""

    def __init__(self, what: str, reason: str, lines: list[str], advice: str = "") -> None:
        reason = _TRACE.sub("", reason)  # the log's last lines tell as much
        shown = "".join(f"\n    {line}" for line in lines)
        log = f"\n  The last lines of its log:{shown}" if lines else "\n  It left no line in its log."
        super().__init__(f"{what} failed: {reason or 'AWS gives no reason'}{log}" + (f"\n  {advice}" if advice else ""))
        self.reason, self.lines = reason, lines


def refused(service: str, operation: str, error: dict[str, Any]) -> AwsError:
    """The sentence for an error that AWS answered with; `error`: its Code and Message."""
    code, text = str(error.get("Code", "")), str(error.get("Message", "")).strip()
    return AwsError(_sentence(service, operation, code, text), code, operation, text)


def iam_action(service: str, operation: str) -> str:
    """The permission that a call needs; `service` as botocore calls it: `s3`, `HeadBucket` -> `s3:ListBucket`."""
    return f"{_PREFIXES.get(service, service)}:{_S3.get(operation, operation) if service == 's3' else operation}"


def failure_advice(reason: str) -> str:
    """What to do about the FailureReason of a job or endpoint; empty where it speaks for itself."""
    said = ("insufficient capacity", "unable to provision", *map(str.lower, CAPACITY))
    if any(text in reason.lower() for text in said):
        return (
            "AWS has no instance of this type to spare in this region just now: try again later, or take another "
            "--instance or --region."
        )
    if "ping health check" in reason:
        return (
            "The container did not answer /ping with 200 in time. If the log is empty it did not start: is the image "
            "for linux/amd64 (`make image` builds it so), and does its CUDA fit the host's driver (--ami; `preflight` "
            "looks at it)?"
        )
    if "AlgorithmError" in reason:
        return "That is the training's own error; it is also at the end of the log."
    if "ResourceLimitExceeded" in reason:
        return "Raise the quota (Service Quotas, Amazon SageMaker), or take another --instance."
    return ""


def _sentence(service: str, operation: str, code: str, text: str) -> str:
    call = f"{service} {operation}"
    if code in THROTTLED:
        return f"AWS throttles {call} ({text or code}), after several tries; wait a minute, {AGAIN}"
    if code in EXPIRED:
        return f"The AWS credentials have expired ({call}); log in again (`aws sso login`, or new keys), {AGAIN}"
    if code in UNKNOWN_KEY or code == "SignatureDoesNotMatch":
        return f"AWS does not know these credentials ({call}: {text or code}); check `aws sts get-caller-identity`."
    if code in DENIED:
        found = _ACTION.search(text)
        action, resource = found.groups() if found else (iam_action(service, operation), None)
        where = f" on {resource.rstrip('.')}" if resource else ""
        return (
            f"Permission {action}{where} is missing ({text or code}). Let the account's administrator add {action} to "
            "the policy of whoever runs this; `preflight` lists all that is needed."
        )
    if code == "ResourceLimitExceeded":
        found = _LIMIT.search(text)
        quota = f"The quota '{found[1]}' is {found[2]}" if found else "A quota is used up"
        return f"{quota} ({text}). Raise it at {QUOTAS} (takes hours to days), or take another --instance."
    if code in CAPACITY:
        return f"{call}: {text or code}. {failure_advice('CapacityError')}"
    return f"{call} was refused: {code}: {text.rstrip('.')}. {_what_to_do(code)}"


def _what_to_do(code: str) -> str:
    """About a refusal that has no sentence of its own."""
    if code in AT_FAULT or (code.isdecimal() and code.startswith("5")):
        return f"That is AWS's own fault; wait a minute, {AGAIN}"
    if code == "BucketAlreadyExists":
        return "Buckets of all accounts share their names: give another --bucket."
    if code in TAKEN:
        return f"Something else is at work on it, or of that name; `status` shows what is there. Then {AGAIN}"
    return f"Mend what AWS names there (a flag, or a setting of the account), then {AGAIN}"
