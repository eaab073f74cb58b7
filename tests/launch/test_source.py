"""Our code for AWS's images: the archive is whole, its program trains, requests name it; with AWS's own toolkit too."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from service.model.artifact import open_artifact
from tests.launch.conftest import RUN
from tests.launch.in_process import ROLE, Account
from training.config import TrainingConfig
from training.errors import ConfigError
from training.launch import experiments, jobs, source
from training.launch.flags import parser
from training.launch.names import Project

TOOLKIT = "sagemaker-training==5.1.4"
TRIAL = {"entry": "hpo"}
"""What `tune` adds to the hyperparameters of its trials."""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    # Python before 3.11.4 has no filters for tarfile.
    subprocess.run(["tar", "-xzf", "-", "-C", folder], input=source.archive(), check=True)
    return folder


def test_the_archive_is_the_same_for_the_same_content_and_has_no_torch(unpacked: Path) -> None:
    assert source.archive() == source.archive()
    lines = (unpacked / "requirements.txt").read_text().splitlines()
    names = [line.split("==")[0] for line in lines]
    assert {"pydantic", "safetensors", "simplejpeg", "optuna"} <= set(names)
    assert not {"torch", "torchvision"} & set(names)
    assert not list(unpacked.rglob("*.ipynb"))


def test_a_job_that_reports_to_mlflow_is_sent_what_that_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = {"mlflow-skinny", "sagemaker-mlflow"}
    assert not mlflow & names(source.requirements())
    groups = source.groups_of({"mlflow_uri": "http://here"})
    assert names(source.requirements(groups)) == names(source.requirements()) | mlflow
    version = metadata.version

    def without(name: str) -> str:
        if name == "mlflow-skinny":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    with pytest.raises(ConfigError, match="mlflow-skinny is not installed here; `uv sync --inexact --group mlflow`"):
        source.requirements(groups)


def names(requirements: str) -> set[str]:
    return {line.split("==")[0] for line in requirements.splitlines()}


@pytest.mark.slow
def test_the_program_trains_away_from_this_checkout(unpacked: Path, data: Path, tmp_path: Path) -> None:
    """As the toolkit calls it: SM_* variables, and hyperparameters as flags with underscores."""
    hyperparameters = {"weights": "none", "quantize": "off", "epochs": 1, "batch_size": 8, "report": False}
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "SM_MODEL_DIR": str(tmp_path / "model"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output"),
        "SM_CHANNEL_TRAIN": str(data), "SM_HPS": json.dumps(hyperparameters), "SAGEMAKER_BASE_DIR": str(tmp_path),
    }  # fmt: skip
    flags = [text for name, value in hyperparameters.items() for text in (f"--{name}", str(value))]
    result = subprocess.run(
        [sys.executable, source.PROGRAM, *flags], cwd=unpacked, env=environment, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    open_artifact(tmp_path / "model").verify()


def test_the_job_is_told_where_the_code_is(here: Account, data: Path) -> None:
    project, image = Project("sent", "sent-code"), "763104351884.dkr.ecr.eu-central-1.amazonaws.com/pytorch-training:2"
    options, _ = parser().parse_known_args(
        ["train", "--data", str(data), "--image", image, "--send-code", "--role", ROLE]
    )
    config = TrainingConfig.create({"data": data, "output": data.parent / "model", "epochs": 1})
    taken, machines = experiments.image_of(options, here.aws.region), jobs.Machines()
    training = experiments.training_of(here.aws, project, options, taken, {"epochs": "1"}, machines, config=config)
    place = json.loads(training.hyperparameters["sagemaker_submit_directory"])
    assert json.loads(training.hyperparameters["sagemaker_program"]) == source.PROGRAM
    bucket, key = place.removeprefix("s3://").split("/", 1)
    assert here.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read() == source.archive()
    assert jobs.request(project, training, here.aws.region)["AlgorithmSpecification"]["TrainingImage"] == image


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, TRIAL], ids=["train", "trial"])
def test_awss_own_toolkit_runs_it(more: dict[str, str], data: Path, tmp_path: Path) -> None:
    """In an environment of its own, from PyPI; our packages are this one's, so that little is installed twice."""
    uv = os.environ.get("UV", "uv")
    made = subprocess.run([uv, "venv", "--python", sys.executable, str(tmp_path / "venv")], capture_output=True)
    if made.returncode:
        pytest.skip("uv is needed to install AWS's training toolkit")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), TOOLKIT], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "ours.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")))
    base = tmp_path / "ml"
    config = base / "input" / "config"
    config.mkdir(parents=True)
    (base / "input" / "data").mkdir()
    (base / "input" / "data" / "train").symlink_to(data)
    (tmp_path / "sourcedir.tar.gz").write_bytes(source.archive())
    given = dict(zip((name.removeprefix("--").replace("-", "_") for name in RUN[::2]), RUN[1::2], strict=True))
    given |= {"sagemaker_program": source.PROGRAM, "sagemaker_submit_directory": str(tmp_path / "sourcedir.tar.gz")}
    if more:
        given |= {**more, "_tuning_objective_metric": "validation:accuracy"}  # SageMaker's, which the toolkit keeps
    (config / "hyperparameters.json").write_text(json.dumps({k: json.dumps(v) for k, v in given.items()}))
    group = {"instance_group_name": "g", "instance_type": "ml.c5.xlarge", "hosts": ["localhost"]}
    resources = {  # a host whose name is known here: the toolkit waits for that
        "current_host": "localhost", "hosts": ["localhost"], "network_interface_name": "lo",
        "current_instance_type": "ml.c5.xlarge", "current_group_name": "g", "instance_groups": [group],
    }  # fmt: skip
    (config / "resourceconfig.json").write_text(json.dumps(resources))
    (config / "inputdataconfig.json").write_text(json.dumps({"train": {"TrainingInputMode": "File"}}))
    environment = {**os.environ, "SAGEMAKER_BASE_DIR": str(base)}
    result = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "train")], env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Reporting training SUCCESS" in result.stdout + result.stderr
    open_artifact(base / "model").verify()
