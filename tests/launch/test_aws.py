"""The journey in a real account: `AWS_TEST_IMAGE=<image in ECR> make test-aws`. Costs a dollar or two, takes an hour.

The image is the one of the target `train`, which understands `serve` as well. Everything runs on ml.m5.xlarge, whose
quotas must be 2 for trainings, 4 for endpoints, 1 for batch transform; `preflight`, the second step, says so. What was
made is removed at the end. Those who wrote it had no account: the same steps are run against the rehearsal.

What only AWS can show has tests of its own, minutes and cents each: a shadow whose answers are captured, a training on
two hosts, and where a variable asks for it

    AWS_TEST_GPU=1                     GPUs: a spot job that is stopped and goes on, an endpoint with its host image;
                                       quotas of ml.g4dn.xlarge for trainings, spot trainings and endpoints must be 1
    AWS_TEST_PYTORCH_IMAGE=<URI>       AWS's PyTorch training image (for processors) with our code
    AWS_TEST_DEBUGGER=1                SageMaker Debugger, which AWS gives to no new account
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.model.artifact import open_artifact
from tests.rehearsal.start import IMAGE, rehearsal
from training.launch import amis, attempts, debugger, jobs
from training.launch.__main__ import main
from training.launch.data import listed
from training.launch.logs import TRAINING, LogTail
from training.launch.names import Project
from training.launch.session import Aws, connect

PROJECT = "launch-test"
OTHERS = {"serverless": f"{PROJECT}-sless", "async": f"{PROJECT}-async"}
CPU, GPU = ("--instance", "ml.m5.xlarge"), ("--instance", "ml.g4dn.xlarge")
EPOCHS = 1000
"""Minutes on a GPU: time enough to see the job at work, and to stop it."""


def launch(command: str, *arguments: object, project: str = PROJECT) -> None:
    """A command, which must end well."""
    assert main([command, "--project", project, *map(str, arguments)]) == 0, (command, arguments)


def all_the_way(image: str, data: Path, asked: Path, folder: Path) -> None:
    """Every step of the journey with a small model, on processors."""
    used = ("--image", image)
    learns = ("--data", data, *used, *CPU, "--weights", "none", "--quantize", "off", "--max-hours", 0.5)
    launch("iam-role")
    wanted = ("--parallel", 2, "--hosting-instance", CPU[1], "--max", 2, "--batch-instance", CPU[1])
    launch("preflight", *used, *CPU, *wanted)
    launch("upload", "--data", data)
    tuned, model = folder / "tuning" / "model", folder / "model"
    launch("tune", *learns, "--trials", 2, "--epochs-range", "1:2", "--batch-sizes", 8, "--output", tuned.parent)
    launch("train", *learns, "--epochs", 2, "--batch-size", 8, "--output", model)
    launch("deploy", *used, *CPU, "--model", model, "--max", 2, "--smoke", asked)
    launch("deploy", *used, *CPU, "--model", tuned, "--max", 2)  # in its place, with its scaling
    launch("status")
    launch("logs", "endpoint")
    count = 1 + len(list(asked.iterdir()))
    launch("invoke", asked, "--output", folder / "answers.csv")
    launch("batch", *used, *CPU, "--model", tuned, "--output", folder / "batch.csv", asked)
    for name in ("answers.csv", "batch.csv"):
        assert len((folder / name).read_text().splitlines()) == count
    launch("delete", "--yes")  # what the others take is free again
    for kind, more in (("serverless", ()), ("async", (*CPU, "--min", 0, "--max", 1))):
        served = (*used, "--role", f"{PROJECT}-sagemaker", "--model", model, "--kind", kind, *more)
        launch("deploy", *served, project=OTHERS[kind])
        launch("invoke", asked, "--output", folder / f"{kind}.csv", project=OTHERS[kind])
        assert len((folder / f"{kind}.csv").read_text().splitlines()) == count
        launch("delete", "--data", "--yes", project=OTHERS[kind])


@dataclass(frozen=True)
class Given:
    """What a test of AWS alone works with."""

    image: str
    data: Path
    asked: Path
    artifact: Path
    """A model of this machine's."""
    folder: Path

    def learns(self, *more: object) -> tuple[object, ...]:
        """The arguments of a training of seconds, whose model comes to `folder`."""
        model = ("--data", self.data, "--output", self.folder / "model")
        return (*model, "--weights", "none", "--quantize", "off", "--batch-size", 8, "--max-hours", 0.5, *more)


def here() -> tuple[Aws, Project]:
    """The account, and what `launch` calls its own in it."""
    aws = connect()
    return aws, Project(PROJECT, f"sagemaker-{aws.region}-{aws.account}")


def log_of_newest() -> LogTail:
    aws, project = here()
    return LogTail(aws, TRAINING, f"{attempts.every(aws, project)[0].name}/")


def written(*parts: str) -> list[str]:
    """The keys of the project's objects in S3 below this folder."""
    aws, project = here()
    return [key for key, _ in listed(aws, f"{project.uri(*parts)}/")]


def until(found: Callable[[], Any], what: str, limit_s: float = 1500) -> Any:
    """What is found, once it is."""
    deadline_s = time.monotonic() + limit_s
    while not (there := found()):
        assert time.monotonic() < deadline_s, what
        time.sleep(1)
    return there


def spot_goes_on(given: Given) -> None:
    """A training on spare GPUs that is stopped goes on from its checkpoint, which AWS has brought to S3 and back."""
    launch("preflight", "--image", given.image, *GPU, "--spot", "--hosting-instance", GPU[1])
    command = given.learns("--image", given.image, *GPU, "--spot", "--epochs", EPOCHS, "--report", "false")
    launch("train", *command, "--no-wait")
    log = log_of_newest()
    until(lambda: any(f"epoch=2/{EPOCHS}" in line for line in log.new_lines()), "it does not train")
    launch("stop", "--yes")
    assert written("checkpoints")
    launch("train", *command)
    resumed = log_of_newest()
    until(lambda: any("resumed from" in line for line in resumed.new_lines()), "it began anew", 120)
    open_artifact(given.folder / "model").verify()


def gpu_answers(given: Given) -> None:
    """A GPU's host has the driver that CUDA 13 needs: else the container ends before it answers."""
    launch("deploy", "--image", given.image, *GPU, "--model", given.artifact, "--smoke", given.asked)
    aws, project = here()
    client = aws.client("sagemaker")
    name = client.describe_endpoint(EndpointName=project.endpoint)["EndpointConfigName"]
    (variant,) = client.describe_endpoint_config(EndpointConfigName=name)["ProductionVariants"]
    assert variant["InferenceAmiVersion"] == amis.ami_for(GPU[1])
    launch("delete", "--yes")


def shadow_is_captured(given: Given) -> None:
    """Both variants' answers come to S3: the callers', and those of the shadow, which nobody else sees."""
    used = ("--image", given.image, *CPU)
    launch("train", *given.learns(*used, "--epochs", 1))
    shadowed = ("--shadow", given.artifact, "--capture-percent", 100)
    launch("deploy", *used, "--model", given.folder / "model", *shadowed, "--smoke", given.asked)
    for variant in ("main", "shadow"):
        until(partial(written, "captured", PROJECT, variant), f"nothing of {variant} is captured")
    launch("delete", "--yes")


def hosts_train_as_one(given: Given) -> None:
    """Two hosts find each other by AWS's names; one of them tells of the epochs and writes the model."""
    two = ("--image", given.image, *CPU, "--instances", 2)
    launch("preflight", *two, "--hosting-instance", CPU[1])
    launch("train", *given.learns(*two, "--epochs", 2))
    open_artifact(given.folder / "model").verify()
    log, lines = log_of_newest(), list[str]()

    def both_told() -> bool:
        lines.extend(log.new_lines())
        begun = sum("on each of 2 host(s) (algo-1, algo-2)" in line for line in lines)
        return begun == 2 and any("epoch=2/2" in line for line in lines)

    until(both_told, "the log lacks a host, or the last epoch", 120)
    assert sum("epoch=2/2" in line for line in lines) == 1


def sent_code_trains(given: Given) -> None:
    """AWS's own PyTorch image installs what our code needs, and trains."""
    launch("train", *given.learns("--image", os.environ["AWS_TEST_PYTORCH_IMAGE"], "--send-code", *CPU, "--epochs", 1))
    open_artifact(given.folder / "model").verify()


def debugger_judges(given: Given) -> None:
    """AWS's rules read what the training writes, and come to a verdict each; the hook's tensors are in S3."""
    launch("train", *given.learns("--image", given.image, *CPU, "--debugger", "--epochs", 2))
    aws, project = here()
    name = attempts.every(aws, project)[0].name

    def verdicts() -> dict[str, str]:
        found = jobs.describe(aws, name).get("DebugRuleEvaluationStatuses", ())
        said = {each["RuleConfigurationName"]: each["RuleEvaluationStatus"] for each in found}
        return {} if {"InProgress", "Stopping"} & set(said.values()) else said

    said = until(verdicts, "the rules come to no end")
    assert said.keys() >= set(debugger.RULES) and "Error" not in said.values(), said
    assert written("debugger")


def remove() -> None:
    """All that the journey may have made."""
    for project in OTHERS.values():
        launch("delete", "--data", "--yes", project=project)
    launch("delete", "--data", "--role", "--yes")


def _reason() -> str:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    if not os.environ.get("AWS_TEST_IMAGE"):
        return "AWS_TEST_IMAGE names no image in ECR (of the target train: make image TARGET=train, make push)"
    try:
        boto3.client("sts").get_caller_identity()
    except (BotoCoreError, ClientError) as exc:
        return f"there is no AWS account: {exc}"
    return ""


@pytest.fixture
def image() -> Iterator[str]:
    """The image; skips, saying why, where there is no account. What was made is removed at the end."""
    reason = _reason()
    if reason:
        pytest.skip(reason)
    try:
        yield os.environ["AWS_TEST_IMAGE"]
    finally:
        remove()


def asks(variable: str, what: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not os.environ.get(variable), reason=f"{variable} is not set: {what}")


GPUS = asks("AWS_TEST_GPU", "1 where the account may have an ml.g4dn.xlarge")


@pytest.mark.aws
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "steps",
    [
        shadow_is_captured,
        hosts_train_as_one,
        pytest.param(spot_goes_on, marks=GPUS),
        pytest.param(gpu_answers, marks=GPUS),
        pytest.param(sent_code_trains, marks=asks("AWS_TEST_PYTORCH_IMAGE", "the URI of AWS's, for processors")),
        pytest.param(debugger_judges, marks=asks("AWS_TEST_DEBUGGER", "1 where the account has Debugger")),
    ],
)  # fmt: skip
def test_only_aws_shows_that(
    steps: Callable[[Given], None], image: str, data: Path, asked: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    artifact = request.getfixturevalue("artifact")  # trained now, not where all is skipped
    launch("iam-role")
    steps(Given(image, data, asked, artifact, tmp_path))


@pytest.mark.aws
@pytest.mark.timeout(10800)
def test_a_small_model_goes_all_the_way_in_an_account(image: str, data: Path, asked: Path, tmp_path: Path) -> None:
    all_the_way(image, data, asked, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_steps_pass_in_the_rehearsal_and_leave_nothing(
    data: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rehearsal() as cloud:
        cloud.push_image()
        for name, value in cloud.variables.items():
            monkeypatch.setenv(name, value)
        all_the_way(IMAGE, data, asked, tmp_path)
        remove()
        left = {**cloud.ask("/rehearsal/leftovers"), **cloud.ask("/rehearsal/traces")}
        assert {kind: names for kind, names in left.items() if names} == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_only_aws_shows_is_asked_for_by_steps_that_pass_in_the_rehearsal(
    data: Path, asked: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but Debugger's, whose rules nothing runs here, and two hosts'; a spot job that goes on, with epochs of a
    processor."""
    monkeypatch.setitem(globals(), "EPOCHS", 24)
    theirs = "763104351884.dkr.ecr.eu-central-1.amazonaws.com/pytorch-training:2.9.0-cpu-py312"
    monkeypatch.setenv("AWS_TEST_PYTORCH_IMAGE", theirs)
    with rehearsal() as cloud:
        cloud.push_image()
        for name, value in cloud.variables.items():
            monkeypatch.setenv(name, value)
        launch("iam-role")
        for steps in (shadow_is_captured, gpu_answers, sent_code_trains, spot_goes_on):
            folder = tmp_path / steps.__name__
            folder.mkdir()
            steps(Given(IMAGE, data, asked, artifact, folder))
        remove()
        left = {**cloud.ask("/rehearsal/leftovers"), **cloud.ask("/rehearsal/traces")}
        assert {kind: names for kind, names in left.items() if names} == {}
