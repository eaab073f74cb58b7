"""Puts the service together: settings and runtime in, an ASGI app out. Importing this starts nothing.

FastAPI routes and answers everything but POST /invocations, which goes straight to `service.invocations`:
FastAPI's way to a route costs more processor time than a small picture's decoding.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from service import exposition, openapi, page, reference, telemetry
from service.classifier import Classifier
from service.errors import error_body
from service.invocations import Invocations
from service.metrics import INVOCATIONS, Metrics
from service.routes import router
from service.runtime import Runtime
from service.settings import Settings
from service.tracing import Tracing
from service.workers import Worker


def create_app(
    settings: Settings,
    classifier: Classifier | None = None,
    on_failure: Callable[[], None] | None = None,
    worker: Worker | None = None,
) -> FastAPI:
    """The app; its lifespan loads `settings.model`, or uses `classifier` if one is given.

    `on_failure` is called once when the model cannot be served. `worker`: which of several this process is.
    """

    metrics = Metrics(worker.page(), worker.index) if worker else Metrics()
    tracing = Tracing()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runtime = Runtime(settings, classifier, on_failure, worker)
        app.state.runtime = runtime
        with metrics.watching(runtime.gauges), tracing.running():
            await runtime.open()
            try:
                yield
            finally:
                await runtime.close()

    app = App(
        lifespan=lifespan,
        docs_url=None,  # FastAPI's would be loaded from another host
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be built from the client's own Host header
    )
    app.state.metrics = metrics
    app.state.settings = settings
    app.direct = telemetry.Telemetry(Invocations(lambda: app.state.runtime), metrics, tracing)
    app.include_router(router)
    app.include_router(exposition.router)
    app.include_router(reference.router)
    app.openapi = lambda: openapi.document(settings)  # type: ignore[method-assign]  # FastAPI's way to one's own
    if settings.page:
        app.include_router(page.router)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_middleware(telemetry.Telemetry, metrics=metrics, tracing=tracing)
    return app


class App(FastAPI):
    """FastAPI with a straight way to the one route that is called all the time."""

    direct: telemetry.Telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, or the lifespan."""
        if scope["type"] == "http" and scope["path"] == INVOCATIONS and scope["method"] == "POST":
            await self.direct(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


async def _answer_http_error(request: Request, exc: Exception) -> Response:
    """The framework's own refusals (no such path, method not allowed) in our shape."""
    if not isinstance(exc, HTTPException):
        raise exc
    record = telemetry.current()
    record.code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "http_error")
    path = ascii(request.url.path[:100])[1:-1]
    others = f"there are GET /ping and POST {INVOCATIONS}, and GET /docs tells the rest."
    sentence = f"{request.method} {path}: {exc.detail}; {others}"
    body = error_body(exc.status_code, record.code, sentence, record.request_id)
    return Response(body, exc.status_code, dict(exc.headers or {}), media_type="application/json")
