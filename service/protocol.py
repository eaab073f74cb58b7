"""HTTP on one connection: uvicorn's parser, with bounds on what a client may make it wait for and hold.

uvicorn bounds neither the time nor the size of a request's head, answers what is no HTTP in plain text, and loses the
body of a request that offers an upgrade (Java's HttpClient offers h2c with every request).
"""

import asyncio
import json
import logging
import os
from contextlib import suppress
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.lifeline import Lifeline
from service.metrics import Metrics
from service.telemetry import RequestRecord

log = logging.getLogger("service.requests")

MAX_HEAD_BYTES = 64 * 2**10
"""Of a request line with its headers; SageMaker's and browsers' take a few thousand."""

HEAD_S = 10.0
"""A head that is not there by then is given up: a connection that was opened and sends nothing, or dribbles."""

LINGER_S = 10.0
"""How long the rest of a body that was refused is read and thrown away, so that the client reads the refusal."""

UNREAD_S = 30.0
"""A client that takes no byte of its answer for so long is cut off."""

SWEEP_S = 1.0


class Protocol(HttpToolsProtocol):
    """uvicorn's, bounded. One for each connection."""

    max_connections: ClassVar[int] = 4096
    """In this process. Beyond it, those that have been idle longest are closed for new ones."""
    lifeline: ClassVar[Lifeline | None] = None
    metrics: ClassVar[Metrics | None] = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._slot: int | None = None
        self._head_bytes = 0
        self._head_since_s: float | None = self.loop.time()
        self._lingers_since_s: float | None = None
        self._unread: tuple[int, float] | None = None  # bytes not yet taken by the client, since when
        self._idle_since_s: float | None = self.loop.time()
        if len(self.connections) > self.max_connections and not self._make_room():
            self._refuse(503, "overloaded", f"{self.max_connections} connections are open; try again in a moment.")
        elif self.lifeline is not None:
            self._slot = self.lifeline.opened(transport.get_extra_info("socket").fileno())

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        if self._slot is not None and self.lifeline is not None:
            self.lifeline.closed(self._slot)
            self._slot = None

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if self._head_since_s is None and self._idle_since_s is not None:
            self._head_since_s = self.loop.time()
        self._idle_since_s = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._go_on_without_upgrade(data[exc.args[0] :])
        except (httptools.HttpParserError, httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            self._refuse(400, "malformed_http", "This is not an HTTP/1.1 request; send one, without TLS.")
        if self._head_since_s is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                sentence = f"The request line and headers may have at most {MAX_HEAD_BYTES:,} bytes; send fewer."
                self._refuse(431, "headers_too_large", sentence)

    def on_headers_complete(self) -> None:
        """See `httptools.HttpRequestParser`."""
        self._head_bytes, self._head_since_s = 0, None
        if self.parser.should_upgrade():
            return
        if self._slot is not None and self.lifeline is not None:
            self.lifeline.waits(self._slot, True)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See `httptools.HttpRequestParser`."""
        if not self.parser.should_upgrade():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """See `httptools.HttpRequestParser`."""
        if not self.parser.should_upgrade():
            self._lingers_since_s = None
            super().on_message_complete()
            self.cycle.more_body = False  # also where the answer came before the end of the body

    def on_response_complete(self) -> None:
        """An answer is written."""
        super().on_response_complete()
        if self._slot is not None and self.lifeline is not None and not self.pipeline:
            self.lifeline.waits(self._slot, False)
        if self.cycle.more_body:
            self._lingers_since_s = self.loop.time()
        elif not self.pipeline:
            self._idle_since_s = self.loop.time()

    def sweep(self, now_s: float) -> None:
        """Give up what has taken too long."""
        unread = self.transport.get_write_buffer_size()
        if not unread:
            self._unread = None
        elif self._unread is None or self._unread[0] != unread:
            self._unread = unread, now_s
        elif now_s - self._unread[1] > UNREAD_S:
            self.transport.abort()
            return
        if self.transport.is_closing():
            return
        if self._lingers_since_s is not None and now_s - self._lingers_since_s > LINGER_S:
            self.transport.close()
        elif self._head_since_s is not None and now_s - self._head_since_s > HEAD_S:
            if self._head_bytes:
                self._refuse(
                    408, "head_timeout", f"The request's head did not arrive within {HEAD_S:g} s; send it faster."
                )
            else:
                self.transport.close()

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """Parse the request anew as if it had not offered an upgrade (RFC 9110, 7.8: a server may ignore it)."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(400, "malformed_http", "This is no proxy; CONNECT is not answered.")
            return
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in (b"upgrade", b"connection")]
        if not self.parser.should_keep_alive():
            lines.append(b"connection: close")
        self.parser = httptools.HttpRequestParser(self)
        with suppress(AttributeError):
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"\r\n".join([*lines, b"", b""]) + rest)

    def _make_room(self) -> bool:
        """Close the connections that have been idle longest; whether there were any."""
        idle = [other for other in self.connections if isinstance(other, Protocol) and other is not self]
        idle = [other for other in idle if other._idle_since_s is not None and not other.transport.is_closing()]
        idle.sort(key=lambda other: other._idle_since_s or 0.0)
        for other in idle[:64]:
            other.transport.close()
        return bool(idle)

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer what no app has seen, and close."""
        if self.transport.is_closing():
            return
        request_id = os.urandom(16).hex()
        record = RequestRecord(request_id, "", "", status, code)
        log.info(record)
        if self.metrics is not None:
            self.metrics.record(record)
        if self.cycle is None or self.cycle.response_complete:  # else an answer is due first, which this would garble
            body = json.dumps({"error": {"code": code, "message": message, "request_id": request_id}}).encode()
            headers = [
                *self.server_state.default_headers, (b"content-type", b"application/json"), (b"connection", b"close"),
                (b"content-length", b"%d" % len(body)), (b"x-request-id", request_id.encode()),
            ]  # fmt: skip
            if status == 503:
                headers.append((b"retry-after", b"1"))
            lines = b"".join(b"%s: %s\r\n" % header for header in headers)
            self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + body)
        self.transport.close()


async def sweep_all(connections: set[Any], lifeline: Lifeline | None) -> None:
    """Once a second, for ever: give up what takes too long."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(SWEEP_S)
        now_s = loop.time()
        for connection in list(connections):
            connection.sweep(now_s)
        if lifeline is not None:
            lifeline.flush()
