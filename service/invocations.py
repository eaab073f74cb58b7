"""POST /invocations, from the ASGI messages of one request to those of its answer.

An ASGI app of its own and no FastAPI route: on small pictures, most of a request's time would be FastAPI's. `routes`
documents it, `app` leads the requests here.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service import telemetry
from service.errors import HTTP_ERRORS, RETRY_AFTER_S, DeadlineExceeded, PayloadTooLarge
from service.inference import JSON, output_fn, require_json
from service.runtime import Runtime

PATH = "/invocations"

WATCH_AFTER_S = 0.05
"""A request that waits longer than this is watched: it is given up when its client hangs up."""

Header = tuple[bytes, bytes]


class Invocations:
    """Answers invocations with what `runtime()` gives."""

    def __init__(self, runtime: Callable[[], Runtime]) -> None:
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; every error of the table becomes its answer."""
        headers: list[Header] = []
        try:
            status, body = 200, await _answer(self._runtime(), scope["headers"], receive)
        except ClientDisconnect:  # nobody reads this answer, the log line tells of it
            status, body = 400, b""
            telemetry.current().code = "client_gone"
        except tuple(HTTP_ERRORS) as exc:
            status, code = HTTP_ERRORS[type(exc)]
            record = telemetry.current()
            record.code = code
            body = telemetry.error_body(code, str(exc), record.request_id)
            if status == 503:
                headers = [(b"retry-after", b"%d" % RETRY_AFTER_S)]
        headers += [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _answer(runtime: Runtime, headers: list[Header], receive: Receive) -> bytes:
    given = _joined(headers)
    accept = given.get("accept")
    require_json(accept)
    record = telemetry.current()
    with runtime.admitted():
        try:
            async with asyncio.timeout(runtime.settings.deadline_s):
                payload = await _read_body(receive, given.get("content-length"), runtime.settings.max_payload_bytes)
                record.bytes_in = len(payload)
                with _given_up_if_gone(receive):
                    result, record.decode_ms = await runtime.predict(payload, given.get("content-type"))
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"The request was not answered within {runtime.settings.deadline_s:g} s; try again, or send less."
            ) from exc
    record.queue_ms, record.infer_ms, record.batch_size = result.queue_ms, result.infer_ms, result.batch_size
    return output_fn([result.value], accept)[0]


def _joined(headers: list[Header]) -> dict[str, str]:
    """Headers by name, the values of repeated ones joined as RFC 9110, 5.3 says."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        found[name] = found[name] + b", " + value if name in found else value
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in found.items()}


async def _read_body(receive: Receive, declared: str | None, limit: int) -> bytes:
    too_large = "The body may have at most {:,} bytes, given: {}; send a smaller image."
    if declared is not None and declared.isdecimal() and int(declared) > limit:
        raise PayloadTooLarge(too_large.format(limit, f"{int(declared):,}"))
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise PayloadTooLarge(too_large.format(limit, "more than that"))
        more = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


@contextmanager
def _given_up_if_gone(receive: Receive) -> Iterator[None]:
    """Cancel what is awaited inside when the client hangs up. Raises: ClientDisconnect in its place.

    Watching costs a task: only requests that wait have one.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    watcher: asyncio.Task[None] | None = None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    def start() -> None:
        nonlocal watcher
        watcher = loop.create_task(watch())

    timer = loop.call_later(WATCH_AFTER_S, start)
    try:
        yield
    except asyncio.CancelledError:
        if not gone or task.uncancel():  # somebody else, the deadline for one, cancelled as well
            raise
        raise ClientDisconnect from None
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()
