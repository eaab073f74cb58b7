"""Data on its way to S3: in parts, checked by sums, only what is missing, told as it goes; channels of jobs."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.launch.conftest import RUN
from tests.launch.in_process import ROLE, Account
from tests.launch.telling import problem, told
from tests.rehearsal.start import IMAGE, Rehearsal
from training import progress
from training.launch import data as channels
from training.launch.names import Project
from training.launch.session import Aws

BUCKET = "sagemaker-eu-central-1-123456789012"
PART_BYTES = 5 * 2**20
"""S3's smallest part."""


def keys(here: Account, project: str) -> dict[str, int]:
    """Key below the project's prefix and size of every object of a project's."""
    found = channels.listed(here.aws, f"s3://{BUCKET}/{project}/")
    return {key.removeprefix(f"{project}/"): size for key, size in found}


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights that is sent in parts: above four times the least that S3 takes."""
    monkeypatch.setattr(channels, "PART_BYTES", PART_BYTES)
    path = tmp_path / "w.safetensors"
    path.write_bytes(os.urandom(4 * PART_BYTES + 1000))
    return path


def test_a_large_file_goes_in_parts_and_arrives_whole(
    here: Account, data: Path, large: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ("upload", "--project", "large", "--data", data, "--weights", large)
    assert "uploading weights: 1 of 1 files sent" in told(caplog, *command)
    assert "s3 UploadPart" in here.calls
    assert set(here.cloud.checksums) == {"PutObject", "UploadPart"}
    assert all(here.cloud.checksums.values())  # by it S3 refuses what was damaged on the way
    (key,) = [key for key in keys(here, "large") if key.endswith("/w.safetensors")]
    found = here.client("s3").get_object(Bucket=BUCKET, Key=f"large/{key}")
    assert found["Body"].read() == large.read_bytes()
    said = told(caplog, *command)
    assert "uploading weights: 0 of 1 files sent" in said and re.search(r"uploading train: 0 of \d+ files sent", said)


def test_parts_of_a_file_that_was_broken_off_do_not_stay(
    here: Account, data: Path, large: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ("upload", "--project", "parts", "--data", data, "--weights", large)
    here.order(operation="UploadPart", code="AccessDenied", message="Access Denied", times=1, status=403)
    assert "Permission s3:PutObject is missing" in problem(caplog, *command)
    uploads = here.client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert [each for each in uploads if each["Key"].startswith("parts/")] == []
    assert "uploading weights: 1 of 1 files sent" in told(caplog, *command)


@pytest.mark.parametrize("filled", [False, True])
def test_a_bucket_whose_making_broke_off_is_closed_by_the_repeat(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture, filled: bool
) -> None:
    name = f"half-made-{'filled' if filled else 'empty'}"
    command, s3 = ("upload", "--project", "half", "--data", data, "--bucket", name), here.client("s3")
    here.order(operation="PutPublicAccessBlock", code="AccessDenied", message="Access Denied", times=1, status=403)
    assert "Permission s3:PutBucketPublicAccessBlock is missing" in problem(caplog, *command)
    if filled:  # someone uses it since, as it is
        s3.put_object(Bucket=name, Key="page.html", Body=b"for all to see")
    assert ("is closed to the public" in told(caplog, *command)) is not filled
    if not filled:
        assert all(s3.get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"].values())
    assert "is closed to the public" not in told(caplog, *command)


def test_a_wrong_object_of_the_same_size_is_sent_again(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    command = ("upload", "--project", "wrong", "--data", data)
    count = sum(1 for path in data.rglob("*.png"))
    said = told(caplog, *command)
    assert f"{count} of {count} files sent (s3://" in said and "the others" not in said
    key, size = next(iter(keys(here, "wrong").items()))
    here.client("s3").put_object(Bucket=BUCKET, Key=f"wrong/{key}", Body=b"x" * size)
    assert f"uploading train: 1 of {count} files sent, the others were there" in told(caplog, *command)
    body = here.client("s3").get_object(Bucket=BUCKET, Key=f"wrong/{key}")["Body"].read()
    assert body == (data / key.split("/", 2)[2]).read_bytes()


def test_progress_is_told_line_by_line_where_nobody_looks_at_a_terminal(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "in_terminal", lambda: False)
    said = told(caplog, "upload", "--project", "shown", "--data", data)
    count = sum(1 for path in data.rglob("*.png"))
    for what in ("reading train", "uploading train"):
        assert re.findall(rf"^{what}: (\d+) of {count}$", said, re.MULTILINE) == [str(n + 1) for n in range(count)]


def test_cifar_100_is_uploaded_as_it_is_and_a_job_gets_it(
    here: Account, sample_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = told(caplog, "upload", "--project", "cifar", "--data", sample_root)
    assert "100 classes" in said
    there = keys(here, "cifar")
    folders = {key.split("/")[1] for key in there}
    assert len(folders) == 1
    names = {key.split("/", 2)[2] for key in there}
    assert {"cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta"} <= names
    train = ("train", "--project", "cifar", "--image", IMAGE, "--role", ROLE, "--weights", "none", "--quantize", "off")
    for given in (sample_root, sample_root / "cifar-100-python"):  # as it is downloaded, and its inner folder
        said = told(caplog, *train, "--data", given, "--dry-run")
        assert f"channel train    s3://{BUCKET}/cifar/data/{folders.copy().pop()}/" in said and "100 classes" in said
    assert "uploading train: 0 of" in told(caplog, *train, "--data", sample_root, "--no-wait")


def test_only_what_the_training_reads_is_sent(
    here: Account, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = shutil.copytree(data, tmp_path / "mine")
    classes = sorted(mine.iterdir())
    images = {f"{path.parent.name}/{path.name}" for path in data.rglob("*.png")}
    (mine / "notes.txt").write_text("mine")
    (mine / "README.jpg").write_bytes(b"beside the classes")
    for name in ("passwords.txt", "model.bin", ".hidden.png"):
        (classes[0] / name).write_bytes(b"mine")
    (classes[0] / "inner").mkdir()
    (classes[0] / "inner" / "keys.csv").write_text("mine")
    (classes[1] / "broken.png").write_bytes(b"")
    validation = shutil.copytree(mine, tmp_path / "validation")
    upload = ("upload", "--project", "only", "--data", mine, "--validation", validation, "--broken-files", "skip")
    assert f"would upload {len(images)} files" in told(caplog, *upload, "--dry-run")
    said = told(caplog, *upload)
    assert f"{classes[0]}: 3 files are not JPEG" in said and "are left out" in said
    there: dict[str, set[str]] = {}
    for key in keys(here, "only"):
        _, channel, name = key.split("/", 2)
        there.setdefault(channel.split("-")[0], set()).add(name)
    assert there == {"train": images, "validation": images}


def test_of_a_split_that_is_given_both_parts_are_sent_and_what_replaces_one_instead_of_it(
    here: Account, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for part in ("train", "val"):
        shutil.copytree(data, tmp_path / "both" / part)
    (tmp_path / "both" / "val" / "list.txt").write_text("mine")
    count = sum(1 for path in data.rglob("*.png"))
    upload = ("upload", "--project", "parts-of", "--data", tmp_path / "both", "--dry-run")
    assert f"would upload {2 * count} files" in told(caplog, *upload)
    said = told(caplog, *upload, "--validation", data)
    assert said.count(f"would upload {count} files") == 2


def test_of_cifar_100_only_its_own_files_are_sent(
    here: Account, sample_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(sample_root, tmp_path / "cifar")
    (root / "cifar-100-python" / "passwords.txt").write_text("mine")
    (root / "notes.txt").write_text("mine")
    told(caplog, "upload", "--project", "own-files", "--data", root)
    names = {key.split("/", 2)[2] for key in keys(here, "own-files")}
    assert names == {f"cifar-100-python/{name}" for name in ("train", "test", "meta", "sample.json")}


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_job_is_given_its_validation_and_weights_and_uses_both(
    cloud: Rehearsal, aws: Aws, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    validation, weights = tmp_path / "validation", tmp_path / "mine.safetensors"
    for folder in data.iterdir():
        (validation / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:2]:
            shutil.copy(path, validation / folder.name)
    shutil.copy(next(artifact.glob("weights.*.safetensors")), weights)
    flags = [*RUN]
    del flags[flags.index("--weights") : flags.index("--weights") + 2]
    said = told(
        caplog, "train", "--project", "channels", "--data", data, "--validation", validation, "--weights", weights,
        "--image", IMAGE, "--role", "resnet34-sagemaker", "--output", tmp_path / "model", *flags,
    )  # fmt: skip
    (name,) = set(re.findall(r"channels-train-\w+-1", said))
    given = cloud.client("sagemaker").describe_training_job(TrainingJobName=name)["InputDataConfig"]
    places = {channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in given}
    assert set(places) == {"train", "validation", "weights"}
    for channel, place in places.items():
        assert re.fullmatch(rf"{Project('channels', BUCKET).uri('data')}/{channel}-[0-9a-f]{{8}}/", place)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["hyperparameters"]["weights"] == "mine.safetensors"
    assert manifest["dataset"]["validation_images"] == sum(1 for path in validation.rglob("*.png"))
