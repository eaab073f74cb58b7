"""GET /, with /model and /example that it asks for: people try the model there; CLASSIFIER_PAGE switches all off.

The page is one response that loads nothing more: `static/` holds its parts, readable, and they are put together once. A
Content-Security-Policy with the hashes of its one style and its one script lets the browser run nothing else, whatever
a class may be called.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from service import telemetry
from service.errors import HTTP_ERRORS, RETRY_AFTER_S, NotReady, error_body
from service.model.images import MEDIA_TYPES
from service.runtime import Runtime

STATIC = Path(__file__).parent / "static"

router = APIRouter(include_in_schema=False)


class Page:
    """HTML that is whole in itself, and the headers that keep it so."""

    def __init__(self, template: str, style: str, script: str) -> None:
        """`template` has {{style}} and {{script}} where these belong."""
        self.html = template.replace("{{style}}", style).replace("{{script}}", script).encode()
        self.headers = {
            "Content-Security-Policy": "; ".join(
                (
                    "default-src 'none'",
                    f"style-src {_source(style)}",
                    f"script-src {_source(script)}",
                    "img-src blob: data:",
                    "connect-src 'self'",
                    "base-uri 'none'",
                    "form-action 'none'",
                    "frame-ancestors 'none'",
                )
            ),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",  # another version of the service may answer here next
        }

    def response(self) -> Response:
        """The page as the answer to a request."""
        return Response(self.html, headers=self.headers, media_type="text/html; charset=utf-8")


@router.api_route("/", methods=["GET", "HEAD"])
async def page() -> Response:
    """The page."""
    return _page().response()


@router.api_route("/model", methods=["GET", "HEAD"])
async def model(request: Request) -> Response:
    """What answers: name, version, number of classes, and a sentence of caution where one is due, else null."""
    runtime: Runtime = request.app.state.runtime
    try:
        card = runtime.require_ready().classifier.card
    except NotReady as exc:
        return _not_ready(exc)
    facts = {"name": card.name, "version": card.version, "classes": len(card.classes), "caution": card.caution}
    return JSONResponse(facts, headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"})


@router.api_route("/example", methods=["GET", "HEAD"])
def example(request: Request) -> Response:
    """The artifact's own image to try; X-Example-Label has its class, percent-encoded. In a thread: it reads a file."""
    runtime: Runtime = request.app.state.runtime
    try:
        given = runtime.example
    except NotReady as exc:
        return _not_ready(exc)
    if given is None:
        raise HTTPException(404, "The model came without an example image")
    try:
        content = given.path.read_bytes()
    except OSError as exc:  # a training has replaced the model on disk since it was loaded
        raise HTTPException(
            404, "The example image is gone from the model's folder, another model may be there"
        ) from exc
    # The type is the artifact's word: only an image's is passed on, or it could be a page that runs in our name.
    media_type = given.media_type if given.media_type in MEDIA_TYPES.values() else "application/octet-stream"
    headers = {
        "X-Example-Label": quote(given.label, safe=""),
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return Response(content, headers=headers, media_type=media_type)


def _not_ready(exc: NotReady) -> Response:
    record = telemetry.current()
    status, record.code = HTTP_ERRORS[NotReady]
    body = error_body(status, record.code, str(exc), record.request_id)
    return Response(body, status, {"Retry-After": str(RETRY_AFTER_S)}, media_type="application/json")


@cache
def _page() -> Page:
    return Page(static("index.html"), static("page.css"), static("shared.js", "card.js", "page.js"))


def static(*names: str) -> str:
    """Parts of the pages, one after the other."""
    return "".join((STATIC / name).read_text("utf-8") for name in names)


def _source(content: str) -> str:
    """The CSP source that allows an inline element of this content (CSP level 3, 6.7.3.3)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
