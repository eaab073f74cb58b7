"""One record per request: request id, stage times, outcome. It becomes a log line, counts, headers and a trace.

The outermost layer of the app: it also turns an exception that nothing else caught into the error shape.
"""

import contextvars
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import error_body
from service.metrics import INVOCATIONS, Metrics
from service.record import SHOWN_PATH, RequestRecord, request_id_of
from service.tracing import Headers, Tracing

log = logging.getLogger("service.requests")

PROBES = ("/ping", "/metrics", "/execution-parameters")
"""Asked again and again by machines: a line only when the answer is another than before."""

REFUSAL = "refusal"
"""Of a scope's state: the record with which `service.protocol` has answered a request whose rest is no HTTP."""

GONE = "gone"
"""Of a scope's state: a function that tells whether the client has hung up, from `service.protocol`."""

ON_GONE = "on_gone"
"""Of a scope's state: a function that `service.protocol` calls when the client hangs up before it has its answer."""

ANSWER = "answer"
"""Of a scope's state: a function that writes a whole answer (status, headers, body) in one packet, from
`service.protocol`; it returns False where the answer must go through `send`."""

WHOLE = "whole"
"""Of a scope's state: there once the whole body has been read, from `service.protocol`."""

_record: contextvars.ContextVar[RequestRecord] = contextvars.ContextVar("record")


def current() -> RequestRecord:
    """The record of the request this task works for."""
    return _record.get()


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
        record = RequestRecord(request_id_of(scope["headers"]), scope["method"], scope["path"])
        _record.set(record)
        if log.isEnabledFor(logging.DEBUG):  # of what a process had that was killed outright, there is no other line
            path = ascii(record.path[:SHOWN_PATH])[1:-1]
            log.debug("request_id=%s arrived: %s %s", record.request_id, record.method, path)

        answer = scope.get("state", {}).get(ANSWER)
        head: Message | None = None  # until the body is here

        async def send_and_note(message: Message) -> None:
            nonlocal head
            if message["type"] == "http.response.start":
                record.status = message["status"]
                record.answered_s = time.perf_counter()
                if record.status < 400 and record.code == "unanswered":
                    record.code = "ok"
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
                if record.path == INVOCATIONS:
                    message["headers"].append((b"server-timing", record.server_timing()))
                head = message
                return
            if head is not None:
                begun, head = head, None
                whole = answer is not None and not message.get("more_body", False)
                if whole and answer(begun["status"], begun["headers"], message.get("body", b"")):
                    return
                await send(begun)
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception:  # the client gets a sentence, the log the trace
            log.exception("request_id=%s failed unexpectedly", record.request_id)
            record.code = "internal_error"
            if not record.status or head is not None:
                await _send_internal_error(send_and_note, record)
        finally:
            if (refusal := scope.get("state", {}).get(REFUSAL)) is not None:
                record.request_id, record.status, record.code = refusal.request_id, refusal.status, refusal.code
            self.tell(record, scope["headers"])

    def tell(self, record: RequestRecord, headers: Headers) -> None:
        """Of a request that is over, or, without a path, of a connection that was refused before there was one.

        Its time ends now: of a refusal behind other requests, once these are answered.
        """
        record.total_ms = (time.perf_counter() - record.started_s) * 1000
        self._metrics.record(record)
        if self._tracing.on and record.path and record.path not in PROBES:
            record.trace_id = self._tracing.record(record, headers)
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
    body = error_body(500, "internal_error", message, record.request_id)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
