"""The images' bytes in a request body: raw, the files of a form, or base64 in JSON.

What a body is follows from its first bytes where these leave no doubt: no allowed image begins as a form or as JSON
does. Else its Content-Type tells, which may be missing or wrong, as curl's defaults are.
"""

import base64
import binascii
import codecs
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from service.errors import MalformedRequest, UnsupportedMediaType
from service.media import JSON, media_type_of
from service.model.errors import UnreadableImage
from service.model.images import allowed_formats
from service.multipart import boundary_of, files_of

T = TypeVar("T")

FORM = "multipart/form-data"

URL_ENCODED = "application/x-www-form-urlencoded"
"""What curl says with --data-binary, which sends a file as it is, and with -d, which does not."""

LOST_BY_CURL_D = (b"\0", b"\n", b"\r")
"""`curl -d @FILE` leaves these bytes out (its manual); no image does without a zero byte in its header."""

RAW_MEDIA_TYPES = ("application/octet-stream", "application/x-image", URL_ENCODED, "")
"""Types under which raw image bytes come besides image/*: unnamed, SageMaker's own, curl's `--data-binary` default."""

MAX_IMAGES = 100
"""In one request; a body of 25 MB could otherwise hold a hundred thousand."""


@dataclass(frozen=True)
class Payloads:
    """The images of one request: one at least, `images` and `unreadable` together."""

    images: tuple[bytes, ...]
    """In order."""
    several: bool
    """Whether the answer is a list of results, in which a bad image is marked; else it is an error."""
    unreadable: Mapping[int, UnreadableImage] = field(default_factory=dict)
    """Of several: index in the request -> why there are no bytes."""

    def in_order(self, outcomes: Iterable[T]) -> list[T | UnreadableImage]:
        """What became of `images`, in order, with the errors of the others in their places."""
        rest = iter(outcomes)
        count = len(self.images) + len(self.unreadable)
        return [self.unreadable[index] if index in self.unreadable else next(rest) for index in range(count)]


def payloads_of(body: bytes, content_type: str | None) -> Payloads:
    """Take the images out of a body. Raises: UnsupportedMediaType, MalformedRequest, UnreadableImage."""
    media_type = media_type_of(content_type or "")
    looks_like_json = body[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{"
    if body and media_type == URL_ENCODED and not looks_like_json and not any(byte in body for byte in LOST_BY_CURL_D):
        raise MalformedRequest(
            "The body has no zero byte and no line break, which curl -d leaves out: it damages images; send the file "
            "as it is, with curl --data-binary @photo.jpg."
        )
    if is_image(body):
        return Payloads((body,), several=False)
    if media_type == FORM or boundary_of(body) is not None:
        files = files_of(body, (content_type or "") if media_type == FORM else "")
        if not files:
            raise MalformedRequest('The form must hold a file, given: 0; send it as curl -F "file=@photo.jpg" does.')
        return Payloads(tuple(files), several=len(files) > 1)
    if media_type == JSON or looks_like_json:
        return _from_json(body)
    if media_type.startswith("image/") or media_type in RAW_MEDIA_TYPES:
        if not body:
            raise UnreadableImage(
                f"The body is empty (0 bytes); send the bytes of a {allowed_formats()} file. Does the file exist? "
                "Where it does not, curl sends nothing."
            )
        return Payloads((body,), several=False)  # the decoder tells what it is not
    raise UnsupportedMediaType(
        f"The content type must be image/*, application/octet-stream, {FORM} or {JSON}, given: {content_type}."
    )


def is_image(body: bytes) -> bool:
    """Whether the bytes begin as a file of one of the allowed formats does, without a doubt."""
    return (
        body.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"))
        or (body[:4] == b"RIFF" and body[8:12] == b"WEBP")
        or (body[:2] == b"BM" and body[6:10] == b"\0\0\0\0")  # reserved fields of a bitmap's header
    )


MAX_COMMAS, MAX_BRACKETS = 4 * MAX_IMAGES, 16
"""In JSON: between images one, in a data URL one, no more brackets than the object and its list have; and some room."""

_FORMS = 'send {"image": "<base64>"} or {"images": ["<base64>", ...]}'


def _from_json(body: bytes) -> Payloads:
    if body.count(b",") > MAX_COMMAS or body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        # Parsing that would hold up every other request for seconds, and take forty times its size in memory.
        raise MalformedRequest(f"The JSON has more parts than {MAX_IMAGES} images can need; {_FORMS}.")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise MalformedRequest(f"The body is not valid JSON ({_reason(exc)}); {_FORMS}.") from exc
    if not isinstance(document, dict) or len(document) != 1 or not {"image", "images"} >= set(document):
        given = f"an object with {_names(document)}" if isinstance(document, dict) else _kind(document)
        raise MalformedRequest(f"The JSON must be an object with image or images alone, given: {given}; {_FORMS}.")
    ((name, value),) = document.items()
    if name == "image":
        try:
            return Payloads((_decoded(value, "image"),), several=False)
        except UnreadableImage as exc:
            raise MalformedRequest(str(exc)) from exc
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_IMAGES:
        given = f"{len(value):,}" if isinstance(value, list) else _kind(value)
        raise MalformedRequest(f"images must be a list of 1 to {MAX_IMAGES} images, given: {given}; {_FORMS}.")
    images: list[bytes] = []
    unreadable: dict[int, UnreadableImage] = {}
    for index, item in enumerate(value):
        try:
            images.append(_decoded(item, f"images[{index}]"))
        except UnreadableImage as exc:
            unreadable[index] = exc
    return Payloads(tuple(images), True, unreadable)


def _decoded(value: object, name: str) -> bytes:
    """Base64 (RFC 4648, 4), also with line breaks or as a data URL (RFC 2397).

    Raises: UnreadableImage, and MalformedRequest of what is no text.
    """
    if not isinstance(value, str):
        raise MalformedRequest(f"{name} must be a string with an image in base64, given: {_kind(value)}.")
    if "://" in value[:12]:  # no base64 has a colon
        raise UnreadableImage(f"{name} is a URL, which is not fetched; send the image's bytes in base64.")
    text = value.partition(",")[2] if value[:5].lower() == "data:" else value
    try:
        return base64.b64decode(text.encode("ascii").translate(None, b" \t\r\n"), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise UnreadableImage(f"{name} is not valid base64 ({_reason(exc)}); encode the file's bytes.") from exc


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )


def _names(document: dict[str, object]) -> str:
    names = [ascii(name[:20]) for name in list(document)[:3]]
    return f"{', '.join(names)} and {len(document) - 3} more" if len(document) > 3 else ", ".join(names) or "no members"


def _reason(exc: Exception) -> str:
    reason = "nested too deeply" if isinstance(exc, RecursionError) else str(exc)
    return ascii(reason[:120])[1:-1].rstrip(".")
