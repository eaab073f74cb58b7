"""HTTP in, HTTP out: /ping and /invocations, as SageMaker calls them.

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from service import telemetry
from service.errors import DeadlineExceeded, PayloadTooLarge
from service.inference import output_fn, require_json
from service.runtime import Runtime
from service.schemas import ErrorResponse, PingResponse, PredictionResponse

router = APIRouter()

T = TypeVar("T")

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
            },
        },
    }
}


@router.api_route("/ping", methods=["GET"], response_model=PingResponse, responses={503: {"model": PingResponse}})
@router.api_route("/ping", methods=["POST", "HEAD"], include_in_schema=False)
async def ping(request: Request) -> JSONResponse:
    """200 when predictions are answered, else 503; the body tells the state either way."""
    runtime: Runtime = request.app.state.runtime
    telemetry.current().code = runtime.state
    return JSONResponse({"status": runtime.state}, 200 if runtime.state == "ready" else 503)


@router.post(
    "/invocations",
    response_model=PredictionResponse,
    openapi_extra=_BODY,
    responses={code: {"model": ErrorResponse} for code in (400, 406, 413, 415, 500, 503, 504)},
)
async def invocations(request: Request) -> Response:
    """Classify one JPEG, PNG, WebP, BMP or GIF image, sent raw or as the one file of a form."""
    runtime: Runtime = request.app.state.runtime
    record = telemetry.current()
    accept = request.headers.get("accept")
    require_json(accept)
    with runtime.admitted():
        try:
            async with asyncio.timeout(runtime.settings.deadline_s):
                payload = await _read_body(request, runtime.settings.max_payload_bytes)
                record.bytes_in = len(payload)
                work = runtime.predict(payload, request.headers.get("content-type"))
                result, record.decode_ms = await _unless_gone(request, work)
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"The request was not answered within {runtime.settings.deadline_s:g} s; try again, or send less."
            ) from exc
    record.queue_ms, record.infer_ms, record.batch_size = result.queue_ms, result.infer_ms, result.batch_size
    body, media_type = output_fn([result.value], accept)
    return Response(body, media_type=media_type)


async def _read_body(request: Request, limit: int) -> bytes:
    too_large = f"The body may have at most {limit:,} bytes, given: {{}}; send a smaller image."
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise PayloadTooLarge(too_large.format(f"{int(declared):,}"))
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise PayloadTooLarge(too_large.format("more than that"))
    return bytes(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up: nobody would read it.

    Raises: ClientDisconnect, and whatever `work` raises.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
