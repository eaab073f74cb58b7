"""Each step with faults at the HTTP seam: what happened is said, nothing is left behind, repeating goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from botocore.retries.standard import ExponentialBackoff

from tests.launch.conftest import RUN
from tests.launch.in_process import ROLE, Account
from tests.launch.telling import problem, told, when
from tests.rehearsal.start import IMAGE, ROOT, Rehearsal
from training.launch import client
from training.launch.session import TRIES

pytestmark = pytest.mark.timeout(900)  # trainings and services really start, beside whatever else the machine does

THROTTLED = {"code": "ThrottlingException", "message": "Rate exceeded"}
EXPIRED = {"code": "ExpiredTokenException", "message": "The security token included in the request is expired"}
DENIED = {
    "code": "AccessDeniedException",
    "message": "User: arn:aws:iam::123456789012:user/ann is not authorized to perform: iam:PassRole on resource: "
    "arn:aws:iam::123456789012:role/resnet34-sagemaker because no identity-based policy allows the action",
}
QUOTA = {
    "code": "ResourceLimitExceeded",
    "message": "The account-level service limit 'ml.g5.xlarge for training job usage' is 0 Instances",
}


def train(data: Path, project: str, *more: object) -> list[object]:
    output = data.parent / project
    return ["train", "--project", project, "--data", data, "--image", IMAGE, "--role", "resnet34-sagemaker",
            "--output", output, *RUN, *more]  # fmt: skip


def said(cloud: Rehearsal, *arguments: object, status: int) -> str:
    done = cloud.launch(*arguments)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def jobs(cloud: Rehearsal, project: str) -> list[str]:
    listed = cloud.client("sagemaker").list_training_jobs(NameContains=f"{project}-train")["TrainingJobSummaries"]
    return [job["TrainingJobName"] for job in listed]


def test_a_throttled_call_is_made_again_until_it_goes_through(cloud: Rehearsal) -> None:
    cloud.order({"operation": "GetRole", **THROTTLED, "times": 2})
    assert "was there" in said(cloud, "iam-role", status=0)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ({**THROTTLED, "times": 20}, r"AWS throttles sagemaker CreateTrainingJob .* the same command goes on"),
        (EXPIRED, r"credentials have expired .*log in again"),
        (DENIED, r"Permission iam:PassRole on arn:aws:iam::123456789012:role/resnet34-sagemaker is missing"),
        (QUOTA, r"The quota 'ml.g5.xlarge for training job usage' is 0 .*servicequotas"),
    ],
)
def test_a_refused_job_is_one_sentence_and_starts_nothing(
    cloud: Rehearsal, data: Path, fault: dict[str, Any], sentence: str
) -> None:
    cloud.order({"operation": "CreateTrainingJob", "times": 3, **fault})
    stderr = said(cloud, *train(data, "refused", "--no-wait"), status=1)
    assert re.search(sentence, stderr.splitlines()[-1]), stderr
    assert jobs(cloud, "refused") == []


TIMES = 1000
REFUSED = [
    ("preflight", "GetCallerIdentity"), ("iam-role", "CreateRole"), ("upload", "PutObject"),
    ("train", "CreateTrainingJob"), ("tune", "CreateHyperParameterTuningJob"), ("deploy", "CreateModel"),
    ("deploy", "CreateEndpoint"), ("batch", "CreateTransformJob"), ("status", "ListEndpointConfigs"),
    ("logs", "ListTrainingJobs"), ("stop", "ListTransformJobs"), ("delete", "ListModels"),
]  # fmt: skip
USUAL = ("train", "batch")  # the others take as long, and are run with the slow tests


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore tries as often as ever, and does not wait between."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)
    monkeypatch.setattr(client, "_backoff_s", lambda _: 0.0)


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize(
    ("command", "operation"),
    [pytest.param(*each, marks=[] if each[0] in USUAL else [pytest.mark.slow]) for each in REFUSED],
)
def test_whatever_is_throttled_or_meets_old_credentials_ends_with_one_sentence_and_nothing_made(
    here: Account, command: str, operation: str, data: Path, packed: Path, asked: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    image, learns = ("--image", IMAGE, "--role", ROLE), ("--data", data, "--weights", "none", "--quantize", "off")
    arguments: dict[str, tuple[object, ...]] = {
        "preflight": image, "upload": ("--data", data), "train": (*image, *learns, "--no-wait"),
        "tune": (*image, *learns, "--no-wait"), "deploy": (*image, "--model", packed), "delete": ("--yes",),
        "batch": (*image, "--model", packed, "--output", tmp_path / "a.csv", asked), "stop": ("--yes",),
    }  # fmt: skip
    project = f"refused-{REFUSED.index((command, operation))}"
    before = here.cloud.plane.leftovers()
    for fault, sentence in (
        (THROTTLED, rf"AWS throttles \S+ {operation} .*after several tries; wait a minute, the same command goes on"),
        (EXPIRED, rf"The AWS credentials have expired \(\S+ {operation}\); log in again .*the same command goes on"),
    ):
        here.order(operation=operation, **fault, times=TIMES)
        said = told(caplog, command, "--project", project, *arguments.get(command, ()), status=1)
        (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert len(re.findall(sentence, said)) == 1
        assert re.search(sentence, error) or (command, error[:22]) == ("preflight", "Not ready: credentials")
        (ordered,) = here.cloud._faults
        tried = TIMES - ordered["times"]
        assert command == "upload" or tried == (TRIES if fault is THROTTLED else 1)  # that has many threads
        left = here.cloud.plane.leftovers()
        registry = ("model packages", "model package groups")  # of a model that is sound
        assert [kind for kind, names in left.items() if kind not in registry and set(names) - set(before[kind])] == []
        here.cloud._faults.clear()


@pytest.mark.usefixtures("without_pauses")
def test_an_image_that_is_throttled_is_tried_again_and_then_a_problem_and_old_credentials_end_it(
    here: Account, asked: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = next(asked.iterdir())
    here.order(operation="InvokeEndpoint", **THROTTLED, times=TIMES)
    assert "1 of 1 images had a problem" in problem(caplog, "invoke", picture)
    assert re.search(r"AWS throttles .* \(tried 6 times\)", capsys.readouterr().out)
    here.cloud._faults.clear()
    here.order(operation="InvokeEndpoint", **EXPIRED, times=TIMES)
    assert "credentials have expired (sagemaker-runtime InvokeEndpoint)" in problem(caplog, "invoke", asked)


@pytest.mark.usefixtures("without_pauses")
def test_to_wait_goes_on_where_aws_throttles_it(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here.containers.artifact, here.containers.runs = artifact, True

    def throttle() -> None:
        here.order(operation="DescribeTrainingJob", **THROTTLED, times=2 * TRIES)  # two times all that boto3 tries
        here.containers.runs = False

    with when("Training in progress", throttle):
        told(
            caplog, "train", "--project", "patient", "--data", data, "--image", IMAGE, "--role", ROLE, "--weights",
            "none", "--quantize", "off", "--output", tmp_path / "model",
        )  # fmt: skip
    assert here.cloud._faults[0]["times"] == 0
    assert (tmp_path / "model" / "manifest.json").is_file()


def test_no_capacity_is_told_with_what_to_do_and_the_next_try_is_a_new_attempt(cloud: Rehearsal, data: Path) -> None:
    reason = "CapacityError: Unable to provision requested ML compute capacity."
    cloud.order({"operation": "TrainingJob", "code": "", "message": reason, "times": 2})
    for attempt in (1, 2):
        stderr = said(cloud, *train(data, "capacity"), status=1)
        assert f"-{attempt} failed: {reason}" in stderr
        assert "try again later, or take another --instance" in stderr
    assert len(jobs(cloud, "capacity")) == 2


def test_a_failed_job_tells_its_reason_and_its_last_lines(cloud: Rehearsal, data: Path) -> None:
    # The container finds no such file: an error of its own, which nothing here can foresee.
    stderr = said(cloud, *train(data, "failing", "--rules", "no-such-rules.toml"), status=1)
    assert re.search(r"Job failing-train-\w+-1 failed: AlgorithmError: .*no-such-rules.toml.*exit code: 2", stderr)
    assert re.search(r"The last lines of its log:\n(    .*\n)*    .*no-such-rules.toml", stderr)
    assert "goes on" not in stderr


def test_settings_that_the_job_would_refuse_are_refused_here(cloud: Rehearsal, data: Path, tmp_path: Path) -> None:
    assert "batch-size" in said(cloud, *train(data, "wrong", "--batch-size", "1"), status=2)
    assert "Unknown flag --epoch" in said(cloud, *train(data, "wrong", "--epoch", "1"), status=2)
    assert "the container has its own" in said(cloud, *train(data, "wrong", "--device", "cpu"), status=2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"no picture")
    assert "x.png" in said(cloud, *train(tmp_path, "wrong"), status=1)
    assert jobs(cloud, "wrong") == []


def test_an_interrupted_upload_goes_on_with_what_is_missing(cloud: Rehearsal, data: Path) -> None:
    upload = ("upload", "--project", "broken-off", "--data", data)
    cloud.order(
        {"operation": "PutObject", "code": "AccessDenied", "message": "Access Denied", "times": 1, "status": 403}
    )
    stderr = said(cloud, *upload, status=1)
    assert "Permission s3:PutObject is missing" in stderr
    listed = cloud.client("s3").list_objects_v2(
        Bucket="sagemaker-eu-central-1-123456789012", Prefix="broken-off/"
    )  # fmt: skip
    there, files = listed.get("KeyCount", 0), sum(1 for path in data.rglob("*.png"))
    stderr = said(cloud, *upload, status=0)
    assert f"{files - there} of {files} files sent" in stderr


def test_ctrl_c_leaves_the_job_and_the_same_command_waits_for_it_again(cloud: Rehearsal, data: Path) -> None:
    command = [str(part) for part in train(data, "waiting", "--poll-seconds", "0.5")]
    process = subprocess.Popen(
        [sys.executable, "-m", "training.launch", *command], cwd=ROOT, env=cloud.environment, stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "Training in progress" in line:
            os.kill(process.pid, signal.SIGINT)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 130, "".join(lines) + rest
    assert re.search(r"Stopped waiting. job waiting-train-\w+-1 goes on at AWS.*the same command waits", rest), rest
    stderr = said(cloud, *train(data, "waiting"), status=0)
    assert "for this very request is there" in stderr
    assert jobs(cloud, "waiting") == [re.findall(r"waiting-train-\w+-\d", stderr)[0]]
    assert (data.parent / "waiting" / "manifest.json").is_file()


def deploy(artifact: Path, project: str, *more: object) -> list[object]:
    return [
        "deploy",
        "--project",
        project,
        "--model",
        artifact,
        "--image",
        IMAGE,
        "--role",
        "resnet34-sagemaker",
        *more,
    ]


def left(cloud: Rehearsal, project: str) -> dict[str, list[str]]:
    found = cloud.ask("/rehearsal/leftovers")
    return {kind: mine for kind, names in found.items() if (mine := [n for n in names if project in n])}


def test_an_endpoint_that_does_not_come_up_is_removed_with_reason_and_log(cloud: Rehearsal, artifact: Path) -> None:
    # A real failure: the container is told to compute on a GPU that is not there.
    stderr = said(cloud, *deploy(artifact, "sick", "--env", "CLASSIFIER_ENGINE=torch-cuda"), status=1)
    assert "Endpoint sick failed: The primary container" in stderr and "ping health check" in stderr
    assert re.search(r"The last lines of its log:\n(    .*\n)*    .*no NVIDIA GPU here", stderr), stderr
    assert "The endpoint is removed" in stderr
    assert "The new model's version stays in the registry and its archive in S3" in stderr
    kept = left(cloud, "sick")
    assert set(kept) <= {"model packages", "model package groups"}, kept  # the model itself is sound
    assert "all of it is removed" in said(cloud, "delete", "--project", "sick", "--yes", "--data", status=0)
    assert left(cloud, "sick") == {}


@pytest.mark.slow
def test_an_update_that_fails_leaves_the_old_model_answering(cloud: Rehearsal, artifact: Path, asked: Path) -> None:
    said(cloud, *deploy(artifact, "updated"), status=0)
    before = left(cloud, "updated")
    stderr = said(cloud, *deploy(artifact, "updated", "--env", "CLASSIFIER_ENGINE=torch-cuda"), status=1)
    assert "The update of endpoint updated failed" in stderr
    assert "The model that was there before still answers" in stderr
    assert left(cloud, "updated") == before
    assert cloud.launch("invoke", "--project", "updated", asked).returncode == 0
    said(cloud, *deploy(artifact, "updated"), status=0)  # and the good one is found as it is
    said(cloud, "delete", "--project", "updated", "--yes", "--data", status=0)


@pytest.mark.slow
def test_a_container_error_arrives_in_its_own_words(cloud: Rehearsal, artifact: Path, tmp_path: Path) -> None:
    said(cloud, *deploy(artifact, "words"), status=0)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    done = cloud.launch("invoke", "--project", "words", tmp_path / "bad.png")
    assert done.returncode == 1
    assert "unreadable_image: The 10 bytes given" in done.stdout
    cloud.order({"operation": "InvokeEndpoint", **THROTTLED, "times": 2})
    assert (
        cloud.launch("invoke", "--project", "words", artifact / next(artifact.glob("example.*")).name).returncode == 0
    )
    said(cloud, "delete", "--project", "words", "--yes", "--data", status=0)


def test_neither_deploy_nor_delete_touches_what_others_made_under_the_same_name(
    cloud: Rehearsal, artifact: Path
) -> None:  # fmt: skip
    client = cloud.client("sagemaker")
    made: list[tuple[str, str]] = []
    try:
        client.create_model(
            ModelName="theirs", ExecutionRoleArn="arn:aws:iam::123456789012:role/r", PrimaryContainer={"Image": IMAGE}
        )
        made.append(("model", "ModelName"))
        client.create_endpoint_config(
            EndpointConfigName="theirs", ProductionVariants=[
                {"VariantName": "v", "ModelName": "theirs", "InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
            ],
        )  # fmt: skip
        made.append(("endpoint_config", "EndpointConfigName"))
        client.create_endpoint(EndpointName="theirs", EndpointConfigName="theirs")
        made.append(("endpoint", "EndpointName"))
        deadline_s = time.monotonic() + 120
        while client.describe_endpoint(EndpointName="theirs")["EndpointStatus"] == "Creating":
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        assert "has nothing to remove" in said(cloud, "delete", "--project", "theirs", "--yes", status=0)
        stderr = said(cloud, *deploy(artifact, "theirs"), status=1)
        assert "Endpoint theirs was not made by these commands" in stderr.splitlines()[-1]
        assert client.describe_endpoint(EndpointName="theirs")["EndpointConfigName"] == "theirs"
        assert left(cloud, "theirs").get("model package groups") is None  # refused before anything was made
    finally:
        for kind, name in reversed(made):
            getattr(client, f"delete_{kind}")(**{name: "theirs"})


def test_a_dry_run_of_deploy_and_batch_says_what_would_be_and_makes_nothing(
    cloud: Rehearsal, artifact: Path, asked: Path
) -> None:  # fmt: skip
    stderr = said(cloud, *deploy(artifact, "planned", "--max", "3"), "--dry-run", status=0)
    assert '"EndpointConfigName": "planned-config-' in stderr and "would register it" in stderr
    batch = ("batch", "--project", "planned", "--model", artifact, "--image", IMAGE, "--role", "resnet34-sagemaker")
    assert "would classify 5 images" in said(cloud, *batch, asked, "--dry-run", status=0)
    assert left(cloud, "planned") == {}


def test_no_region_no_credentials_and_no_network_are_sentences(tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    bare |= {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }

    def status(**more: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "training.launch", "status"], cwd=ROOT, env={**bare, **more}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stderr

    code, stderr = status()
    assert code == 2 and "No AWS region is set" in stderr
    code, stderr = status(AWS_DEFAULT_REGION="eu-central-1")
    assert code == 1 and "There are no AWS credentials" in stderr
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "eu-central-1"}
    code, stderr = status(**keys, AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1")
    assert code == 1 and "cannot be reached" in stderr and "Traceback" not in stderr
