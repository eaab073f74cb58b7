"""The endpoint's entry point, in the four words SageMaker users know.

`model_fn` loads, `input_fn` decodes, `predict_fn` predicts, `output_fn` writes the answer. The service is made of the
same parts (it decodes straight to the model's side), AWS's inference toolkit calls these, given
`SAGEMAKER_PROGRAM=service.inference` (https://github.com/aws/sagemaker-inference-toolkit; it counts parameters, so none
has more than these).
"""

import json
import re
from collections.abc import Sequence
from email.message import Message
from functools import lru_cache
from pathlib import Path

from service.classifier import Classifier, Prediction
from service.engines.choose import Layout, Wanted, load
from service.errors import MalformedRequest, NotAcceptable, UnsupportedMediaType
from service.model.artifact import Artifact, open_artifact
from service.model.errors import ArtifactError
from service.model.images import RgbImage, decode
from service.multipart import files_of

JSON = "application/json"
TOP_K = 5
"""How many classes an answer ranks."""

RAW_MEDIA_TYPES = ("application/octet-stream", "application/x-image", "application/x-www-form-urlencoded", "")
"""Types under which raw image bytes come besides image/*: unnamed, SageMaker's own, curl's `--data-binary` default."""


def model_fn(model_dir: str | Path) -> Classifier:
    """Load and verify the model in `model_dir`, with the fastest engine: see `load_model`."""
    return load_model(Path(model_dir))


def load_model(folder: Path, engine: Wanted = "auto", layout: Layout | None = None) -> Classifier:
    """Load and verify the model in `folder`: every file's hash, then the self-check with the engine that will run it.

    Raises: ArtifactError, EngineUnavailable.
    """
    artifact = open_artifact(folder)
    try:
        return _load(artifact, engine, layout)
    except ArtifactError:
        newer = open_artifact(folder)
        if newer.manifest == artifact.manifest:
            raise
        return _load(newer, engine, layout)  # a training replaced the model while it was being read


def input_fn(body: bytes, content_type: str | None) -> list[RgbImage]:
    """Decode a request body: raw image bytes, or one file in multipart/form-data.

    Returns: the images, uint8 `[H, W, 3]` each; today exactly one.
    Raises: UnsupportedMediaType, MalformedRequest, ImageError.
    """
    return [decode(payload_of(body, content_type))]


def payload_of(body: bytes, content_type: str | None) -> bytes:
    """The image's bytes in a request body. Raises: UnsupportedMediaType, MalformedRequest."""
    media_type = media_type_of(content_type or "")
    if media_type == "multipart/form-data":
        files = files_of(body, content_type or "")
        if len(files) != 1:
            raise MalformedRequest(f"The form must hold exactly one file, given: {len(files)}; send one per request.")
        return files[0]
    if media_type.startswith("image/") or media_type in RAW_MEDIA_TYPES:
        return body
    raise UnsupportedMediaType(
        f"The content type must be image/*, application/octet-stream or multipart/form-data, given: {content_type}."
    )


@lru_cache(maxsize=256)
def media_type_of(content_type: str) -> str:
    """The media type of a Content-Type header, without its parameters; "" for none."""
    header = Message()
    header["Content-Type"] = content_type
    return header.get_content_type() if content_type else ""


def predict_fn(images: Sequence[RgbImage], model: Classifier) -> list[Prediction]:
    """Predict the images, in order; this is what the batcher runs."""
    return model.classify(images)


def output_fn(predictions: Sequence[Prediction], accept: str | None) -> tuple[bytes, str]:
    """Write the answer to one image as JSON. Returns: body and content type. Raises: NotAcceptable."""
    require_json(accept)
    (prediction,) = predictions
    answer = {
        "model": {"name": prediction.model.name, "version": prediction.model.version},
        "predictions": [
            {"label": label, "index": index, "probability": round(probability, 6)}
            for label, index, probability in prediction.top(TOP_K)
        ],
    }
    return json.dumps(answer, ensure_ascii=False).encode(), JSON


def require_json(accept: str | None) -> None:
    """Raises: NotAcceptable when an Accept header excludes the one type that answers have."""
    if not _accepts_json(accept):
        raise NotAcceptable(f"Answers are {JSON}, which the Accept header excludes: {accept}.")


def _load(artifact: Artifact, engine: Wanted, layout: Layout | None) -> Classifier:
    artifact.verify()
    return load(artifact, engine, layout)


@lru_cache(maxsize=256)
def _accepts_json(accept: str | None) -> bool:
    ranges = [[piece.strip().lower() for piece in part.split(";")] for part in (accept or "*/*").split(",")]
    refused = {media_range for media_range, *options in ranges if any(re.fullmatch(r"q=0(\.0*)?", o) for o in options)}
    return JSON not in refused and any(
        media_range in (JSON, "application/*", "*/*", "") and media_range not in refused for media_range, *_ in ranges
    )
