"""/ping, and what the OpenAPI document says of /invocations (`service.invocations` answers it).

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service import telemetry
from service.runtime import Runtime
from service.schemas import ErrorResponse, PingResponse, PredictionResponse

router = APIRouter()

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
async def invocations() -> PredictionResponse:
    """Classify one JPEG, PNG, WebP, BMP or GIF image, sent raw or as the one file of a form."""
    raise AssertionError("service.app leads these requests to service.invocations")
