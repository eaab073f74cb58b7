"""CIFAR-100: read as torchvision reads it, downloaded over real HTTP, never unpickled unless it is verified."""

import contextlib
import gc
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import socketserver
import struct
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR100

from training.data import cifar100
from training.data.cifar100 import FILES, FOLDER, download, read
from training.errors import DataError


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def contents(root: Path) -> dict[str, bytes]:
    return {name: (root / FOLDER / name).read_bytes() for name in FILES}


def replace(root: Path, name: str, content: bytes, described: bool) -> None:
    """Replace one file, and if `described` write the sample.json that vouches for it."""
    (root / FOLDER / name).write_bytes(content)
    description = root / FOLDER / "sample.json"
    if described:
        sha256 = {file: hashlib.sha256(found).hexdigest() for file, found in contents(root).items()}
        description.write_text(json.dumps({"sha256": sha256}))
    else:
        description.unlink()


class MakesFolder:
    """What it is pickled into makes a folder when it is loaded: the harmless form of running a program."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


class ArrayOverForeignMemory:
    """Objects whose addresses the file states: with others than these zeros, the interpreter's memory is theirs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.ndarray, ((2,), np.dtype("O"), bytes(16))


def python2_pickle(value: object) -> bytes:
    """Pickle as Python 2 did, which wrote the official files: text as byte strings, arrays by numpy.core."""
    if isinstance(value, str):
        raw = value.encode("latin1")
        return b"T" + struct.pack("<i", len(raw)) + raw
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2_pickle, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2_pickle(k) + python2_pickle(v) for k, v in value.items()) + b"u"
    assert isinstance(value, np.ndarray)
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\0K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    shape = b"(" + b"".join(map(python2_pickle, value.shape)) + b"t"
    return start + b"(K\x01" + shape + dtype + b"\x89" + python2_pickle(value.tobytes().decode("latin1")) + b"tb"


def genuine(name: str, root: Path) -> bytes:
    entry = pickle.loads((root / FOLDER / name).read_bytes())
    return b"\x80\x02" + python2_pickle(entry) + b"."


@contextlib.contextmanager
def running(server: socketserver.TCPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def file_server(folder: Path) -> socketserver.TCPServer:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))


def server_that_answers(answer: bytes) -> socketserver.TCPServer:
    """Answers every request with these bytes and hangs up."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(answer)

    return socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def own(sample_root: Path, tmp_path: Path) -> Path:
    """A copy of the sample that may be changed."""
    shutil.copytree(sample_root, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def published(sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tar.gz in the genuine format that torchvision and we take for CIFAR-100."""
    folder = tmp_path / "published"
    folder.mkdir()
    files = {name: genuine(name, sample_root) for name in FILES}
    with tarfile.open(folder / CIFAR100.filename, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{FOLDER}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5((folder / CIFAR100.filename).read_bytes()))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(files["train"])]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(files["test"])]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5(files["meta"])})
    monkeypatch.setattr(cifar100, "OFFICIAL_MD5", {name: md5(content) for name, content in files.items()})
    return folder


def test_the_generated_sample_reads_back(sample_root: Path) -> None:
    dataset = read(sample_root)
    assert (dataset.name, len(dataset.classes)) == ("generated-sample", 100)
    assert (len(dataset.train), len(dataset.validation)) == (200, 100)
    for images in (dataset.train, dataset.validation):
        image = images.image(3)
        assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
        assert images.labels.dtype == np.int64
        assert set(images.labels) == set(range(100))
    assert dataset.facts == {"folder": FOLDER, "split": "the files train and test"}


def test_torchvision_reads_the_sample_and_gives_the_same_pixels_and_labels(sample_root: Path) -> None:
    files = contents(sample_root)

    class Sample(CIFAR100):  # type: ignore[misc]
        train_list = [["train", md5(files["train"])]]  # noqa: RUF012
        test_list = [["test", md5(files["test"])]]  # noqa: RUF012
        meta = {**CIFAR100.meta, "md5": md5(files["meta"])}  # noqa: RUF012

    dataset = read(sample_root)
    for train, ours in ((True, dataset.train), (False, dataset.validation)):
        theirs = Sample(str(sample_root), train=train)
        assert tuple(theirs.classes) == dataset.classes
        assert theirs.targets == ours.labels.tolist()
        for index in range(len(ours)):
            np.testing.assert_array_equal(np.asarray(theirs[index][0]), ours.image(index))


def test_the_official_checksums_are_torchvisions() -> None:
    assert cifar100.OFFICIAL_MD5 == {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    }
    assert CIFAR100.tgz_md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert CIFAR100.url == "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_in_the_sample_is_refused_naming_the_file(own: Path, name: str) -> None:
    content = bytearray((own / FOLDER / name).read_bytes())
    content[len(content) // 2] ^= 1
    (own / FOLDER / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{FOLDER}/{name} is damaged"):
        read(own)


@pytest.mark.parametrize("name", FILES)
def test_files_that_nothing_vouches_for_are_refused_naming_url_and_md5(own: Path, name: str) -> None:
    (own / FOLDER / "sample.json").unlink()
    with pytest.raises(DataError, match=rf"{FOLDER}/{name}.*the md5 is not that of CIFAR-100.*kriz.*eb9058c3"):
        read(own)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("described", [False, True], ids=["without sample.json", "with a sample.json for it"])
def test_a_file_that_would_run_a_program_is_refused_and_nothing_runs(
    own: Path, tmp_path: Path, name: str, described: bool
) -> None:
    hostile = pickle.dumps({**pickle.loads(contents(own)[name]), "extra": MakesFolder(tmp_path / "it ran")})
    replace(own, name, hostile, described)
    with pytest.raises(DataError, match=rf"{FOLDER}/{name}"):
        read(own)
    assert not (tmp_path / "it ran").exists()
    pickle.loads(hostile)  # the trap does work
    assert (tmp_path / "it ran").exists()


def test_a_file_that_makes_arrays_over_foreign_memory_is_refused(own: Path) -> None:
    hostile = pickle.dumps({**pickle.loads(contents(own)["train"]), "extra": ArrayOverForeignMemory()})
    replace(own, "train", hostile, described=True)
    with pytest.raises(DataError, match=f"{FOLDER}/train cannot be read as CIFAR-100 has it"):
        read(own)


@pytest.mark.parametrize("junk", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({"data": 1})[:-3]])
def test_a_file_that_is_no_such_pickle_is_refused_naming_it(own: Path, junk: bytes) -> None:
    replace(own, "test", junk, described=True)
    with pytest.raises(DataError, match=f"{FOLDER}/test cannot be read as CIFAR-100 has it"):
        read(own)


@pytest.mark.parametrize(
    "changed",
    [
        {"data": None},
        {"data": np.zeros((100, 3071), np.uint8)},
        {"fine_labels": [0] * 99},
        {"fine_labels": [0] * 99 + [100]},
        {"fine_labels": [0] * 99 + [-1]},
        {"fine_labels": ["cat"] * 100},
        {"fine_labels": [], "data": np.zeros((0, 3072), np.uint8)},
    ],
    ids=["no pixels", "too few pixels", "too few labels", "label 100", "label -1", "labels are names", "no image"],
)
def test_images_and_labels_that_do_not_fit_are_refused(own: Path, changed: dict[str, object]) -> None:
    replace(own, "test", pickle.dumps({**pickle.loads(contents(own)["test"]), **changed}), described=True)
    with pytest.raises(DataError, match="does not hold images and labels as CIFAR-100 has them"):
        read(own)


@pytest.mark.parametrize("missing", ["data", "fine_labels"])
def test_an_entry_that_is_missing_is_named(own: Path, missing: str) -> None:
    entry = pickle.loads(contents(own)["test"])
    del entry[missing]
    replace(own, "test", pickle.dumps(entry), described=True)
    with pytest.raises(DataError, match=missing):
        read(own)


@pytest.mark.parametrize(
    "description", [b"", b"{", b"[]", b"{}", b'{"sha256": null}', b'{"sha256": "x"}', b'{"sha256": {}}', b"\xff"]
)
def test_a_damaged_description_of_the_sample_is_refused(own: Path, description: bytes) -> None:
    (own / FOLDER / "sample.json").write_bytes(description)
    with pytest.raises(DataError, match=r"is damaged; delete .* and generate the sample again"):
        read(own)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_saying_how_to_get_it(own: Path, name: str) -> None:
    (own / FOLDER / name).unlink()
    with pytest.raises(DataError, match=rf"{name} cannot be read \(No such file or directory\)"):
        read(own)


@pytest.mark.filterwarnings("ignore:.*tar:DeprecationWarning")  # torchvision's unpacking, on Python 3.12 and 3.13
def test_a_download_in_the_genuine_format_is_verified_and_reads(
    published: Path, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    with running(file_server(published)) as address:
        monkeypatch.setattr(CIFAR100, "url", f"{address}/{CIFAR100.filename}")
        download(root)
    dataset, drawn = read(root), read(sample_root)
    assert (dataset.name, dataset.classes) == ("cifar-100", drawn.classes)
    for ours, theirs in ((dataset.train, drawn.train), (dataset.validation, drawn.validation)):
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        assert all((ours.image(i) == theirs.image(i)).all() for i in range(len(theirs)))
    download(root)  # there is no server any more, and none is needed
    assert socket.getdefaulttimeout() is None


@pytest.mark.filterwarnings("ignore:.*tar:DeprecationWarning")
def test_a_damaged_archive_of_an_earlier_try_is_fetched_again(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / CIFAR100.filename).write_bytes(b"half")
    with running(file_server(published)) as address:
        monkeypatch.setattr(CIFAR100, "url", f"{address}/{CIFAR100.filename}")
        download(root)
    assert read(root).name == "cifar-100"


def test_an_archive_with_another_md5_is_refused_and_not_unpacked(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (published / CIFAR100.filename).open("ab") as file:
        file.write(b"\0")
    with running(file_server(published)) as address:
        monkeypatch.setattr(CIFAR100, "url", f"{address}/{CIFAR100.filename}")
        with pytest.raises(DataError, match="CIFAR-100 cannot be downloaded"):
            download(tmp_path / "data")
    assert not (tmp_path / "data" / FOLDER).exists()


def assert_says_what_to_do(message: str, root: Path) -> None:
    assert "CIFAR-100 cannot be downloaded (" in message
    assert f"Fetch {CIFAR100.url} (md5 eb9058c3a382ffc7106e4002c42a8d85)" in message
    assert f"unpack it so that {root / FOLDER / 'train'} exists" in message


def test_a_server_that_cannot_be_reached_gives_url_md5_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{closed_port()}/cifar-100-python.tar.gz")
    with pytest.raises(DataError) as refused:
        download(tmp_path)
    assert_says_what_to_do(str(refused.value), tmp_path)
    assert socket.getdefaulttimeout() is None


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n1000\r\nhalf",
        b"this is not HTTP\r\n\r\n",
        b"",
    ],
    ids=["not found", "cut short", "cut short in chunks", "not HTTP", "hangs up"],
)
def test_a_server_that_misbehaves_gives_url_md5_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    with running(server_that_answers(answer)) as address:
        monkeypatch.setattr(CIFAR100, "url", f"{address}/cifar-100-python.tar.gz")
        try:
            download(tmp_path)
        except DataError as exc:
            assert_says_what_to_do(str(exc), tmp_path)
        else:
            raise AssertionError("nothing was refused")
    gc.collect()  # urllib leaves the socket to it
