"""What Content-Type and Accept headers mean (RFC 9110, 8.3 and 12.5.1)."""

from email.message import Message
from functools import lru_cache

from service.errors import NotAcceptable

JSON, JSON_LINES, CSV = "application/json", "application/jsonlines", "text/csv"

ANSWERS = (JSON, JSON_LINES, CSV)
"""The types that answers can have; the first of those that a client likes equally is given."""


@lru_cache(maxsize=256)
def media_type_of(content_type: str) -> str:
    """The media type of a Content-Type header in lower case, without its parameters; "" for none."""
    header = Message()
    header["Content-Type"] = content_type
    return header.get_content_type() if content_type else ""


@lru_cache(maxsize=256)
def negotiate(accept: str | None) -> str:
    """The one of `ANSWERS` that an Accept header prefers. Raises: NotAcceptable."""
    ranges = [_media_range(part) for part in (accept or "*/*").split(",") if part.strip()]
    best = max(ANSWERS, key=lambda offer: _quality(offer, ranges))
    if ranges and _quality(best, ranges) == 0:
        raise NotAcceptable(
            f"Answers are {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}, which the Accept header excludes, given: "
            f"{(accept or '')[:200]}; send one of them, or no Accept header."
        )
    return best


def _media_range(text: str) -> tuple[str, float]:
    """A part of an Accept header -> media range and quality; one that cannot be read counts as not said."""
    media_range, *parameters = [piece.strip().lower() for piece in text.split(";")]
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = float(value)
            except ValueError:
                return media_range, 1.0
            return media_range, min(max(quality, 0.0), 1.0) if quality == quality else 1.0  # NaN is not itself
    return media_range, 1.0


def _quality(offer: str, ranges: list[tuple[str, float]]) -> float:
    """What the most specific range that covers `offer` says of it; 1 where there are no ranges."""
    for covering in (offer, f"{offer.split('/')[0]}/*", "*/*"):
        said = [quality for media_range, quality in ranges if media_range == covering]
        if said:
            return max(said)
    return 0.0 if ranges else 1.0
