"""`train` and `tune` with what not every account has: Debugger, and AWS's images in place of ours."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from tests.launch.in_process import ROLE, Account
from tests.launch.telling import told
from tests.rehearsal.start import IMAGE
from training.launch import debugger, jobs, source
from training.launch.names import Project
from training.launch.session import Aws

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


def test_what_awss_rules_found_is_told_at_a_jobs_end(caplog: pytest.LogCaptureFixture) -> None:
    found = [
        {"RuleConfigurationName": name, "RuleEvaluationStatus": status, **more}
        for name, status, more in (
            ("Overfit", "NoIssuesFound", {}),
            ("DeadRelu", "IssuesFound", {"StatusDetails": "RuleEvaluationConditionMet: at step 500"}),
            ("ExplodingTensor", "Error", {"StatusDetails": "InternalServerError"}),
            ("Overtraining", "InProgress", {}),
        )
    ]
    for job, lines in (({}, []), ({"DebugRuleEvaluationStatuses": found}, [
        ("INFO", "rule Overfit: NoIssuesFound"),
        ("WARNING", "rule DeadRelu: IssuesFound (RuleEvaluationConditionMet: at step 500)"),
        ("WARNING", "rule ExplodingTensor: Error (InternalServerError)"),
        ("INFO", "rule Overtraining is at work still; the same command tells later what it found"),
    ])):  # fmt: skip
        described = {"TrainingJobStatus": "Completed", "TrainingJobName": "j", **job}

        class Answers:
            def client(self, _: str) -> Any:
                return self

            def describe_training_job(self, told: Any = described, **_: str) -> Any:
                return told

        caplog.clear()
        with caplog.at_level("INFO", "training"):
            jobs.wait_for(cast(Aws, Answers()), "j", 0.01)
        said = [(record.levelname, record.getMessage()) for record in caplog.records]
        assert [each for each in said if each[1].startswith("rule ")] == lines


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
