"""What a SageMaker job implies, read from files below /opt/ml (here: a temporary root) or from SM_* variables."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from training.config import TrainingConfig
from training.environment import sagemaker_values
from training.errors import ConfigError

NOTHING: Mapping[str, str] = {}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The layout of a plain container, without channels."""
    (tmp_path / "ml" / "input" / "config").mkdir(parents=True)
    (tmp_path / "ml" / "model").mkdir()
    hyperparameters(tmp_path / "ml", {})
    return tmp_path / "ml"


def hyperparameters(root: Path, values: object) -> None:
    (root / "input" / "config" / "hyperparameters.json").write_text(json.dumps(values))


def channel(root: Path, name: str) -> Path:
    folder = root / "input" / "data" / name
    folder.mkdir(parents=True)
    return folder


def test_outside_of_sagemaker_nothing_is_implied(tmp_path: Path) -> None:
    assert sagemaker_values(tmp_path / "missing", NOTHING) == {}
    assert sagemaker_values(tmp_path, {"HOME": "/root", "SM_MODULE": "x"}) == {}


def test_a_plain_container_tells_data_output_and_hyperparameters(root: Path) -> None:
    training = channel(root, "training")
    hyperparameters(root, {"epochs": "3", "learning_rate": '"0.5"', "sagemaker_program": "x"})
    assert sagemaker_values(root, NOTHING) == {
        "data": str(training), "output": str(root / "model"), "epochs": "3", "learning_rate": "0.5",
    }  # fmt: skip


def test_the_training_toolkits_variables_are_used_where_they_are(root: Path, tmp_path: Path) -> None:
    training = channel(tmp_path / "elsewhere", "x")
    environ = {"SM_MODEL_DIR": str(tmp_path / "out"), "SM_CHANNEL_TRAINING": str(training)}
    expected = {"data": str(training), "output": str(tmp_path / "out")}
    assert sagemaker_values(root, environ) == expected
    assert sagemaker_values(tmp_path / "missing", environ) == expected


def test_the_train_channel_alone_is_the_data(root: Path) -> None:
    train = channel(root, "train")
    assert sagemaker_values(root, NOTHING)["data"] == str(train)


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("validation", ["validation", "val", "valid", "test"])
def test_separate_train_and_validation_channels_are_both_taken(root: Path, train: str, validation: str) -> None:
    folders = channel(root, train), channel(root, validation)
    values = sagemaker_values(root, NOTHING)
    assert (values["data"], values["validation"]) == tuple(map(str, folders))


def test_separate_channels_are_found_by_their_variables_too(root: Path, tmp_path: Path) -> None:
    train, validation = channel(tmp_path / "here", "x"), channel(tmp_path / "there", "y")
    environ = {"SM_MODEL_DIR": "/m", "SM_CHANNEL_TRAIN": str(train), "SM_CHANNEL_VALIDATION": str(validation)}
    values = sagemaker_values(root, environ)
    assert (values["data"], values["validation"], values["output"]) == (str(train), str(validation), "/m")


def test_a_validation_channel_alone_is_no_training_data(root: Path) -> None:
    channel(root, "validation")
    assert "data" not in sagemaker_values(root, NOTHING)


@pytest.mark.parametrize("name", ["weights", "pretrained"])
def test_a_weights_channel_gives_the_pretrained_weights(root: Path, name: str) -> None:
    folder = channel(root, name)
    assert sagemaker_values(root, NOTHING)["weights"] == str(folder)


def test_hyperparameters_win_over_what_channels_imply(root: Path) -> None:
    channel(root, "weights")
    channel(root, "train")
    hyperparameters(root, {"weights": "none", "data": "/mnt/fsx"})
    values = sagemaker_values(root, NOTHING)
    assert (values["weights"], values["data"]) == ("none", "/mnt/fsx")


def test_numbers_and_booleans_in_the_file_become_text(root: Path) -> None:
    hyperparameters(root, {"epochs": 3, "learning_rate": 0.5})
    values = sagemaker_values(root, NOTHING)
    assert (values["epochs"], values["learning_rate"]) == ("3", "0.5")


def test_what_a_job_implies_makes_a_configuration(root: Path) -> None:
    channel(root, "training")
    hyperparameters(root, {"epochs": '"3"', "freeze": '"none"', "sagemaker_submit_directory": "s3://x"})
    config = TrainingConfig.create(sagemaker_values(root, NOTHING))
    assert (config.epochs, config.freeze, config.output) == (3, (), root / "model")


def test_an_unknown_hyperparameter_of_a_job_is_refused(root: Path) -> None:
    channel(root, "training")
    hyperparameters(root, {"epoch": "3"})
    with pytest.raises(ConfigError, match="Unknown hyperparameter epoch"):
        TrainingConfig.create(sagemaker_values(root, NOTHING))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe"],
    ids=["empty", "cut", "list", "null", "text", "binary"],
)
def test_broken_hyperparameters_are_refused_naming_the_file(root: Path, content: bytes) -> None:
    (root / "input" / "config" / "hyperparameters.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"hyperparameters\.json cannot be read as a JSON object"):
        sagemaker_values(root, NOTHING)
