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

MAX_HEADER_BYTES, MAX_HEADERS_BYTES = 8 * 2**10, 2**17
"""Of a header that extends another (long names, pax records), and of all in an archive. Paths have at most 4,096."""

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
        try:
            yield Path(name)
        except ArtifactError as exc:  # where it was unpacked tells nobody anything
            raise ArtifactError(str(exc).replace(name, str(source))) from exc


def unpack(archive: Path, target: Path) -> None:
    """Unpack `archive` into the folder `target`.

    Plain files and folders only: links, devices, and paths that lead out of the folder are refused. Written by
    hand, because the filters of `tarfile` (PEP 706) are not in every Python 3.11.

    Raises: ArtifactError; what was unpacked until then stays.
    """
    try:
        with tarfile.open(archive, "r:*", tarinfo=_member_class()) as tar:
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


def _member_class() -> type[tarfile.TarInfo]:
    """For one archive: what refuses what `tarfile` would read into memory, or for hours, before it hands a member out.

    Sparse files have maps without end, and its expressions for pax records take time in the square of their bytes.
    """
    extended = 0

    class Member(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
            nonlocal extended
            member = super().frombuf(buf, encoding, errors)
            if member.type == tarfile.GNUTYPE_SPARSE:
                refuse_sparse()
            if member.type in _EXTENDING:
                extended += member.size
                if member.size > MAX_HEADER_BYTES or extended > MAX_HEADERS_BYTES:
                    raise ValueError(f"one of its headers claims {member.size:,} bytes")
            return member

    def refuse_sparse(*_: object) -> None:
        raise ValueError("it holds a sparse file")

    for name in ("_proc_sparse", "_proc_gnusparse_00", "_proc_gnusparse_01", "_proc_gnusparse_10"):
        assert hasattr(Member, name), name  # tarfile's own: pax records that make a file sparse are read in there
        setattr(Member, name, refuse_sparse)
    return Member


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
