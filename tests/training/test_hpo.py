"""`python -m training.hpo` over the real training: a study, one training in a SageMaker job, wrong flags."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.model.artifact import open_artifact
from training.config import TrainingConfig
from training.errors import ConfigError
from training.hpo import main, require_study
from training.tuning.best import read_best
from training.tuning.config import TuningConfig

ROOT = Path(__file__).parents[2]
SMALL = [
    "--weights", "none", "--freeze", "stem,layer1,layer2,layer3,layer4", "--hidden-units", "8", "--side", "8",
    "--quantize", "off",
    "--device", "cpu", "--feature-cache", "off",
]  # fmt: skip


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


@pytest.fixture(scope="module")
def tuned(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a study of two trials, and the command that made it."""
    folder = tmp_path_factory.mktemp("tuned")
    command = ["--data", str(sample_root), "--output", str(folder), *SMALL]
    command += ["--trials", "2", "--batch-sizes", "50,100", "--epochs", "1", "--learning_rate_range", "1e-3:1e-1"]
    assert main(command) == 0
    return folder, command


def test_a_study_over_the_real_training_writes_best_json(tuned: tuple[Path, list[str]], sample_root: Path) -> None:
    folder, _ = tuned
    content = json.loads((folder / "best.json").read_text())
    assert set(content["hyperparameters"]) == {"learning_rate", "batch_size"}
    assert content["settings"]["epochs"] == 1
    assert content["trials"] == {"complete": 2}
    assert content["dataset"] == {
        "name": "generated-sample", "classes": 100, "train_images": 200, "validation_images": 100,
    }  # fmt: skip
    values = {"from_tuning": folder / "best.json", "data": sample_root, "output": folder / "model", "side": 16}
    config = TrainingConfig.resolve(values)
    assert (config.learning_rate, config.hidden_units, config.side) == (
        content["hyperparameters"]["learning_rate"], 8, 16,
    )  # fmt: skip


def test_all_trials_train_from_one_feature_cache_and_so_does_the_next_study(
    sample_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cached = [*SMALL[:-1], "on", "--cache-folder", str(tmp_path / "features"), "--data", str(sample_root)]
    cached += ["--trials", "3", "--batch-sizes", "50,100", "--epochs", "1"]
    assert main([*cached, "--output", str(tmp_path / "first")]) == 0
    said = [line for line in caplog.messages if line.startswith("feature cache: ")]
    assert ["computed by" in line for line in said] == [True, True]  # training and validation images, once each
    assert sum("from cached features" in line for line in caplog.messages) == 3
    caplog.clear()
    assert main([*cached, "--output", str(tmp_path / "second")]) == 0
    said = [line for line in caplog.messages if line.startswith("feature cache: ")]
    assert ["found and verified" in line for line in said] == [True, True]


def test_training_with_best_json_reaches_what_the_trial_reached(
    tuned: tuple[Path, list[str]], sample_root: Path, tmp_path: Path
) -> None:
    from training.run import run

    folder, _ = tuned
    places = {"data": sample_root, "output": tmp_path / "model", "device": "cpu"}
    run(TrainingConfig.create({**read_best(folder / "best.json"), **places}))
    metrics = open_artifact(tmp_path / "model").manifest.metrics
    content = json.loads((folder / "best.json").read_text())
    assert metrics["history"][-1]["validation_accuracy"] == content["value"]


def test_the_same_command_again_makes_no_more_trials(
    tuned: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert main(tuned[1]) == 0
    assert not [line for line in caplog.messages if line.startswith(("data:", "trial 2"))]
    assert any(line.startswith("best hyperparameters: learning_rate=") for line in caplog.messages)


def job(root: Path, monkeypatch: pytest.MonkeyPatch, data: Path, hyperparameters: dict[str, str]) -> None:
    """Make this process one of a SageMaker training job, as the training toolkit's variables tell it."""
    monkeypatch.setenv("SM_MODEL_DIR", str(root / "model"))
    monkeypatch.setenv("SM_OUTPUT_DATA_DIR", str(root / "output"))
    monkeypatch.setenv("SM_CHANNEL_TRAINING", str(data))
    monkeypatch.setenv("SM_HPS", json.dumps(hyperparameters))
    for name in ("SM_HOSTS", "SM_CURRENT_HOST"):
        monkeypatch.delenv(name, raising=False)


def test_in_a_job_of_sagemakers_tuner_it_trains_once_with_the_hyperparameters_given(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    given = {"learning_rate": "0.02", "batch_size": '"50"', "epochs": "1", "_tuning_objective_metric": "x"}
    job(tmp_path, monkeypatch, sample_root, given)
    assert main(SMALL) == 0
    told = open_artifact(tmp_path / "model").manifest.hyperparameters
    assert (told["learning_rate"], told["batch_size"], told["epochs"]) == (0.02, 50, 1)
    assert any("validation_accuracy=" in line for line in caplog.messages)
    assert not list(tmp_path.rglob("study.*"))


def test_in_a_job_the_hyperparameter_trials_makes_a_study(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job(tmp_path, monkeypatch, sample_root, {"trials": "1", "epochs_range": "1:1", "batch_sizes": "100"})
    assert main(SMALL) == 0
    assert read_best(tmp_path / "model" / "best.json")["batch_size"] == 100


def test_in_a_job_ranges_without_trials_are_refused(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job(tmp_path, monkeypatch, sample_root, {"epochs_range": "1:1"})
    assert main(SMALL) == 2
    assert errors(caplog)[0].startswith("epochs_range are settings of a study")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--trials", "0"], "--trials 0: must be at least 1"),
        (["--trials", "many"], "--trials many: give a whole number"),
        (
            ["--learning-rate-range", "1"],
            "--learning-rate-range 1: give two numbers with a colon between them, LOW:HIGH",
        ),
        (["--epochs-range", "4-10"], "--epochs-range 4-10: give two numbers with a colon between them"),
        (["--learning-rate-range", "0.1:0.01"], "LOW not above HIGH"),
        (["--learning-rate-range", "0:1"], "must be numbers above 0"),
        (["--learning-rate-range", "1e-3:inf"], "must be numbers above 0"),
        (["--epochs-range", "1.5:3"], "--epochs-range 1.5:3: give a whole number"),
        (["--batch-sizes", "32,x"], "--batch-sizes 32,x: give a whole number"),
        (["--batch-sizes", "1"], "at least 2, which batch norm needs"),
        (["--timeout-minutes", "0"], "--timeout-minutes 0: must be above 0"),
        (["--metric", "loss"], "--metric loss: give 'validation_accuracy' or 'validation_loss'"),
        (["--trial", "3"], "Unknown flag --trial."),
        (["--epochs", "3", "--epochs-range", "1:3"], "--epochs fixes what --epochs-range would tune"),
        (["--epochs", "3", "--batch-size", "8", "--learning-rate", "1"], "nothing is left to tune"),
        (["--side", "3"], "--side 3: must be at least 8"),
        (["--recipe", "best", "--epochs-range", "4:12"], "--epochs-range holds 6, which is not possible here: --wa"),
        (["--batch-sizes", "8,2000000"], "--batch-sizes holds 2000000, which is not possible here"),
    ],
)
def test_wrong_flags_end_with_one_sentence_before_anything_is_written(
    flags: list[str], sentence: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["--data", "x", "--output", str(tmp_path / "out"), *flags]) == 2
    (error,) = errors(caplog)
    assert sentence in error
    assert not (tmp_path / "out").exists()


def test_a_study_is_not_begun_in_the_folder_of_a_model_or_among_other_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ["--data", "x", "--output", str(tmp_path)]
    (tmp_path / "notes.txt").touch()
    assert main(command) == 2
    assert "holds other things (notes.txt)" in errors(caplog)[-1]
    (tmp_path / "study.sqlite3").touch()
    require_study(tmp_path)
    (tmp_path / "manifest.json").touch()
    assert main(command) == 2
    assert "is the folder of a model" in errors(caplog)[-1]


def test_the_help_tells_what_the_output_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("--output") > text.count("folder of the study") == 1 and "write the artifact into" not in text


def test_what_is_not_drawn_need_not_be_possible(tmp_path: Path) -> None:
    given = {"epochs": 80, "unfreeze_at": 30, "warmup_epochs": 20}  # not with the default of 10 to 70 epochs
    start = TrainingConfig.create({"data": tmp_path, "output": tmp_path, **given})
    TuningConfig().require_possible(given, start)
    with pytest.raises(ConfigError, match="--epochs-range holds 10, which is not possible here"):
        TuningConfig().require_possible({}, start)


def test_a_study_is_of_ten_trials_around_the_reference() -> None:
    assert TuningConfig().model_dump() == {
        "trials": 10, "learning_rate_range": (1e-4, 1e-1), "batch_sizes": (32, 64, 128, 256), "epochs_range": (10, 70),
        "timeout_minutes": None, "metric": "validation_accuracy",
    }  # fmt: skip


def test_an_unknown_flag_is_answered_with_the_names_of_the_study_too(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["--trial", "3"]) == 2
    assert errors(caplog)[0].endswith("Did you mean --trials?")


def test_missing_data_ends_the_study_and_leaves_it_to_be_continued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out"), *SMALL]) == 1
    assert "nowhere" in errors(caplog)[0]


class KillAt(logging.Handler):
    """Sends this process SIGTERM when a log line begins with `text`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(self._text):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("line", ["data:", "epoch=1/"], ids=["while preparing", "while training"])
def test_sigterm_ends_the_study_with_a_sentence_and_the_trial_is_tried_again(
    line: str, sample_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    command = ["--data", str(sample_root), "--output", str(tmp_path), *SMALL, "--epochs-range", "2:40"]
    handler = KillAt(line)
    logging.getLogger().addHandler(handler)
    try:
        assert main([*command, "--trials", "1"]) == 143
    finally:
        logging.getLogger().removeHandler(handler)
    assert errors(caplog) == ["Stopped before the end: the same command goes on; the trial under way begins again."]
    import optuna

    study = optuna.load_study(study_name="resnet34", storage=f"sqlite:///{tmp_path / 'study.sqlite3'}")
    assert [(trial.state.name, trial.user_attrs["ended"]) for trial in study.trials] == [("FAIL", "interrupted")]


def test_settings_are_checked_without_torch_and_optuna() -> None:
    code = "import sys, training.hpo, training.tuning; training.hpo.main(['--trials', '0', '--data', 'x'])"
    code += "; sys.exit(len({'torch', 'optuna', 'matplotlib'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
