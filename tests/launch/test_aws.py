"""The journey in a real account: `AWS_TEST_IMAGE=<image in ECR> make test-aws`. Costs cents; removes what it made.

Nothing here has been run by those who wrote it, who had no account.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from training.launch.__main__ import main

PROJECT = "launch-test"


def _reason() -> str:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    if not os.environ.get("AWS_TEST_IMAGE"):
        return "AWS_TEST_IMAGE names no image in ECR"
    try:
        boto3.client("sts").get_caller_identity()
    except (BotoCoreError, ClientError) as exc:
        return f"there is no AWS account: {exc}"
    return ""


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The image; skips, saying why, where there is no account. What was made is removed at the end."""
    reason = _reason()
    if reason:
        pytest.skip(reason)
    try:
        yield os.environ["AWS_TEST_IMAGE"]
    finally:
        assert main(["delete", "--project", PROJECT, "--data", "--role", "--yes"]) == 0


@pytest.mark.aws
@pytest.mark.timeout(3600)
def test_a_small_model_goes_all_the_way_on_processors(image: str, data: Path, asked: Path, tmp_path: Path) -> None:
    ours = ["--project", PROJECT]
    machine = ["--instance", "ml.c6i.xlarge"]
    small = ["--weights", "none", "--epochs", "2", "--batch-size", "8", "--quantize", "off", "--max-hours", "0.5"]
    model, answers = tmp_path / "model", tmp_path / "answers.csv"
    assert main(["iam-role", *ours]) == 0
    assert main(["preflight", *ours, "--image", image, *machine, "--hosting-instance", "ml.c6i.xlarge"]) == 0
    train = ["train", *ours, "--data", str(data), "--image", image, "--output", str(model)]
    assert main([*train, "--instance", "ml.m5.xlarge", *small]) == 0
    assert main(["deploy", *ours, "--model", str(model), "--image", image, *machine, "--smoke", str(asked)]) == 0
    assert main(["invoke", *ours, str(asked), "--output", str(answers)]) == 0
    assert len(answers.read_text().splitlines()) == 1 + len(list(asked.iterdir()))
