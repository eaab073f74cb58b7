"""The endpoint's entry point, in the four words SageMaker users know.

`model_fn` loads, `input_fn` decodes, `predict_fn` predicts, `output_fn` writes the answer. The service is made of the
same parts (it decodes straight to the model's side), AWS's inference toolkit calls these, given
`SAGEMAKER_PROGRAM=service.inference` (https://github.com/aws/sagemaker-inference-toolkit; it counts parameters, so none
has more than these).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from service.answers import TOP_K, Outcome, write_answer
from service.classifier import Classifier, Prediction
from service.engines.choose import Layout, load
from service.engines.names import Wanted
from service.media import negotiate
from service.model.artifact import Artifact, open_artifact
from service.model.errors import ArtifactError, ImageError
from service.model.images import RgbImage, decode
from service.payloads import payloads_of

T = TypeVar("T")


class InOrder(list[T]):
    """What there is of each image of a request; `several`: whether the answer is a list of results, also of one."""

    def __init__(self, values: Iterable[T], several: bool) -> None:
        super().__init__(values)
        self.several = several


def model_fn(model_dir: str | Path) -> Classifier:
    """Load and verify the model in `model_dir`, with the fastest engine: see `load_model`."""
    return load_model(Path(model_dir))


def load_model(folder: Path, engine: Wanted = "auto", layout: Layout | None = None) -> Classifier:
    """Load and verify the model in `folder`: every file's hash, and the self-check with the engine that will run it.

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


def input_fn(body: bytes, content_type: str | None) -> InOrder[RgbImage | ImageError]:
    """Decode a request body: an image's bytes, the files of a form, or base64 in JSON.

    Returns: the images in order, uint8 `[H, W, 3]` each; among several, one that cannot be read is its error.
    Raises: UnsupportedMediaType, MalformedRequest; ImageError, if the only image cannot be read.
    """
    payloads = payloads_of(body, content_type)
    if not payloads.several:
        return InOrder([decode(payloads.images[0])], several=False)
    return InOrder(payloads.in_order(map(_decoded, payloads.images)), several=True)


def predict_fn(images: Sequence[RgbImage | ImageError], model: Classifier) -> InOrder[Outcome]:
    """Predict the images, in order; an error stays what it is. Raises: ImageError, if there is nothing else."""
    readable = [image for image in images if not isinstance(image, ImageError)]
    if not readable:
        raise next(image for image in images if isinstance(image, ImageError))
    predictions = iter(model.classify(readable))
    outcomes = [image if isinstance(image, ImageError) else next(predictions) for image in images]
    return InOrder(outcomes, _several(images))


def output_fn(outcomes: Sequence[Outcome], accept: str | None) -> tuple[bytes, str]:
    """Write the answer in the type that `accept` prefers. Returns: body and content type. Raises: NotAcceptable."""
    media_type = negotiate(accept)
    card = next(outcome.model for outcome in outcomes if isinstance(outcome, Prediction))
    return write_answer(outcomes, card, _several(outcomes), media_type, TOP_K), media_type


def _several(values: Sequence[object]) -> bool:
    return values.several if isinstance(values, InOrder) else len(values) > 1


def _decoded(payload: bytes) -> RgbImage | ImageError:
    try:
        return decode(payload)
    except ImageError as exc:
        return exc


def _load(artifact: Artifact, engine: Wanted, layout: Layout | None) -> Classifier:
    artifact.look()
    classifier = load(artifact, engine, layout)
    artifact.verify_rest()  # what was read was compared then; once more would be 0.1 s a worker
    return classifier
