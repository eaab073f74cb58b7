"""One record per request: request id, stage times, outcome. It becomes a log line, counts, headers and a trace.

The outermost layer of the app: it also turns an exception that nothing else caught into the error shape.
"""

import contextvars
import json
import logging
import os
import re
import time
from dataclasses import dataclass, field, fields
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import INVOCATIONS, Metrics
from service.tracing import Tracing

log = logging.getLogger("service.requests")

PROBES = ("/ping", "/metrics", "/execution-parameters")
"""Asked again and again by machines: a line only when the answer is another than before."""

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_SHOWN_PATH = 200
"""So much of a path is logged, in characters: uvicorn lets 64 KiB through."""


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
    trace_id: str | None = None
    started_s: float = field(default_factory=time.perf_counter, repr=False)
    answered_s: float | None = field(default=None, repr=False)
    """When the answer began, on the clock of `started_s`."""

    def fields(self) -> dict[str, Any]:
        """What is known, by name; times in ms to the microsecond."""
        pairs = ((name, getattr(self, name)) for name in _SHOWN)
        known = {
            name: round(value, 3) if value.__class__ is float else value for name, value in pairs if value is not None
        }
        known["path"] = self.path[:_SHOWN_PATH]
        return {"message": "request", **known}

    def __str__(self) -> str:
        """The record as `key=value` pairs; what is not known is left out."""
        pairs = ((name, getattr(self, name)) for name in _SHOWN)
        return " ".join([f"{name}={_text(value)}" for name, value in pairs if value is not None])

    def server_timing(self) -> bytes:
        """The stages up to now as a Server-Timing header (https://www.w3.org/TR/server-timing/), durations in ms."""
        text = f"total;dur={(time.perf_counter() - self.started_s) * 1000:.1f}"
        if self.infer_ms is not None:
            text = f"infer;dur={self.infer_ms:.1f}, {text}"
        if self.queue_ms is not None:
            text = f"queue;dur={self.queue_ms:.1f}, {text}"
        if self.decode_ms is not None:
            text = f"decode;dur={self.decode_ms:.1f}, {text}"
        return text.encode()


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
    """ASGI middleware: opens a record, answers its id and its times in headers, tells of it when it is over."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self.app = app
        self._metrics = metrics
        self._tracing = tracing
        self._answers: dict[str, tuple[int, str]] = {}

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
                record.answered_s = time.perf_counter()
                if record.status < 400 and record.code == "unanswered":
                    record.code = "ok"
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
                if record.path == INVOCATIONS:
                    message["headers"].append((b"server-timing", record.server_timing()))
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
            self._metrics.record(record)
            if self._tracing.on and record.path not in PROBES:
                record.trace_id = self._tracing.record(record, scope["headers"])
            log.log(self._level(record), record)

    def _level(self, record: RequestRecord) -> int:
        """DEBUG for a probe whose answer is the one before; at first, that it succeeds is expected."""
        if record.path not in PROBES or record.status not in (200, 503):
            return logging.INFO
        answer = (record.status, record.code)
        before = self._answers.get(record.path)
        self._answers[record.path] = answer
        return logging.DEBUG if answer == before or (before is None and record.status == 200) else logging.INFO


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
    text = str(value)[:_SHOWN_PATH]
    return text if text.isprintable() and " " not in text else json.dumps(text)
