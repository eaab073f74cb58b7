"""One record per request: request id, stage times, outcome. Logged as one line when the request ends.

The outermost layer of the app: it also turns an exception that nothing else caught into the error shape.
"""

import contextvars
import json
import logging
import os
import re
import sys
import time
from dataclasses import dataclass, field, fields

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("service.requests")

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")


@dataclass
class RequestRecord:
    """What is known of one request; the stages fill it in."""

    request_id: str
    method: str
    path: str
    status: int = 0
    code: str = "unanswered"
    bytes_in: int = 0
    images: int | None = None
    decode_ms: float | None = None
    queue_ms: float | None = None
    infer_ms: float | None = None
    total_ms: float = 0.0
    batch_size: int | None = None
    started_s: float = field(default_factory=time.perf_counter, repr=False)

    def line(self) -> str:
        """The record as `key=value` pairs; what is not known is left out."""
        pairs = ((name, getattr(self, name)) for name in _SHOWN)
        return " ".join([f"{name}={_text(value)}" for name, value in pairs if value is not None])


_SHOWN = tuple(item.name for item in fields(RequestRecord) if item.repr)

_record: contextvars.ContextVar[RequestRecord] = contextvars.ContextVar("record")


def current() -> RequestRecord:
    """The record of the request this task works for."""
    return _record.get()


def error_body(code: str, message: str, request_id: str) -> bytes:
    """The one JSON shape of errors (`service.schemas.ErrorResponse`)."""
    detail = {"code": code, "message": message, "request_id": request_id}
    return json.dumps({"error": detail}, ensure_ascii=False).encode()


class Telemetry:
    """ASGI middleware: opens a record, answers its id in X-Request-Id, logs it when the request is over."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; anything but HTTP passes through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope), scope["method"], scope["path"])
        _record.set(record)

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                if record.status < 400 and record.code == "unanswered":
                    record.code = "ok"
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception:  # the client gets a sentence, the log the trace
            log.exception("request_id=%s failed unexpectedly", record.request_id)
            record.code = "internal_error"
            if not record.status:
                await _send_internal_error(send_and_note, record)
        finally:
            record.total_ms = (time.perf_counter() - record.started_s) * 1000
            probe = record.path == "/ping" and record.status == 200
            log.log(logging.DEBUG if probe else logging.INFO, "%s", record.line())


def configure_logging(level: str) -> None:
    """One handler on stdout, unbuffered by line, for our lines and uvicorn's."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    # What no line of ours shows is not looked up for it (logging HOWTO, Optimization).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    # Lines of the libraries that repeat ours or say nothing to the user.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("PIL").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.WARNING)


async def _send_internal_error(send: Send, record: RequestRecord) -> None:
    message = "The service failed on this request; the cause is in its log under the request id."
    body = error_body("internal_error", message, record.request_id)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> str:
    """The client's own id where it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SAFE_ID.fullmatch(value):
            return str(value, "ascii")
    return os.urandom(16).hex()


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)
