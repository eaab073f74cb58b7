"""`train` and `tune` with what not every account has: Debugger, and AWS's images in place of ours."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch.in_process import ROLE, Account
from tests.launch.telling import told
from tests.rehearsal.start import IMAGE
from training.launch import debugger, source
from training.launch.names import Project

AWSS = "763104351884.dkr.ecr.eu-central-1.amazonaws.com/pytorch-training:2"
SMALL = ("--weights", "none", "--quantize", "off", "--no-wait")


def test_a_job_with_debugger_is_started_with_hook_rules_and_profiler(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told(caplog, "train", "--project", "debugs", "--data", data, "--image", IMAGE, "--role", ROLE, "--debugger", *SMALL)
    (given,) = here.cloud.plane.jobs._given.values()
    project = Project("debugs", "sagemaker-eu-central-1-123456789012")
    for name, value in debugger.request(project, "eu-central-1").items():
        assert given[name] == value
    assert "TensorBoardOutputConfig" not in given


def test_trials_of_a_search_in_awss_image_are_given_our_code(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told(
        caplog, "tune", "--project", "sends", "--data", data, "--image", AWSS, "--send-code", "--role", ROLE, *SMALL,
        "--trials", 1, "--epochs-range", "1:2", "--batch-sizes", 8,
    )  # fmt: skip
    ((name, search),) = here.cloud.plane.jobs._searches.items()
    definition: dict[str, Any] = search["given"]["TrainingJobDefinition"]
    assert definition["AlgorithmSpecification"]["TrainingImage"] == AWSS
    fixed = definition["StaticHyperParameters"]
    assert fixed["entry"] == "hpo" and json.loads(fixed["sagemaker_program"]) == source.PROGRAM
    bucket, key = json.loads(fixed["sagemaker_submit_directory"]).removeprefix("s3://").split("/", 1)
    assert here.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read() == source.archive()
    told(caplog, "stop", "--project", "sends", name)
