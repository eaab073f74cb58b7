"""The artifact: one folder that holds everything a prediction needs, and proves that it is whole.

    manifest.json                   what is in it: classes, preprocessing, metrics, sha256 of every file, and of itself
    weights.<sha>.safetensors       the network's tensors
    self_check.<sha>.safetensors    a few inputs, uint8 [n, S, S, 3], and their logits, float32 [n, K]
    example.<sha>.<ext>             one validation image, as its file was, to try the service with
    int8_graph.<sha>.xml            optional: the network in int8, as OpenVINO writes it, with
    int8_weights.<sha>.bin          its weights

Nothing in it is code and nothing is unpickled. Files are named by their content and the manifest, which names
them, is replaced last and at once: whoever reads the folder sees the old model or the new one, never a mixture.
"""

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.model.architecture import Architecture
from service.model.errors import ArtifactError
from service.model.files import replace
from service.model.preprocess import PixelBatch, Preprocessing

FORMAT_VERSION = 2
READABLE = (1, 2)
"""1 had no `quantization`."""
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_TEXT = 256

MAX_LOSS_POINTS = 0.5
"""An int8 network that loses more percentage points of accuracy than this runs only when it is asked for by name."""

Role = Literal["weights", "self_check", "example", "int8_graph", "int8_weights"]
REQUIRED: tuple[Role, ...] = ("weights", "self_check", "example")
INT8: tuple[Role, ...] = ("int8_graph", "int8_weights")
Weights = dict[str, npt.NDArray[Any]]


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


@dataclass(frozen=True)
class SelfCheck:
    """Inputs and the logits the trained network gave for them."""

    inputs: PixelBatch
    """uint8 `[n, S, S, 3]`."""
    logits: npt.NDArray[np.float32]
    """float32 `[n, K]`."""


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: a manifest that proved whole, and the files it vouches for."""

    folder: Path
    manifest: Manifest

    def read(self, role: Role) -> bytes:
        """The bytes of one file, compared with the manifest's sha256 before they are returned.

        Raises: ArtifactError naming the file.
        """
        with self._opened(role) as file:
            content = file.read()
        self._compare(role, hashlib.sha256(content).hexdigest())
        return content

    def verify(self) -> None:
        """Compare every file with its sha256. Raises: ArtifactError naming the file that is missing or damaged."""
        for role in self.manifest.files:
            with self._opened(role) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._compare(role, digest)

    @contextmanager
    def _opened(self, role: Role) -> Iterator[BufferedReader]:
        entry, path = self.manifest.files[role], self.path(role)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe or a device: reading it may never end
                raise ArtifactError(f"{path} is no plain file; copy the artifact again.")
            if status.st_size != entry.bytes:
                raise ArtifactError(
                    f"{path} is damaged: it has {status.st_size:,} bytes not {entry.bytes:,}; copy the artifact again."
                )
            with path.open("rb") as file:
                yield file
        except FileNotFoundError as exc:
            raise ArtifactError(f"{path} is missing, though {MANIFEST} names it; copy the artifact again.") from exc
        except OSError as exc:
            raise ArtifactError(f"{path} cannot be read: {exc.strerror}.") from exc

    def _compare(self, role: Role, digest: str) -> None:
        if digest != self.manifest.files[role].sha256:
            raise ArtifactError(
                f"{self.path(role)} is damaged: its sha256 is not the one in {MANIFEST}; copy the artifact again."
            )

    def weights(self) -> Weights:
        """The network's tensors by name. Raises: ArtifactError."""
        return _tensors(self.read("weights"), self.path("weights"))

    def self_check(self) -> SelfCheck:
        """The stored inputs and logits. Raises: ArtifactError."""
        tensors = _tensors(self.read("self_check"), self.path("self_check"))
        side, classes = self.manifest.preprocessing.side_px, len(self.manifest.classes)
        inputs, logits = tensors.get("inputs"), tensors.get("logits")
        if (
            inputs is None
            or logits is None
            or inputs.dtype != np.uint8
            or logits.dtype != np.float32
            or inputs.ndim != 4
            or not len(inputs)
            or inputs.shape[1:] != (side, side, 3)
            or logits.shape != (len(inputs), classes)
            or not np.isfinite(logits).all()
        ):
            raise ArtifactError(f"{self.path('self_check')} does not hold inputs [n, {side}, {side}, 3] and logits.")
        return SelfCheck(inputs, logits)

    def path(self, role: Role) -> Path:
        """Where the file of this role lies."""
        return self.folder / self.manifest.files[role].path


def open_artifact(folder: Path) -> Artifact:
    """Read and verify the manifest in `folder`, or in the one folder inside it that has one.

    Raises: ArtifactError.
    """
    home = _find_home(folder)
    path = home / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_MANIFEST_BYTES:,} bytes: it is no manifest of ours.")
        content = path.read_bytes()
    except OSError as exc:
        raise ArtifactError(f"{path} cannot be read: {exc.strerror}.") from exc
    return Artifact(home, _parse_manifest(content, path))


@dataclass(frozen=True)
class Int8Network:
    """An OpenVINO model in int8, as `openvino.save_model` writes it, and what it was measured at."""

    graph: bytes
    """The XML file."""
    weights: bytes
    """The .bin file."""
    quantization: Quantization

    def contents(self) -> dict[Role, tuple[str, bytes]]:
        """Its files by role: ending and bytes."""
        return {"int8_graph": (".xml", self.graph), "int8_weights": (".bin", self.weights)}


def write_artifact(
    folder: Path,
    facts: Mapping[str, Any],
    weights: Weights,
    self_check: SelfCheck,
    example: tuple[str, bytes],
    int8: Int8Network | None = None,
) -> Artifact:
    """Write an artifact into `folder` (made if missing), replacing the one that is there in a single step.

    Args:
        facts: the manifest's fields but format_version, version, created_at, quantization and files.
        weights: the network's tensors by name.
        example: file name ending (".png") and bytes of the image to try.
        int8: the quantized network, if there is one.

    Raises: OSError (disk full, no permission); the artifact that was there is then still whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check: Weights = {"inputs": self_check.inputs, "logits": self_check.logits}
    contents: dict[Role, tuple[str, bytes]] = {
        "weights": (".safetensors", safetensors.numpy.save(weights)),
        "self_check": (".safetensors", safetensors.numpy.save(check)),
        "example": example,
    }
    if int8 is not None:
        contents |= int8.contents()
    with _exclusive(folder):
        files = {role: _store(folder, role, ending, content) for role, (ending, content) in contents.items()}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            version=files["weights"].sha256[:12],
            created_at=datetime.now(UTC).replace(microsecond=0),
            files=files,
            quantization=int8.quantization if int8 is not None else None,
            **facts,
        )
        replace(folder / MANIFEST, _sealed(manifest))
        _remove_leftovers(folder, manifest)
    return open_artifact(folder)


def add_int8(artifact: Artifact, int8: Int8Network, packages: Mapping[str, str]) -> Artifact:
    """Add an int8 network to `artifact`, in place of one it has; the weights, the version and all other facts stay.

    A reader sees the artifact as it was or with the network. `packages`: what made it, for the manifest.

    Raises: ArtifactError when another model lies in the folder by now; OSError.
    """
    folder = artifact.folder
    with _exclusive(folder):
        before = open_artifact(folder).manifest
        if before.files["weights"] != artifact.manifest.files["weights"]:
            raise ArtifactError(
                f"{folder} holds another model by now, version {before.version} not {artifact.manifest.version}."
            )
        stored = {role: _store(folder, role, ending, content) for role, (ending, content) in int8.contents().items()}
        changed = {
            "files": {**before.files, **stored},
            "quantization": int8.quantization,
            "packages": {**before.packages, **packages},
        }
        manifest = Manifest.model_validate({**dict(before), **changed})
        replace(folder / MANIFEST, _sealed(manifest))
        _remove_leftovers(folder, manifest)
    return open_artifact(folder)


_SEAL = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_UNSEALED = b'"manifest_sha256": "' + b"0" * 64 + b'"'


def _sealed(manifest: Manifest) -> bytes:
    """The manifest as JSON whose last field is the sha256 of this very text with zeros in that field's place."""
    fields = {**manifest.model_dump(mode="json"), "manifest_sha256": "0" * 64}
    text = json.dumps(fields, indent=2, ensure_ascii=False).encode() + b"\n"
    seal = b'"manifest_sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'"'
    return seal.join(text.rsplit(_UNSEALED, 1))


def _parse_manifest(content: bytes, path: Path) -> Manifest:
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


def _find_home(folder: Path) -> Path:
    try:
        return _home(folder)
    except OSError as exc:
        raise ArtifactError(f"{str(folder)[:200]} cannot be read: {exc.strerror}.") from exc


def _home(folder: Path) -> Path:
    if (folder / MANIFEST).is_file():
        return folder
    if not folder.is_dir():
        raise ArtifactError(f"There is no model at {folder}: train one (README, 'make serve') or name another folder.")
    inside = sorted(entry.name for entry in folder.iterdir())
    homes = [folder / name for name in inside if (folder / name / MANIFEST).is_file()]
    if len(homes) == 1:
        return homes[0]
    found = ", ".join(inside[:10]) or "nothing"
    raise ArtifactError(f"There is no {MANIFEST} in {folder}, found {found}; name the folder that training wrote.")


def _tensors(content: bytes, path: Path) -> Weights:
    try:
        return safetensors.numpy.load(content)
    except Exception as exc:  # the hash was right, so whoever wrote the file wrote no safetensors
        raise ArtifactError(f"{path} is not a safetensors file: {exc}.") from exc


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on the folder, so that two trainings do not clear away each other's files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _store(folder: Path, role: Role, ending: str, content: bytes) -> FileEntry:
    digest = hashlib.sha256(content).hexdigest()
    entry = FileEntry(path=f"{role}.{digest[:12]}{ending}", sha256=digest, bytes=len(content))
    replace(folder / entry.path, content)
    return entry


def _remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Remove files of earlier models and of interrupted writes; what is not ours stays."""
    keep = {entry.path for entry in manifest.files.values()}
    stored = rf"({'|'.join(get_args(Role))})\.[0-9a-f]{{12}}\.\w+"
    ours = re.compile(rf"{stored}|\.({stored}|{re.escape(MANIFEST)})\.partial")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)
