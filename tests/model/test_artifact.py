"""The artifact: it comes back as it was written, no damage goes unnoticed, and no interruption leaves a mixture."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from pydantic import ValidationError

from service.model.architecture import Architecture
from service.model.artifact import Artifact, Int8Network, SelfCheck, add_int8, open_artifact, write_artifact
from service.model.errors import ArtifactError
from service.model.files import MANIFEST
from service.model.manifest import Quantization, Role
from service.model.preprocess import Preprocessing

ROOT = Path(__file__).parents[2]
ROLES: tuple[Role, ...] = ("weights", "self_check", "example")
FACTS: dict[str, Any] = {
    "name": "tiny",
    "architecture": Architecture(num_classes=3),
    "classes": ("cat", "dög", "two words"),
    "preprocessing": Preprocessing(side_px=8),
    "example": {"label": "cat", "media_type": "image/png"},
    "hyperparameters": {"epochs": 1},
    "dataset": {"name": "drawn"},
    "metrics": {"validation": {"accuracy": 0.5}},
    "packages": {"python": "3.11"},
}


def self_check() -> SelfCheck:
    return SelfCheck(np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3), np.ones((2, 3), np.float32))


def write(folder: Path, value: float = 0.0, size: int = 64, **facts: object) -> Artifact:
    weights = {"layer.weight": np.full(size, value, np.float32), "layer.count": np.array(7)}
    return write_artifact(folder, {**FACTS, **facts}, weights, self_check(), (".png", b"not looked at"))


def reseal(folder: Path, **changed: object) -> None:
    """Change fields of the manifest as someone would who knows how it is sealed."""
    path = folder / MANIFEST
    fields = {**json.loads(path.read_bytes()), **changed, "manifest_sha256": "0" * 64}
    text = json.dumps(fields, indent=2)
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))


def flip(path: Path, position: int, mask: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)


def assert_whole(folder: Path) -> Artifact:
    artifact = open_artifact(folder)
    for role in ROLES:
        artifact.read(role)
    assert len(np.unique(artifact.weights()["layer.weight"])) == 1
    assert artifact.self_check().logits.shape == (2, 3)
    return artifact


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "model")
    return tmp_path / "model"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = write(tmp_path / "new" / "model", 2.5)
    artifact = open_artifact(tmp_path / "new" / "model")
    assert artifact == written
    for name, value in FACTS.items():
        got = getattr(artifact.manifest, name)
        assert (got.model_dump() if name == "example" else got) == value
    weights = artifact.weights()
    np.testing.assert_array_equal(weights["layer.weight"], np.full(64, 2.5, np.float32))
    assert weights["layer.count"].shape == ()
    assert weights["layer.count"] == 7
    check = artifact.self_check()
    np.testing.assert_array_equal(check.inputs, self_check().inputs)
    np.testing.assert_array_equal(check.logits, self_check().logits)
    assert artifact.read("example") == b"not looked at"
    assert artifact.path("example").suffix == ".png"


def test_the_version_tells_the_weights(tmp_path: Path) -> None:
    one, two, again = (write(tmp_path / name, value).manifest.version for name, value in [("a", 1), ("b", 2), ("c", 1)])
    assert one == again != two


def test_every_file_is_named_by_its_content_and_its_hash_stands_in_the_manifest(folder: Path) -> None:
    fields = json.loads((folder / MANIFEST).read_bytes())
    assert names(folder) == {MANIFEST, *(entry["path"] for entry in fields["files"].values())}
    for entry in fields["files"].values():
        content = (folder / entry["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert entry["sha256"][:12] in entry["path"]
        assert len(content) == entry["bytes"]


@pytest.mark.parametrize("role", ROLES)
def test_a_flipped_byte_is_refused_naming_the_file(folder: Path, role: Role) -> None:
    artifact = open_artifact(folder)
    path = artifact.path(role)
    whole = path.read_bytes()
    rng = random.Random(role)
    for position in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(100))}:
        flip(path, position, 1 << rng.randrange(8))
        with pytest.raises(ArtifactError, match=path.name):
            open_artifact(folder).read(role)
        path.write_bytes(whole)
    artifact.read(role)


def test_a_flipped_byte_anywhere_in_the_manifest_is_refused_naming_it(folder: Path) -> None:
    path = folder / MANIFEST
    whole = path.read_bytes()
    rng = random.Random(0)
    seal = whole.rindex(b'"manifest_sha256"')
    positions = {*rng.sample(range(len(whole)), 200), *rng.sample(range(seal, len(whole)), 30), 0, len(whole) - 1}
    positions |= set(rng.sample([i for i, byte in enumerate(whole) if byte in b" \n"], 20))
    for position in positions:
        flip(path, position, rng.randrange(1, 256))
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            open_artifact(folder)
        path.write_bytes(whole)
    open_artifact(folder)


@pytest.mark.parametrize("old_and_new", [(b"\n", b"\r\n"), (b"  ", b" "), (b"\n}", b"}"), (b"tiny", b"tinY")])
def test_a_manifest_edited_by_hand_is_refused(folder: Path, old_and_new: tuple[bytes, bytes]) -> None:
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes().replace(*old_and_new))
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        open_artifact(folder)


def test_a_seal_in_capital_letters_is_refused(folder: Path) -> None:
    fields = json.loads((folder / MANIFEST).read_bytes())
    seal = fields["manifest_sha256"]
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace(seal, seal.upper()))
    with pytest.raises(ArtifactError, match="damaged"):
        open_artifact(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"text"', b"{}", b"\xff\xfe{}", b'{"manifest_sha256": 0}', b'{"a":' + b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "text", "no fields", "no utf-8", "seal is a number", "deeply nested"],
)
def test_a_manifest_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_artifact(folder)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_manifest_is_refused(folder: Path, share: float) -> None:
    content = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        open_artifact(folder)


@pytest.mark.parametrize("role", ROLES)
def test_a_missing_file_is_refused_naming_it(folder: Path, role: Role) -> None:
    artifact = open_artifact(folder)
    artifact.path(role).unlink()
    with pytest.raises(ArtifactError, match=rf"{artifact.path(role).name} is missing"):
        artifact.read(role)


@pytest.mark.parametrize("role", ROLES)
def test_a_truncated_or_extended_file_is_refused_naming_it(folder: Path, role: Role) -> None:
    artifact = open_artifact(folder)
    path = artifact.path(role)
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=rf"{path.name} is damaged: it has {len(damaged):,} bytes"):
            artifact.read(role)


def test_a_folder_in_place_of_a_file_is_refused_naming_it(folder: Path) -> None:
    artifact = open_artifact(folder)
    artifact.path("example").unlink()
    artifact.path("example").mkdir()
    with pytest.raises(ArtifactError, match=artifact.path("example").name):
        artifact.read("example")


def test_a_missing_manifest_is_refused_saying_what_was_found(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json among .*weights\.[0-9a-f]{12}\.safetensors"):
        open_artifact(folder)


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_path_that_is_no_folder_is_refused_naming_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=f"There is no model at .*{name}"):
        open_artifact(tmp_path / name)


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_format_version_is_refused_saying_which_is_read(folder: Path, version: object) -> None:
    reseal(folder, format_version=version)
    with pytest.raises(ArtifactError, match=rf"format version {version!r}, this release reads 1 and 2"):
        open_artifact(folder)


@pytest.mark.parametrize("path", ["../weights", "/etc/passwd", "a/b", "", ".hidden", "a\nb"])
def test_a_manifest_cannot_name_files_outside_its_folder(folder: Path, path: str) -> None:
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    reseal(folder, files={**files, "weights": {**files["weights"], "path": path}})
    with pytest.raises(ArtifactError, match=r"not a valid manifest: files\.weights"):
        open_artifact(folder)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"classes": ["a", "b"]}, "3 classes, but 2 are named"),
        ({"classes": ["a", "b", "a"]}, "named twice"),
        ({"files": {}}, "no entry for example, self_check, weights"),
        ({"surplus": 1}, "surplus"),
        ({"name": ""}, "name"),
        ({"created_at": "yesterday"}, "created_at"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder: Path, changed: dict[str, object], reason: str) -> None:
    reseal(folder, **changed)
    with pytest.raises(ArtifactError, match=f"not a valid manifest.*{reason}"):
        open_artifact(folder)


def test_a_file_with_the_right_hash_that_is_no_safetensors_is_refused_naming_it(folder: Path) -> None:
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    junk = b"junk" * 10
    (folder / "weights.junk").write_bytes(junk)
    entry = {"path": "weights.junk", "sha256": hashlib.sha256(junk).hexdigest(), "bytes": len(junk)}
    reseal(folder, files={**files, "weights": entry})
    with pytest.raises(ArtifactError, match=r"weights\.junk is not a safetensors file"):
        open_artifact(folder).weights()


@pytest.mark.parametrize(
    ("inputs", "logits"),
    [
        (np.zeros((2, 9, 9, 3), np.uint8), np.zeros((2, 3), np.float32)),
        (np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 3), np.float32)),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 4), np.float32)),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 3), np.float64)),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 3), np.float32)),
    ],
    ids=["side", "input type", "classes", "logits type", "no image"],
)
def test_a_self_check_of_other_shapes_is_refused(tmp_path: Path, inputs: Any, logits: Any) -> None:
    weights = {"w": np.zeros(1, np.float32)}
    artifact = write_artifact(tmp_path, FACTS, weights, SelfCheck(inputs, logits), (".png", b""))
    with pytest.raises(ArtifactError, match=r"self_check.* does not hold inputs \[n, 8, 8, 3\]"):
        artifact.self_check()


def test_an_artifact_one_folder_down_is_found(folder: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    shutil.copytree(folder, outer / "model")
    (outer / "README").touch()
    (outer / "empty").mkdir()
    assert assert_whole(outer).folder == outer / "model"


def test_a_folder_may_be_given_by_a_link_but_the_one_inside_is_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert assert_whole(tmp_path / "link").folder == tmp_path / "link"
    outer = tmp_path / "outer"
    shutil.copytree(folder, outer / "model")
    (tmp_path / "other").symlink_to(outer)
    assert assert_whole(tmp_path / "other").folder == tmp_path / "other/model"
    (outer / "linked").symlink_to(folder)
    with pytest.raises(ArtifactError, match="linked' is a link; copy the folder itself"):
        open_artifact(outer)


def test_two_artifacts_one_folder_down_are_refused_naming_them(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(folder, tmp_path / "outer" / name)
    with pytest.raises(ArtifactError, match="one, two"):
        open_artifact(tmp_path / "outer")


def test_an_artifact_two_folders_down_is_not_guessed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "outer" / "inner" / "model")
    with pytest.raises(ArtifactError, match=r"holds \(inner\)"):
        open_artifact(tmp_path / "outer")


def test_a_new_artifact_replaces_the_old_one_and_nothing_else(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "weights.best.safetensors").touch()
    new = write(folder, 1.0)
    kept = {"notes.txt", "weights.best.safetensors"}
    assert names(folder) == {MANIFEST, *(new.path(role).name for role in ROLES), *kept}
    assert assert_whole(folder).weights()["layer.weight"][0] == 1.0


def test_leftovers_of_an_interrupted_write_are_removed_by_the_next(folder: Path) -> None:
    leftovers = [".manifest.json.partial", ".weights.0123456789ab.safetensors.partial", "example.0123456789ab.jpeg"]
    for name in leftovers:
        (folder / name).write_bytes(b"half")
    assert_whole(folder)
    write(folder, 1.0)
    assert not names(folder) & set(leftovers)


def test_writing_the_same_again_keeps_it_whole(folder: Path) -> None:
    write(folder)
    assert_whole(folder)
    assert len(names(folder)) == 4


def test_facts_that_make_no_manifest_leave_the_old_artifact_as_it_was(folder: Path) -> None:
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(ValidationError):
        write(folder, 1.0, classes=("one", "two"))
    assert (folder / MANIFEST).read_bytes() == before
    assert assert_whole(folder).weights()["layer.weight"][0] == 0.0


def test_the_weights_are_plain_safetensors_that_other_programs_read(folder: Path) -> None:
    artifact = open_artifact(folder)
    loaded = safetensors.numpy.load_file(artifact.path("weights"))
    assert set(loaded) == {"layer.weight", "layer.count"}


# A process that imports this file as a module and does one of three things in folder argv[3].
CHILD = """
import importlib.util, os, random, resource, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("the_tests", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
task, folder = sys.argv[2], Path(sys.argv[3])

def write_alternately(times, start=0, report=None):
    for i in range(start, start + times):
        tests.write(folder, float(i % 2), 200_000)
        if report is not None:
            os.write(report, b".")

if task == "write":
    print("ready", flush=True)
    sys.stdin.readline()
    write_alternately(10)
if task == "be killed":
    rng = random.Random(0)
    for i, line in enumerate(sys.stdin):  # one line, one writer, killed at some moment after 0, 1 or 2 writes
        done, report = os.pipe()
        child = os.fork()
        if child == 0:
            write_alternately(10**9, i, report)
        for _ in range(i % 3):
            os.read(done, 1)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(done)
        os.close(report)
        print("killed", flush=True)
if task == "fill the disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        tests.write(folder, 1.0, 200_000)
    except OSError as exc:
        print("OSError", flush=True)
"""


def child(task: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, __file__, task, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_writer_killed_at_any_moment_leaves_a_whole_artifact(folder: Path) -> None:
    seen = set()
    with child("be killed", folder) as killed:
        assert killed.stdin is not None
        assert killed.stdout is not None
        for _ in range(20):
            print("go", file=killed.stdin, flush=True)
            assert killed.stdout.readline() == "killed\n"
            seen.add(float(assert_whole(folder).weights()["layer.weight"][0]))
        killed.stdin.close()
    assert killed.returncode == 0
    assert seen == {0.0, 1.0}
    write(folder)
    assert len(names(folder)) == 4


def test_two_writers_at_once_both_succeed_and_leave_one_whole_artifact(folder: Path) -> None:
    with child("write", folder) as one, child("write", folder) as two:
        for writer in (one, two):
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in (one, two):
            assert writer.stdin is not None
            print("go", file=writer.stdin, flush=True)
    assert (one.returncode, two.returncode) == (0, 0)
    assert_whole(folder)
    assert len(names(folder)) == 4


def test_a_full_disk_is_an_oserror_and_leaves_the_old_artifact(folder: Path) -> None:
    with child("fill the disk", folder) as writer:
        assert writer.stdout is not None
        assert writer.stdout.read() == "OSError\n"
    assert assert_whole(folder).weights()["layer.weight"][0] == 0.0
    write(folder, 1.0)
    assert len(names(folder)) == 4


@pytest.mark.parametrize("text", ["", "two\nlines", "\x1b[31mred", "\ud800", "x" * 257])
@pytest.mark.parametrize("field", ["name", "version", "classes", "label"])
def test_text_that_no_log_or_answer_can_carry_is_refused(folder: Path, field: str, text: str) -> None:
    classes = ["cat", "dog", text] if field == "classes" else list(FACTS["classes"])
    example = {"label": text if field == "label" else "cat", "media_type": "image/png"}
    changed: dict[str, object] = {field: text} if field in ("name", "version") else {}
    reseal(folder, **{"classes": classes, "example": example, **changed})
    with pytest.raises(ArtifactError, match="is not a valid manifest") as refused:
        open_artifact(folder)
    assert str(refused.value).isprintable()


def test_a_pipe_in_place_of_a_file_is_refused_and_not_read(folder: Path) -> None:
    path = open_artifact(folder).path("example")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match="no plain file"):
        open_artifact(folder).read("example")


def test_a_file_of_gigabytes_is_refused_and_not_read(folder: Path) -> None:
    artifact = open_artifact(folder)
    path = artifact.path("weights")
    os.truncate(path, 3 * 2**30)  # sparse
    files = {role: entry.model_dump() for role, entry in artifact.manifest.files.items()}
    files["weights"]["bytes"] = 3 * 2**30
    reseal(folder, files=files)
    with pytest.raises(ArtifactError, match="has 3,221,225,472 bytes, 2,147,483,648 are allowed"):
        open_artifact(folder).read("weights")


def test_an_interrupted_write_leaves_no_partial_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("service.model.artifact.os.fsync", full)
    before = names(folder)
    with pytest.raises(OSError, match="No space left"):
        write(folder, value=3.0)
    assert names(folder) == before
    assert_whole(folder)


def int8(text: bytes = b"graph") -> Int8Network:
    figures = {"method": "by hand", "calibration_images": 3, "n": 7, "self_check_difference": 0.1}
    shares = {"top1_agreement": 0.9, "accuracy": 0.5, "accuracy_float32": 0.6}
    return Int8Network(text, text + b" weights", Quantization.model_validate({**figures, **shares}))


def test_an_int8_network_is_added_and_everything_else_stays(folder: Path) -> None:
    before = open_artifact(folder)
    after = add_int8(before, int8(), {"maker": "1.0"})
    after.verify()
    before.verify()  # who opened it before reads on
    assert (after.read("int8_graph"), after.read("int8_weights")) == (b"graph", b"graph weights")
    changed = {"quantization": int8().quantization, "packages": {**FACTS["packages"], "maker": "1.0"}}
    files = {**before.manifest.files, **{role: after.manifest.files[role] for role in ("int8_graph", "int8_weights")}}
    assert after.manifest == before.manifest.model_copy(update={**changed, "files": files})
    assert after.manifest.quantization is not None
    assert after.manifest.quantization.loss_points == pytest.approx(10)


def test_another_int8_network_takes_the_place_of_the_first_and_a_new_model_takes_it_away(folder: Path) -> None:
    add_int8(open_artifact(folder), int8(), {})
    second = add_int8(open_artifact(folder), int8(b"second"), {})
    assert len(names(folder)) == 6
    assert second.read("int8_graph") == b"second"
    write(folder, 1.0)
    assert open_artifact(folder).manifest.quantization is None
    assert len(names(folder)) == 4


def test_an_int8_network_of_another_model_is_refused(folder: Path) -> None:
    before = open_artifact(folder)
    newer = write(folder, 1.0)
    with pytest.raises(ArtifactError, match=f"another model by now, version {newer.manifest.version} not"):
        add_int8(before, int8(), {})
    assert open_artifact(folder).manifest == newer.manifest


def test_a_path_too_long_for_the_system_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / ("a" * 300))
