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
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from service.model.errors import ArtifactDamaged, ArtifactError
from service.model.files import MANIFEST, MAX_MANIFEST_BYTES, find_home, replace
from service.model.manifest import FORMAT_VERSION, FileEntry, Manifest, Quantization, Role, parse_manifest, sealed
from service.model.resize import PixelBatch

MAX_FILE_BYTES = 2 * 2**30
"""Of files beside the manifest, which are read into memory; a ResNet-34 in float32 takes 0.09 GiB."""

Weights = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class SelfCheck:
    """Inputs and the logits the trained network gave for them."""

    inputs: PixelBatch
    """uint8 `[n, S, S, 3]`."""
    logits: npt.NDArray[np.float32]
    """float32 `[n, K]`."""

    def difference(self, logits: npt.NDArray[np.float32]) -> float:
        """The largest difference of `logits`, float32 `[n, K]`, from these, as a share of the largest |logit|."""
        return float(np.abs(logits - self.logits).max() / max(1e-12, float(np.abs(self.logits).max())))


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: a manifest that proved whole, and the files it vouches for."""

    folder: Path
    manifest: Manifest
    _proved: set[Role] = field(default_factory=set, init=False, repr=False, compare=False)
    """What `read` has returned."""

    def read(self, role: Role) -> bytes:
        """The bytes of one file, compared with the manifest's sha256 before they are returned.

        Raises: ArtifactError naming the file.
        """
        with self._opened(role) as file:
            content = file.read()
        self._compare(role, hashlib.sha256(content).hexdigest())
        self._proved.add(role)
        return content

    def verify(self) -> None:
        """Compare every file with its sha256. Raises: ArtifactError naming the file that is missing or damaged."""
        self._verify(self.manifest.files)

    def verify_rest(self) -> None:
        """See `verify`; what `read` has returned was compared then, and is not again."""
        self._verify(role for role in self.manifest.files if role not in self._proved)

    def look(self) -> None:
        """Find, at no cost, what `verify` would refuse but for content: a file that is missing, or of another size."""
        for role in self.manifest.files:
            self._look(role)

    def _verify(self, roles: Iterable[Role]) -> None:
        for role in roles:
            with self._opened(role) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._compare(role, digest)

    @contextmanager
    def _opened(self, role: Role) -> Iterator[BufferedReader]:
        self._look(role)
        with self._told(role), self.path(role).open("rb") as file:
            yield file

    def _look(self, role: Role) -> None:
        entry, path = self.manifest.files[role], self.path(role)
        with self._told(role):
            status = path.lstat()
        if stat.S_ISLNK(status.st_mode):  # it may lead anywhere, and elsewhere tomorrow
            raise ArtifactError(f"{path} is a link; copy the file itself into the artifact.")
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device: reading it may never end
            raise ArtifactError(f"{path} is no plain file; copy the artifact again.")
        if status.st_size > MAX_FILE_BYTES:
            raise ArtifactError(
                f"{path} has {status.st_size:,} bytes, {MAX_FILE_BYTES:,} are allowed; no ResNet-34 needs more."
            )
        if status.st_size != entry.bytes:
            raise ArtifactDamaged(
                f"{path} is damaged: it has {status.st_size:,} bytes not {entry.bytes:,}; copy the artifact again."
            )

    @contextmanager
    def _told(self, role: Role) -> Iterator[None]:
        """What the system says of a file, as an ArtifactError."""
        path = self.path(role)
        try:
            yield
        except FileNotFoundError as exc:
            raise ArtifactError(f"{path} is missing, though {MANIFEST} names it; copy the artifact again.") from exc
        except OSError as exc:
            raise ArtifactError(f"{path} cannot be read: {exc.strerror}.") from exc

    def _compare(self, role: Role, digest: str) -> None:
        if digest != self.manifest.files[role].sha256:
            raise ArtifactDamaged(
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
    home = find_home(folder)
    path = home / MANIFEST
    try:
        if path.is_symlink():
            raise ArtifactError(f"{path} is a link; copy the file itself into the artifact.")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_MANIFEST_BYTES:,} bytes: it is no manifest of ours.")
        content = path.read_bytes()
    except OSError as exc:
        raise ArtifactError(f"{path} cannot be read: {exc.strerror}.") from exc
    return Artifact(home, parse_manifest(content, path))


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
    folder: Path, facts: Mapping[str, Any], weights: Weights, self_check: SelfCheck, example: tuple[str, bytes]
) -> Artifact:
    """Write an artifact into `folder` (made if missing), replacing the one that is there in a single step.

    Args:
        facts: the manifest's fields but format_version, version, created_at, quantization and files.
        weights: the network's tensors by name.
        example: file name ending (".png") and bytes of the image to try.

    Raises: OSError (disk full, no permission); the artifact that was there is then still whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check: Weights = {"inputs": self_check.inputs, "logits": self_check.logits}
    contents: dict[Role, tuple[str, bytes]] = {
        "weights": (".safetensors", safetensors.numpy.save(weights)),
        "self_check": (".safetensors", safetensors.numpy.save(check)),
        "example": example,
    }
    with _exclusive(folder):
        files = {role: _store(folder, role, ending, content) for role, (ending, content) in contents.items()}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            version=files["weights"].sha256[:12],
            created_at=datetime.now(UTC).replace(microsecond=0),
            files=files,
            **facts,
        )
        replace(folder / MANIFEST, sealed(manifest))
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
            "format_version": FORMAT_VERSION,
            "files": {**before.files, **stored},
            "quantization": int8.quantization,
            "packages": {**before.packages, **packages},
        }
        manifest = Manifest.model_validate({**dict(before), **changed})
        replace(folder / MANIFEST, sealed(manifest))
        _remove_leftovers(folder, manifest)
    return open_artifact(folder)


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
