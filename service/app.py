"""Puts the service together: settings and runtime in, an ASGI app out. Importing this starts nothing."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service import telemetry
from service.classifier import Classifier
from service.errors import HTTP_ERRORS, RETRY_AFTER_S
from service.routes import router
from service.runtime import Runtime
from service.settings import Settings


def create_app(
    settings: Settings, classifier: Classifier | None = None, on_failure: Callable[[], None] | None = None
) -> FastAPI:
    """The app; its lifespan loads `settings.model`, or uses `classifier` if one is given.

    `on_failure` is called once when the model cannot be served.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runtime = Runtime(settings, classifier, on_failure)
        app.state.runtime = runtime
        runtime.open()
        try:
            yield
        finally:
            await runtime.close()

    app = FastAPI(
        title="ResNet-34 image classifier",
        description="GET /ping tells whether it is ready; POST /invocations classifies an image.",
        version="1",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would be built from the client's own Host header
    )
    app.include_router(router)
    for exception in HTTP_ERRORS:
        app.add_exception_handler(exception, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnect, _note_client_gone)
    app.add_middleware(telemetry.Telemetry)
    return app


async def _answer_error(request: Request, exc: Exception) -> Response:
    status, code = HTTP_ERRORS[type(exc)]
    return _error(status, code, str(exc), {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {})


async def _answer_http_error(request: Request, exc: Exception) -> Response:
    """The framework's own refusals (no such path, method not allowed, client gone) in our shape."""
    if not isinstance(exc, HTTPException):
        raise exc
    code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "http_error")
    sentence = f"{request.method} {request.url.path}: {exc.detail}; there are GET /ping and POST /invocations."
    return _error(exc.status_code, code, sentence, dict(exc.headers or {}))


async def _note_client_gone(request: Request, exc: Exception) -> Response:
    """The client hung up before it was answered: nobody reads this answer, the log line tells of it."""
    telemetry.current().code = "client_gone"
    return Response(status_code=400)


def _error(status: int, code: str, message: str, headers: dict[str, str]) -> Response:
    record = telemetry.current()
    record.code = code
    body = telemetry.error_body(code, message, record.request_id)
    return Response(body, status, headers, media_type="application/json")
