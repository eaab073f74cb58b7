"""Unpack a model archive (`model.tar.gz`, as SageMaker training jobs leave it) without trusting it."""

import lzma
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from service.model.errors import ArtifactError

MAX_UNPACKED_BYTES = 4 * 2**30
"""What an archive may hold unpacked; a ResNet-34 in float32 takes 0.09 GiB."""

MAX_HEADER_BYTES = 2**20
"""Of a header that extends another (long names, pax records): `tarfile` reads it into memory."""

MAX_MEMBERS = 1000
"""Files and folders in an archive; an artifact has four, besides what the user packs along (code/)."""


@contextmanager
def model_folder(source: Path) -> Iterator[Path]:
    """The folder of a model: `source` itself, or what the archive `source` holds, removed afterwards.

    Raises: ArtifactError.
    """
    if not source.is_file():
        yield source
        return
    try:
        scratch = tempfile.TemporaryDirectory(prefix="model-", ignore_cleanup_errors=True)
    except OSError as exc:
        raise ArtifactError(f"{source} cannot be unpacked: {exc}; free space or set TMPDIR.") from exc
    with scratch as name:
        unpack(source, Path(name))
        yield Path(name)


def unpack(archive: Path, target: Path) -> None:
    """Unpack `archive` into the folder `target`.

    Plain files and folders only: links, devices, and paths that lead out of the folder are refused. Written by
    hand, because the filters of `tarfile` (PEP 706) are not in every Python 3.11.

    Raises: ArtifactError; what was unpacked until then stays.
    """
    try:
        with tarfile.open(archive, "r:*", tarinfo=_Member) as tar:
            size = 0
            for count, member in enumerate(tar, 1):
                size += max(0, member.size)
                if size > MAX_UNPACKED_BYTES or count > MAX_MEMBERS:
                    raise ArtifactError(
                        f"{archive} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes or {MAX_MEMBERS:,} files; "
                        "pack the artifact's folder alone."
                    )
                _extract(tar, member, archive, target)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, RecursionError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise ArtifactError(f"{archive} is no readable tar archive: {reason}; pack the folder again.") from exc
    except OSError as exc:
        raise ArtifactError(f"{archive} cannot be unpacked into {target}: {exc.strerror or exc}.") from exc


class _Member(tarfile.TarInfo):
    """Refuses what `tarfile` would read into memory before it hands the member out."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """See `tarfile.TarInfo.frombuf`. Raises: ValueError too."""
        member = super().frombuf(buf, encoding, errors)
        if member.type in _EXTENDING and member.size > MAX_HEADER_BYTES:
            raise ValueError(f"one of its headers claims {member.size:,} bytes")
        return member


_EXTENDING = {
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
}  # fmt: skip


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, archive: Path, target: Path) -> None:
    place = (target / member.name).resolve()
    if not place.is_relative_to(target.resolve()):
        raise ArtifactError(
            f"{archive} holds {member.name!r}, which leads out of the folder; pack it with relative paths."
        )
    if member.isdir():
        place.mkdir(parents=True, exist_ok=True)
        return
    content = tar.extractfile(member) if member.isfile() else None
    if content is None or member.size < 0:
        raise ArtifactError(f"{archive} holds {member.name!r}, which is no plain file; pack files only.")
    place.parent.mkdir(parents=True, exist_ok=True)
    with content, place.open("xb") as file:
        shutil.copyfileobj(content, file)
