"""Write what was found out about the images of a request: one prediction, or a result for each.

application/json       {"model": ..., "predictions": [...]}, or {"model": ..., "results": [...]}
application/jsonlines  a line of JSON for each image, {"model": ..., "predictions": [...]} or {"error": ...}
text/csv               a header line, then a line for each class that is ranked, or for the error of an image
"""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from service.classifier import ModelCard, Prediction
from service.errors import HTTP_ERRORS
from service.media import CSV, JSON
from service.model.errors import ImageError

TOP_K = 5
"""How many classes an answer ranks unless the request says otherwise."""

MAX_TOP_K = 1000
"""As many as a request may ask for."""

COLUMNS = ("image", "rank", "label", "index", "probability", "error_code", "error_message")
"""Of the CSV; `image` counts from 0 in the order of the request, `rank` from 1."""

Outcome = Prediction | ImageError
"""Of one image: what it shows, or why it could not be read."""


def write_answer(outcomes: Sequence[Outcome], card: ModelCard, several: bool, media_type: str, top_k: int) -> bytes:
    """The body of an answer of the model `card` in one of `service.media.ANSWERS`.

    `several`: whether it is a list of results, in which errors are marked. Raises: ImageError, if the only image of a
    request for one could not be read.
    """
    if not several and isinstance(outcomes[0], ImageError):
        raise outcomes[0]
    if media_type == CSV:
        return _csv(outcomes, top_k)
    model = {"name": card.name, "version": card.version}
    results = [_result(outcome, top_k) for outcome in outcomes]
    if media_type == JSON:
        return _json({"model": model, "results": results} if several else {"model": model, **results[0]})
    return b"".join(_json(result if "error" in result else {"model": model, **result}) + b"\n" for result in results)


def _result(outcome: Outcome, top_k: int) -> dict[str, Any]:
    if isinstance(outcome, ImageError):
        return {"error": {"code": HTTP_ERRORS[type(outcome)][1], "message": str(outcome)}}
    return {
        "predictions": [
            {"label": label, "index": index, "probability": round(probability, 6)}
            for label, index, probability in outcome.top(top_k)
        ]
    }


_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each answer


def _json(value: Any) -> bytes:
    return _encode(value).encode()


def _csv(outcomes: Sequence[Outcome], top_k: int) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)  # RFC 4180: lines end with CR LF
    writer.writerow(COLUMNS)
    for image, outcome in enumerate(outcomes):
        if isinstance(outcome, ImageError):
            writer.writerow([image, "", "", "", "", HTTP_ERRORS[type(outcome)][1], outcome])
        else:
            writer.writerows(
                [image, rank, label, index, round(probability, 6), "", ""]
                for rank, (label, index, probability) in enumerate(outcome.top(top_k), 1)
            )
    return text.getvalue().encode()
