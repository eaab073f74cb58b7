"""The AWS account we work in: region, identity, and clients whose errors are sentences. The only maker of clients.

boto3's clients are used for every call instead of the SageMaker SDK's classes: its version 3 takes 13 s to import
(torch with it), names jobs by the clock, so that a repeated command could not find its own job, and its ModelTrainer
passes on neither Debugger's hook nor rules. The requests are the same; tests/rehearsal runs the SDK's ModelTrainer
against our image as a second client.
"""

import json
import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import botocore
from boto3.exceptions import RetriesExceededError
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    ConnectTimeoutError,
    HTTPClientError,
    IncompleteReadError,
    InvalidRegionError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSOError,
)
from botocore.parsers import ResponseParserError
from botocore.utils import validate_region_name

from training.errors import ConfigError
from training.launch import regions
from training.launch.errors import AGAIN, AwsError, refused

log = logging.getLogger("training")

TRIES = 6
"""How often a throttled or failed call is made in all, waiting twice as long each time (botocore's standard mode).

An invocation is made once: `client.py` tries it again itself, as the container asks for.
"""
READ_TIMEOUT_S = 70
"""Above the 60 s that an invocation may take."""


_MEMBERS = {
    "GetCallerIdentity": ("Account",), "PutObject": ("ETag",), "GetObject": ("ETag",), "HeadObject": ("ETag",),
    "CreateMultipartUpload": ("UploadId",), "UploadPart": ("ETag",), "CompleteMultipartUpload": ("ETag",),
    "ListObjectsV2": ("Name",),
}  # fmt: skip
"""What AWS's answers have in any case, beyond what its service models call required."""
_UNREAD = (KeyError, AttributeError, TypeError, ValueError, IndexError, RecursionError)
"""What botocore raises where an answer, or what tells credentials, is well-formed and not as it is to be."""
_BOTOCORE, _JSON = Path(botocore.__file__).parent, Path(json.__file__).parent


class NoRegion(regions.RegionError):
    """Neither a flag, the environment nor ~/.aws says in which region."""


class _Answer(dict[str, Any]):
    """An answer, whose members are asked for by [] where AWS gives them in any case."""

    def __init__(self, members: Mapping[str, Any], service: str, operation: str) -> None:
        super().__init__(members)
        self._call = (service, operation)

    def __missing__(self, name: str) -> Any:
        raise _not_aws(*self._call)


class _Explaining:
    """Put before botocore's client class: what it raises becomes our errors."""

    def _make_api_call(self, operation: str, arguments: dict[str, Any]) -> Any:
        service = self.meta.service_model.service_id.lower().replace(" ", "-")  # type: ignore[attr-defined]
        try:
            answer = super()._make_api_call(operation, arguments)  # type: ignore[misc]
        except ClientError as exc:
            if exc.response.get("Error", {}).get("Code") == "ModelError":
                raise  # the container's answer: the caller (`client.py`) reads it
            if _is_of_nobody(exc):
                raise _not_aws(service, operation) from exc
            raise refused(service, operation, exc.response.get("Error", {})) from exc
        except (BotoCoreError, ResponseParserError, EOFError) as exc:
            raise unreachable(service, operation, exc) from exc
        except _UNREAD as exc:
            if isinstance(exc, UnicodeEncodeError):  # which quotes a part of it
                raise _no_text(operation) from exc
            if _is_of_credentials(exc):
                raise _credentials(operation, exc) from exc
            if not _is_botocores(exc):
                raise
            log.debug("%s %s", service, operation, exc_info=True)
            raise _not_aws(service, operation) from exc
        shape = self.meta.service_model.operation_model(operation).output_shape  # type: ignore[attr-defined]
        members = [*_MEMBERS.get(operation, ()), *(shape.required_members if shape else ())]
        if members and not any(name in answer for name in members):
            raise _not_aws(service, operation)
        return _Answer(answer, service, operation)


def _is_of_nobody(exc: ClientError) -> bool:
    """Whether botocore made the refusal of an answer that has neither a code of AWS's nor a request's number."""
    headers = exc.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    code = str(exc.response.get("Error", {}).get("Code", ""))
    return code in ("500", "502", "503", "504") and not {"x-amz-request-id", "x-amzn-requestid"} & set(headers)


def _is_of_credentials(exc: BaseException) -> bool:
    """Whether it was raised while botocore read credentials, rather than an answer."""
    files = (Path(frame.f_code.co_filename).name for frame, _ in traceback.walk_tb(exc.__traceback__))
    return not {"credentials.py", "tokens.py", "auth.py"}.isdisjoint(files)


def _is_botocores(exc: BaseException) -> bool:
    """Whether botocore raised it, or json for it; else it is a mistake in what botocore calls, such as ours."""
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(exc.__traceback__)]
    last = next((file for file in reversed(files) if file.parent != _JSON), Path())
    return _BOTOCORE in last.parents


def _no_text(operation: str) -> AwsError:
    return AwsError(
        "The AWS credentials hold what is no text; set them anew (AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, "
        "AWS_ACCESS_KEY_ID, ~/.aws).",
        "NoCredentials", operation,
    )  # fmt: skip


def _credentials(operation: str, exc: Exception) -> AwsError:
    return AwsError(
        f"What gives the AWS credentials (credential_process in ~/.aws, say) gives none that can be read "
        f"({type(exc).__name__}); `aws sts get-caller-identity` must do well first.",
        "NoCredentials", operation,
    )  # fmt: skip


def _not_aws(service: str, operation: str) -> AwsError:
    return AwsError(
        f"{service} was answered by something that is not AWS: a proxy, or a login page of the network? "
        f"Mend that (HTTPS_PROXY, NO_PROXY), then {AGAIN}",
        "Unreachable", operation,
    )  # fmt: skip


def _tell_again(operation: Any, attempts: int, caught_exception: Exception | None = None, **_: object) -> None:
    """A call that got no answer in time is made again: minutes in all, of which someone is to know."""
    if attempts == 1 and isinstance(caught_exception, ConnectTimeoutError | ReadTimeoutError):
        service = operation.service_model.service_id.lower().replace(" ", "-")
        log.warning(
            "%s has not answered %s in time (%s); it is asked again, %d times in all",
            service, operation.name, caught_exception, TRIES,
        )  # fmt: skip


def unreachable(service: str, operation: str, exc: Exception) -> AwsError:
    """The sentence for a call that got no answer, or was not made."""
    if isinstance(exc, NoCredentialsError):
        return AwsError(
            "There are no AWS credentials; `aws configure`, `aws sso login`, or a role of this machine give some. "
            "`make rehearse` shows the whole journey without an account.",
            "NoCredentials", operation,
        )  # fmt: skip
    if isinstance(exc, PartialCredentialsError):
        return AwsError(
            f"The AWS credentials are not whole ({exc}); `aws configure` or `aws sso login` give both parts.",
            "NoCredentials", operation,
        )  # fmt: skip
    if isinstance(exc, SSOError):
        return AwsError(f"The login has expired ({exc}); `aws sso login`, then {AGAIN}", "ExpiredToken", operation)
    if isinstance(getattr(exc, "kwargs", {}).get("error"), TypeError | UnicodeError):  # of a header's text
        return _no_text(operation)
    if "Invalid header value" in str(exc):  # which it quotes, and which may be a secret
        return AwsError(
            "The AWS credentials hold what cannot be sent, such as the end of a line; set them anew "
            "(AWS_SESSION_TOKEN, AWS_ACCESS_KEY_ID, ~/.aws).",
            "NoCredentials", operation,
        )  # fmt: skip
    if isinstance(exc, ConnectionError | HTTPClientError | IncompleteReadError):
        return AwsError(
            f"{service} cannot be reached ({exc}); is there network, and is the service in this region? Then {AGAIN}",
            "Unreachable", operation,
        )  # fmt: skip
    if isinstance(exc, ResponseParserError):
        return _not_aws(service, operation)
    if isinstance(exc, EOFError):
        return AwsError(
            "The profile asks for a code (mfa_serial), and there is no terminal to type it at; start the command in "
            "one, or set the keys of a session (`aws sts get-session-token`).",
            "NoCredentials", operation,
        )  # fmt: skip
    if isinstance(exc, RetriesExceededError):
        return unreachable(service, operation, exc.last_exception)
    return AwsError(f"{service} {operation}: {exc}", type(exc).__name__, operation)


def read_body(answer: Mapping[str, Any], service: str, operation: str) -> bytes:
    """All of an answer's Body, which arrives after the call has returned. Raises: AwsError."""
    try:
        return bytes(answer["Body"].read())
    except BotoCoreError as exc:
        raise unreachable(service, operation, exc) from exc


@dataclass(frozen=True)
class Aws:
    """An account and a region. Made by `connect`; nothing is asked of AWS before it is needed."""

    boto: boto3.Session

    @property
    def region(self) -> str:
        """Such as eu-central-1."""
        return str(self.boto.region_name)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Account, Arn and UserId of whoever calls. Raises: AwsError."""
        found: dict[str, str] = self.client("sts").get_caller_identity()
        return found

    @property
    def account(self) -> str:
        """The account's twelve digits."""
        return self.identity["Account"]

    @property
    def partition(self) -> str:
        """aws, aws-cn or aws-us-gov."""
        return self.identity["Arn"].split(":")[1]

    @cached_property
    def _clients(self) -> dict[tuple[str, str], Any]:
        return {}

    def client(self, service: str, region: str | None = None) -> Any:
        """A client of `service`, made once. Its calls raise AwsError; InvokeEndpoint's ModelError passes through.

        Not to be called by several threads at once, which boto3's sessions do not bear; clients do.

        Raises: AwsError where the credentials are not whole or the settings in ~/.aws are wrong.
        """
        key = (service, region or self.region)
        if key not in self._clients:
            try:
                self._clients[key] = self.boto.client(
                    service,
                    region_name=key[1],
                    config=Config(
                        retries={
                            "mode": "standard",
                            "total_max_attempts": 1 if service == "sagemaker-runtime" else TRIES,
                        },
                        connect_timeout=10,
                        read_timeout=READ_TIMEOUT_S,
                        max_pool_connections=64,
                        user_agent_extra="resnet34-sagemaker",
                    ),
                )
            except BotoCoreError as exc:
                raise unreachable(service, "cannot be called", exc) from exc
            except _UNREAD as exc:
                if _is_of_credentials(exc):
                    raise _credentials("cannot be called", exc) from exc
                if not (isinstance(exc, ValueError) and _is_botocores(exc)):
                    raise
                # AWS_ENDPOINT_URL is no URL
                raise unreachable(service, "cannot be called", exc) from exc
            if service != "sagemaker-runtime":
                self._clients[key].meta.events.register("needs-retry", _tell_again)
        return self._clients[key]


def connect(region: str | None = None, profile: str | None = None) -> Aws:
    """The account that the environment, ~/.aws or this machine's role give. Raises: ConfigError (RegionError)."""
    try:
        session = boto3.Session(region_name=region, profile_name=profile)
    except ProfileNotFound as exc:
        given = f"--profile {profile}" if profile else "AWS_PROFILE"
        raise ConfigError(f"{given}: {exc}; `aws configure list-profiles` lists them.") from exc
    except BotoCoreError as exc:
        raise ConfigError(f"The settings in ~/.aws cannot be used: {exc}") from exc
    if not session.region_name:
        raise NoRegion("No AWS region is set: give --region eu-central-1, say, or set AWS_DEFAULT_REGION.")
    try:
        validate_region_name(session.region_name)
    except InvalidRegionError as exc:
        raise regions.RegionError(
            f"Region {session.region_name}: regions look like eu-central-1; give --region."
        ) from exc
    regions.look_at(session, session.region_name)
    session.events.register("creating-client-class", _explain)
    return Aws(session)


def _explain(base_classes: list[type], **_: object) -> None:
    base_classes.insert(0, _Explaining)
