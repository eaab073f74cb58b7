"""What can go wrong with a request, and how each is told to the client.

    ServiceError
    ├── RequestError             the client's to mend
    │   ├── MalformedRequest     400  a form or JSON that is none, no image in it, an unknown option
    │   ├── NotAcceptable        406  Accept excludes every type that answers have
    │   ├── BodyTimeout          408  the body came too slowly
    │   ├── PayloadTooLarge      413  more bytes than the limit
    │   └── UnsupportedMediaType 415  neither an image nor a form nor JSON; or compressed
    └── Unavailable              ours; trying again helps, but for EngineFailure
        ├── EngineFailure        500  the engine raised or answered wrongly
        ├── NotReady             503  loading, warming up, failed, stopped
        ├── Overloaded           503  as many requests, or bytes, under way as are allowed (429 by setting)
        └── DeadlineExceeded     504  the answer would come after the platform has hung up

Errors of images (`service.model.errors.ImageError`) join the table as 400 and 413. An image that costs too much to
decode gets 413 like one that is too large: the remedy is the same, a smaller or simpler file; trying again is none.
"""

import json
from collections.abc import Mapping
from typing import TypeVar

from service.model.errors import ImageTooCostly, ImageTooLarge, UnreadableImage

Error = TypeVar("Error", bound=Exception)


class ServiceError(Exception):
    """Root of the errors a request can end with."""


class RequestError(ServiceError):
    """The request cannot be answered as it is."""


class MalformedRequest(RequestError):
    """The body is not what its content type says."""


class NotAcceptable(RequestError):
    """The client accepts none of the types that can be given."""


class BodyTimeout(RequestError):
    """The body was not there in time."""


class PayloadTooLarge(RequestError):
    """The body has more bytes than are accepted."""


class UnsupportedMediaType(RequestError):
    """The content type is neither an image nor a form nor JSON, or the body is compressed."""


class Unavailable(ServiceError):
    """The service cannot answer now."""


class EngineFailure(Unavailable):
    """The engine failed on the batch the request was in."""


class NotReady(Unavailable):
    """The model is not loaded yet, could not be loaded, or the service is stopping."""


class Overloaded(Unavailable):
    """The bound on requests under way is reached."""


class DeadlineExceeded(Unavailable):
    """The request was not answered in time."""


HTTP_ERRORS: dict[type[Exception], tuple[int, str]] = {
    MalformedRequest: (400, "malformed_request"),
    UnreadableImage: (400, "unreadable_image"),
    NotAcceptable: (406, "not_acceptable"),
    BodyTimeout: (408, "body_timeout"),
    PayloadTooLarge: (413, "payload_too_large"),
    ImageTooLarge: (413, "image_too_large"),
    ImageTooCostly: (413, "image_too_costly"),
    UnsupportedMediaType: (415, "unsupported_media_type"),
    EngineFailure: (500, "engine_failure"),
    NotReady: (503, "not_ready"),
    Overloaded: (503, "overloaded"),
    DeadlineExceeded: (504, "deadline_exceeded"),
}
"""Exception -> HTTP status and the `code` in the body. `tests/service/test_errors.py` keeps it complete."""

CONNECTION_ERRORS = {"malformed_http": 400, "head_timeout": 408, "headers_too_large": 431, "worker_died": 503}
"""Code -> HTTP status of what ends a connection before, or without, a request of its own."""

RETRY_AFTER_S = 1
"""What `Retry-After` says with a 503 or 429: places are free again after the next batch."""


def without_frames(exc: Error) -> Error:
    """`exc`, and what it came from, without tracebacks: an answer's frames lead back to its error, and would keep the
    request's bytes until the garbage collector comes.
    """
    left: list[BaseException | None] = [exc]
    while left:
        each = left.pop()
        if each is not None and each.__traceback__ is not None:
            each.__traceback__ = None
            left += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
    return exc


def error_body(status: int, code: str, message: str, request_id: str, beside: Mapping[str, str] = {}) -> bytes:
    """The one JSON shape of errors (`service.schemas.ErrorResponse`), with what stands `beside` the error."""
    detail: dict[str, str | int] = {"code": code, "message": message, "request_id": request_id}
    if status in (429, 503):
        detail["retry_after_s"] = RETRY_AFTER_S
    return json.dumps({**beside, "error": detail}, ensure_ascii=False).encode()
