"""/ping and /execution-parameters. (`service.invocations` answers /invocations, `service.openapi` documents all.)

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-batch-code.html
"""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service import telemetry
from service.runtime import MEANING, Runtime
from service.schemas import ExecutionParameters

router = APIRouter()

BATCH_BYTES = 100 * 2**20
"""Concurrent requests times their size that a batch transform allows (CreateTransformJob, MaxPayloadInMB)."""


@router.api_route("/ping", methods=["GET", "POST", "HEAD"])
async def ping(request: Request) -> JSONResponse:
    """200 when predictions are answered, else 503; the body tells the state either way, and what it means."""
    runtime: Runtime = request.app.state.runtime
    state = runtime.state
    telemetry.current().code = state
    headers = {"Connection": "close"} if runtime.stopping else None  # the next one is to go to another instance
    if state == "ready":
        return JSONResponse({"status": state}, headers=headers)
    return JSONResponse({"status": state, "message": MEANING[state]}, 503, headers)


@router.get("/execution-parameters")
async def execution_parameters(request: Request) -> ExecutionParameters:
    """What a batch transform job uses where its own settings do not say: one image a request, as large as allowed."""
    settings = request.app.state.runtime.settings
    payload_bytes = min(settings.max_payload_bytes, BATCH_BYTES)
    return ExecutionParameters(
        MaxConcurrentTransforms=max(1, min(settings.max_images, BATCH_BYTES // payload_bytes)),
        MaxPayloadInMB=max(1, payload_bytes // 2**20),
    )


@router.post("/invocations")
async def invocations() -> None:
    """Here for the sake of other methods, which get 405."""
    raise AssertionError("service.app leads these requests to service.invocations")
