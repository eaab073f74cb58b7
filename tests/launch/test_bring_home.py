"""What a job made comes home: the model always, the run's files where they can be unpacked."""

import logging
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.model.archive import MAX_MEMBERS
from tests.rehearsal.start import REGION, Rehearsal
from training.errors import ConfigError
from training.launch import jobs, places
from training.launch.errors import LaunchError
from training.launch.jobs import bring_home, pack
from training.launch.session import Aws

BUCKET = "home"


@pytest.fixture
def job(cloud: Rehearsal, artifact: Path, tmp_path: Path) -> Iterator[Callable[[int], dict[str, Any]]]:
    """A job's description, with its model and so many files of its run in S3."""
    s3 = cloud.client("s3")
    s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    keys = ("output/model.tar.gz", "output/output.tar.gz")

    def made(files: int) -> dict[str, Any]:
        s3.upload_file(str(pack(artifact, tmp_path / "model.tar.gz")), BUCKET, keys[0])
        run = tmp_path / "files"
        run.mkdir()
        (run / "metrics.jsonl").write_text("{}\n")
        for number in range(files - 1):
            (run / str(number)).touch()
        with tarfile.open(tmp_path / "output.tar.gz", "w:gz") as tar:
            for path in run.iterdir():
                tar.add(path, path.name)
        s3.upload_file(str(tmp_path / "output.tar.gz"), BUCKET, keys[1])
        return {"ModelArtifacts": {"S3ModelArtifacts": f"s3://{BUCKET}/{keys[0]}"}}

    yield made
    for key in keys:
        s3.delete_object(Bucket=BUCKET, Key=key)
    s3.delete_bucket(Bucket=BUCKET)


@pytest.mark.parametrize("files", [3, MAX_MEMBERS + 1])
def test_the_model_comes_home_whatever_the_run_left(
    job: Callable[[int], dict[str, Any]], files: int, aws: Aws, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out" / "model"
    with caplog.at_level(logging.INFO, "training"):
        bring_home(aws, job(files), output)
    assert (output / "manifest.json").is_file()
    here = {path.name for path in output.parent.iterdir()}
    if files > MAX_MEMBERS:
        assert here == {"model", "model.tar.gz"}
        assert "run's files (s3://home/output/output.tar.gz) were not brought home: " in caplog.text
    else:
        assert here == {"model", "model.tar.gz", "model-run"}


def test_what_lies_there_stays_where_the_object_is_damaged(
    job: Callable[[int], dict[str, Any]], aws: Aws, cloud: Rehearsal, artifact: Path, tmp_path: Path
) -> None:
    output, uri = tmp_path / "out" / "model", "s3://home/output/model.tar.gz"
    found = job(2)
    shutil.copytree(artifact, output)
    before = sorted(output.iterdir())
    whole = (tmp_path / "model.tar.gz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive"):
        cloud.client("s3").put_object(Bucket=BUCKET, Key="output/model.tar.gz", Body=damaged)
        with pytest.raises(LaunchError, match=rf"^{uri}: .*remove it, and the same command runs the job again"):
            bring_home(aws, found, output)
        assert sorted(output.iterdir()) == before and list(output.parent.iterdir()) == [output]


def test_files_of_others_beside_it_stay(job: Callable[[int], dict[str, Any]], aws: Aws, tmp_path: Path) -> None:
    home, done = tmp_path / "out", job(2)
    (home / "model-run").mkdir(parents=True)
    kept = [home / "model-run" / "notes.txt", home / "model-run.tar.gz"]
    for path in kept:
        path.write_text("mine")
    bring_home(aws, done, home / "model")
    assert [path.read_text() for path in kept] == ["mine", "mine"]
    (home / "model" / ".git").mkdir()
    bring_home(aws, done, home / "model")
    assert (home / "model" / ".git").is_dir()
    (home / "other.tar.gz").write_text("mine")
    with pytest.raises(ConfigError, match=r"other\.tar\.gz, where its archive goes, is another file"):
        bring_home(aws, {"ModelArtifacts": {"S3ModelArtifacts": "s3://home/output/model.tar.gz"}}, home / "other")


RENAMES = 6


@pytest.fixture
def before(tmp_path: Path) -> dict[Path, object]:
    """What lies in `home`: a model of before, its archive, and what others put there."""
    home = tmp_path / "home"
    (home / "model" / ".git").mkdir(parents=True)
    for name in (".git/HEAD", "manifest.json", "weights.old"):
        (home / "model" / name).write_text("of before")
    (home / "model.tar.gz").write_text("of before")
    return lying(home)


def lying(home: Path) -> dict[Path, object]:
    return {path: path.is_dir() or path.read_text() for path in sorted(home.rglob("*"))}


def replace(home: Path) -> None:
    """As `bring_home` does it."""
    with jobs._beside(home / "model") as scratch:
        (scratch / "new").mkdir()
        for name in ("new/manifest.json", "new/weights.new", "model.tar.gz"):
            (scratch / name).write_text("new")
        jobs._replace(home / "model", scratch, {scratch / "model.tar.gz": home / "model.tar.gz"})


@contextmanager
def at_each_rename(do: Callable[[int], object]) -> Iterator[list[int]]:
    """`do` before each, of which it is given the number, from 1 on; gives their numbers."""
    rename = Path.rename
    numbers: list[int] = []

    def watched(path: Path, target: Path) -> Path:
        numbers.append(len(numbers) + 1)
        do(numbers[-1])
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "rename", watched)
        yield numbers


@pytest.mark.parametrize("ended_by", [KeyboardInterrupt(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("at", range(1, RENAMES + 1))
def test_what_lay_there_is_put_back_where_the_replacing_breaks_off(
    tmp_path: Path, before: dict[Path, object], ended_by: BaseException, at: int
) -> None:
    def break_off(number: int) -> None:
        if number == at:
            raise ended_by

    with pytest.raises(type(ended_by)), at_each_rename(break_off):
        replace(tmp_path / "home")
    assert lying(tmp_path / "home") == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_until_all_of_the_new_is_there(
    tmp_path: Path, before: dict[Path, object], stop: signal.Signals
) -> None:
    home = tmp_path / "home"
    was = signal.signal(stop, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), at_each_rename(lambda _: signal.raise_signal(stop)) as numbers:
            replace(home)
        assert signal.getsignal(stop) is signal.default_int_handler
    finally:
        signal.signal(stop, was)
    assert len(numbers) == RENAMES
    here = {str(path.relative_to(home)): text for path, text in lying(home).items() if path.is_file()}
    assert here == {
        "model/.git/HEAD": "of before", "model/manifest.json": "new", "model/weights.new": "new", "model.tar.gz": "new"
    }  # fmt: skip


def test_what_cannot_be_put_back_is_kept_and_named(tmp_path: Path, before: dict[Path, object]) -> None:
    home = tmp_path / "home"

    def break_off(number: int) -> None:
        if number == 4:
            (home / "model" / "manifest.json").write_text("another's, of this moment")
            raise OSError(5, "Input/output error")

    with at_each_rename(break_off), pytest.raises(LaunchError, match="written: Input/output error") as told:
        replace(home)
    (kept,) = home.glob("model.before-*")
    assert f"the rest is in {kept}, and stays there" in str(told.value)
    assert (kept / "old" / "manifest.json").read_text() == "of before" and not (kept / "new").exists()
    assert (home / "model.tar.gz").read_text() == (home / "model" / "weights.old").read_text() == "of before"
    replace(home)
    assert (kept / "old" / "manifest.json").is_file() and (home / "model" / "manifest.json").read_text() == "new"


def test_where_nothing_can_be_put_back_nothing_is_removed(tmp_path: Path, before: dict[Path, object]) -> None:
    def refuse(number: int) -> None:
        if number >= 5:
            raise OSError(30, "Read-only file system")

    with at_each_rename(refuse), pytest.raises(LaunchError, match="written: Read-only file system") as told:
        replace(tmp_path / "home")
    (kept,) = (tmp_path / "home").glob(".model-*")
    assert f"the rest is in {kept}, and stays there" in str(told.value)
    assert {path.name for path in kept.rglob("*")} == {"old", "old-model.tar.gz", "manifest.json", "weights.old"}


def test_a_link_stays_one_and_the_model_goes_where_it_leads(
    job: Callable[[int], dict[str, Any]], aws: Aws, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "model")
    bring_home(aws, job(2), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "model" / "manifest.json").is_file()
    assert (tmp_path / "elsewhere" / "model.tar.gz").is_file()


def test_where_a_disk_is_mounted_is_refused_before_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setattr("os.path.ismount", lambda place: Path(place) == tmp_path / "disk")
    for name in ("disk", "link"):
        with pytest.raises(ConfigError, match=rf"{name} is where a disk is mounted.*such as .*{name}/model"):
            places.require_output(tmp_path / name)


def test_a_full_disk_is_not_blamed_on_the_object(
    job: Callable[[int], dict[str, Any]], aws: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    done = job(2)
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(LaunchError, match=r"cannot be written: No space left on device.*room on the disk") as told:
        bring_home(aws, done, tmp_path / "out" / "model")
    assert "remove it" not in str(told.value)


def test_what_a_killed_command_left_beside_it_is_removed_by_the_next(tmp_path: Path) -> None:
    output, left = tmp_path / "model", tmp_path / ".model-0abc_xyz"
    (left / "new").mkdir(parents=True)
    (left / "model.tar.gz.part").touch()
    (tmp_path / ".model-mynotes1").mkdir()
    (tmp_path / ".model-mynotes1" / "notes").touch()
    with jobs._held(left), jobs._beside(output):
        pass
    assert left.is_dir()  # of a command that is at work
    with jobs._beside(output):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".model-mynotes1"]
