"""What --data, --validation and --weights become: channels of a job, each an S3 address as it is or uploaded."""

import argparse
import logging
import os
import shutil
from pathlib import Path

import pytest

from tests.rehearsal.start import IMAGE
from training.errors import ConfigError, DataError, TrainingError
from training.launch.__main__ import main
from training.launch.data import channel_of, prefix_of
from training.launch.experiments import channels
from training.launch.names import Project
from training.launch.session import Aws, connect

PROJECT = Project("resnet34", "mine")


def dry(data: object, validation: object = None, weights: object = None) -> dict[str, str]:
    """The channels of a dry run, which asks AWS for nothing."""
    given = [None if value is None else str(value) for value in (data, validation, weights)]
    options = argparse.Namespace(**dict(zip(("data", "validation", "weights"), given, strict=True)), dry_run=True)
    return channels(connect("eu-central-1"), PROJECT, options)


def test_addresses_are_taken_as_they_are_and_only_folders_get_a_slash() -> None:
    assert dry("s3://b/train", "s3://b/val/", "s3://b/w.safetensors") == {
        "train": "s3://b/train/", "validation": "s3://b/val/", "weights": "s3://b/w.safetensors"
    }  # fmt: skip
    assert dry("s3://b/train", weights="imagenet") == {"train": "s3://b/train/"}
    with pytest.raises(ConfigError, match="no S3 address"):
        dry("s3://")


def test_a_file_of_weights_goes_with_data_in_s3_and_here(data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"weights")
    uploaded = PROJECT.uri("data", prefix_of(channel_of("weights", weights)))
    assert dry("s3://b/train", weights=weights) == {"train": "s3://b/train/", "weights": uploaded}
    found = dry(data, weights=weights)
    assert found["weights"] == uploaded
    assert found["train"].startswith(PROJECT.uri("data", "train-"))


def test_data_and_validation_are_both_here_or_both_there(data: Path) -> None:
    for one, other in (("s3://b/train/", data), (data, "s3://b/val/")):
        with pytest.raises(ConfigError, match="one is in S3 and the other here"):
            dry(one, other)


@pytest.mark.parametrize("flag", ["data", "validation", "weights"])
def test_a_place_that_is_not_there_is_named_with_its_flag(flag: str, data: Path, tmp_path: Path) -> None:
    given = {"data": data, flag: tmp_path / "gone"}
    with pytest.raises(ConfigError, match=rf"--{flag} .*gone: there is no such"):
        dry(**given)
    if flag == "weights":
        with pytest.raises(ConfigError, match=r"--weights .*gone: there is no such file"):
            dry("s3://b/train/", weights=tmp_path / "gone")


def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "a.png").write_bytes(b"x")
    channel = channel_of("train", folder)
    (folder / "cat" / "a.png").unlink()
    with pytest.raises(TrainingError, match=r"a\.png cannot be read: No such file"):
        prefix_of(channel)


def test_a_bucket_that_the_projects_role_cannot_read_is_warned_of(
    caplog: pytest.LogCaptureFixture, aws: Aws, request: pytest.FixtureRequest
) -> None:
    s3 = aws.client("s3")
    s3.create_bucket(Bucket="theirs", CreateBucketConfiguration={"LocationConstraint": aws.region})
    request.addfinalizer(lambda: s3.delete_bucket(Bucket="theirs"))
    s3.put_object(Bucket="theirs", Key="train/cat/a.png", Body=b"x")
    request.addfinalizer(lambda: s3.delete_object(Bucket="theirs", Key="train/cat/a.png"))
    given = ["--image", IMAGE, "--data", "s3://theirs/train/", "--dry-run", "--weights", "none"]
    for command, warned in ((["train", *given], True), (["train", *given, "--role", "resnet34-sagemaker"], False)):
        caplog.clear()
        assert main(command) == 0, caplog.text
        assert ("bucket theirs: the role that iam-role makes reads" in caplog.text) is warned
    assert main(["upload", "--data", "s3://theirs/train/", "--dry-run"]) == 0
    arn = "arn:aws:sagemaker:eu-central-1:123456789012:mlflow-app/mine"
    caplog.clear()
    with caplog.at_level(logging.INFO, "training"):
        assert main(["train", *given, "--mlflow", arn]) == 0
    assert f"mlflow_uri={arn}" in caplog.text


def test_class_folders_that_are_links_are_sent_as_the_check_reads_them(data: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for folder in data.iterdir():
        (linked / folder.name).symlink_to(folder)
    assert [key for key, _ in channel_of("train", linked).files] == [key for key, _ in channel_of("train", data).files]
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("train", "validation"):
        (parts / name).symlink_to(linked)
    keys = {key for key, _ in channel_of("train", parts).files}
    assert keys == {f"{part}/{key}" for part in ("train", "validation") for key, _ in channel_of("train", data).files}
    first = next(data.iterdir()).name
    (linked / "own").mkdir()
    shutil.copy(next((data / first).iterdir()), linked / "own" / "a.png")
    (linked / "own" / "round").symlink_to(linked)  # not followed there either
    assert {key for key, _ in channel_of("train", linked).files if key.startswith("own/")} == {"own/a.png"}


def test_a_name_that_s3_cannot_have_is_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "cat"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    with pytest.raises(DataError, match=r"\\udcff\.png': its name is no UTF-8.*rename it"):
        channel_of("train", tmp_path / "data")


def test_a_name_longer_than_any_is_a_sentence(data: Path) -> None:
    long = "x" * 300
    for given in ((long,), (data, long), (data, None, long)):
        with pytest.raises(ConfigError, match=r"x{300}: File name too long"):
            dry(*given)


def test_broken_files_are_skipped_where_that_is_asked_for(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, aws: Aws
) -> None:
    broken = shutil.copytree(data, tmp_path / "broken")
    (next(broken.iterdir()) / "broken.png").write_bytes(b"")
    for command in (["upload"], ["train", "--image", IMAGE, "--role", "resnet34-sagemaker", "--weights", "none"]):
        given = [*command, "--data", str(broken), "--dry-run"]
        caplog.clear()
        assert main(given) == 1
        assert "go on without them with --broken-files skip" in caplog.text
        assert main([*given, "--broken-files", "skip"]) == 0, caplog.text
