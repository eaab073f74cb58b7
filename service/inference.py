"""The endpoint's entry point, in the four words SageMaker users know.

`model_fn` loads, `input_fn` decodes, `predict_fn` predicts, `output_fn` writes the answer. The service is made of the
same parts (it decodes straight to the model's side), AWS's inference toolkit calls these, given
`SAGEMAKER_PROGRAM=service.inference` (https://github.com/aws/sagemaker-inference-toolkit; it counts parameters, so none
has more than these).
"""

from collections.abc import Sequence
from pathlib import Path

from service.answers import TOP_K, Outcome, write_answer
from service.classifier import Classifier, Prediction
from service.engines.choose import Layout, load
from service.engines.names import Wanted
from service.media import negotiate
from service.model.artifact import Artifact, open_artifact
from service.model.errors import ArtifactError, ImageError
from service.model.images import RgbImage, decode
from service.payloads import payloads_of


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


def input_fn(body: bytes, content_type: str | None) -> list[RgbImage | ImageError]:
    """Decode a request body: an image's bytes, the files of a form, or base64 in JSON.

    Returns: the images in order, uint8 `[H, W, 3]` each; among several, one that cannot be read is its error.
    Raises: UnsupportedMediaType, MalformedRequest; ImageError, if the only image cannot be read.
    """
    payloads = payloads_of(body, content_type)
    if not payloads.several:
        return [decode(payloads.images[0])]
    return [_decoded(payload) for payload in payloads.images]


def predict_fn(images: Sequence[RgbImage | ImageError], model: Classifier) -> list[Outcome]:
    """Predict the images, in order; an error stays what it is. Raises: ImageError, if there is nothing else."""
    readable = [image for image in images if not isinstance(image, ImageError)]
    if not readable:
        raise next(image for image in images if isinstance(image, ImageError))
    predictions = iter(model.classify(readable))
    return [image if isinstance(image, ImageError) else next(predictions) for image in images]


def output_fn(outcomes: Sequence[Outcome], accept: str | None) -> tuple[bytes, str]:
    """Write the answer in the type that `accept` prefers. Returns: body and content type. Raises: NotAcceptable."""
    media_type = negotiate(accept)
    card = next(outcome.model for outcome in outcomes if isinstance(outcome, Prediction))
    return write_answer(outcomes, card, len(outcomes) > 1, media_type, TOP_K), media_type


def _decoded(payload: bytes) -> RgbImage | ImageError:
    try:
        return decode(payload)
    except ImageError as exc:
        return exc


def _load(artifact: Artifact, engine: Wanted, layout: Layout | None) -> Classifier:
    artifact.verify()
    return load(artifact, engine, layout)
