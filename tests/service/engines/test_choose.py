"""`auto` takes the fastest engine that the machine has and that agrees with the training, and says why."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from service.engines import choose
from service.engines.base import EngineUnavailable
from service.engines.choose import Layout, candidates, load
from service.model.artifact import Artifact, open_artifact
from service.model.errors import ArtifactError
from service.model.manifest import Manifest, Quantization
from tests.service.artifacts import changed


@pytest.fixture(scope="module")
def model(artifact: Path) -> Artifact:
    return open_artifact(artifact)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "gpus", lambda: 0)


def quantized(manifest: Manifest, loss_points: float, n: int = 5000) -> Manifest:
    int8 = Quantization(
        method="test", calibration_images=1, n=n, top1_agreement=0.99, accuracy=0.7 - loss_points / 100,
        accuracy_float32=0.7, self_check_difference=0.1,
    )  # fmt: skip
    return manifest.model_copy(update={"quantization": int8})


def computes(monkeypatch: pytest.MonkeyPatch, *precisions: str) -> None:
    """Stands in for the processor: which precisions it has instructions for."""
    from service.engines import openvino

    monkeypatch.setattr(openvino, "has_bf16", lambda: "bf16" in precisions)


@pytest.mark.parametrize(
    ("loss_points", "expected"),
    [
        (None, ["openvino-bf16", "openvino-fp32", "torch"]),
        (0.5, ["openvino-int8", "openvino-bf16", "openvino-fp32", "torch"]),
        (-0.2, ["openvino-int8", "openvino-bf16", "openvino-fp32", "torch"]),
        (0.6, ["openvino-bf16", "openvino-fp32", "torch"]),
    ],
)
def test_the_order_follows_from_the_measured_loss(
    model: Artifact, loss_points: float | None, expected: list[str]
) -> None:
    manifest = model.manifest if loss_points is None else quantized(model.manifest, loss_points)
    assert [name for name, _ in candidates(manifest)] == expected


def test_the_reason_tells_how_good_int8_is(model: Artifact) -> None:
    reasons = [reason for _, reason in candidates(quantized(model.manifest, 0.7))]
    assert "99.00% of 5,000 validation images and loses 0.70 points of accuracy; more than 0.5 " in reasons[0]
    (_, gain), *_ = candidates(quantized(model.manifest, -2.22))
    assert gain.endswith("validation images and gains 2.22 points of accuracy")


@pytest.mark.parametrize(
    ("loss_points", "n", "doubt"),
    [
        (0.0, 199, "199 validation images are too few to tell, 200 are needed"),
        (
            0.0,
            200,
            "200 validation images do not exclude a loss of 1.16 points (95 % confidence), ",
        ),
        (0.0, 400, None),
        (
            0.5,
            1000,
            "1000 validation images do not exclude a loss of 1.02 points (95 % confidence), ",
        ),
        (0.5, 1200, None),
    ],
)
def test_int8_runs_by_itself_only_where_enough_images_say_that_it_may(
    model: Artifact, loss_points: float, n: int, doubt: str | None
) -> None:
    (first, reason), *_ = candidates(quantized(model.manifest, loss_points, n))
    assert first == ("openvino-int8" if doubt is None else "openvino-bf16")
    assert doubt is None or doubt in reason


@pytest.mark.parametrize(
    ("loss_points", "bf16", "expected", "why"),
    [
        (0.2, True, "openvino-int8", "int8 agrees with float32 on 99.00% of 5,000 validation images and loses 0.20"),
        (0.2, False, "openvino-int8", "int8 agrees with float32 on 99.00% of 5,000 validation images and loses 0.20"),
        (0.6, True, "openvino-bf16", "loses 0.60 points of accuracy; more than 0.5 points of accuracy are lost"),
        (0.6, False, "openvino-fp32", "loses 0.60 points of accuracy; more than 0.5 points of accuracy are lost"),
    ],
)
def test_auto_runs_the_int8_network_of_an_artifact_whose_figures_are_good_enough(
    int8_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    loss_points: float, bf16: bool, expected: str, why: str,
) -> None:  # fmt: skip
    computes(monkeypatch, *(["bf16"] if bf16 else []))
    manifest = open_artifact(int8_artifact).manifest
    assert manifest.quantization is not None
    measured = {"n": 5000, "top1_agreement": 0.99, "accuracy_float32": 0.7, "accuracy": 0.7 - loss_points / 100}
    figures = manifest.quantization.model_copy(update=measured)
    artifact = open_artifact(changed(int8_artifact, tmp_path / "model", quantization=figures))
    with caplog.at_level(logging.INFO):
        classifier = load(artifact, layout=Layout(1))
    assert classifier.engine.name == expected
    (line,) = [text for text in caplog.messages if text.startswith(f"engine {expected} on 1 thread: ")]
    assert why in line
    assert classifier.check(artifact.self_check()) <= classifier.engine.tolerance


def test_a_gpu_goes_before_all_and_is_not_replaced_where_sagemaker_started_us(
    model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "gpus", lambda: 2)
    monkeypatch.setattr(choose, "SAGEMAKER_MODEL", tmp_path)
    assert [*candidates(model.manifest)] == [("torch-cuda", "there is a GPU (2 seen)")]


def test_elsewhere_a_gpu_that_cannot_be_used_is_a_warning(
    model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "has_gpu", lambda: True)
    monkeypatch.setattr(choose, "gpus", lambda: 1)  # as an old driver shows it, which PyTorch cannot use
    monkeypatch.setattr(choose, "SAGEMAKER_MODEL", tmp_path / "none")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert load(model, layout=Layout(1)).engine.name.startswith("openvino-")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("engine torch-cuda is passed over: ")


def test_without_a_gpu_the_engine_for_gpus_says_so_before_torch_is_imported(
    model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "has_gpu", lambda: False)
    monkeypatch.setitem(sys.modules, "service.engines.cuda", None)  # importing it would fail
    with pytest.raises(EngineUnavailable, match="There is no NVIDIA GPU here: CLASSIFIER_ENGINE=auto takes"):
        load(model, "torch-cuda", Layout(1))


def test_an_engine_that_fails_its_self_check_is_passed_over_with_a_line(
    model: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from service.engines import openvino

    computes(monkeypatch, "bf16")
    monkeypatch.setitem(openvino.TOLERANCES, "bf16", 0.0)  # as if its answers were wrong
    with caplog.at_level(logging.INFO):
        assert load(model, layout=Layout(1)).engine.name == "openvino-fp32"
    assert "engine openvino-bf16 is passed over: The self-check failed" in caplog.text
    assert "engine openvino-fp32 on 1 thread: " in caplog.text
    with pytest.raises(ArtifactError, match="The self-check failed: openvino-bf16 differs"):
        load(model, "openvino-bf16", Layout(1))


def test_a_processor_without_bfloat16_computes_in_float32(
    model: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    computes(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert load(model, layout=Layout(1)).engine.name == "openvino-fp32"
    assert "openvino-bf16 is passed over: This processor does not compute in bfloat16" in caplog.text
    with pytest.raises(EngineUnavailable, match="choose CLASSIFIER_ENGINE=openvino-fp32"):
        load(model, "openvino-bf16", Layout(1))


def test_without_openvino_torch_runs_it_and_without_both_a_sentence_says_what_to_install(
    model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    present: dict[str, Any] = {"torch": object()}
    monkeypatch.setattr(choose.importlib.util, "find_spec", present.get)
    assert [name for name, _ in candidates(model.manifest)] == ["torch"]
    present.clear()
    with pytest.raises(EngineUnavailable, match="'pip install openvino'"):
        load(model)


def test_a_named_engine_whose_package_is_missing_is_refused(model: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "service.engines.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    said = r"openvino-fp32 needs a package that cannot be imported .*; choose another of auto, torch-cuda, torch\."
    with pytest.raises(EngineUnavailable, match=said):
        load(model, "openvino-fp32", Layout(1))
