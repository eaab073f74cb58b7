"""manifest.json: what an artifact states about its model and its files, sealed with its own sha256."""

import hashlib
import json
import math
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.model.architecture import Architecture
from service.model.errors import ArtifactError
from service.model.preprocess import Preprocessing

FORMAT_VERSION = 2
READABLE = (1, 2)
"""1 had no `quantization`."""
MAX_TEXT = 256

INT8_MAX_LOSS_POINTS = 0.5
"""An int8 network that lost more percentage points of accuracy than this runs only when it is asked for by name."""

INT8_MAX_LIKELY_LOSS_POINTS = 1.0
"""Likewise one that may lose more than this, as far as its validation images can tell (`Quantization`)."""

INT8_MIN_IMAGES = 200
"""Likewise one that was measured on fewer validation images: one of them is more than half a point."""

ONE_SIDED_95 = 1.645
"""Standard errors above the mean, below which 95 % of a normal distribution lie."""

GENERATED_SAMPLE = "generated-sample"
"""The data set's name where a model was trained on drawn shapes (`training.data.sample`)."""

Role = Literal["weights", "self_check", "example", "int8_graph", "int8_weights"]
REQUIRED: tuple[Role, ...] = ("weights", "self_check", "example")
INT8: tuple[Role, ...] = ("int8_graph", "int8_weights")


class _FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _printable(text: str) -> str:
    if not text.isprintable() or not 1 <= len(text) <= MAX_TEXT:
        raise ValueError(f"must be 1 to {MAX_TEXT} printable characters")
    return text


Text = Annotated[str, AfterValidator(_printable)]
"""Text that logs and answers can carry: no control characters, no lone surrogates."""


class FileEntry(_FrozenModel):
    """One file of the artifact."""

    path: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Example(_FrozenModel):
    """The image to try: its class and the media type to send it with."""

    label: Text
    media_type: Text


class Quantization(_FrozenModel):
    """How the int8 network was made, and how well it agrees with the float32 one on the validation images."""

    method: Text
    calibration_images: int = Field(ge=1)
    n: int = Field(ge=1)
    """Validation images both networks were compared on."""
    top1_agreement: float = Field(ge=0, le=1)
    """Share of the n images that both give the same likeliest class."""
    accuracy: float = Field(ge=0, le=1)
    accuracy_float32: float = Field(ge=0, le=1)
    self_check_difference: float = Field(ge=0)
    """Largest difference of its logits on the self-check's inputs, as a share of the largest |logit|."""

    @property
    def loss_points(self) -> float:
        """Percentage points of accuracy lost; negative where int8 is the better one."""
        return round(100 * (self.accuracy_float32 - self.accuracy), 6)

    @property
    def likely_loss_points(self) -> float:
        """What the loss does not exceed with 95 % confidence.

        The networks differ on a share d of n images, each of which adds or takes one right answer at most, so that the
        standard error of the difference is sqrt(d / n) at most (McNemar 1947, https://doi.org/10.1007/BF02295996).
        """
        return round(self.loss_points + 100 * ONE_SIDED_95 * math.sqrt((1 - self.top1_agreement) / self.n), 6)

    @property
    def doubt(self) -> str | None:
        """Why the int8 network runs only when it is asked for by name; None where it may run by itself."""
        if self.n < INT8_MIN_IMAGES:
            return f"{self.n} validation images are too few to tell, {INT8_MIN_IMAGES} are needed"
        if self.loss_points > INT8_MAX_LOSS_POINTS:
            return f"more than {INT8_MAX_LOSS_POINTS} points of accuracy are lost"
        if self.likely_loss_points > INT8_MAX_LIKELY_LOSS_POINTS:
            return (
                f"{self.n} validation images do not exclude a loss of {self.likely_loss_points:.2f} points (95 % "
                f"confidence), at most {INT8_MAX_LIKELY_LOSS_POINTS:g} is allowed"
            )
        return None


class Manifest(_FrozenModel):
    """The content of manifest.json."""

    format_version: Literal[1, 2]
    name: Text
    version: Text
    created_at: datetime
    architecture: Architecture
    classes: tuple[Text, ...] = Field(min_length=2)
    preprocessing: Preprocessing
    example: Example
    hyperparameters: dict[str, Any]
    dataset: dict[str, Any]
    metrics: dict[str, Any]
    packages: dict[str, str]
    quantization: Quantization | None = None
    files: dict[Role, FileEntry]

    @property
    def caution(self) -> str | None:
        """What is to be known before the model is believed; None where it was trained on pictures."""
        if self.dataset.get("name") != GENERATED_SAMPLE:
            return None
        return (
            "This model was trained on a generated sample (drawn shapes): it is there to try the service with, and "
            "useless for real pictures."
        )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Manifest":
        if self.architecture.num_classes != len(self.classes):
            raise ValueError(
                f"the network has {self.architecture.num_classes} classes, but {len(self.classes)} are named"
            )
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class is named twice")
        if self.example.label not in self.classes:
            raise ValueError("the example is of none of the classes")
        missing = {*REQUIRED, *(INT8 if self.quantization else ())} - set(self.files)
        if missing:
            raise ValueError(f"no entry for {', '.join(sorted(missing))} in 'files'")
        if not self.quantization and set(INT8) & set(self.files):
            raise ValueError("there is an int8 network, but 'quantization' does not say how good it is")
        return self


_SEAL = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_UNSEALED = b'"manifest_sha256": "' + b"0" * 64 + b'"'


def sealed(manifest: Manifest) -> bytes:
    """The manifest as JSON whose last field is the sha256 of this very text with zeros in that field's place."""
    fields = {**manifest.model_dump(mode="json"), "manifest_sha256": "0" * 64}
    text = json.dumps(fields, indent=2, ensure_ascii=False).encode() + b"\n"
    seal = b'"manifest_sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'"'
    return seal.join(text.rsplit(_UNSEALED, 1))


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """The manifest in `content`, the bytes of `path`. Raises: ArtifactError when it is damaged or none of ours."""
    damaged = ArtifactError(f"{path} is damaged: its sha256 is not the one it states; copy the artifact again.")
    seals = list(_SEAL.finditer(content))
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"{path} is damaged: it is not valid JSON; copy the artifact again.") from exc
    if not isinstance(fields, dict) or not seals:
        raise damaged
    start, end = seals[-1].span()
    if hashlib.sha256(content[:start] + _UNSEALED + content[end:]).hexdigest() != fields.pop("manifest_sha256", None):
        raise damaged
    if fields.get("format_version") not in READABLE:
        stated = ascii(fields.get("format_version"))[:20]
        raise ArtifactError(
            f"{path} has format version {stated}, this release reads {' and '.join(map(str, READABLE))}; "
            "export the model again with this release."
        )
    try:
        return Manifest.model_validate(fields)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ascii(".".join(str(part) for part in first["loc"]) or "the whole")[1:100].strip("'")
        raise ArtifactError(f"{path} is not a valid manifest: {where}: {first['msg']}.") from exc
