"""What cannot be is refused with a sentence before anything is made at AWS, and before anything costs."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from tests.launch.in_process import ROLE, Account
from tests.launch.telling import problem, shown, told
from tests.rehearsal.start import IMAGE, Rehearsal
from training.errors import ConfigError
from training.launch import images
from training.launch.__main__ import main
from training.launch.names import Project
from training.launch.places import require_output

PAYLOAD, BODY = "CLASSIFIER_MAX_PAYLOAD_BYTES", "CLASSIFIER_MAX_BODY_BYTES"
SMALL = ("--weights", "none", "--quantize", "off")


def refused(here: Account, caplog: pytest.LogCaptureFixture, *command: object) -> str:
    """The sentence; nothing was made or sent."""
    before = here.calls
    sentence = problem(caplog, *command, status=2)
    made = [call for call in here.calls - before if call.split()[1].startswith(("Create", "Put"))]
    assert made == []
    return sentence


def train(data: Path, *more: object) -> tuple[object, ...]:
    return ("train", "--project", "early", "--data", data, "--image", IMAGE, "--role", ROLE, *SMALL, *more)


def deploy(packed: object, *more: object) -> tuple[object, ...]:
    return ("deploy", "--project", "early", "--model", packed, "--image", IMAGE, "--role", ROLE, *more)


def test_a_hook_that_awss_image_cannot_be_sent_is_refused(
    here: Account, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "hook.toml").write_text('debugger = "on"\n')
    hooked = train(data, "--recipe", tmp_path / "hook.toml")
    sentence = refused(here, caplog, *hooked, "--send-code")
    assert 'debugger = "on" in --recipe needs smdebug' in sentence and "leave the line out, or" in sentence
    assert "would start" in told(caplog, *hooked, "--dry-run")
    rules = refused(here, caplog, *train(data, "--debugger", "--send-code"))
    assert "--send-code: --debugger needs smdebug" in rules and "leave it out, or" in rules


def test_a_place_where_a_model_cannot_go_is_refused_before_the_job(
    here: Account, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "app").mkdir()
    for name in ("manifest.json", "settings.json", "index.html"):  # such as web applications have
        (tmp_path / "app" / name).write_text("{}")
    (tmp_path / "file").touch()
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "file", "photo.png")
    for output, said in (
        ("app", r"app holds other things \(index.html, settings.json\)"),
        ("file", "file is no folder"),
        ("file/model", r"cannot be written: \S+file is no folder"),
        ("photos", r"photos\.tar\.gz, where its archive goes, is another file"),
        ("..", "give a folder with a name of its own"),
    ):
        with pytest.raises(ConfigError, match=said):
            require_output(tmp_path / output)
    for command in (train(data, "--output", tmp_path / "app"), train(data, "--output", ".")):
        assert "name" in refused(here, caplog, *command)
    seek = ("tune", *train(data, "--output", tmp_path / "file")[1:])
    assert "file is no folder" in refused(here, caplog, *seek)
    assert len(list((tmp_path / "app").iterdir())) == 3


def test_a_search_that_could_draw_what_cannot_be_is_refused(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    late = ("--unfreeze-at", "30", "--warmup-epochs", "20")  # of 10 to 70 epochs
    said = refused(here, caplog, "tune", *train(data)[1:], *late)
    assert "--epochs-range holds 10, which is not possible here" in said


def test_what_is_mistyped_is_told_with_what_is_meant(
    here: Account, data: Path, packed: Path, asked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch = ("batch", "--project", "early", "--model", packed, "--image", IMAGE, "--role", ROLE, asked)
    for command in (train(data), ("tune", *train(data)[1:]), deploy(packed), batch):
        assert "look like ml.g5.xlarge" in refused(here, caplog, *command, "--instance", "g5.xlarge")
    assert "Did you mean ml.g5.xlarge?" in refused(here, caplog, *train(data), "--instance", "g5.xlarge")
    hosting = ("preflight", "--image", IMAGE, "--role", ROLE, "--hosting-instance", "c5.xlarge")
    assert "--hosting-instance c5.xlarge: " in refused(here, caplog, *hosting)
    assert "ml.g5.xlarg is none of the types that boto3 lists for this. Did you mean ml.g5.xlarge?" in told(
        caplog, *train(data), "--instance", "ml.g5.xlarg", "--dry-run"
    )
    assert "Did you mean --image?" in refused(here, caplog, *train(data), "--imge", "x")
    assert refused(here, caplog, *train(data), "--epohcs", "3") == "Unknown flag --epohcs. Did you mean --epochs?"
    known = refused(here, caplog, *train(data), "--xyzzy", "3").removesuffix(".").split(": ", 1)[1].split(", ")
    assert len(known) == len(set(known)) > 20
    assert "--dry-run stands before the command" in refused(here, caplog, "--dry-run", *train(data))
    assert "delete ... --data" in refused(here, caplog, "--data", "delete")
    assert refused(here, caplog, "delete", "--with-data") == "Unknown --with-data. Did you mean --data?"
    assert "Unknown --xyzzy. status knows" in refused(here, caplog, "status", "--xyzzy")


def test_data_that_is_not_in_s3_is_told_before_a_job_is_started(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here.training(Project("early", "has-some"))
    address = ("--project", "early", "--image", IMAGE, "--role", ROLE, *SMALL)
    for place, said in (
        ("s3://has-some/nothing/", "--data s3://has-some/nothing/: there is nothing in S3 at this address"),
        ("s3://has-some/early/dat", "there is nothing in S3 at this address"),  # as a folder
        ("s3://no-such-bucket/x/", "--data s3://no-such-bucket/x/: there is no bucket no-such-bucket"),
    ):
        assert said in refused(here, caplog, "train", *address, "--data", place)
        assert said in refused(here, caplog, "upload", "--data", place)
    weights = ("--data", data, "--weights", "s3://has-some/w.pth")
    assert "--weights s3://has-some/w.pth: there is nothing" in refused(here, caplog, "train", *address[:-4], *weights)
    here.order(operation="ListObjectsV2", code="AccessDenied", message="no", times=1, status=403)
    said = told(caplog, "train", *address, "--data", "s3://has-some/early/data/", "--dry-run")
    assert "whether something is there cannot be told" in said


def test_data_that_is_not_here_is_told_before_aws_is_asked(
    here: Account, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    nowhere = tmp_path / "nowhere"
    before = here.calls
    for command in (train(nowhere, "--dry-run"), ("tune", *train(nowhere)[1:]), ("upload", "--data", nowhere)):
        assert f"--data {nowhere}: there is no such folder." in problem(caplog, *command, status=2)
    assert "is empty" in problem(caplog, *train(tmp_path / "empty"), status=1)
    assert "there is no such file" in problem(caplog, *train(data, "--weights", nowhere), status=2)
    assert here.calls == before


def test_a_best_json_that_is_missing_names_what_writes_one(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sentence = refused(here, caplog, *train(data), "--from-tuning", "no/best.json")
    assert "--from-tuning no/best.json is missing; `python -m training.launch tune` writes best.json" in sentence


def test_an_artifact_and_its_archive_may_be_replaced(tmp_path: Path, packed: Path, artifact: Path) -> None:
    (tmp_path / "model").symlink_to(artifact)
    (tmp_path / "model.tar.gz").symlink_to(packed)
    require_output(tmp_path / "model")
    require_output(tmp_path / "new" / "folders" / "model")
    assert not (tmp_path / "new").exists()


def test_a_gpu_that_the_image_cannot_use_is_refused(
    here: Account, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Rehearsal.note_images(tmp_path)
    noted = [each for each in train(data) if each not in ("--image", IMAGE)]
    assert "CUDA 13 dropped its GPU" in refused(here, caplog, *noted, "--instance", "ml.p3.2xlarge")
    assert "instance types look like" in refused(here, caplog, *train(data), "--instance", "banana")
    # The same of one that is given, unless it is known to bring an older CUDA, or is AWS's, of which nobody knows.
    old = (*train(data), "--instance", "ml.p3.2xlarge")
    monkeypatch.chdir(tmp_path.parent)
    assert "CUDA 13 dropped its GPU" in refused(here, caplog, *old)
    assert "would start" in told(caplog, *old, "--send-code", "--dry-run")
    monkeypatch.chdir(tmp_path)
    images.PUSHED.write_text(json.dumps({"train": {"uri": IMAGE, "cuda": "12.4"}}))
    assert "would start" in told(caplog, *old, "--dry-run")


def test_settings_of_an_endpoint_that_cannot_be_are_refused(
    here: Account, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    for flags, said in (
        (("--env", "NOVALUE"), "say NAME=VALUE"),
        (("--env", "A B=1"), "say NAME=VALUE, with letters"),
        (("--scale-at-requests", 600), "--scale-at-requests: the endpoint does not scale, as --max is not above --min"),
        (("--scale-at-backlog", 3), "--scale-at-backlog: a realtime endpoint scales by --scale-at-requests and"),
        (("--kind", "async", "--shadow", packed), "--shadow needs a real-time endpoint"),
        (("--shadow", "no/such"), "--shadow no/such: there is no such folder, no such file, and no training job"),
        (("--smoke", tmp_path / "bad.png"), "bad.png: "),
        (("--role", "arn:aws:iam::123456789012:user"), "a role's ARN looks like"),
    ):
        assert said in refused(here, caplog, *deploy(packed, *flags))
    for model in ("artifacts/typo", "x" * 300, "a b", "s3://b", "s3://b/models/"):
        assert f"{model}: " in refused(here, caplog, *deploy(model))


def test_a_batch_whose_answers_could_not_be_written_is_refused(
    here: Account, packed: Path, asked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken.csv").mkdir()
    batch = ("batch", "--project", "early", "--model", packed, "--image", IMAGE, "--role", ROLE, asked)
    assert "is no file that can be written" in refused(here, caplog, *batch, "--output", tmp_path / "taken.csv")
    below = asked / next(asked.iterdir()).name / "a.csv"
    assert "is no folder" in refused(here, caplog, *batch, "--output", below)
    assert "say NAME=VALUE" in refused(here, caplog, *batch, "--env", "NOVALUE")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("upload", "--data", ""), "--data is given an empty text"),
        (("upload", "--data="), "--data is given an empty text"),
        (("invoke", ""), "invoke is given an empty text"),
        (("deploy", "--model", "", "--dry-run"), "--model is given an empty text"),
        (("invoke", "--url", "http://127.0.0.1:9", "--asynchronous", "x.png"), "x.png: there is no such file"),
    ],
)
def test_an_empty_text_is_refused(
    here: Account, caplog: pytest.LogCaptureFixture, command: tuple[str, ...], said: str
) -> None:
    assert said in refused(here, caplog, *command)


def test_flags_that_exclude_each_other_are_refused(
    here: Account, asked: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    both = ("invoke", asked, "--url", "http://127.0.0.1:9", "--asynchronous")
    assert "--asynchronous is for an endpoint of SageMaker" in refused(here, caplog, *both)


@pytest.mark.parametrize("bucket", ["s3://mine", "My Bucket", "a/b", "..", "x" * 64])
def test_what_is_no_name_of_a_bucket_is_refused(here: Account, caplog: pytest.LogCaptureFixture, bucket: str) -> None:
    assert "give a name alone" in refused(here, caplog, "status", "--bucket", bucket)


def test_a_limit_that_would_not_be_kept_is_refused(here: Account, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    seek = ("tune", *train(data, "--dry-run", "--timeout-minutes", "90")[1:])
    assert "--trials and --max-hours bound a search" in refused(here, caplog, *seek)


def test_a_password_in_an_address_is_not_shown(here: Account, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = told(caplog, *train(data, "--dry-run", "--mlflow-uri", "http://ann:SECRET@host/a"))
    assert "://***@host/a" in said and "SECRET" not in said


@pytest.mark.parametrize(
    "flags",
    [
        ("train", "--data", "d", "--volume-gb", "9" * 30),
        ("status", "--poll-seconds", "1e300"),
        ("train", "--data", "d", "--max-hours", "1e308"),
        ("train", "--data", "d", "--retries", "31"),
        ("invoke", "x", "--concurrency", "1000000"),
        ("deploy", "--max", "99999999999999"),
        ("preflight", "--max", "99999999999999"),
        ("invoke", "x", "--endpoint", "a b"),
    ],
)
def test_numbers_beyond_all_bounds_are_refused(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert f"given {flags[-1]}, allowed are" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="nothing may be put into"):
        require_output(closed / "model")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials, but a region."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")


@pytest.mark.usefixtures("nobody")
def test_what_is_mistyped_is_told_without_credentials(
    packed: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "photos" / "empty").mkdir(parents=True)
    for more, said in (
        (("--min", 5, "--max", 3), "--min 5 --max 3: --min is at least 1 and not more than --max"),
        (("--kind", "async", "--min", 0), "--min 0 --max 0: --max is at least 1 (where it is not given, it is"),
        (("--model", "artifacts/nothing"), "--model artifacts/nothing: there is no such folder"),
        (("--shadow", "artifacts/nothing"), "--shadow artifacts/nothing: there is no such folder"),
        (("--smoke", "nothing"), "nothing: there is no such file or folder"),
        (("--project", "My_Project"), "--project My_Project: 1 to 18 small letters"),
        (("--image", "foo"), "--image foo is not in ECR"),
        (("--kind", "serverless", "--max", 3), "--max 3: a serverless endpoint has no instances to count; --max-conc"),
        (("--kind", "serverless", "--startup-seconds", 900), "--startup-seconds 900: AWS gives serverless endpoints"),
        (("--env", "CLASSIFIER_DEADLINE_S=300"), "waits for realtime endpoints no longer than 60 s; give 60 at most"),
        (("--env", f"{PAYLOAD}={26 * 2**20}"), f"{PAYLOAD}=27262976: AWS sends realtime endpoints no more than 25 MB"),
        (("--kind", "serverless", "--env", f"{PAYLOAD}=5000000"), "no more than 4 MB; give 4194304 at most, or take"),
        (("--kind", "async", "--env", "CLASSIFIER_DEADLINE_S=4000"), "no longer than 3600 s; give 3600 at most."),
        (("--kind", "async", "--env", f"{PAYLOAD}={2**30}"), f"give --env {BODY}={2**30} at least."),
        (("--env", f"{BODY}=9"), f"{BODY}=9, all bodies at once, is less than {PAYLOAD}=26214400"),
        (("--env", f"{BODY}={25 * 2**20}", "--min", 2, "--max", 1), "--min 2 --max 1: --min is at least 1"),
        (("--kind", "serverless", "--capture-percent", 20), "--capture-percent 20: AWS stores no requests of serverl"),
        (("--instance", "g5.xlarge"), "Did you mean ml.g5.xlarge?"),
    ):
        assert said in problem(caplog, *deploy(packed, *more), "--dry-run", status=2)
    assert "has no folders of images, and at least 2 are needed" in problem(
        caplog, "upload", "--data", tmp_path / "photos"
    )
    sentence = problem(caplog, "upload", "--data", data)
    assert sentence.startswith("There are no AWS credentials; `aws configure`")
    assert sentence.endswith("`make rehearse` shows the whole journey without an account.")


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("command", ["train", "tune", "batch"])
def test_an_image_that_a_job_cannot_have_is_told_without_credentials(
    packed: Path, data: Path, asked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, command: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    line = (command, asked, "--model", packed) if command == "batch" else (command, "--data", data, *SMALL)
    elsewhere = IMAGE.replace("eu-central-1", "us-east-1")
    for more, said in (
        ((), "--image is missing"),
        (("--image", "foo"), "--image foo is not in ECR"),
        (("--image", elsewhere), f"The image {elsewhere} is in us-east-1, and jobs and endpoints in eu-central-1"),
    ):
        assert said in problem(caplog, *line, *more, status=2)
    Rehearsal.note_images(tmp_path)
    if command != "batch":
        assert "CUDA 13 dropped its GPU" in problem(caplog, *line, "--instance", "ml.p3.2xlarge", status=2)
    assert "There are no AWS credentials" in problem(caplog, *line)


@pytest.mark.usefixtures("nobody")
def test_the_policies_of_a_role_are_printed_without_credentials_and_without_a_region(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = ("iam-role", "--policy")
    assert '"arn:aws:s3:::sagemaker-eu-central-1-ACCOUNT/*"' in shown(caplog, capsys, *policy)
    assert '"arn:aws-cn:s3:::mine/*"' in shown(caplog, capsys, *policy, "--region", "cn-north-1", "--bucket", "mine")
    assert "--project My_Project" in problem(caplog, *policy, "--project", "My_Project", status=2)
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert '"arn:aws:s3:::sagemaker-REGION-ACCOUNT"' in shown(caplog, capsys, *policy)
    assert '"arn:aws:s3:::mine"' in shown(caplog, capsys, *policy, "--bucket", "mine")
    assert "--bucket My Bucket: give a name" in problem(caplog, *policy, "--bucket", "My Bucket", status=2)
    assert "--project My_Project" in problem(caplog, *policy, "--project", "My_Project", status=2)
    for name, given, said in (
        ("AWS_DEFAULT_REGION", "eu-cenrtal-1", "Did you mean eu-central-1?"),
        ("AWS_PROFILE", "nobody", "AWS_PROFILE: "),
    ):
        monkeypatch.setenv(name, given)
        assert said in problem(caplog, *policy, status=2)
