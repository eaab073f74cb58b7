"""What ends the start of the service, as a real process: exit status 1, one sentence, no code of the model executed."""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.engines.base import Logits
from service.engines.fake import FakeEngine
from service.model.artifact import open_artifact
from service.model.resize import PixelBatch
from tests.conftest import environment, free_port
from tests.service.served import serve

ROOT = Path(__file__).parents[2]


def refusal(model: Path, *before: str, program: str | None = None, **env: str) -> str:
    """The one error line of a start that failed. `before`: what starts the command; `program`: Python in its place."""
    python = [sys.executable, *(("-m", "service") if program is None else ("-c", program))]
    command = [*before, *python, "--model", str(model), "--port", str(free_port())]
    result = subprocess.run(
        [*command, "--host", "127.0.0.1"], cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=200
    )
    said = result.stdout + result.stderr
    assert result.returncode == 1, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if " ERROR " in line]
    assert line.endswith("."), line
    return line


def reseal(folder: Path, **changed: object) -> None:
    """Change the manifest as someone would who knows how it is sealed."""
    path = folder / "manifest.json"
    fields = {**json.loads(path.read_bytes()), **changed, "manifest_sha256": "0" * 64}
    text = json.dumps(fields, indent=2)
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))


def replace_weights(folder: Path, content: bytes) -> None:
    """Other weights, with the hash that fits them."""
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    (folder / "weights.other").write_bytes(content)
    entry = {"path": "weights.other", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    reseal(folder, files={**files, "weights": entry})


class Touch:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def model(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "model"))


def test_truncated_weights(model: Path) -> None:
    path = open_artifact(model).path("weights")
    os.truncate(path, path.stat().st_size // 2)
    assert f"{path} is damaged: it has" in refusal(model)


def test_a_wrong_number_of_classes(model: Path) -> None:
    classes = [*open_artifact(model).manifest.classes, "one more"]
    reseal(model, classes=classes)
    assert "classes, but" in refusal(model)


def test_weights_of_another_number_of_classes(model: Path) -> None:
    manifest = json.loads((model / "manifest.json").read_bytes())
    classes = [*manifest["classes"], "one more"]
    reseal(model, classes=classes, architecture={**manifest["architecture"], "num_classes": len(classes)})
    refusal(model)


def test_another_format_version(model: Path) -> None:
    reseal(model, format_version=99)
    assert "format version 99" in refusal(model)


def test_a_model_that_would_predict_otherwise(model: Path) -> None:
    reseal(
        model, preprocessing={**json.loads((model / "manifest.json").read_bytes())["preprocessing"], "mean": [0, 0, 0]}
    )
    assert "self-check failed" in refusal(model)


def test_a_pickle_in_place_of_the_weights_is_not_loaded(model: Path, tmp_path: Path) -> None:
    replace_weights(model, pickle.dumps(Touch(tmp_path / "executed")))
    assert "weights.other is not a safetensors file" in refusal(model)
    assert not (tmp_path / "executed").exists()


def broken(folder: Path, package: str, text: str) -> str:
    """A folder for PYTHONPATH in which the package is this module."""
    (folder / "broken" / package).mkdir(parents=True)
    (folder / "broken" / package / "__init__.py").write_text(text)
    return str(folder / "broken")


@pytest.mark.parametrize("kind", ["ImportError", "RuntimeError", "OSError"])
def test_a_native_library_that_is_missing(kind: str, model: Path, tmp_path: Path) -> None:
    missing = "libtbb.so.12: cannot open shared object file: No such file or directory"
    path = broken(tmp_path, "openvino", f"raise {kind}({missing!r})")
    said = refusal(model, PYTHONPATH=path, CLASSIFIER_ENGINE="openvino-fp32")
    assert "The engine openvino-fp32 needs a package that cannot be imported (libtbb.so.12: cannot open" in said


def test_a_library_that_crashes_when_it_is_imported_is_named(model: Path, tmp_path: Path) -> None:
    """Nothing can catch that; where it happened is told on stderr."""
    path = broken(tmp_path, "openvino", "import signal\nsignal.raise_signal(signal.SIGILL)")
    command = [
        sys.executable,
        "-m",
        "service",
        "--model",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(free_port()),
    ]
    died = subprocess.run(
        command, cwd=ROOT, env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=60, check=False
    )
    assert died.returncode == -signal.SIGILL
    assert "Fatal Python error: Illegal instruction" in died.stderr
    assert str(Path("openvino") / "__init__.py") in died.stderr


@pytest.mark.parametrize("package", ["PIL", "numpy"])
def test_a_library_that_is_missing_for_another_package(model: Path, tmp_path: Path, package: str) -> None:
    missing = "libz.so.1: cannot open shared object file: No such file or directory"
    advice = "raise ImportError('IMPORTANT: how to solve it ...') from exc"  # as numpy does
    path = broken(tmp_path, package, f"try: raise ImportError({missing!r})\nexcept ImportError as exc: {advice}")
    said = refusal(model, PYTHONPATH=path, CLASSIFIER_WORKERS="2")
    assert f"a package that it needs cannot be imported ({missing}); install what uv.lock has" in said


@pytest.mark.parametrize("words", ["std::bad_alloc", "failed to map segment from shared object"])
def test_a_model_for_which_there_is_not_enough_memory(words: str, caplog: pytest.LogCaptureFixture) -> None:
    class Starved(FakeEngine):
        def infer(self, batch: PixelBatch) -> Logits:
            raise RuntimeError(words)

    failed = threading.Event()
    with serve(Starved(2), ready=False, on_failure=failed.set) as served:
        served.until(failed.is_set)
        reply = served.ask("GET", "/ping")
        assert (reply.status, reply.json["status"]) == (503, "failed")
    assert f"There is not enough memory for it ({words}); give the process more" in caplog.text


def test_a_start_that_does_not_end(model: Path) -> None:
    program = (
        "import time, service.__main__ as m; m.prepare = lambda _: True; m.serve = lambda *_: time.sleep(60); "
        "raise SystemExit(m.main())"
    )
    said = refusal(model, program=program, CLASSIFIER_START_TIMEOUT_S="1")
    assert "worker 0 was not ready within 1 s and is killed; CLASSIFIER_START_TIMEOUT_S allows more." in said


def test_too_few_open_files(model: Path) -> None:
    limited = ("sh", "-c", 'ulimit -n 300; exec "$@"', "sh")
    said = refusal(model, *limited)
    assert "This process may open 300 files, the service needs 512; raise the limit (ulimit -n 4096)." in said
    said = refusal(model, *limited, CLASSIFIER_WORKERS="2")
    assert "the service needs 1024; raise the limit (ulimit -n 8192)." in said


def test_too_few_processes_and_threads(model: Path) -> None:
    """What the container's group allows is told by a function, since tests have no group of their own."""
    program = "import service.__main__ as m; m.tasks = lambda: 40; raise SystemExit(m.main())"
    said = refusal(model, program=program, CLASSIFIER_WORKERS="2")
    assert "This container may have 40 processes and threads, the service needs 48; raise the limit" in said
    assert said.endswith("(docker run --pids-limit 512), or set fewer CLASSIFIER_WORKERS.")
    said = refusal(model, program=program.replace("40", "10"))
    assert said.endswith("may have 10 processes and threads, the service needs 24; raise the limit (docker run "
                         "--pids-limit 256).")  # fmt: skip


def test_code_that_lies_beside_the_model_is_not_executed(
    model: Path, tmp_path: Path, start_server: Callable[..., object]
) -> None:
    (model / "code").mkdir()
    for place in (
        model / "code" / "inference.py",
        model / "inference.py",
        model / "numpy.py",
        model / "sitecustomize.py",
    ):
        place.write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})")
    with start_server(model) as server:  # type: ignore[attr-defined]
        assert server.ask("GET", "/ping").status == 200
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["weights", "example", "manifest"])
def test_a_link_in_place_of_a_file(model: Path, tmp_path: Path, name: str) -> None:
    path = model / "manifest.json" if name == "manifest" else open_artifact(model).path(name)
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    assert f"{path} is a link; copy the file itself into the artifact." in refusal(model)


def test_a_link_in_place_of_the_folder_inside(model: Path, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    link = tmp_path / "given/model"
    link.symlink_to(model)
    assert f"{str(link)!r} is a link; copy the folder itself." in refusal(tmp_path / "given")


def test_a_link_to_nowhere_in_place_of_a_file(model: Path) -> None:
    path = open_artifact(model).path("weights")
    path.unlink()
    path.symlink_to("/nowhere")
    assert f"{path} is a link" in refusal(model)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("../../outside", tarfile.REGTYPE, "leads out of the folder"),
        ("/tmp/outside", tarfile.REGTYPE, "leads out of the folder"),
        ("link", tarfile.SYMTYPE, "is no plain file"),
        ("pipe", tarfile.FIFOTYPE, "is no plain file"),
    ],
)
def test_an_archive_that_is_not_of_plain_files(model: Path, tmp_path: Path, name: str, kind: bytes, said: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.addfile(member, io.BytesIO())
        archive.add(model, ".")
    assert said in refusal(tmp_path / "model.tar.gz")


def test_an_archive_that_unpacks_to_more_than_is_allowed(tmp_path: Path) -> None:
    big = tarfile.TarInfo("weights.bin")
    big.size = 5 * 2**30
    (tmp_path / "model.tar").write_bytes(big.tobuf() + b"\0" * 10240)
    assert "unpacks to more than" in refusal(tmp_path / "model.tar")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"A small file system cannot be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_full_while_unpacking(model: Path, tmp_path: Path, full_disk: Path) -> None:
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(model, ".")
    assert "No space left on device" in refusal(tmp_path / "model.tar.gz", TMPDIR=str(full_disk))


@pytest.mark.parametrize("host", ["192.0.2.1", "nonsense.invalid"])
def test_an_address_that_is_not_this_machines(model: Path, host: str) -> None:
    command = [sys.executable, "-m", "service", "--model", str(model), "--host", host, "--port", str(free_port())]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert f"Cannot listen on {host} port" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("host", ["ü" * 70, "no.such.host.invalid"])
def test_a_host_that_is_none_is_told_in_a_sentence(model: Path, host: str) -> None:
    command = [sys.executable, "-m", "service", "--model", str(model), "--host", host, "--port", str(free_port())]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert "; choose an address of this machine, or another port." in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_a_model_whose_name_is_too_long() -> None:
    assert "The model cannot be served. aaaa" in refusal(Path("a" * 5000))


def test_a_port_in_use(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "service", "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert "in use; stop what uses it or choose another port (make serve PORT=" in result.stdout
