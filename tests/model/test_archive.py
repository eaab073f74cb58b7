"""Model archives: good ones are unpacked, hostile and damaged ones leave nothing behind."""

import gzip
import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from service.model import archive
from service.model.archive import unpack
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
def parent(tmp_path: Path) -> Path:
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.mark.parametrize(("name", "mode"), [("model.tar.gz", "w:gz"), ("model.tar", "w"), ("model.tar.xz", "w:xz")])
def test_a_good_archive_is_unpacked_into_a_new_folder(tmp_path: Path, parent: Path, name: str, mode: str) -> None:
    content = noise(100_000)
    packed = pack(
        tmp_path / name,
        member("./manifest.json", b"{}"),
        member("code", kind=tarfile.DIRTYPE),
        member("code/weights.bin", content),
        mode=mode,
    )
    target = unpack(packed, parent)
    assert target.parent == parent
    assert {str(path.relative_to(target)) for path in target.rglob("*")} == {
        "manifest.json",
        "code",
        "code/weights.bin",
    }
    assert (target / "code" / "weights.bin").read_bytes() == content
    assert unpack(packed, parent) != target


def test_without_a_parent_the_systems_temporary_folder_is_used(
    tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(parent))
    assert unpack(pack(tmp_path / "m.tar.gz", member("a", b"a"))).parent == parent


def test_unpacked_files_are_neither_executable_nor_anothers(tmp_path: Path, parent: Path) -> None:
    info, content = member("script", b"#!/bin/sh")
    info.mode, info.uid, info.gid = 0o6777, 12345, 12345
    status = (unpack(pack(tmp_path / "m.tar.gz", (info, content)), parent) / "script").stat()
    assert status.st_mode & 0o7022 == 0
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
    tmp_path: Path, parent: Path, members: list[Member]
) -> None:
    packed = pack(tmp_path / "model.tar.gz", member("first", noise(10_000)), *members)
    with pytest.raises(ArtifactError, match=r"model\.tar\.gz"):
        unpack(packed, parent)
    assert list(parent.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"temporary", "model.tar.gz"}


def test_an_absolute_path_stays_inside_the_folder(tmp_path: Path, parent: Path) -> None:
    outside = tmp_path / "outside"
    try:
        unpacked = unpack(pack(tmp_path / "m.tar.gz", member(str(outside), b"evil")), parent)
    except ArtifactError:
        assert list(parent.iterdir()) == []
    else:
        assert [path.name for path in unpacked.rglob("*") if path.is_file()] == ["outside"]
    assert not outside.exists()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9])
@pytest.mark.parametrize(("name", "mode"), [("m.tar.gz", "w:gz"), ("m.tar.xz", "w:xz"), ("m.tar.bz2", "w:bz2")])
def test_a_truncated_archive_is_refused_and_nothing_is_left(
    tmp_path: Path, parent: Path, share: float, name: str, mode: str
) -> None:
    packed = pack(tmp_path / name, member("a", noise(60_000)), member("b", noise(60_000)), mode=mode)
    content = packed.read_bytes()
    packed.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ArtifactError, match=name):
        unpack(packed, parent)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize(("name", "mode"), [("m.tar.xz", "w:xz"), ("m.tar.bz2", "w:bz2")])
def test_an_archive_damaged_in_the_middle_is_refused_and_nothing_is_left(
    tmp_path: Path, parent: Path, name: str, mode: str
) -> None:
    packed = pack(tmp_path / name, member("a", b"0123456789" * 20_000 + noise(100_000)), mode=mode)
    content = bytearray(packed.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 2000] = bytes(2000)
    packed.write_bytes(content)
    with pytest.raises(ArtifactError, match=name):
        unpack(packed, parent)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", b"PK\x03\x04" + bytes(600), gzip.compress(b"gzip, but no tar" * 100)],
    ids=["empty", "text", "zip", "gzip of something else"],
)
def test_a_file_that_is_no_tar_archive_is_refused_and_nothing_is_left(
    tmp_path: Path, parent: Path, content: bytes
) -> None:
    (tmp_path / "model.tar.gz").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.tar\.gz is no readable tar archive"):
        unpack(tmp_path / "model.tar.gz", parent)
    assert list(parent.iterdir()) == []


def test_an_archive_that_is_not_there_is_refused_naming_it(tmp_path: Path, parent: Path) -> None:
    with pytest.raises(ArtifactError, match=r"missing\.tar\.gz cannot be unpacked.*No such file"):
        unpack(tmp_path / "missing.tar.gz", parent)
    assert list(parent.iterdir()) == []


def test_a_temporary_folder_that_cannot_be_made_is_an_artifact_error(tmp_path: Path) -> None:
    packed = pack(tmp_path / "m.tar.gz", member("a", b"a"))
    with pytest.raises(ArtifactError):
        unpack(packed, tmp_path / "nowhere")


def headers(*sizes: int) -> list[Member]:
    return [member(f"part{i}", bytes(size)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [(1001,), (600, 401)])
def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(ArtifactError, match="unpacks to more than 1,000 bytes"):
        unpack(pack(tmp_path / "m.tar.gz", *headers(*sizes)), parent)
    assert list(parent.iterdir()) == []


def test_an_archive_of_exactly_the_limit_is_unpacked(
    tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 1000)
    assert unpack(pack(tmp_path / "m.tar.gz", *headers(600, 400)), parent).is_dir()


def test_a_size_that_is_only_claimed_is_refused_before_anything_is_written(
    tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted: list[str] = []
    original: Callable[..., None] = tarfile.TarFile.extract
    monkeypatch.setattr(
        tarfile.TarFile, "extract", lambda self, m, *a, **k: (extracted.append(m.name), original(self, m, *a, **k))
    )
    info = tarfile.TarInfo("huge")
    info.size = 2**40
    (tmp_path / "m.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(ArtifactError, match="unpacks to more than"):
        unpack(tmp_path / "m.tar", parent)
    assert extracted == []
    assert list(parent.iterdir()) == []


@pytest.mark.timeout(10)
def test_a_negative_size_is_refused_and_is_not_read_in_circles(tmp_path: Path, parent: Path) -> None:
    again = tarfile.TarInfo("again")
    again.size = -512  # the next header would then be this one
    first, content = member("first", bytes(512))
    blocks = [first.tobuf(tarfile.GNU_FORMAT), content, again.tobuf(tarfile.GNU_FORMAT), bytes(100_000)]
    (tmp_path / "m.tar").write_bytes(b"".join(blocks))
    with pytest.raises(ArtifactError):
        unpack(tmp_path / "m.tar", parent)
    assert list(parent.iterdir()) == []
