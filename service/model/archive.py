"""Unpack a model archive (`model.tar.gz`, as SageMaker training jobs leave it) without trusting it."""

import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path

from service.model.errors import ArtifactError

MAX_UNPACKED_BYTES = 4 * 2**30
"""What an archive may hold unpacked; a ResNet-34 in float32 takes 0.09 GiB."""


def unpack(archive: Path, parent: Path | None = None) -> Path:
    """Unpack `archive` into a new temporary folder (below `parent`, by default the system's) and return it.

    Plain files and folders only: links, devices, and paths that lead out of the folder are refused.
    The caller removes the folder.

    Raises: ArtifactError.
    """
    target = Path(tempfile.mkdtemp(prefix="model-", dir=parent))
    try:
        _extract(archive, target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def _extract(archive: Path, target: Path) -> None:
    try:
        with tarfile.open(archive, "r:*") as tar:
            size = 0
            for member in tar:
                if not (member.isfile() or member.isdir()):
                    raise ArtifactError(f"{archive} holds {member.name!r}, which is no plain file; pack files only.")
                size += member.size
                if size > MAX_UNPACKED_BYTES:
                    raise ArtifactError(f"{archive} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes.")
                tar.extract(member, target, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as exc:
        raise ArtifactError(f"{archive} is no readable tar archive: {exc}; pack the folder again.") from exc
    except OSError as exc:
        raise ArtifactError(f"{archive} cannot be unpacked into {target}: {exc.strerror or exc}.") from exc
