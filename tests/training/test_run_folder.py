"""A run with all its instruments: what each leaves in the run's folder, and that they agree with the artifact."""

import json
from pathlib import Path
from typing import Any

import pytest

from service.model.artifact import open_artifact
from training.debugging.configuration import RULES
from training.debugging.smdebug_hook import import_smdebug
from training.hpo import train_once
from training.train_model import main, parse_arguments


@pytest.fixture(scope="module")
def model(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the small sample, trained from cached features with every instrument."""
    home = tmp_path_factory.mktemp("run")
    instruments = ["--observe-every", "2", "--debugger", "on" if import_smdebug() else "off"]
    instruments += ["--debugger-interval", "4"]
    assert main([*training(sample_root, home), "--output", str(home / "model"), *instruments]) == 0
    return home / "model"


def training(data: Path, home: Path) -> list[str]:
    """The settings of the training itself."""
    flags = ["--weights", "none", "--freeze", "stem,layer1,layer2,layer3", "--epochs", "2", "--batch-size", "50"]
    flags += ["--cache-folder", str(home / "features"), "--feature-cache", "on", "--quantize", "off"]
    return ["--data", str(data), *flags]


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    return model.parent / "model-run"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_weights_are_those_of_the_tuners_training_without_instruments(
    model: Path, sample_root: Path, tmp_path: Path
) -> None:
    given = parse_arguments([*training(sample_root, model.parent), "--output", str(tmp_path / "model")])
    train_once({}, {**given, "report": False})
    plain, watched = open_artifact(tmp_path / "model").manifest, open_artifact(model).manifest
    assert plain.files["weights"].sha256 == watched.files["weights"].sha256
    assert not list(tmp_path.rglob("rules.json"))


def test_the_evaluation_states_the_manifests_figures(model: Path, folder: Path) -> None:
    stated, evaluation = open_artifact(model).manifest.metrics["validation"], read(folder / "evaluation.json")
    for name in ("loss", "accuracy", "top5_accuracy", "ece", "n"):
        assert evaluation[name] == stated[name], name


def test_the_metrics_file_has_each_epoch_of_the_manifest(model: Path, folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    history = open_artifact(model).manifest.metrics["history"]
    assert [{name: line[name] for name in told} for line, told in zip(epochs, history, strict=True)] == history
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 9))


def test_every_rule_has_a_verdict(folder: Path) -> None:
    verdicts = read(folder / "rules.json")["rules"]
    assert {each["rule"] for each in verdicts} == set(RULES)
    assert {each["status"] for each in verdicts} <= {"NoIssuesFound", "IssuesFound"}


def test_the_profile_names_what_holds_the_run_up(folder: Path) -> None:
    profile = read(folder / "profile.json")
    assert profile["summary"].endswith(".")
    assert profile["step_ms"]["median"] > 0


def test_the_report_shows_verdicts_and_curves(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert all(text in page for text in ("VanishingGradient", "Confusion matrix", "Calibration", "Learning rate"))


def test_tensorboard_has_its_file(folder: Path) -> None:
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_debuggers_tensors_can_be_read_back(folder: Path) -> None:
    if import_smdebug() is None:
        pytest.skip("smdebug is not installed: uv sync --inexact --group debugger")
    from smdebug.trials import create_trial

    trial = create_trial(str(folder / "tensors"))
    names = trial.tensor_names()
    assert {"scalar/batch_loss", "scalar/epoch_accuracy"} <= set(names)
    assert any(name.startswith("gradient/Network_layer4") for name in names)
    assert not any("layer3" in name for name in names)


def test_no_checkpoint_is_left_of_a_run_that_is_over(folder: Path) -> None:
    assert not list(folder.rglob("checkpoint.pt*"))
