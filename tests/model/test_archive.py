"""Model archives: good ones are unpacked, hostile and damaged ones leave nothing behind."""

import gzip
import os
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

import pytest

from service.model import archive
from service.model.archive import model_folder, unpack
from service.model.artifact import open_artifact
from service.model.errors import ArtifactError

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(content)
    return info, content


def pack(path: Path, *members: Member, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for info, content in members:
            tar.addfile(info, BytesIO(content))
    return path


def noise(size: int) -> bytes:
    return bytes(os.urandom(size))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files while the test runs."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def refused(packed: Path, temporary: Path, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason), model_folder(packed):
        raise AssertionError("the archive was unpacked")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("name", "mode"), [("model.tar.gz", "w:gz"), ("model.tar", "w"), ("model.tar.xz", "w:xz")])
def test_a_good_archive_is_unpacked_and_removed_afterwards(
    tmp_path: Path, temporary: Path, name: str, mode: str
) -> None:
    content = noise(100_000)
    packed = pack(
        tmp_path / name,
        member("./manifest.json", b"{}"),
        member("code", kind=tarfile.DIRTYPE),
        member("code/weights.bin", content),
        member("folder/that/has/no/entry", b"x"),
        mode=mode,
    )
    with model_folder(packed) as folder, model_folder(packed) as other:
        assert folder.parent == other.parent == temporary
        assert folder != other
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert found == {"manifest.json", "code/weights.bin", "folder/that/has/no/entry"}
        assert (folder / "code" / "weights.bin").read_bytes() == content
    assert list(temporary.iterdir()) == []
    assert packed.exists()


def test_a_folder_is_given_as_it_is_and_stays(tmp_path: Path, temporary: Path) -> None:
    with model_folder(tmp_path) as folder:
        assert folder == tmp_path
    assert tmp_path.is_dir()
    assert list(temporary.iterdir()) == []


def test_what_was_unpacked_is_removed_when_its_use_fails(tmp_path: Path, temporary: Path) -> None:
    packed = pack(tmp_path / "m.tar.gz", member("a", b"a"))
    with pytest.raises(ZeroDivisionError), model_folder(packed) as folder:
        assert (folder / "a").exists()
        raise ZeroDivisionError
    assert list(temporary.iterdir()) == []


def test_unpacked_files_are_neither_executable_nor_anothers(tmp_path: Path) -> None:
    info, content = member("script", b"#!/bin/sh")
    info.mode, info.uid, info.gid = 0o6777, 12345, 12345
    (tmp_path / "target").mkdir()
    unpack(pack(tmp_path / "m.tar.gz", (info, content)), tmp_path / "target")
    status = (tmp_path / "target" / "script").stat()
    assert status.st_mode & 0o7133 == 0
    assert status.st_uid == os.getuid()


HOSTILE = {
    "a path upwards": [member("../evil", b"evil")],
    "a path upwards further down": [member("a/../../evil", b"evil")],
    "a symbolic link out": [member("link", kind=tarfile.SYMTYPE, target="/etc")],
    "a symbolic link within": [member("a", b"a"), member("link", kind=tarfile.SYMTYPE, target="a")],
    "a file through a link": [member("link", kind=tarfile.SYMTYPE, target=".."), member("link/evil", b"evil")],
    "a hard link out": [member("link", kind=tarfile.LNKTYPE, target="/etc/passwd")],
    "a hard link within": [member("a", b"a"), member("link", kind=tarfile.LNKTYPE, target="a")],
    "a character device": [member("null", kind=tarfile.CHRTYPE)],
    "a block device": [member("disk", kind=tarfile.BLKTYPE)],
    "a pipe": [member("pipe", kind=tarfile.FIFOTYPE)],
    "a file that is also a folder": [member("a", b"a"), member("a/b", b"b")],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE)
def test_links_devices_and_ways_out_are_refused_and_nothing_is_left(
    tmp_path: Path, temporary: Path, members: list[Member]
) -> None:
    packed = pack(tmp_path / "model.tar.gz", member("first", noise(10_000)), *members)
    refused(packed, temporary, r"model\.tar\.gz")
    assert {path.name for path in tmp_path.iterdir()} == {"temporary", "model.tar.gz"}


def test_an_absolute_path_is_refused_and_nothing_is_left(tmp_path: Path, temporary: Path) -> None:
    outside = tmp_path / "outside"
    refused(pack(tmp_path / "m.tar.gz", member(str(outside), b"evil")), temporary, "leads out of the folder")
    assert not outside.exists()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9])
@pytest.mark.parametrize(("name", "mode"), [("m.tar.gz", "w:gz"), ("m.tar.xz", "w:xz"), ("m.tar.bz2", "w:bz2")])
def test_a_truncated_archive_is_refused_and_nothing_is_left(
    tmp_path: Path, temporary: Path, share: float, name: str, mode: str
) -> None:
    packed = pack(tmp_path / name, member("a", noise(60_000)), member("b", noise(60_000)), mode=mode)
    content = packed.read_bytes()
    packed.write_bytes(content[: int(share * len(content))])
    refused(packed, temporary, name)


@pytest.mark.parametrize(("name", "mode"), [("m.tar.xz", "w:xz"), ("m.tar.bz2", "w:bz2")])
def test_an_archive_damaged_in_the_middle_is_refused_and_nothing_is_left(
    tmp_path: Path, temporary: Path, name: str, mode: str
) -> None:
    packed = pack(tmp_path / name, member("a", b"0123456789" * 20_000 + noise(100_000)), mode=mode)
    content = bytearray(packed.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 2000] = bytes(2000)
    packed.write_bytes(content)
    refused(packed, temporary, name)


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", b"PK\x03\x04" + bytes(600), gzip.compress(b"gzip, but no tar" * 100)],
    ids=["empty", "text", "zip", "gzip of something else"],
)
def test_a_file_that_is_no_tar_archive_is_refused_and_nothing_is_left(
    tmp_path: Path, temporary: Path, content: bytes
) -> None:
    (tmp_path / "model.tar.gz").write_bytes(content)
    refused(tmp_path / "model.tar.gz", temporary, r"model\.tar\.gz is no readable tar archive")


def test_an_archive_that_is_not_there_is_refused_naming_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"missing\.tar\.gz cannot be unpacked.*No such file"):
        unpack(tmp_path / "missing.tar.gz", tmp_path)


def test_a_temporary_folder_that_cannot_be_made_is_an_artifact_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(tmp_path / "m.tar.gz", member("a", b"a"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match=r"m\.tar\.gz"), model_folder(packed):
        pass


def zeros(*sizes: int) -> list[Member]:
    return [member(f"part{i}", bytes(size)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [(1001,), (600, 401)])
def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 1000)
    refused(pack(tmp_path / "m.tar.gz", *zeros(*sizes)), temporary, "unpacks to more than 1,000 bytes")


def test_an_archive_of_too_many_files_is_refused(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    refused(pack(tmp_path / "m.tar.gz", *zeros(0, 0, 0, 0)), temporary, "or 3 files")


def test_an_archive_of_exactly_the_limits_is_unpacked(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 1000)
    monkeypatch.setattr(archive, "MAX_MEMBERS", 2)
    with model_folder(pack(tmp_path / "m.tar.gz", *zeros(600, 400))) as folder:
        assert len(list(folder.iterdir())) == 2


def test_a_size_that_is_only_claimed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge")
    info.size = 2**40
    (tmp_path / "m.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    (tmp_path / "target").mkdir()
    with pytest.raises(ArtifactError, match="unpacks to more than"):
        unpack(tmp_path / "m.tar", tmp_path / "target")
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.timeout(10)
def test_a_negative_size_is_refused_and_is_not_read_in_circles(tmp_path: Path, temporary: Path) -> None:
    again = tarfile.TarInfo("again")
    again.size = -512  # the next header would then be this one
    first, content = member("first", bytes(512))
    blocks = [first.tobuf(tarfile.GNU_FORMAT), content, again.tobuf(tarfile.GNU_FORMAT), bytes(100_000)]
    (tmp_path / "m.tar").write_bytes(b"".join(blocks))
    refused(tmp_path / "m.tar", temporary, r"m\.tar")


@pytest.mark.parametrize("kind", sorted(archive._EXTENDING))
@pytest.mark.parametrize("first", [True, False])
def test_a_header_that_claims_gigabytes_is_refused_unread(
    tmp_path: Path, temporary: Path, kind: bytes, first: bool
) -> None:
    extending = tarfile.TarInfo("extending")
    extending.type, extending.size = kind, 3 * 2**30
    before = b"" if first else member("first", b"")[0].tobuf(tarfile.GNU_FORMAT)
    with (tmp_path / "m.tar").open("wb") as file:
        file.write(before + extending.tobuf(tarfile.GNU_FORMAT))
        file.truncate(3 * 2**30 + 10_240)  # sparse
    refused(tmp_path / "m.tar", temporary, "one of its headers claims 3,221,225,472 bytes")


def pax(records: dict[str, str]) -> tarfile.TarInfo:
    info = tarfile.TarInfo("file")
    info.pax_headers = records
    return info


@pytest.mark.parametrize(
    "blocks",
    [
        pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x"}).tobuf(tarfile.PAX_FORMAT),
        pax({"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}).tobuf(tarfile.PAX_FORMAT),
        pax({"GNU.sparse.size": "9", "GNU.sparse.numblocks": "1"}).tobuf(tarfile.PAX_FORMAT),
    ],
    ids=["1.0", "0.1", "0.0"],
)
def test_sparse_files_of_pax_are_refused(tmp_path: Path, temporary: Path, blocks: bytes) -> None:
    (tmp_path / "m.tar").write_bytes(blocks + bytes(10_240))
    refused(tmp_path / "m.tar", temporary, "it holds a sparse file")


def test_sparse_files_of_gnu_are_refused(tmp_path: Path, temporary: Path) -> None:
    info = tarfile.TarInfo("sparse")
    info.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "m.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    refused(tmp_path / "m.tar", temporary, "it holds a sparse file")


@pytest.mark.timeout(30)
def test_many_long_headers_are_refused(tmp_path: Path, temporary: Path) -> None:
    digits = tarfile.TarInfo("digits")
    digits.type, digits.size = tarfile.XGLTYPE, archive.MAX_HEADER_BYTES
    chain = (digits.tobuf(tarfile.GNU_FORMAT) + b"9" * digits.size) * 100
    (tmp_path / "m.tar").write_bytes(chain + bytes(10_240))
    refused(tmp_path / "m.tar", temporary, r"m\.tar is no readable tar archive")


def test_what_is_wrong_inside_an_archive_is_told_with_the_archives_name(tmp_path: Path, temporary: Path) -> None:
    packed = pack(tmp_path / "m.tar.gz", member("line\nbreak", b""), member("\x1b[31m", b""))
    with pytest.raises(ArtifactError) as caught, model_folder(packed) as folder:
        open_artifact(folder)
    assert str(caught.value).startswith(f"There is no manifest.json among what {packed} holds (")
    assert str(caught.value).isprintable()
