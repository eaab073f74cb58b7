"""The journey in a real account: `AWS_TEST_IMAGE=<image in ECR> make test-aws`. Costs a dollar or two, takes an hour.

The image is the one of the target `train`, which understands `serve` as well. Everything runs on ml.m5.xlarge, whose
quotas must be 2 for trainings, 4 for endpoints, 1 for batch transform; `preflight`, the second step, says so. What was
made is removed at the end. Those who wrote it had no account: the same steps are run against the rehearsal.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rehearsal.start import IMAGE, rehearsal
from training.launch.__main__ import main

PROJECT = "launch-test"
OTHERS = {"serverless": f"{PROJECT}-sless", "async": f"{PROJECT}-async"}
CPU = ("--instance", "ml.m5.xlarge")


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
