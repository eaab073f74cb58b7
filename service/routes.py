"""/ping, /execution-parameters, and what the OpenAPI document says of /invocations (`service.invocations` answers it).

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-batch-code.html
"""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service import telemetry
from service.runtime import Runtime
from service.schemas import (
    ErrorResponse,
    ExecutionParameters,
    PingResponse,
    PredictionResponse,
    SeveralPredictionsResponse,
)

router = APIRouter()

BATCH_BYTES = 100 * 2**20
"""Concurrent requests times their size that a batch transform allows (CreateTransformJob, MaxPayloadInMB)."""

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
    state = runtime.state
    telemetry.current().code = state
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/execution-parameters")
async def execution_parameters(request: Request) -> ExecutionParameters:
    """What a batch transform job uses where its own settings do not say: one image a request, as large as allowed."""
    settings = request.app.state.runtime.settings
    payload_bytes = min(settings.max_payload_bytes, BATCH_BYTES)
    return ExecutionParameters(
        MaxConcurrentTransforms=max(1, min(settings.max_requests, BATCH_BYTES // payload_bytes)),
        MaxPayloadInMB=max(1, payload_bytes // 2**20),
    )


@router.post(
    "/invocations",
    response_model=PredictionResponse | SeveralPredictionsResponse,
    openapi_extra=_BODY,
    responses={code: {"model": ErrorResponse} for code in (400, 406, 408, 413, 415, 429, 500, 503, 504)},
)
async def invocations() -> PredictionResponse:
    """Classify JPEG, PNG, WebP, BMP or GIF images, sent raw, as the files of a form, or in base64 in JSON."""
    raise AssertionError("service.app leads these requests to service.invocations")
