"""The int8 network: what is stated of it is so, it comes or stays away as asked, and no failure costs the artifact."""

import io
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from service.engines.choose import candidates, load
from service.model.artifact import Artifact, Int8Network, open_artifact
from service.model.machine import gpus
from service.model.network import network_of
from service.model.openvino_graph import core
from service.model.small_maps import flatten_small_maps
from training import quantization
from training.data.loader import Loader
from training.errors import DataError
from training.evaluate import main as evaluate
from training.evaluate import open_images
from training.logits import logits_of
from training.quantize import main as quantize
from training.train_model import main as train_main

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CLASSES = ("dark", "light", "red", "striped")
SMALL = [
    "--weights", "none", "--side", "32", "--epochs", "2", "--batch-size", "16", "--optimizer", "adamw",
    "--learning-rate", "0.001", "--validation-fraction", "0.25", "--device", "cpu", "--tensorboard", "false",
    "--profile", "false",
]  # fmt: skip
TINY = [*SMALL, "--side", "8", "--epochs", "1", "--freeze", "stem,layer1,layer2,layer3,layer4"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 40 noisy pictures, 120 to train on and 40 to validate on."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("quantization") / "data"
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 120, (32, 32, 3)) + [0, 130, np.array([130, 0, 0]), 0][number]
            if name == "striped":
                pixels[::4] += 130
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            (root / name / f"{i:02}.png").write_bytes(buffer.getvalue())
    return root


def train(data: Path, output: Path, *flags: str, base: list[str] = SMALL) -> int:
    return train_main(["--data", str(data), "--output", str(output), *base, *flags])


@pytest.fixture(scope="module")
def model(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained model with its int8 network and its report. Copy it before changing it."""
    output = tmp_path_factory.mktemp("int8") / "model"
    assert train(pictures, output, "--quantize", "on") == 0
    return output


def links(folder: Path, target: Path) -> Path:
    """A copy that takes no space; writing an artifact replaces files and never writes into them."""
    return Path(shutil.copytree(folder, target, copy_function=os.link))


def int8_logits(artifact: Artifact, pixels: Any) -> Any:
    network = core().read_model(artifact.read("int8_graph"), artifact.read("int8_weights"))
    flatten_small_maps(network)
    assert network.input(0).partial_shape.to_string() == f"[?,{pixels.shape[1]},{pixels.shape[1]},3]"
    return core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(pixels)[0]


# What the artifact says -----------------------------------------------------------------------------------------


def test_the_int8_network_agrees_with_float32_as_its_manifest_states(model: Path, pictures: Path) -> None:
    artifact = open_artifact(model)
    artifact.verify()
    stated = artifact.manifest.quantization
    assert stated is not None
    dataset, images = open_images(artifact.manifest, pictures, None, "validation")
    pixels = np.stack([images.resized(i, 32) for i in range(len(images))])
    reference, labels = logits_of(network_of(artifact), Loader(images, 32, 0, "validation"), CPU, "float32")
    mine = int8_logits(artifact, pixels)
    assert (mine.dtype, mine.shape) == (np.float32, (40, 4))
    assert (stated.n, stated.calibration_images) == (40, len(dataset.train)) == (40, 120)
    assert stated.top1_agreement == (mine.argmax(1) == reference.argmax(1)).mean()
    assert stated.accuracy == (mine.argmax(1) == labels).mean()
    assert stated.accuracy_float32 == (reference.argmax(1) == labels).mean()
    assert stated.accuracy_float32 == artifact.manifest.metrics["validation"]["accuracy"]
    assert stated.top1_agreement >= 0.9
    check = artifact.self_check()
    difference = abs(int8_logits(artifact, check.inputs) - check.logits).max() / abs(check.logits).max()
    assert difference == pytest.approx(stated.self_check_difference, rel=1e-3)
    assert 0 < difference < 0.2
    assert not np.array_equal(mine, reference)


def test_the_service_takes_it_when_asked_and_by_itself_only_on_the_evidence_of_enough_images(model: Path) -> None:
    artifact = open_artifact(model)
    stated = artifact.manifest.quantization
    assert stated is not None and stated.loss_points <= 0.5
    name, why = next(candidates(artifact.manifest))
    assert (name, "are too few to tell, 200 are needed" in why) == ("openvino-bf16", True) or gpus()
    classifier = load(artifact, "openvino-int8")  # compares the self-check's logits
    check = artifact.self_check()
    found = [each.argmax() for each in classifier.engine.infer(check.inputs)]
    assert found == check.logits.argmax(1).tolist()


def test_it_is_int8_and_small_and_tells_nothing_of_this_machine(model: Path) -> None:
    artifact = open_artifact(model)
    text = artifact.read("int8_graph").decode()
    assert text.count('type="FakeQuantize"') >= 36
    assert text.count('element_type="i8"') >= 36
    files = artifact.manifest.files
    assert files["int8_weights"].bytes < 0.27 * files["weights"].bytes
    for part in (str(model.parent), str(Path.home()), "/tmp", "nncf", os.uname().nodename):
        assert part not in text
    assert set(artifact.manifest.packages) >= {"nncf", "openvino"}
    assert artifact.manifest.quantization is not None
    assert artifact.manifest.quantization.method.startswith(f"nncf {artifact.manifest.packages['nncf']}")
    assert "quantize" not in artifact.manifest.hyperparameters


def test_the_report_and_the_evaluation_tell_of_it(
    model: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stated = open_artifact(model).manifest.quantization
    assert stated is not None
    folder = model.parent / "model-run"
    assert json.loads((folder / "evaluation.json").read_text())["quantization"] == stated.model_dump()
    assert "The int8 network" in (folder / "report.html").read_text()
    caplog.set_level(logging.INFO)
    assert evaluate(["--model", str(model), "--data", str(pictures), "--output", str(tmp_path)]) == 0
    assert f"int8, as the manifest states: {quantization.described(stated)}" in caplog.text


def test_the_images_that_calibrate_are_spread_over_the_classes_and_bounded_in_number(
    model: Path, pictures: Path
) -> None:
    dataset, _ = open_images(open_artifact(model).manifest, pictures, None, "train")
    loader = Loader(dataset.train, 32, 0, "train")
    calibration = quantization.Calibration(loader, 8)
    (batch,) = calibration
    assert batch.shape == (8, 32, 32, 3)
    places = [i for image in batch for i in range(120) if (dataset.train.resized(i, 32) == image).all()]
    assert np.bincount(dataset.train.labels[places]).tolist() == [2, 2, 2, 2]
    assert [len(each) for each in quantization.Calibration(loader, 300)] == [64, 56]
    assert len(list(calibration)) == len(calibration) == 1  # once more from the start
    assert len(next(iter(quantization.Calibration(Loader(dataset.train, 1024, 0, "train"), 3)))) == 1


# Asked for, or not ----------------------------------------------------------------------------------------------


def test_a_model_with_int8_can_be_replaced_by_one_without(model: Path, pictures: Path, tmp_path: Path) -> None:
    output = links(model, tmp_path / "model")
    assert train(pictures, output, "--quantize", "off", base=TINY) == 0
    artifact = open_artifact(output)
    assert artifact.manifest.quantization is None
    assert len(list(output.iterdir())) == 4
    assert "nncf" not in artifact.manifest.packages


def test_without_nncf_auto_trains_on_says_so_first_and_off_does_not_look(pictures: Path, tmp_path: Path) -> None:
    code = f"""
import importlib.abc, logging, sys
tried = []
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nncf":
            tried.append(name)
            raise ModuleNotFoundError("No module named 'nncf'")
sys.meta_path.insert(0, Blocker())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "nncf" else found(name)
from training.train_model import main
flags = {[*TINY, "--report", "false", "--data", str(pictures)]!r}
print("off", main([*flags, "--output", {str(tmp_path / "off")!r}, "--quantize", "off"]), tried, "nncf" in sys.modules)
print("auto", main([*flags, "--output", {str(tmp_path / "auto")!r}]), tried)
print("on", main([*flags, "--output", {str(tmp_path / "on")!r}, "--quantize", "on"]), tried)
"""
    home = tmp_path / "home"
    home.mkdir()
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    off, auto, on = re.split(r"^(?:off|auto) .*\n", done.stdout, flags=re.MULTILINE)
    assert re.findall(r"^(off|auto|on) (.*)", done.stdout, re.MULTILINE) == [
        ("off", "0 [] False"), ("auto", "0 []"), ("on", "2 ['nncf']"),
    ], done.stdout + done.stderr  # fmt: skip
    assert "int8" not in off
    (line,) = [line for line in auto.splitlines() if "int8" in line]
    assert "nncf cannot be imported, so the artifact will hold the float32 network alone" in line
    assert "uv sync --inexact --group training" in line
    assert "images to train on" not in on
    assert "int8 needs nncf and openvino, which cannot be imported (No module named 'nncf')" in on
    for name in ("off", "auto"):
        assert open_artifact(tmp_path / name).manifest.quantization is None
    assert not (tmp_path / "on").exists()


def failing(*_: object) -> Int8Network:
    raise RuntimeError("Check 'foo' failed at src/bar.cpp:1:\nout of luck")


@pytest.mark.parametrize(("mode", "status"), [("auto", 0), ("on", 1)])
def test_a_failure_costs_the_int8_network_and_nothing_else(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str,
    status: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(quantization, "int8_network", failing)
    assert train(pictures, tmp_path / "model", "--quantize", mode, base=TINY) == status
    said = "The int8 network could not be made (RuntimeError: Check 'foo' failed at src/bar.cpp:1: out of luck)."
    warning = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("the artifact is written"))
    assert said in warning
    assert f"`python -m training.quantize --model {tmp_path / 'model'} --data {pictures}` makes it later" in warning
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR] == ([said] if status else [])
    artifact = open_artifact(tmp_path / "model")
    artifact.verify()
    assert artifact.manifest.quantization is None
    assert (tmp_path / "model-run" / "report.html").is_file()
    assert not list((tmp_path / "model-run").rglob("checkpoint.pt"))


def test_stopped_while_it_quantizes_the_artifact_is_there_and_the_log_says_so(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stopped(*_: object) -> Int8Network:
        raise KeyboardInterrupt

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(quantization, "int8_network", stopped)
    assert train(pictures, tmp_path / "model", base=TINY) == 130
    assert "stopped; the artifact is written, without an int8 network; `python -m training.quantize" in caplog.text
    open_artifact(tmp_path / "model").verify()
    monkeypatch.undo()
    caplog.clear()
    assert train(pictures, tmp_path / "model", base=TINY) == 0
    assert "resumed from" in caplog.text and "epoch 1/1 train" not in caplog.text  # nothing is trained again
    assert open_artifact(tmp_path / "model").manifest.quantization is not None
    assert (tmp_path / "model-run" / "report.html").is_file()
    assert not list((tmp_path / "model-run").rglob("checkpoint.pt"))


def test_a_network_that_loses_accuracy_is_kept_with_its_figures_and_a_warning(
    artifact: Path, sample_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_artifact(artifact)
    manifest = opened.manifest
    dataset, images = open_images(manifest, sample_root, None, "validation")
    train, validation = Loader(dataset.train, 32, 0, "train"), Loader(images, 32, 0, "validation")
    right = np.eye(100, dtype=np.float32)[images.labels]  # as if float32 knew everything
    made = quantization.int8_network(
        opened.weights(), manifest.architecture, manifest.preprocessing, train, validation, right, images.labels,
        opened.self_check(), 20,
    ).quantization  # fmt: skip
    assert (made.accuracy_float32, made.calibration_images, made.n) == (1.0, 20, 100)
    assert made.top1_agreement == made.accuracy < 0.5
    assert made.loss_points > 50
    assert "int8: 100 validation images are too few to tell, 200 are needed; the service runs it only" in caplog.text


# python -m training.quantize ------------------------------------------------------------------------------------


def test_int8_is_added_to_an_artifact_and_the_rest_stays(artifact: Path, int8_artifact: Path) -> None:
    before, after = open_artifact(artifact).manifest, open_artifact(int8_artifact).manifest
    open_artifact(int8_artifact).verify()
    assert after.quantization is not None and after.quantization.n == 100
    assert after.version == before.version
    same = set(type(before).model_fields) - {"quantization", "files", "packages"}
    assert {name: getattr(after, name) for name in same} == {name: getattr(before, name) for name in same}
    assert {role: after.files[role] for role in before.files} == before.files
    assert {name: after.packages[name] for name in before.packages} == before.packages
    assert set(after.packages) - set(before.packages) == {"nncf", "openvino"}


@pytest.mark.slow
def test_another_process_makes_the_same_bytes_says_nothing_of_nncf_and_reports_to_nobody(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    copy, home = links(model, tmp_path / "model"), tmp_path / "home"
    home.mkdir()
    reader = open_artifact(copy)
    code = f"""
import logging, sys
from training.quantize import main
before = logging.getLogger("torch.utils.cpp_extension").level
assert main({["--model", str(copy), "--data", str(pictures), "--device", "cpu"]!r}) == 0
from nncf.telemetry.wrapper import telemetry
assert type(telemetry).__name__ == "MagicMock" and "openvino_telemetry" not in sys.modules
assert logging.getLoggerClass() is logging.Logger
assert (logging.getLogger("nncf").level, logging.getLogger("torch.utils.cpp_extension").level) == (logging.INFO, before)
"""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if not re.match(r"[\dT:-]{19}Z INFO ", line)] == []
    assert "nncf" not in done.stdout
    assert list(home.rglob("*")) == []
    assert open_artifact(copy).manifest == open_artifact(model).manifest
    reader.verify()


def run(model: Path, data: Path, *flags: str) -> int:
    return quantize(["--model", str(model), "--data", str(data), "--device", "cpu", *flags])


def sentence(caplog: pytest.LogCaptureFixture) -> str:
    (found,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert "Traceback" not in caplog.text
    return found


@pytest.mark.parametrize("full", ["temporary folder", "model's folder"])
def test_a_full_disk_leaves_the_artifact_as_it_was(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    full: str,
) -> None:  # fmt: skip
    copy = links(model, tmp_path / "model")
    figures = open_artifact(copy).manifest.quantization
    assert figures is not None
    if full == "model's folder":
        made = Int8Network(b"other", bytes(22_000_000), figures)
        monkeypatch.setattr(quantization, "int8_network", lambda *_: made)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, limits[1]))  # the int8 weights have 22 MB
    try:
        status = run(copy, pictures, "--calibration-images", "8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    expected = {
        "temporary folder": r"could not be made: it cannot be written into /\S+ \(.*\); free space or set TMPDIR",
        "model's folder": rf"cannot be written \(File too large\); {copy} is as it was",
    }
    assert re.search(expected[full], sentence(caplog))
    artifact = open_artifact(copy)
    artifact.verify()
    assert artifact.manifest == open_artifact(model).manifest


def test_an_archive_is_refused_with_what_to_do(
    artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.tar.gz"
    with tarfile.open(path, "w:gz"):
        pass
    assert run(path, tmp_path) == 1
    assert f"unpack the archive (tar -xzf {path} -C DIR)" in sentence(caplog)


def test_data_that_do_not_give_the_manifests_figures_are_refused(
    model: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Path(shutil.copytree(pictures, tmp_path / "data"))
    (other / "red").rename(other / "x")
    (other / "dark").rename(other / "red")
    (other / "x").rename(other / "dark")
    assert run(model, other) == 1
    assert "THEY DIFFER" in caplog.text
    assert "int8 would be compared with the wrong thing" in caplog.text


def test_no_model_no_data_and_other_classes_end_with_a_sentence(
    model: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(tmp_path / "nowhere", pictures) == 1
    assert "There is no model at" in sentence(caplog)
    caplog.clear()
    assert run(model, tmp_path / "nowhere") == 1
    assert "there is no such folder" in sentence(caplog)
    caplog.clear()
    fewer = Path(shutil.copytree(pictures, tmp_path / "data"))
    shutil.rmtree(fewer / "red")
    assert run(model, fewer) == 1
    assert "Missing in the data: red; int8 is calibrated and judged on all" in sentence(caplog)


@pytest.mark.parametrize("flags", [["--calibration-images", "0"], ["--device", "tpu"], ["--split", "test"]])
def test_wrong_flags_are_status_2(flags: list[str], tmp_path: Path) -> None:
    assert run(tmp_path, tmp_path, *flags) == 2


def test_an_image_that_has_become_unreadable_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, pictures: Path
) -> None:
    artifact = open_artifact(model)
    dataset, images = open_images(artifact.manifest, pictures, None, "validation")

    def gone(*_: object) -> Any:
        raise DataError("cat.png: cannot be read.")

    monkeypatch.setattr(type(dataset.train), "resized", gone)
    train, validation = Loader(dataset.train, 32, 0, "train"), Loader(images, 32, 0, "validation")
    with pytest.raises(quantization.QuantizationError, match=r"could not be made: cat.png: cannot be read\."):
        quantization.add_quantized(artifact, train, validation, np.zeros((40, 4), np.float32), images.labels)
