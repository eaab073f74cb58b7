"""The OpenAPI document: what the service takes and answers, as data. GET /openapi.json is this, /docs is made of it.

Written out and not derived from routes: POST /invocations is no FastAPI route, and what matters of it (content types,
several images, errors) is nothing that a signature tells. The JSON shapes are those of `service.schemas`.
tests/service/test_openapi.py posts every example and runs every command against a real service,
tests/service/test_schemathesis.py sends it what follows from the schemas.
"""

from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import schemas
from service.answers import COLUMNS, MAX_TOP_K, TOP_K
from service.errors import CONNECTION_ERRORS, HTTP_ERRORS, RETRY_AFTER_S
from service.media import CSV, JSON, JSON_LINES
from service.payloads import FORM, MAX_IMAGES
from service.runtime import MEANING
from service.settings import Settings

Json = dict[str, Any]

PICTURE = "R0lGODdhCAAIAIEAAPDIPLQ8PAAAAAAAACwAAAAACAAIAAAIGAADCBxIsOBAAAgBEEyo8GDChQ8NSiQYEAA7"
"""A GIF of 8 x 8 pixels in base64: an example that is short enough to be read past."""

NO_PICTURE = "bm8gcGljdHVyZQ=="
"""Base64 of something that is no image."""

RAW_TYPES = (
    "image/jpeg", "image/png", "image/webp", "image/bmp", "image/gif",
    "application/x-image", "application/octet-stream",
)  # fmt: skip
"""Types to send an image's bytes as they are. (Others that begin with image/ will do as well.)"""

DESCRIPTION = """\
Image in, likeliest classes out. The same interface runs on a laptop, in a container and behind an Amazon SageMaker \
endpoint, which calls `/ping` and `/invocations`.

Every answer has `X-Request-Id`: the client's own where it sent one of 1 to 64 letters, digits and `._:-`, else a \
new one; the service's log has it too. Every error has one shape, `{"error": {"code", "message", "request_id"}}`."""

INVOCATIONS = f"""\
One image is the body itself, the one file of a form, or base64 in JSON. Several, at most {MAX_IMAGES}, are the files \
of a form or a list in JSON; they are answered in order, and one that cannot be read is marked in its place while the \
others are answered all the same.

Formats are JPEG, PNG, WebP, BMP and GIF. A missing or wrong content type does no harm where the first bytes show what \
the body is: an image, a form or JSON. Animated images are judged by their first frame, every image by its centre \
square. Of the types of answers, the `Accept` header chooses."""

ERRORS: dict[int, str] = {
    400: "The body is not what its content type says, an image in it cannot be read, an option is not allowed, or what "
    "came is not HTTP.",
    405: "The method is not POST.",
    406: "The Accept header excludes every type that answers have.",
    408: "The headers or the body came too slowly.",
    413: "More bytes, more pixels or a costlier image than the service takes.",
    415: "The content type is none of those above, and the first bytes do not show an image, a form or JSON.",
    429: "As 503 overloaded, if the service is set to say so: try again after `Retry-After` seconds.",
    431: "The request line and headers are too long.",
    500: "The service failed on this request; its log says why, under the request id.",
    503: "Not ready, or as much is under way as is allowed, or the process that had the request died: try again after "
    "`Retry-After` seconds.",
    504: "The answer would have come too late; try again, or send less.",
}
"""Status of POST /invocations -> when it comes."""

MESSAGES = {
    "malformed_request": "top_k must be one whole number from 1 to 1000, given: 'all'.",
    "unreadable_image": "The image is damaged or incomplete (image file is truncated); send the whole file "
    "(200,000 bytes arrived).",
    "method_not_allowed": "GET /invocations: Method Not Allowed; there are GET /ping and POST /invocations, and GET "
    "/docs tells the rest.",
    "not_acceptable": "Answers are application/json, application/jsonlines or text/csv, which the Accept header "
    "excludes, given: image/png; send one of them, or no Accept header.",
    "body_timeout": "Of the body, 65,536 bytes arrived within 30 s, and its end did not; send it faster, or a smaller "
    "image.",
    "payload_too_large": "The body may have at most 26,214,400 bytes, given: 31,457,280; send a smaller image, or "
    "fewer.",
    "image_too_large": "The image may have at most 89,478,485 pixels, given: 10000 x 10000 = 100,000,000 pixels; send "
    "a smaller one.",
    "image_too_costly": "The image takes more than 5 s to decode; save it anew, smaller or as a baseline JPEG.",
    "unsupported_media_type": "The content type must be image/*, application/octet-stream, multipart/form-data or "
    "application/json, given: text/plain.",
    "overloaded": "256 images are under way, as many as allowed; try again in a moment.",
    "malformed_http": "This is not an HTTP/1.1 request; send one, without TLS.",
    "head_timeout": "The request's head did not arrive within 10 s; send it faster.",
    "headers_too_large": "A request's head may have at most 65,536 bytes and 200 headers; send fewer.",
    "worker_died": "The process that had this request died before it could answer; send the request again.",
    "engine_failure": "The model failed on this request; the cause is in the service's log.",
    "internal_error": "The service failed on this request; the cause is in its log under the request id.",
    "not_ready": "The service is not ready (state: warming_up); GET /ping tells when it is.",
    "deadline_exceeded": "The request was not answered within 55 s; try again, or send less.",
}
"""Code -> a sentence that comes with it."""

REQUEST_ID = "9f1c0a7be2d94c1f8f0e5d6b7a8c9d0e"
ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"

HEADERS: Json = {
    "X-Request-Id": {"description": "The request's id in the log.", "schema": {"type": "string"}},
    "Server-Timing": {
        "description": "Milliseconds of the stages: `decode;dur=1.2, queue;dur=0.3, infer;dur=5.1, total;dur=7.0`.",
        "schema": {"type": "string"},
    },
    "Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer", "minimum": 0}},
    ATTRIBUTES: {"description": "The request's own, unchanged, where it had them.", "schema": {"type": "string"}},
}

ONE: Json = {
    "model": {"name": "resnet34", "version": "3f2a9c41d7e0"},
    "predictions": [
        {"label": "apple", "index": 0, "probability": 0.987654},
        {"label": "pear", "index": 57, "probability": 0.010203},
    ],
}
NOT_READ: Json = {"error": {"code": "unreadable_image", "message": MESSAGES["unreadable_image"]}}
SEVERAL: Json = {"model": ONE["model"], "results": [{"predictions": ONE["predictions"]}, NOT_READ]}
LINES = (
    '{"model": {"name": "resnet34", "version": "3f2a9c41d7e0"}, "predictions": [{"label": "apple", "index": 0, '
    '"probability": 0.987654}]}\n{"error": {"code": "unreadable_image", "message": "The image is empty (0 bytes)."}}\n'
)
TABLE = ",".join(COLUMNS) + "\r\n0,1,apple,0,0.987654,,\r\n0,2,pear,57,0.010203,,\r\n"


def document(settings: Settings) -> Json:
    """The document of a service with these settings."""
    text = {"schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ResNet-34 image classifier", "version": "1", "description": DESCRIPTION},
        "paths": {
            "/invocations": {"post": _invocations(settings)},
            "/ping": {"get": _ping("ping"), "post": _ping("ping_post")},
            "/execution-parameters": {
                "get": _read(
                    "execution_parameters", "What a batch transform may send",
                    "Asked by SageMaker before a batch transform whose own settings leave it open.",
                    {JSON: {"schema": _reference("ExecutionParameters")}},
                )
            },
            "/metrics": {
                "get": _read(
                    "metrics", "Figures for Prometheus",
                    "Requests, stage times, queue, batches, processes, engine, model. Text format 0.0.4, or "
                    "OpenMetrics where the `Accept` header prefers that.",
                    {"text/plain": text, "application/openmetrics-text": text},
                )
            },
        },
        "components": {"schemas": _schemas(), "headers": HEADERS},
    }  # fmt: skip


def _invocations(settings: Settings) -> Json:
    answers = {
        JSON: {
            "schema": {"oneOf": [_reference("PredictionResponse"), _reference("SeveralPredictionsResponse")]},
            "examples": {"one image": {"value": ONE}, "several images": {"value": SEVERAL}},
        },
        JSON_LINES: {"schema": {"type": "string"}, "examples": {"a line for each image": {"value": LINES}}},
        CSV: {"schema": {"type": "string"}, "examples": {"a line for each class": {"value": TABLE}}},
    }
    return {
        "operationId": "invocations",
        "summary": "Classify one image or several",
        "description": INVOCATIONS,
        "parameters": [
            {
                "name": "top_k", "in": "query", "example": 3,
                "description": "How many classes to rank, likeliest first; at most as many as the model has are given.",
                "schema": {"type": "integer", "minimum": 1, "maximum": MAX_TOP_K, "default": TOP_K},
            },
            {
                "name": ATTRIBUTES, "in": "header", "example": "top_k=3",
                "description": "Behind an endpoint, which passes no query on: `top_k=3`, among whatever else there is. "
                "It comes back with the answer.",
                "schema": {"type": "string"},
            },
            {
                "name": "X-Request-Id", "in": "header", "example": REQUEST_ID,
                "description": "An id of the client's own for the log.", "schema": {"type": "string"},
            },
        ],
        "requestBody": {"required": True, "content": _bodies(settings)},
        "responses": {
            "200": {
                "description": "The likeliest classes, of the one image or of each.",
                "headers": _references("X-Request-Id", "Server-Timing", ATTRIBUTES),
                "content": answers,
            },
            **{str(status): _error(status, text) for status, text in ERRORS.items()},
        },
        "x-codeSamples": [{"lang": "Shell", **sample} for sample in _commands(settings)],
    }  # fmt: skip


def _bodies(settings: Settings) -> Json:
    # The example is the model's own; without the page, nothing serves it.
    example = {"examples": {"the model's example": {"externalValue": "example"}}} if settings.page else {}
    raw = {"schema": {"type": "string", "format": "binary"}, **example}
    image = {"type": "string", "format": "byte", "description": "an image's bytes in base64, or a data URL of them"}
    files = {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "minItems": 1,
        "description": "an image's bytes; once more for each further image (the name of the field does not matter)",
    }
    images = {"type": "array", "items": image, "minItems": 1, "maxItems": MAX_IMAGES}
    return {
        **dict.fromkeys(RAW_TYPES, raw),
        FORM: {"schema": {"type": "object", "properties": {"file": files}, "required": ["file"]}},
        JSON: {
            "schema": {
                "oneOf": [
                    _object(image=image),
                    _object(images={**images, "description": f"a list of up to {MAX_IMAGES} of these"}),
                ]
            },
            "examples": {
                "one image": {"value": {"image": PICTURE}},
                "several images": {"value": {"images": [PICTURE, f"data:image/gif;base64,{PICTURE}"]}},
                "several images, of which one is none": {"value": {"images": [PICTURE, NO_PICTURE]}},
            },
        },
    }


def _error(status: int, text: str) -> Json:
    found = [code for given, code in HTTP_ERRORS.values() if given == status]
    found += [code for code, given in CONNECTION_ERRORS.items() if given == status]
    codes = {405: ["method_not_allowed"], 429: ["overloaded"], 500: [*found, "internal_error"]}.get(status, found)
    again = {"retry_after_s": RETRY_AFTER_S} if status in (429, 503) else {}
    bodies = {
        code: {"error": {"code": code, "message": MESSAGES[code], "request_id": REQUEST_ID, **again}} for code in codes
    }
    return {
        "description": text,
        "headers": _references("X-Request-Id", "Server-Timing", *(["Retry-After"] if again else [])),
        "content": {
            JSON: {
                "schema": _reference("ErrorResponse"),
                "examples": {code: {"value": body} for code, body in bodies.items()},
            }
        },
    }


def _ping(operation: str) -> Json:
    why = ", ".join(f"`{state}`" for state in MEANING)
    answers: dict[str, tuple[str, list[Json]]] = {
        "200": ("It answers.", [{"status": "ready"}]),
        "503": (f"It does not; the body says why: {why}.", [{"status": s, "message": m} for s, m in MEANING.items()]),
    }
    return {
        "operationId": operation,
        "summary": "Is it ready?",
        "description": "The probe of SageMaker, and of load balancers.",
        "responses": {
            status: {
                "description": text,
                "headers": _references("X-Request-Id"),
                "content": {
                    JSON: {
                        "schema": _reference("PingResponse"),
                        "examples": {body["status"]: {"value": body} for body in bodies},
                    }
                },
            }
            for status, (text, bodies) in answers.items()
        },
    }


def _read(operation: str, summary: str, description: str, content: Json) -> Json:
    answer = {"description": "At any time.", "headers": _references("X-Request-Id"), "content": content}
    return {"operationId": operation, "summary": summary, "description": description, "responses": {"200": answer}}


def _commands(settings: Settings) -> list[Json]:
    """Commands that run as they are in a POSIX shell on the machine of the service."""
    base = f"http://127.0.0.1:{settings.port}"
    fetch = f"curl -s -o example.img {base}/example\n"
    by_json = f"""curl -H 'Content-Type: {JSON}' -d '{{"images": ["{PICTURE}"]}}' {base}/invocations"""
    samples = {
        "one image": f"{fetch}curl --data-binary @example.img '{base}/invocations?top_k=3'",
        "several images": f"{fetch}curl -F file=@example.img -F file=@example.img {base}/invocations",
        "base64 in JSON": by_json,
        "a table": f"{fetch}curl -H 'Accept: {CSV}' --data-binary @example.img {base}/invocations",
    }
    return [{"label": k, "source": source} for k, source in samples.items() if settings.page or fetch not in source]


def _schemas() -> Json:
    models: list[type[BaseModel]] = [
        schemas.PredictionResponse, schemas.SeveralPredictionsResponse, schemas.ErrorResponse, schemas.PingResponse,
        schemas.ExecutionParameters,
    ]  # fmt: skip
    wanted: list[tuple[type[BaseModel], Literal["serialization"]]] = [(model, "serialization") for model in models]
    _, definitions = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
    found: Json = definitions["$defs"]
    return found


def _object(**properties: Json) -> Json:
    """An object with exactly these."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _reference(schema: str) -> Json:
    return {"$ref": f"#/components/schemas/{schema}"}


def _references(*headers: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in headers}
