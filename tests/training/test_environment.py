"""What a SageMaker job implies, read from files below /opt/ml (here: a temporary root) or from SM_* variables."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from training.config import TrainingConfig
from training.environment import (
    Ranks,
    SageMakerJob,
    environment_with,
    ranks,
    require_channel,
    sagemaker_job,
    sagemaker_values,
    write_failure,
)
from training.errors import ConfigError
from training.flags import parse_hyperparameters

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
        "data": str(training), "output": str(root / "model"), "run_folder": str(root / "output" / "data"),
        "epochs": "3", "learning_rate": "0.5",
    }  # fmt: skip


def test_the_training_toolkits_variables_are_used_where_they_are(root: Path, tmp_path: Path) -> None:
    training = channel(tmp_path / "elsewhere", "x")
    environ = {"SM_MODEL_DIR": str(tmp_path / "out"), "SM_CHANNEL_TRAINING": str(training)}
    expected = {"data": str(training), "output": str(tmp_path / "out")}
    for place in (root, tmp_path / "missing"):
        run_folder = str(place / "output" / "data")
        assert sagemaker_values(place, environ) == {**expected, "run_folder": run_folder}


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


def test_a_job_without_training_data_is_told_which_channels_it_has(root: Path) -> None:
    channel(root, "images")
    with pytest.raises(ConfigError, match=r"no channel training or train with data to train on; it has: images \(in "):
        require_channel({}, root, {})
    require_channel({"data": "/pics"}, root, {})
    shutil.rmtree(root / "input" / "data")
    with pytest.raises(ConfigError, match="it has: none"):
        require_channel({}, root, {})


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


def config_file(root: Path, name: str, value: object) -> Path:
    path = root / "input" / "config" / name
    path.write_text(json.dumps(value))
    return path


def test_outside_of_sagemaker_there_is_no_job(tmp_path: Path) -> None:
    assert sagemaker_job(tmp_path, {"TRAINING_JOB_NAME": "left over"}) is None


def test_a_job_of_two_hosts_is_read_from_the_platforms_files(root: Path) -> None:
    hosts = ["algo-10", "algo-2", "algo-1"]
    config_file(
        root, "resourceconfig.json", {"current_host": "algo-2", "hosts": hosts, "network_interface_name": "eth0"}
    )
    hook = config_file(root, "debughookconfig.json", {"LocalPath": "/opt/ml/output/tensors"})
    (root / "checkpoints").mkdir()
    hyperparameters(root, {"epochs": '"3"', "sagemaker_region": "x", "entry": "hpo"})
    job = sagemaker_job(root, {"TRAINING_JOB_NAME": "mine"})
    assert job == SageMakerJob(
        name="mine", current_host="algo-2", hosts=("algo-1", "algo-2", "algo-10"), network_interface="eth0",
        model_folder=root / "model", output_folder=root / "output" / "data",
        checkpoint_folder=root / "checkpoints", debug_hook_config=hook,
        hyperparameters={"epochs": "3", "entry": "hpo"},
    )  # fmt: skip
    assert job.host_rank == 1


def test_a_job_of_which_little_is_said_is_alone_without_checkpoints_and_hook(root: Path) -> None:
    job = sagemaker_job(root, NOTHING)
    assert job is not None
    assert (job.hosts, job.host_rank, job.network_interface) == (("algo-1",), 0, None)
    assert (job.name, job.checkpoint_folder, job.debug_hook_config) == (None, None, None)


def test_the_training_toolkits_variables_tell_a_job_too(tmp_path: Path) -> None:
    hook = tmp_path / "hook.json"
    hook.write_text("{}")
    environ = {
        "SM_MODEL_DIR": "/m", "SM_OUTPUT_DATA_DIR": "/o", "SM_HOSTS": '["a-1", "a-2"]', "SM_CURRENT_HOST": "a-1",
        "SM_NETWORK_INTERFACE_NAME": "eth1", "SM_HPS": '{"epochs": 3, "weights": "none", "sagemaker_x": 1}',
        "SMDEBUG_CONFIG_FILE_PATH": str(hook),
    }  # fmt: skip
    job = sagemaker_job(tmp_path, environ)
    assert job is not None
    assert (job.hosts, job.network_interface, job.debug_hook_config) == (("a-1", "a-2"), "eth1", hook)
    assert (job.model_folder, job.output_folder) == (Path("/m"), Path("/o"))
    assert sagemaker_values(tmp_path, environ) == {
        "output": "/m", "run_folder": "/o", "epochs": "3", "weights": "none",
    }  # fmt: skip
    without = sagemaker_job(tmp_path, {**environ, "USE_SMDEBUG": "false"})
    assert without is not None
    assert without.debug_hook_config is None


def test_the_checkpoint_folder_may_be_elsewhere(root: Path, tmp_path: Path) -> None:
    config_file(root, "checkpointconfig.json", {"S3Uri": "s3://x", "LocalPath": str(tmp_path)})
    job = sagemaker_job(root, NOTHING)
    assert job is not None
    assert job.checkpoint_folder == tmp_path


def test_the_entry_is_no_setting_of_a_run(root: Path) -> None:
    hyperparameters(root, {"epochs": "3", "entry": "train_model"})
    assert "entry" not in sagemaker_values(root, NOTHING)


def test_a_pipe_is_refused_with_what_to_do(root: Path) -> None:
    config_file(root, "inputdataconfig.json", {"train": {"TrainingInputMode": "Pipe"}})
    with pytest.raises(ConfigError, match=r"Channel train is in Pipe mode.*FastFile or File"):
        sagemaker_values(root, NOTHING)
    config_file(root, "inputdataconfig.json", {"train": {"TrainingInputMode": "FastFile"}})
    assert "output" in sagemaker_values(root, NOTHING)


@pytest.mark.parametrize("name", ["resourceconfig.json", "checkpointconfig.json"])
def test_a_damaged_file_of_the_platform_is_refused_by_name(root: Path, name: str) -> None:
    config_file(root, name, ["x"])
    with pytest.raises(ConfigError, match=name):
        sagemaker_job(root, NOTHING)


def test_what_is_strange_in_a_file_of_the_platform_is_refused_or_taken_as_text(root: Path) -> None:
    config_file(root, "resourceconfig.json", {"current_host": "algo-1", "hosts": ["algo-²", "algo-1"]})
    job = sagemaker_job(root, NOTHING)
    assert job is not None and job.hosts == ("algo-1", "algo-²")
    config_file(root, "checkpointconfig.json", {"LocalPath": 5})
    with pytest.raises(ConfigError, match=r"checkpointconfig\.json: LocalPath must be text, given: 5"):
        sagemaker_job(root, NOTHING)
    (root / "input" / "config" / "checkpointconfig.json").unlink()
    for name in ("hyperparameters.json", "resourceconfig.json"):
        (root / "input" / "config" / name).write_text("[" * 100_000)
        with pytest.raises(ConfigError, match=name):
            sagemaker_job(root, NOTHING)
        (root / "input" / "config" / name).write_text("{}")
    assert parse_hyperparameters({"recipe": "[" * 100_000}) == {"recipe": "[" * 100_000}


@pytest.mark.parametrize("variable", ["SM_HPS", "SM_HOSTS", "SM_INPUT_DATA_CONFIG"])
def test_a_damaged_variable_is_refused_by_name(tmp_path: Path, variable: str) -> None:
    environ = {"SM_MODEL_DIR": "/m", variable: "{"}
    with pytest.raises(ConfigError, match=variable):
        sagemaker_values(tmp_path, environ)
        sagemaker_job(tmp_path, environ)


def test_hosts_without_the_current_one_are_refused(root: Path) -> None:
    config_file(root, "resourceconfig.json", {"current_host": "algo-3", "hosts": ["algo-1"]})
    with pytest.raises(ConfigError, match="do not hold the current host algo-3"):
        sagemaker_job(root, NOTHING)


def test_a_process_is_alone_unless_torchrun_says_otherwise() -> None:
    assert ranks(NOTHING) == Ranks()
    assert ranks({"LOCAL_RANK": "0"}) == Ranks()
    assert Ranks().is_first
    assert not Ranks().is_distributed
    second = ranks({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert second == Ranks(3, 4, 1)
    assert second.is_distributed
    assert not second.is_first


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "1"},
        {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ],
)
def test_ranks_that_cannot_be_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="RANK"):
        ranks(environ)


def test_a_failure_is_one_sentence_and_then_the_trace(root: Path) -> None:
    write_failure("No images.", "Traceback ...\nValueError", root, NOTHING)
    assert (root / "output" / "failure").read_text() == "No images.\n\nTraceback ...\nValueError"
    assert [path.name for path in (root / "output").iterdir()] == ["failure"]


def test_a_long_sentence_is_cut_to_what_aws_shows(root: Path) -> None:
    write_failure("ä" * 5000, "trace", root, NOTHING)
    shown, trace = (root / "output" / "failure").read_bytes().split(b"\n\n")
    assert len(shown) <= 1024
    assert shown.decode().endswith("ä...")
    assert trace == b"trace"


def test_the_first_failure_stays(root: Path) -> None:
    write_failure("The cause.", "", root, NOTHING)
    write_failure("What followed.", "", root, NOTHING)
    assert (root / "output" / "failure").read_text() == "The cause."


def test_a_failure_outside_of_a_job_or_on_a_full_disk_harms_nothing(root: Path, tmp_path: Path) -> None:
    write_failure("x", "", tmp_path / "elsewhere", NOTHING)
    assert not (tmp_path / "elsewhere").exists()
    (root / "output").write_text("a file where the folder should be")
    write_failure("x", "", root, NOTHING)


def test_what_a_child_needs_gives_way_to_what_is_set() -> None:
    assert environment_with({"A": "1", "B": "2"}, {"B": "mine"}) == {"A": "1", "B": "mine"}
