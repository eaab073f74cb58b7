"""The evaluation of an artifact: the same numbers as its manifest, and what cannot be evaluated."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from service.model.artifact import open_artifact
from service.model.network import network_of
from service.model.openvino_graph import core
from training.data.layouts import open_dataset
from training.data.loader import Loader
from training.errors import DataError
from training.evaluate import compare, default_output, main, open_images
from training.figures import figures
from training.logits import logits_of


def run(model: Path, data: Path, output: Path, *flags: str) -> int:
    return main(["--model", str(model), "--data", str(data), "--output", str(output), "--device", "cpu", *flags])


def class_folders(root: Path, names: tuple[str, ...], count: int = 4) -> Path:
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (20 * k, 20 * i, 0)).save(root / name / f"{i}.png")
    return root


def test_the_figures_of_an_archive_are_the_manifests(
    artifact: Path, sample_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(artifact, "pets")
    assert run(tmp_path / "model.tar.gz", sample_root, tmp_path / "out", "--batch-size", "64") == 0
    stated = json.loads((artifact / "manifest.json").read_text())
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for name in ("accuracy", "top5_accuracy", "n"):
        assert written[name] == pytest.approx(stated["metrics"]["validation"][name])
    assert written["loss"] == pytest.approx(stated["metrics"]["validation"]["loss"], rel=1e-4)
    assert written["model"] == {"name": "tiny", "version": stated["version"]}
    assert written["dataset"]["evaluated"] == "validation"
    assert "they agree" in caplog.text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Batch loss" not in page and "Loss</h3>" in page  # the manifest's history, but no steps


def test_figures_of_other_images_than_the_manifests_are_not_compared(
    artifact: Path, sample_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    manifest = open_artifact(artifact).manifest
    dataset, images = open_images(manifest, sample_root, None, "train")
    assert len(images) == 200
    measured = figures(np.eye(100)[images.labels], images.labels)
    assert compare(manifest, dataset, "train", measured) is None
    assert "not compared with the manifest" in caplog.text
    elsewhere = manifest.model_copy(update={"dataset": {**manifest.dataset, "split": "by seed"}})
    assert compare(elsewhere, dataset, "validation", measured) is None


def test_figures_other_than_the_manifests_are_told_and_status_1(
    artifact: Path, sample_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boast = shutil.copytree(artifact, tmp_path / "model")
    fields = json.loads((boast / "manifest.json").read_text())
    fields["metrics"]["validation"]["accuracy"] = 0.9
    text = json.dumps({**fields, "manifest_sha256": "0" * 64}, indent=2)
    (boast / "manifest.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))
    assert run(boast, sample_root, tmp_path / "out") == 1
    assert "THEY DIFFER" in caplog.text
    assert (tmp_path / "out" / "report.html").is_file()


def test_other_classes_are_refused_by_name(artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = class_folders(tmp_path / "pictures", ("cat", "dog"))
    assert run(artifact, data, tmp_path / "out") == 1
    assert "has classes unknown to the model tiny: cat, dog; name the folders as the model's 100 classes" in caplog.text
    assert not (tmp_path / "out").exists()


def test_classes_in_another_order_are_mapped_by_name_and_held_out_as_in_training(
    artifact: Path, tmp_path: Path
) -> None:
    data = class_folders(tmp_path / "pictures", ("ant", "bee", "cow"), count=8)
    trained = open_artifact(artifact).manifest
    hyperparameters = {**trained.hyperparameters, "seed": 7, "validation_fraction": 0.25}
    manifest = trained.model_copy(update={"classes": ("cow", "ant", "bee"), "hyperparameters": hyperparameters})
    _, images = open_images(manifest, data, None, "validation")
    held_out = open_dataset(data, validation_fraction=0.25, seed=7, broken_files="refuse").validation
    assert [images.file_name(i) for i in range(len(images))] == [held_out.file_name(i) for i in range(len(held_out))]
    assert [manifest.classes[k] for k in images.labels] == ["ant", "ant", "bee", "bee", "cow", "cow"]
    assert images.payload(0) == held_out.payload(0)
    more = manifest.model_copy(update={"classes": ("cow", "elk", "ant", "bee")})
    _, images = open_images(more, data, None, "validation")
    assert [more.classes[k] for k in images.labels] == ["ant", "ant", "bee", "bee", "cow", "cow"]
    fewer = manifest.model_copy(update={"classes": ("cow", "ant")})
    with pytest.raises(DataError, match=r"unknown to the model tiny: bee; name the folders as the model's 2 classes"):
        open_images(fewer, data, None, "validation")


def test_images_of_a_part_of_the_classes_are_evaluated(
    artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    known = open_artifact(artifact).manifest.classes
    data = class_folders(tmp_path / "pictures", (known[7], known[90]), count=3)
    flags = ("--validation", str(data))
    assert run(artifact, data, tmp_path / "out", *flags) == 0
    assert "without images of 98 of the model's 100 classes: " in caplog.text
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["n"] == 6
    assert [k for k, each in enumerate(written["classes"]) if each["n"]] == [7, 90]
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("engine", ["openvino-fp32", "openvino-bf16", "openvino-int8"])
def test_the_networks_that_the_service_runs_are_evaluated(
    int8_artifact: Path, sample_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, engine: str
) -> None:
    if engine == "openvino-bf16" and "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor does not compute in bfloat16")
    caplog.set_level("INFO")
    assert run(int8_artifact, sample_root, tmp_path / "out", "--engine", engine) == 0
    stated = open_artifact(int8_artifact).manifest
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["dataset"]["engine"] == engine
    assert stated.quantization is not None
    if engine == "openvino-int8":
        assert written["accuracy"] == pytest.approx(stated.quantization.accuracy)
        assert "they agree" in caplog.text
    else:
        near = 0.002 if engine == "openvino-fp32" else 0.1
        assert written["loss"] == pytest.approx(stated.metrics["validation"]["loss"], abs=near)


def test_int8_of_a_model_that_has_none_is_refused(
    artifact: Path, sample_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(artifact, sample_root, tmp_path / "out", "--engine", "openvino-int8") == 1
    assert "The artifact has no int8 network; `python -m training.quantize` adds one." in caplog.text


def test_logits_do_not_depend_on_the_batch(artifact: Path, sample_root: Path) -> None:
    opened = open_artifact(artifact)
    _, images = open_images(opened.manifest, sample_root, None, "validation")
    device = torch.device("cpu")
    network = network_of(opened).to(device)
    many, labels = logits_of(network, Loader(images, 32, 0, "all at once"), device, "all at once", 100)
    few, _ = logits_of(network, Loader(images, 32, 0, "thirty"), device, "thirty", 30)
    assert many.dtype == np.float32 and many.shape == (100, 100)
    assert np.allclose(many, few, atol=1e-4)
    assert labels.tolist() == images.labels.tolist()


@pytest.mark.parametrize("flags", [[], ["--batch-size", "0"], ["--device", "tpu"], ["--split", "test"]])
def test_wrong_settings_are_status_2(flags: list[str], tmp_path: Path) -> None:
    assert main(["--model", str(tmp_path), *flags]) == 2


def test_no_model_and_no_data_are_status_1(artifact: Path, sample_root: Path, tmp_path: Path) -> None:
    assert run(tmp_path, sample_root, tmp_path / "out") == 1
    assert run(artifact, tmp_path / "nowhere", tmp_path / "out") == 1


def test_the_report_lies_beside_the_model_by_default(tmp_path: Path) -> None:
    assert default_output(tmp_path / "pets") == tmp_path / "pets-evaluation"
    assert default_output(tmp_path / "model.tar.gz") == tmp_path / "model-evaluation"
    assert default_output(tmp_path / "pets", "openvino-int8") == tmp_path / "pets-evaluation-openvino-int8"
