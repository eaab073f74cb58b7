"""HTTP on one connection: uvicorn's parser, with bounds on what a client may make it wait for and hold.

uvicorn bounds neither the time nor the size of a request's head, answers what is no HTTP in plain text, and loses the
body of a request that offers an upgrade (Java's HttpClient offers h2c with every request). Invocations for which there
is no place are refused here, by their head.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import RETRY_AFTER_S, error_body
from service.http_text import answer_head, is_whole, without_upgrade
from service.lifeline import IDLE, WAITING, WRITING, Lifeline
from service.metrics import INVOCATIONS
from service.options import echoed
from service.record import RequestRecord, new_request_id, request_id_of
from service.telemetry import ANSWER, GONE, ON_GONE, REFUSAL, WHOLE, Telemetry
from service.tracing import Headers

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 2**10
"""Of a request line with its headers; SageMaker's and browsers' take a few thousand."""

ROOM = 64
"""Connections that are closed at once where there are too many: more than one turn of the event loop accepts."""

MAX_HEADERS = 200
"""Of one request; browsers send some twenty. Each takes 170 bytes in memory however short it is: by its bytes alone, a
head of 64 KB could take a megabyte."""

HEAD_S = 10.0
"""A head that is not there by then is given up: a connection that was opened and sends nothing, or dribbles."""

LINGER_S = 10.0
"""How long the rest of a body that was refused is read and thrown away, so that the client reads the refusal."""

UNREAD_S = 30.0
"""A client that takes no byte of its answer for so long is cut off."""

KEEP_ALIVE_S = 75.0
"""How long an idle connection is kept: longer than load balancers do (60 s on AWS), so that they close first and never
send a request into a closed one."""

SWEEP_S = 1.0

_INVOCATIONS = INVOCATIONS.encode()

Reading = Literal["nothing", "head", "body"]
"""Of which part of a message the parser has read last; trailers count as body."""


@dataclass(frozen=True)
class _Refusal:
    """What ends a connection."""

    message: str | None
    """None: nothing is said."""
    record: RequestRecord
    told: bool
    """Whether the request itself, which was being answered, tells log and counts of it."""
    headers: Headers
    """Of the request, where there is one."""


class Protocol(HttpToolsProtocol):
    """uvicorn's, bounded. One for each connection."""

    def __init__(
        self,
        *args: Any,
        telemetry: Telemetry,
        overload: Callable[[], str | None],
        lifeline: Lifeline | None,
        max_connections: int,
        overload_status: int,
        **kwargs: Any,
    ) -> None:
        """`telemetry`, which is told of what is refused here; `overload`, why invocations are refused now (None: they
        are not); `lifeline`, where connections are reported if this is a worker.
        """
        super().__init__(*args, **kwargs)
        self.telemetry = telemetry
        self.overload = overload
        self.lifeline = lifeline
        self.max_connections = max_connections
        self.overload_status = overload_status

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self.flow = _Flow(self)
        self._slot: int | None = None
        self._running: Any = None
        """Of the requests that wait behind one another, the one that is being answered."""
        self._reading: Reading = "nothing"
        self._due = 0
        """Requests whose head has been read and whose answer has not been written."""
        self._since_s = self.loop.time()
        """Since when it has been as it is: a message or an answer began or ended then."""
        self._asked = False
        """Whether a whole head has come on this connection."""
        self._skips_body = False
        """Whether the request that is being read has been refused by its head alone."""
        self._refused_this_turn = False
        """Whether this turn of the event loop has refused one here by its head."""
        self._dry_bytes = 0
        """What was read of this message without reaching a part of its body: of its head, or of its trailers."""
        self._head_bytes = 0
        """Of the names and values of this message's headers."""
        self._got_body = False
        self._refusal: _Refusal | None = None
        self._unread: tuple[int, float] | None = None  # bytes not yet taken by the client, since when
        if len(self.connections) > self.max_connections and not self._make_room():
            sentence = f"{self.max_connections} connections are open; try again in a moment."
            self._refuse(self.overload_status, "overloaded", sentence)
        elif self.lifeline is not None:
            self._slot = self.lifeline.opened(transport.get_extra_info("socket").fileno())

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        for cycle in (self._running, *[cycle for cycle, _ in self.pipeline]):  # uvicorn tells the last one alone
            if cycle is None:
                continue
            cycle.body = b""  # it and this keep each other until garbage is looked for
            cycle.scope["state"].pop(ANSWER, None)
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
                if (on_gone := cycle.scope["state"].get(ON_GONE)) is not None:
                    on_gone()
        if self._slot is not None and self.lifeline is not None:
            self.lifeline.closed(self._slot)
            self._slot = None

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        while data and self._refusal is None and not self.transport.is_closing():
            self._got_body = False
            size, rest = len(data), b""
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as exc:
                size = exc.args[0]
                rest = self._without_upgrade(data[size:])
            except (httptools.HttpParserError, httptools.HttpParserInvalidURLError, UnicodeDecodeError):
                if len(self.url) >= MAX_HEAD_BYTES:  # the parser of URLs takes no more than 2**16 - 1
                    self._refuse_head()
                else:
                    self._refuse(400, "malformed_http", "This is not an HTTP/1.1 request; send one, without TLS.")
            if self._got_body or self._reading == "nothing":
                self._dry_bytes = 0
            else:
                self._dry_bytes += size
                if self._dry_bytes > MAX_HEAD_BYTES:
                    self._refuse_head()
            data = rest

    def on_message_begin(self) -> None:
        """See `httptools.HttpRequestParser`."""
        super().on_message_begin()
        self._reading, self._since_s, self._dry_bytes, self._head_bytes = "head", self.loop.time(), 0, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """See `httptools.HttpRequestParser`."""
        if self._reading == "head":  # a trailer must not become a header (RFC 9110, 6.5.1)
            super().on_header(name, value)
            self._head_bytes += len(name) + len(value)  # one that comes in one piece, with its body, is never dry
            if len(self.headers) > MAX_HEADERS or self._head_bytes > MAX_HEAD_BYTES:
                self.headers.clear()
                self._refuse_head()
                raise OverflowError  # ends the parser's work on this head

    def on_headers_complete(self) -> None:
        """See `httptools.HttpRequestParser`."""
        if self.parser.should_upgrade():
            return
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # to be ignored there (RFC 9110, 10.1.1)
        self._asked = True
        if self._refuse_by_head():
            return
        super().on_headers_complete()  # raises where the URL is none: then nothing is due
        self.scope["state"][GONE] = self.transport.is_closing
        self._reading, self._got_body = "body", True
        self._due += 1
        self._tell_lifeline()

    def on_body(self, body: bytes) -> None:
        """See `httptools.HttpRequestParser`. Most bodies come in one piece, which uvicorn would copy twice."""
        if self.parser.should_upgrade():
            return
        self._got_body = True
        if self._skips_body or self.cycle.response_complete:
            return
        held = self.cycle.body
        if not held:
            self.cycle.body = body  # type: ignore[assignment]  # which is then handed on as it is
        elif isinstance(held, bytearray):
            held += body
        else:
            self.cycle.body = bytearray(held) + body
        if len(self.cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        """See `httptools.HttpRequestParser`."""
        if not self.parser.should_upgrade():
            self._reading, self._since_s = "nothing", self.loop.time()
            if not self._skips_body:
                super().on_message_complete()
                self.scope["state"][WHOLE] = True
            self._skips_body = False
            if not self._due:
                self._tell_lifeline()

    def on_response_complete(self) -> None:
        """An answer is written, at least into the transport's buffer."""
        self._running.scope["state"].pop(ANSWER, None)  # else it and its request would keep each other alive
        self._due -= 1
        self._note_answer()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal is not None:
            self._write_refusal(self._refusal)

    def _note_answer(self) -> None:
        self.server_state.total_requests += 1
        self._since_s = self.loop.time()
        if self._slot is not None and self.lifeline is not None:
            self.lifeline.note(self._slot, WRITING)
            self.loop.call_soon(self._tell_lifeline)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        cycle.scope["state"][ANSWER] = partial(self._answer, cycle)
        super()._start_asgi_task(cycle, app)

    def _answer(self, cycle: Any, status: int, headers: Headers, body: bytes) -> bool:
        """Write a whole answer, in one packet: uvicorn's `send` writes head and body each by itself.

        Returns: False, with nothing written, where it takes `send` to write it rightly.
        """
        if not is_whole(status, headers, body) or cycle.scope["method"] == "HEAD":
            return False
        if cycle.response_started or self.flow.write_paused:
            return False
        if cycle.disconnected:
            return True
        closes = (b"connection", b"close")
        cycle.keep_alive = cycle.keep_alive and closes not in headers
        if not cycle.keep_alive and closes not in headers:
            headers = [*headers, closes]
        try:
            head = answer_head(status, [*self.server_state.default_headers, *headers])
        except ValueError:  # which `send` refuses, too
            return False
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        self.transport.write(head + body)
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        return True

    def _tell_lifeline(self) -> None:
        """What would become of this connection if the process died now."""
        if self._slot is not None and self.lifeline is not None:
            writing = not self.transport.is_closing() and self.transport.get_write_buffer_size() > 0
            writing |= self._reading == "body" and not self._due  # what comes is the rest of what has been answered
            self.lifeline.note(self._slot, WRITING if writing else WAITING if self._due else IDLE)

    def sweep(self, now_s: float) -> None:
        """Give up what has taken too long."""
        self._tell_lifeline()
        unread = self.transport.get_write_buffer_size()
        if not unread:
            self._unread = None
        elif self._unread is None or self._unread[0] != unread:
            self._unread = unread, now_s
        elif now_s - self._unread[1] > UNREAD_S:
            log.info("a client took no byte of its answer for %g s and is cut off", UNREAD_S)
            self.transport.abort()
            return
        if self.transport.is_closing():
            return
        took_s = now_s - self._since_s
        if self._refusal is not None and self._due == 0:
            if took_s > LINGER_S:
                self.transport.close()
        elif self._reading == "head":
            if took_s > HEAD_S:
                sentence = f"The request's head did not arrive within {HEAD_S:g} s; send it faster."
                self._refuse(408, "head_timeout", sentence)
        elif self._due == 0:
            lingers = self._reading == "body"  # of a request that was answered before its end
            if took_s > (LINGER_S if lingers else KEEP_ALIVE_S if self._asked else HEAD_S):
                self.transport.close()

    def _refuse_by_head(self) -> bool:
        """Answer an invocation for which there is no place, without the way through ASGI; its body is thrown away.

        In an overload most requests are refused, and what each costs is missing where others are answered. Those that
        are rare or need more care go the whole way, and are refused there.
        """
        if self.url != _INVOCATIONS or self.parser.get_method() != b"POST" or self.expect_100_continue:
            return False
        if self.parser.get_http_version() != "1.1" or not self.parser.should_keep_alive():
            return False
        if self._due or self._refused_this_turn:  # what is pipelined takes turns with other connections
            return False
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            return False
        if (sentence := self.overload()) is None:
            return False
        record = RequestRecord(request_id_of(self.headers), "POST", INVOCATIONS, self.overload_status, "overloaded")
        self._write(record, sentence, (b"server-timing", record.server_timing()), *echoed(self.headers))
        self.telemetry.tell(record, self.headers)
        self._reading, self._got_body, self._skips_body = "body", True, True
        self._refused_this_turn = True
        self.loop.call_soon(self._end_turn)
        self._note_answer()
        return True

    def _end_turn(self) -> None:
        self._refused_this_turn = False

    def _without_upgrade(self, rest: bytes) -> bytes:
        """The request without the upgrade it offered, to be parsed anew (RFC 9110, 7.8: a server may ignore it)."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(400, "malformed_http", "This is no proxy; CONNECT is not answered.")
            return b""
        version = self.parser.get_http_version().encode()
        request = without_upgrade(method, self.url, version, self.headers, self.parser.should_keep_alive())
        self.parser = httptools.HttpRequestParser(self)
        with suppress(AttributeError):
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return request + rest

    def _make_room(self) -> bool:
        """Close the connections that have been idle longest; whether there were any."""
        others = [other for other in self.connections if isinstance(other, Protocol) and other is not self]
        idle = [other for other in others if other._due == 0 and not other.transport.is_closing()]
        for other in sorted(idle, key=lambda other: other._since_s)[:ROOM]:
            other.transport.close()
        return bool(idle)

    def _refuse_head(self) -> None:
        sentence = f"A request's head may have at most {MAX_HEAD_BYTES:,} bytes and {MAX_HEADERS} headers; send fewer."
        self._refuse(431, "headers_too_large", sentence)

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Read no more, answer what is due, then this, and close.

        Of a request that has had its answer, nothing is said: it would be taken for the answer to the next one.
        """
        if self._refusal is not None or self.transport.is_closing():
            return
        answered = self._reading == "body" and not self._due
        record, told = RequestRecord(new_request_id(), "", "", status, code), False
        headers: Headers = []
        if self._reading == "body" and self._due:  # the request that is being read gets this for its answer
            self._due -= 1
            waiting = bool(self.pipeline)
            cycle = self.pipeline.popleft()[0] if waiting else self.cycle
            scope = cycle.scope
            headers = list(scope["headers"])
            record = RequestRecord(request_id_of(scope["headers"]), scope["method"], scope["path"], status, code)
            if cycle.response_started:
                self.transport.close()
            elif not waiting:
                scope["state"][REFUSAL], told = record, True
                cycle.disconnected = True
                cycle.waiting_for_100_continue = False
                cycle.message_event.set()
        self._refusal = _Refusal(None if answered else message, record, told or answered, headers)
        if self._due == 0:
            self._write_refusal(self._refusal)

    def _write_refusal(self, refusal: _Refusal) -> None:
        if self.transport.is_closing():
            return
        if not refusal.told:
            self.telemetry.tell(refusal.record, refusal.headers)
        if refusal.message is not None:
            self._write(refusal.record, refusal.message, (b"connection", b"close"))
        self._since_s = self.loop.time()
        self.transport.write_eof()  # closed at once, what the client still sends would be answered by a reset
        self.flow.resume_reading()

    def _write(self, record: RequestRecord, message: str, *further: tuple[bytes, bytes]) -> None:
        """A whole answer, in the one shape of errors."""
        body = error_body(record.status, record.code, message, record.request_id)
        headers = [
            *self.server_state.default_headers, (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)), (b"x-request-id", record.request_id.encode()), *further,
        ]  # fmt: skip
        if record.status in (429, 503):
            headers.append((b"retry-after", b"%d" % RETRY_AFTER_S))
        self.transport.write(answer_head(record.status, headers) + body)


class _Flow(FlowControl):
    """Reads no further while requests wait behind one another: uvicorn's goes on, and a client could queue millions."""

    def __init__(self, protocol: Protocol) -> None:
        super().__init__(protocol.transport)
        self._protocol = protocol

    def resume_reading(self) -> None:
        """Unless there are requests to be answered first, all of whose bodies are here but for the last one's."""
        if not self._protocol.pipeline:
            super().resume_reading()


async def sweep_all(connections: set[Any], lifeline: Lifeline | None) -> None:
    """Once a second, for ever: give up what takes too long. From the first moment on the lifeline tells that this
    worker accepts.
    """
    loop = asyncio.get_running_loop()
    while True:
        if lifeline is not None:
            lifeline.beat()
        await asyncio.sleep(SWEEP_S)
        now_s = loop.time()
        for connection in list(connections):
            try:
                connection.sweep(now_s)
            except Exception:  # one connection must not end the watch over all
                log.exception("a connection is given up")
                connection.transport.abort()
