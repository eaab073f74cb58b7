"""The OpenAPI document: what the service takes and answers, as data. GET /openapi.json is this, /docs is made of it.

Written out and not derived from routes: POST /invocations is no FastAPI route, and what matters of it (content types,
several images, errors) is nothing that a signature tells. tests/service/test_openapi.py posts every example and runs
every command against a real service, tests/service/test_schemathesis.py sends it what follows from the schemas.
"""

from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import schemas
from service.errors import HTTP_ERRORS
from service.settings import Settings

Json = dict[str, Any]

PICTURE = "R0lGODdhCAAIAIEAAPDIPLQ8PAAAAAAAACwAAAAACAAIAAAIGAADCBxIsOBAAAgBEEyo8GDChQ8NSiQYEAA7"
"""A GIF of 8 x 8 pixels in base64: an example that is short enough to be read past."""

NO_PICTURE = "bm8gcGljdHVyZQ=="
"""Base64 of something that is no image."""

IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/gif")
RAW_TYPES = ("application/x-image", "application/octet-stream")

DESCRIPTION = """\
Image in, likeliest classes out. The same interface runs on a laptop, in a container and behind an Amazon SageMaker \
endpoint, which calls `/ping` and `/invocations`.

Every answer has `X-Request-Id`: the client's own where it sent one of 1 to 64 letters, digits and `._:-`, else a \
new one; the service's log has it too. Every error has one shape, `{"error": {"code", "message", "request_id"}}`."""

ERRORS: dict[int, str] = {
    400: "The body is not what its content type says, an image in it cannot be read, or an option is not allowed.",
    405: "POST is the method.",
    406: "The Accept header names none of the types that answers have.",
    413: "More bytes, or more pixels, than the service takes.",
    415: "The content type is none of those listed, and the body does not show by itself to be an image.",
    429: "As many requests are under way as are allowed; try again after `Retry-After` seconds.",
    500: "The service failed on this request; its log says why, under the request id.",
    503: "Not ready, or as many requests are under way as are allowed; try again after `Retry-After` seconds.",
    504: "The answer would have come too late; try again, or send less.",
}
"""Status -> when it happens. Which codes come with it is in `service.errors.HTTP_ERRORS`."""

_HEADERS: Json = {
    "X-Request-Id": {"description": "The request's id in the log.", "schema": {"type": "string"}},
    "Server-Timing": {
        "description": "Milliseconds of the stages: `decode;dur=1.2, queue;dur=0.3, infer;dur=5.1, total;dur=7.0`.",
        "schema": {"type": "string"},
    },
    "Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer", "minimum": 0}},
}


def document(settings: Settings) -> Json:
    """The document of a service with these settings."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "ResNet-34 image classifier", "version": "1", "description": DESCRIPTION},
        "paths": {
            "/invocations": {"post": _invocations(settings)},
            "/ping": {"get": _ping("ping"), "post": _ping("ping_post")},
            "/execution-parameters": {"get": _execution_parameters()},
            "/metrics": {"get": _metrics()},
        },
        "components": {"schemas": _schemas(), "headers": _HEADERS},
    }


def _invocations(settings: Settings) -> Json:
    return {
        "operationId": "invocations",
        "summary": "Classify one image or several",
        "description": (
            "One image is the body itself, the one file of a form, or base64 in JSON; several are the files of a form, "
            "or a list in JSON, and are answered in order: one that cannot be read is marked in its place, the others "
            "are answered all the same. Formats: JPEG, PNG, WebP, BMP and GIF, whatever the content type says. "
            "Animated images are judged by their first frame, and of every image by its centre square."
        ),
        "parameters": [
            {
                "name": "top_k", "in": "query", "required": False, "example": 3,
                "description": "How many classes to rank, likeliest first; fewer if the model has fewer.",
                "schema": {"type": "integer", "minimum": 1, "default": 5},
            },
        ],
        "requestBody": {"required": True, "content": _bodies(settings)},
        "responses": {
            "200": {
                "description": "The likeliest classes, of one image or of each.",
                "headers": _references("X-Request-Id", "Server-Timing"),
                "content": _answers(),
            },
            **{str(status): _error(status, text) for status, text in ERRORS.items()},
        },
        "x-codeSamples": [{"lang": "Shell", **sample} for sample in _commands(settings)],
    }  # fmt: skip


def _bodies(settings: Settings) -> Json:
    # The example is the model's own; without the page, nothing serves it.
    example = {"examples": {"the model's example": {"externalValue": "example"}}} if settings.page else {}
    files = {"type": "object", "properties": {"file": {"description": "One image, or several under this name."}}}
    image = {"type": "string", "contentEncoding": "base64", "description": "A file's bytes."}
    return {
        **{media_type: {"schema": {"type": "string", "format": "binary"}, **example} for media_type in IMAGE_TYPES},
        **{media_type: {"schema": {"type": "string", "format": "binary"}, **example} for media_type in RAW_TYPES},
        "multipart/form-data": {"schema": files},
        "application/json": {
            "schema": {
                "oneOf": [
                    {"type": "object", "properties": {"image": image}, "required": ["image"]},
                    {
                        "type": "object",
                        "properties": {"images": {"type": "array", "items": image, "minItems": 1}},
                        "required": ["images"],
                    },
                ]
            },
            "examples": {
                "one image": {"value": {"image": PICTURE}},
                "several images": {"value": {"images": [PICTURE, PICTURE]}},
                "several images, one is none": {"value": {"images": [PICTURE, NO_PICTURE]}},
            },
        },
    }


_ONE: Json = {
    "model": {"name": "resnet34", "version": "3f2a9c41d7e0"},
    "predictions": [
        {"label": "apple", "index": 0, "probability": 0.987654},
        {"label": "pear", "index": 57, "probability": 0.010203},
    ],
}
_SEVERAL: Json = {
    "model": _ONE["model"],
    "results": [
        {"predictions": _ONE["predictions"]},
        {"error": {"code": "unreadable_image", "message": "The image is empty (0 bytes); send the bytes of a file."}},
    ],
}


def _answers() -> Json:
    return {
        "application/json": {
            "schema": {"oneOf": [_reference("PredictionResponse"), _reference("ResultsResponse")]},
            "examples": {"one image": {"value": _ONE}, "several images": {"value": _SEVERAL}},
        },
        "application/jsonlines": {"schema": {"type": "string"}},
        "text/csv": {"schema": {"type": "string"}},
    }


def _error(status: int, text: str) -> Json:
    codes = [code for given, code in HTTP_ERRORS.values() if given == status]
    detail = {"message": "What was given, what is allowed, what to do.", "request_id": "0b5c…"}
    headers = ("X-Request-Id", "Retry-After") if status in (429, 503) else ("X-Request-Id",)
    return {
        "description": text,
        "headers": _references(*headers),
        "content": {
            "application/json": {
                "schema": _reference("ErrorResponse"),
                "examples": {code: {"value": {"error": {"code": code, **detail}}} for code in codes},
            }
        },
    }


def _ping(operation: str) -> Json:
    content = {"application/json": {"schema": _reference("PingResponse")}}
    return {
        "operationId": operation,
        "summary": "Is it ready?",
        "description": "The probe of load balancers and of SageMaker.",
        "responses": {
            "200": {
                "description": "Requests are answered.",
                "headers": _references("X-Request-Id"),
                "content": content,
            },
            "503": {
                "description": "Loading, warming up, stopping or failed; the body says which.",
                "headers": _references("X-Request-Id"),
                "content": content,
            },
        },
    }


def _execution_parameters() -> Json:
    return {
        "operationId": "execution_parameters",
        "summary": "What SageMaker Batch Transform may send",
        "description": "Read once before a transform job whose own settings leave these open.",
        "responses": {
            "200": {
                "description": "Requests at once, records per request, and megabytes per request.",
                "headers": _references("X-Request-Id"),
                "content": {"application/json": {"schema": _reference("ExecutionParameters")}},
            }
        },
    }


def _metrics() -> Json:
    return {
        "operationId": "metrics",
        "summary": "Figures for Prometheus",
        "description": "Requests, stage times, queue, batches, engine and model, in Prometheus' text format.",
        "responses": {
            "200": {
                "description": "The figures.",
                "headers": _references("X-Request-Id"),
                "content": {"text/plain": {"schema": {"type": "string"}}},
            }
        },
    }


def _commands(settings: Settings) -> list[Json]:
    """Commands that run as they are in a POSIX shell on the machine of the service."""
    base = f"http://127.0.0.1:{settings.port}"
    json = f"""curl -H 'Content-Type: application/json' -d '{{"images": ["{PICTURE}"]}}' {base}/invocations"""
    if not settings.page:  # nothing serves an example image then
        return [{"label": "base64 in JSON", "source": json}]
    fetch = f"curl -s -o example.img {base}/example"
    return [
        {"label": "one image", "source": f"{fetch}\ncurl --data-binary @example.img '{base}/invocations?top_k=3'"},
        {
            "label": "several images",
            "source": f"{fetch}\ncurl -F file=@example.img -F file=@example.img {base}/invocations",
        },
        {"label": "base64 in JSON", "source": json},
        {
            "label": "as CSV",
            "source": f"{fetch}\ncurl -H 'Accept: text/csv' --data-binary @example.img {base}/invocations",
        },
    ]


def _schemas() -> Json:
    models: list[type[BaseModel]] = [
        schemas.PredictionResponse,
        schemas.ErrorResponse,
        schemas.PingResponse,
    ]
    wanted: list[tuple[type[BaseModel], Literal["serialization"]]] = [(model, "serialization") for model in models]
    _, definitions = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
    found: Json = definitions["$defs"]
    found["ResultsResponse"] = {"type": "object"}  # INTERIM
    found["ExecutionParameters"] = {"type": "object"}  # INTERIM
    return found


def _reference(schema: str) -> Json:
    return {"$ref": f"#/components/schemas/{schema}"}


def _references(*headers: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in headers}
