"""A client of the service: the same code for an address and for a SageMaker endpoint.

    from training.launch.client import UrlTarget, classify
    with closing(UrlTarget("http://127.0.0.1:8080")) as target:
        for outcome in classify(target, paths): ...

What the container says of an error arrives either way: SageMaker wraps it into a ModelError, from which status and
body are taken out again. "Later" (429, 503, 504) is tried again, after what Retry-After or the service's own wait says.
"""

import http.client
import json
import logging
import math
import random
import re
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from botocore.exceptions import ClientError

from service.model.images import MEDIA_TYPES
from training.data.folder import MAX_FILE_BYTES
from training.errors import ConfigError, DataError
from training.launch.errors import THROTTLED, AwsError, LaunchError
from training.launch.hosting import LIMITS
from training.launch.names import split_uri
from training.launch.places import kind_at
from training.launch.session import READ_TIMEOUT_S, Aws, read_body

log = logging.getLogger("training")

LATER = (429, 503, 504)
"""Statuses that say: the same request may do well later."""
TRIES = 6
MAX_PAUSE_S = 20.0
ASYNC_LIMIT_S = LIMITS["async"].timeout_s
TRANSIENT = frozenset(
    {*THROTTLED, "Unreachable", "ServiceUnavailable", "InternalFailure", "InternalDependencyException",
     "InternalStreamFailure", "ModelNotReadyException", "InternalError", "ServiceUnavailableException"}
)  # fmt: skip
"""AWS's own codes that say so."""
_URL = re.compile(r"[!-~]+")
"""What stands in the first line of a request; the rest of the world's letters are %-encoded there."""
_NOBODY = (ConnectionRefusedError, socket.gaierror, ssl.SSLError)
"""What no later try mends: a wrong port, a name that is none, https where http is spoken."""
SMALLEST_LIMIT_BYTES = LIMITS["serverless"].payload_mb * 2**20
"""AWS refuses what is larger than an endpoint takes with the code of any wrong request."""


@dataclass(frozen=True)
class Reply:
    """What the service answered."""

    status: int
    headers: Mapping[str, str]
    """Names in small letters."""
    body: bytes

    @property
    def problem(self) -> str:
        """The service's own sentence about an error, with its code."""
        try:
            error = json.loads(self.body)["error"]
            return f"{error['code']}: {error['message']}"
        except (ValueError, KeyError, TypeError, RecursionError):
            return self.body[:300].decode(errors="replace") or f"status {self.status}"


class Unanswered(LaunchError):
    """No answer came; the same request may do well later."""


class Target(Protocol):
    """Where images are sent. Used by many threads at once."""

    name: str

    def ask(
        self, body: bytes, media_type: str, accept: str = "application/json", stop: threading.Event | None = None
    ) -> Reply:
        """One request; a long wait ends with `stop`. Raises: Unanswered; LaunchError where no image would do."""
        ...

    def close(self) -> None:
        """No more requests come."""
        ...


class UrlTarget:
    """A service at an address: `make serve`, a container, a load balancer."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port, parts = None, None, urlsplit("")
        path = f"{parts.path.rstrip('/').removesuffix('/invocations')}/invocations"  # the service's log names it whole
        if not host or parts.scheme not in ("http", "https") or not _URL.fullmatch(path) or not _is_host(host):
            raise ConfigError(
                f"--url {url.rpartition('@')[2]}: give the address of the service, such as http://127.0.0.1:8080."
            )
        if parts.username is not None:
            raise ConfigError("--url: a name or password in the address is not sent; leave it out.")
        self.name, self._host, self._port = url, host, port
        self._path = path
        self._made = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._answered = False

    def close(self) -> None:
        """Close the connections of all threads; one that waits for an answer gets none any more."""
        for connection in self._connections:
            under_way = connection.sock
            if under_way is not None:
                with suppress(OSError):  # it may have ended by itself
                    socket.socket.shutdown(under_way, socket.SHUT_RDWR)
            connection.close()

    def ask(
        self, body: bytes, media_type: str, accept: str = "application/json", stop: threading.Event | None = None
    ) -> Reply:
        """See `Target.ask`."""
        if not hasattr(self._local, "connection"):
            self._local.connection = self._made(self._host, self._port, timeout=READ_TIMEOUT_S)
            self._connections.append(self._local.connection)
        connection = self._local.connection
        try:
            connection.request("POST", self._path, body, {"Content-Type": media_type, "Accept": accept})
            response = connection.getresponse()
            content = response.read()
            self._answered = True
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            if not self._answered and isinstance(exc, _NOBODY):  # later, it may be starting anew
                why = "nobody listens there" if isinstance(exc, ConnectionRefusedError) else str(exc)
                raise LaunchError(
                    f"{self.name}: {why}; start the service ('make serve'), or give another --url."
                ) from exc
            raise Unanswered(
                f"{self.name} did not answer ({exc or type(exc).__name__}); is the service running?"
            ) from exc
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, content)


class EndpointTarget:
    """A SageMaker endpoint, real-time or serverless."""

    def __init__(self, aws: Aws, endpoint: str) -> None:
        self.name, self._client = f"endpoint {endpoint}", aws.client("sagemaker-runtime")
        self._endpoint, self._region = endpoint, aws.region

    def close(self) -> None:
        """The client is the account's, and stays."""

    def ask(
        self, body: bytes, media_type: str, accept: str = "application/json", stop: threading.Event | None = None
    ) -> Reply:
        """See `Target.ask`."""
        try:
            answer = self._client.invoke_endpoint(
                EndpointName=self._endpoint, Body=body, ContentType=media_type, Accept=accept
            )
            content = read_body(answer, "sagemaker-runtime", "InvokeEndpoint")
        except ClientError as exc:  # ModelError, see `session`: the container's own answer
            original = exc.response.get("OriginalStatusCode", 500)
            return Reply(int(original), {}, str(exc.response.get("OriginalMessage", exc)).encode())
        except AwsError as exc:
            if exc.code == "ValidationError" and len(body) > SMALLEST_LIMIT_BYTES and "not found" not in exc.text:
                return Reply(413, {}, f"{len(body) / 1e6:.1f} MB: {exc.text}".encode())
            if exc.code in TRANSIENT:
                raise Unanswered(str(exc)) from exc
            if exc.code == "ValidationError" and "not found" in exc.text:
                raise LaunchError(
                    f"There is no endpoint {self._endpoint} in {self._region}: `deploy` first, or give another "
                    "--endpoint, --project or --region."
                ) from exc
            raise
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        return Reply(200, headers, content)


class AsyncTarget:
    """An asynchronous endpoint: the image goes to S3, the answer is fetched from there, and neither stays."""

    def __init__(
        self, aws: Aws, endpoint: str, place: str, poll_s: float = 1.0, limit_s: float = ASYNC_LIMIT_S
    ) -> None:
        """`place`: s3:// folder for the images. `limit_s`: how long an image's answer may take."""
        self.name, self._endpoint = f"asynchronous endpoint {endpoint}", endpoint
        self._s3, self._client = aws.client("s3"), aws.client("sagemaker-runtime")
        self._place, self._poll_s, self._limit_s = place, poll_s, limit_s

    def close(self) -> None:
        """The clients are the account's, and stay."""

    def ask(
        self, body: bytes, media_type: str, accept: str = "application/json", stop: threading.Event | None = None
    ) -> Reply:
        """See `Target.ask`. An answer that takes too long becomes a 408: the same request would take as long again."""
        bucket, prefix = split_uri(self._place)
        given = f"s3://{bucket}/{prefix.rstrip('/')}/{uuid.uuid4().hex}"
        made = [given]
        try:
            self._s3.put_object(Bucket=bucket, Key=split_uri(given)[1], Body=body, ContentType=media_type)
            sent = self._client.invoke_endpoint_async(
                EndpointName=self._endpoint, InputLocation=given, ContentType=media_type, Accept=accept,
                InvocationTimeoutSeconds=ASYNC_LIMIT_S,
            )  # fmt: skip
            answers = [(200, sent["OutputLocation"]), (500, sent.get("FailureLocation"))]
            made += [uri for _, uri in answers if uri]
            deadline_s = time.monotonic() + self._limit_s
            while time.monotonic() < deadline_s:
                for status, uri in answers:
                    found = self._content(uri) if uri else None
                    if found is not None:
                        return Reply(status, {}, found)
                if (stop or threading.Event()).wait(self._poll_s):
                    raise Unanswered("It was stopped.")
        except AwsError as exc:
            if exc.code in TRANSIENT:
                raise Unanswered(str(exc)) from exc
            raise
        finally:
            self._remove(made)
        return Reply(408, {}, f"no answer at {sent['OutputLocation']} within {self._limit_s:g} s".encode())

    def _content(self, uri: str) -> bytes | None:
        """The object, None where it is not there yet. Raises: AwsError."""
        bucket, key = split_uri(uri)
        try:
            return read_body(self._s3.get_object(Bucket=bucket, Key=key), "s3", "GetObject")
        except AwsError as exc:
            # S3 says "denied" of what is missing, without ListBucket. What may do well later is asked for again.
            if exc.is_missing or exc.is_denied or exc.code in TRANSIENT:
                return None
            raise

    def _remove(self, uris: Iterable[str]) -> None:
        for uri in uris:
            bucket, key = split_uri(uri)
            with suppress(AwsError):  # the answer counts; `delete --data` removes what is left
                self._s3.delete_object(Bucket=bucket, Key=key)


@dataclass(frozen=True)
class Outcome:
    """What came of one image."""

    path: Path
    predictions: tuple[dict[str, Any], ...] = ()
    """Likeliest first: label, index, probability. Empty where there is a problem."""
    problem: str | None = None
    tries: int = 1
    model: Mapping[str, str] = field(default_factory=dict)


def classify(target: Target, paths: Iterable[Path], *, concurrency: int = 8, tries: int = TRIES) -> Iterator[Outcome]:
    """Send each image; outcomes in the order of `paths`, failures among them. Raises: AwsError (of access, say).

    Who stops reading outcomes (Ctrl-C) gives up those under way at an address and waits for those at an endpoint;
    those to come are not made.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(concurrency) as threads:
        try:
            yield from threads.map(lambda path: classify_one(target, path, tries, stop), paths)
        except (KeyboardInterrupt, GeneratorExit) as exc:
            stop.set()
            target.close()
            if isinstance(exc, KeyboardInterrupt):
                log.info("it stops when the requests under way are given up, which takes %d s at most", READ_TIMEOUT_S)
            raise
        finally:
            stop.set()
            threads.shutdown(wait=True, cancel_futures=True)


def classify_one(target: Target, path: Path, tries: int = TRIES, stop: threading.Event | None = None) -> Outcome:
    """One image's outcome, tried again where the service says later. Raises: AwsError where no image would do."""
    stop = stop or threading.Event()
    try:
        body = content_of(path)
    except OSError as exc:
        return Outcome(path, problem=f"cannot be read: {exc.strerror}")
    except DataError as exc:
        return Outcome(path, problem=str(exc))
    media_type = MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")
    for attempt in range(1, tries + 1):
        try:
            reply = target.ask(body, media_type, stop=stop)
        except Unanswered as exc:
            problem, pause_s = str(exc), _backoff_s(attempt)
        else:
            if reply.status == 200:
                return understood(path, reply, attempt)
            problem = reply.problem
            if reply.status not in LATER:
                return Outcome(path, problem=problem, tries=attempt)
            pause_s = retry_after_s(reply) or _backoff_s(attempt)
        if attempt < tries and stop.wait(min(pause_s, MAX_PAUSE_S)):
            return Outcome(path, problem=f"{problem} (stopped)", tries=attempt)
    return Outcome(path, problem=f"{problem} (tried {tries} times)", tries=tries)


def content_of(path: Path) -> bytes:
    """An image file's bytes. Raises: DataError where they are more than any image has; OSError."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise DataError(f"it has {size:,} bytes, at most {MAX_FILE_BYTES:,} are read")
    return path.read_bytes()


def understood(path: Path, reply: Reply, attempt: int = 1) -> Outcome:
    """What came of an image that was answered with 200; a problem where another service answered."""
    try:
        answer = json.loads(reply.body)
        found = [
            {**each, "label": str(each["label"]), "probability": float(each["probability"])}
            for each in answer["predictions"]
        ]
        if not found or not all(math.isfinite(each["probability"]) for each in found):
            raise ValueError
        return Outcome(path, tuple(found), None, attempt, dict(answer.get("model") or {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return Outcome(path, problem=f"the answer is none of this service: {reply.body[:100]!r}", tries=attempt)


def retry_after_s(reply: Reply) -> float | None:
    """What the service asks to wait: the header, or where a platform drops headers the body's `retry_after_s`."""
    text: object = reply.headers.get("retry-after")
    if text is None:
        try:
            text = json.loads(reply.body)["error"].get("retry_after_s")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
    try:
        return max(0.0, float(str(text)))
    except ValueError:
        return None


def images_in(places: Iterable[Path]) -> list[Path]:
    """The image files that these files and folders are, in order. Raises: ConfigError where there is none."""
    found: list[Path] = []
    for place in places:
        kind = kind_at(place)
        if kind == "folder":
            found += sorted(p for p in place.rglob("*") if p.suffix.lower() in MEDIA_TYPES and p.is_file())
        elif kind == "file":
            found.append(place)
        else:
            raise ConfigError(f"{place}: there is no such file or folder.")
    if not found:
        raise ConfigError(f"No images ({', '.join(sorted(MEDIA_TYPES))}) in {', '.join(map(str, places))}.")
    return found


def _is_host(host: str) -> bool:
    """Whether a socket can be asked for it: a name's parts have 1 to 63 characters, none of them a space."""
    try:
        return _URL.fullmatch(host.encode("idna").decode()) is not None
    except UnicodeError:
        return False


def _backoff_s(attempt: int) -> float:
    return random.uniform(0.5, 1.0) * min(MAX_PAUSE_S, float(2 ** (attempt - 1)))  # noqa: S311 - no secret
