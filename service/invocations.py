"""POST /invocations, from the ASGI messages of one request to those of its answer.

An ASGI app of its own and no FastAPI route: on small pictures, most of a request's time would be FastAPI's. `openapi`
documents it, `app` leads the requests here.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service import telemetry
from service.admission import Memory
from service.answers import write_answer
from service.errors import (
    HTTP_ERRORS,
    RETRY_AFTER_S,
    BodyTimeout,
    Overloaded,
    PayloadTooLarge,
    UnsupportedMediaType,
    error_body,
    without_frames,
)
from service.media import JSON, negotiate
from service.options import CUSTOM_ATTRIBUTES, echoed, top_k_of
from service.runtime import Runtime

GONE_S = 1.0
"""How long the server has to see that a client has hung up, once the connection is closing."""

LARGE_ANSWER = 2_000
"""Predictions in an answer beyond which it is written in a thread: 100 images of 1,000 classes take a third of a
second."""

Header = tuple[bytes, bytes]


class Invocations:
    """Answers invocations with what `runtime()` gives."""

    def __init__(self, runtime: Callable[[], Runtime]) -> None:
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; every error of the table becomes its answer."""
        runtime = self._runtime()
        given = _joined(scope["headers"])
        headers: list[Header] = []
        media_type = JSON
        try:
            status = 200
            body, media_type = await _answer(runtime, given, scope, receive)
        except ClientDisconnect:  # nobody would read an answer, the log line tells of it
            telemetry.current().code = "client_gone"
            # uvicorn sees it in its next turn; until then it would call a request without an answer a fault of ours. Of
            # requests that wait behind one another on a connection it tells the last one only.
            with suppress(TimeoutError):
                async with asyncio.timeout(GONE_S):
                    await _disconnected(receive)
            return
        except tuple(HTTP_ERRORS) as exc:
            status, code = HTTP_ERRORS[type(exc)]
            if isinstance(exc, Overloaded):
                status = runtime.settings.overload_status
            record = telemetry.current()
            record.code = code
            body = error_body(status, code, str(without_frames(exc)), record.request_id)
            if status in (429, 503):
                headers.append((b"retry-after", b"%d" % RETRY_AFTER_S))
        headers += [(b"content-type", media_type.encode()), (b"content-length", b"%d" % len(body))]
        if runtime.stopping:
            headers.append((b"connection", b"close"))
        headers += echoed(scope["headers"])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _answer(runtime: Runtime, given: dict[str, str], scope: Scope, receive: Receive) -> tuple[bytes, str]:
    """The body of the answer, and its type."""
    state = scope.get("state", {})
    gone = state.get(telemetry.GONE)

    def require_client() -> None:
        if gone is not None and gone():
            raise ClientDisconnect

    media_type = negotiate(given.get("accept"))
    top_k = top_k_of(scope.get("query_string", b""), given.get(CUSTOM_ATTRIBUTES.decode()))
    if given.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise UnsupportedMediaType(
            f"The body must not be compressed, given: Content-Encoding {given['content-encoding'][:40]}; send it plain."
        )
    predictor = runtime.require_ready()
    runtime.admission.require_room()
    record = telemetry.current()
    async with runtime.admission.deadline():
        with runtime.admission.memory() as memory:
            timeout_s = None if telemetry.WHOLE in state else runtime.settings.body_timeout_s
            payload = await _read_body(
                receive, given.get("content-length"), runtime.settings.max_payload_bytes, timeout_s, memory
            )
            record.bytes_in = len(payload)
            with runtime.admission.place() as places, _given_up_if_gone(state):
                payloads = await runtime.read(payload, given.get("content-type"))
                del payload  # a form or JSON, which takes as much again as its images
                answered = await predictor.predict(payloads, places, require_client)
            outcomes = payloads.in_order(answered.outcomes)
            record.images = len(outcomes) if answered.several else None
            record.decode_ms, record.queue_ms, record.infer_ms, record.batch_size = (
                answered.decode_ms, answered.queue_ms, answered.infer_ms, answered.batch_size
            )  # fmt: skip
            write = partial(write_answer, outcomes, answered.card, answered.several, media_type, top_k)
            large = len(outcomes) * top_k > LARGE_ANSWER
            body = await asyncio.to_thread(write) if large else write()
    require_client()
    return body, media_type


def _joined(headers: list[Header]) -> dict[str, str]:
    """Headers by name, the values of repeated ones joined as RFC 9110, 5.3 says."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        found[name] = found[name] + b", " + value if name in found else value
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in found.items()}


async def _read_body(
    receive: Receive, declared: str | None, limit: int, timeout_s: float | None, memory: Memory
) -> bytes:
    """The whole body, of at most `limit` bytes, accounted for; without `timeout_s` where it is here already.

    Raises: PayloadTooLarge, BodyTimeout, Overloaded, ClientDisconnect.
    """
    too_large = "The body may have at most {:,} bytes, given: {}; send a smaller image, or fewer."
    if declared is not None and declared.isdecimal():
        if len(declared) > 18 or int(declared) > limit:
            raise PayloadTooLarge(too_large.format(limit, f"{int(declared[:18]):,}"))
        memory.declare(int(declared))
    chunks: list[bytes] = []
    more = True
    try:
        async with asyncio.timeout(timeout_s):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk = message.get("body", b"")
                memory.take(len(chunk))
                if memory.held > limit:
                    raise PayloadTooLarge(too_large.format(limit, "more than that"))
                chunks.append(chunk)
                more = message.get("more_body", False)
    except TimeoutError as exc:
        raise BodyTimeout(
            f"Of the body, {memory.held:,} bytes arrived within {timeout_s:g} s, and its end did not; send it "
            "faster, or a smaller image."
        ) from exc
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextmanager
def _given_up_if_gone(state: dict[str, Any]) -> Iterator[None]:
    """Cancel what is awaited inside when the client hangs up. Raises: ClientDisconnect in its place."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def give_up() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    state[telemetry.ON_GONE] = give_up
    try:
        yield
    except asyncio.CancelledError:
        if not gone or task.uncancel():  # somebody else, the deadline for one, cancelled as well
            raise
        raise ClientDisconnect from None
    finally:
        del state[telemetry.ON_GONE]
