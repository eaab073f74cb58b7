"""Every step broken off in its midst and repeated: one sentence, nothing left over, and the same end as without."""

import io
import os
import re
import signal
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.in_process import POLL_S, ROLE, Account, meanwhile, until
from tests.launch.telling import DENIED, EXPIRED, ctrl_c, problem, shown, sigterm, told, when
from tests.launch.test_faults import left
from tests.rehearsal.start import IMAGE, Rehearsal
from training.launch import autoscaling, data, deployment, endpoint, inventory, roles
from training.launch import data as s3
from training.launch.attempts import TRAINING_JOBS, TRANSFORM_JOBS, TUNING_JOBS
from training.launch.errors import AwsError, LaunchError
from training.launch.hosting import Hosting, config_request
from training.launch.names import Project
from training.launch.session import Aws

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # a service really starts, beside whatever else the machine does

SMALL = ("--weights", "none", "--quantize", "off")
SEARCH = ("--trials", 2, "--parallel", 2, "--epochs-range", "1:2", "--batch-sizes", 8, *SMALL)


def test_a_deployment_broken_at_every_step_is_finished_by_repeating_it(
    cloud: Rehearsal, aws: Aws, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deploy = ("deploy", "--project", "steps", "--model", packed, "--image", IMAGE, "--role", "resnet34-sagemaker",
              "--instance", "ml.c5.xlarge", "--max", 2)  # fmt: skip
    registry = {"model packages", "model package groups"}
    for name in (
        "CreateModelPackageGroup", "CreateModelPackage", "CreateModel", "CreateEndpointConfig", "CreateEndpoint"
    ):  # fmt: skip
        cloud.order({"operation": name, **DENIED})
        assert f"Permission sagemaker:{name} is missing" in problem(caplog, *deploy)
        assert set(left(cloud, "steps")) <= registry
    with when("endpoint steps: Creating", ctrl_c):
        said = told(caplog, *deploy, status=130)
    assert "endpoint steps goes on at AWS" in said and "launch deploy --project steps --model" in said
    assert "To end it: python -m training.launch delete --project steps" in said
    for name in ("RegisterScalableTarget", "PutScalingPolicy"):
        cloud.order({"operation": name, **DENIED})
        assert f"Permission application-autoscaling:{name} is missing" in problem(caplog, *deploy)
    cloud.order({"operation": "InvokeEndpoint", **DENIED})
    sentence = problem(caplog, *deploy)
    assert "Permission sagemaker:InvokeEndpoint is missing" in sentence
    assert "Endpoint steps is unchanged and in service all the same" in sentence
    said = told(caplog, *deploy)
    assert "endpoint steps is unchanged" in said and "scales from 1 to 2" in said and "predicts as this machine" in said
    assert {kind: len(names) for kind, names in left(cloud, "steps").items()} == dict.fromkeys(
        ("endpoints", "endpoint configurations", "models", *registry, "servers"), 1
    )
    assert "all of it is removed" in told(caplog, "delete", "--project", "steps", "--data", "--yes")
    assert left(cloud, "steps") == {}


def test_credentials_that_expire_while_an_endpoint_comes_up_do_not_end_it(here: Account) -> None:
    project = Project("expires", "expires")
    wanted = config_request(project, here.model(project), Hosting())
    here.containers.ready.clear()
    with (
        when("endpoint expires: Creating", lambda: here.order(operation="DescribeEndpoint", **EXPIRED)),
        pytest.raises(AwsError, match=r"have expired \(sagemaker DescribeEndpoint\); log in again"),
    ):
        deployment.bring(here.aws, project, None, wanted, Hosting(), POLL_S)
    assert here.status(project) == "Creating"
    assert here.settle(project, wanted) in ("created", "unchanged")  # it may be up by now


def train(here: Account, project: str, data: Path, output: Path, artifact: Path) -> tuple[object, ...]:
    """A training that goes on until it is told to end, and makes this artifact."""
    here.containers.artifact, here.containers.runs = artifact, True
    return ("train", "--project", project, "--data", data, "--image", IMAGE, "--role", ROLE, "--output", output,
            *SMALL, "--epochs", 1)  # fmt: skip


def test_credentials_that_expire_while_a_job_runs_do_not_end_it(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = train(here, "logged-out", data, tmp_path / "model", artifact)
    with when("Training in progress", lambda: here.order(operation="DescribeTrainingJob", **EXPIRED)):
        sentence = problem(caplog, *command)
    assert re.search(r"expired \(sagemaker DescribeTrainingJob\); log in again .*the same command goes on", sentence)
    with when("Training in progress", sigterm):  # nor does whoever ends the command
        assert "goes on at AWS" in told(caplog, *command, status=143)
    here.containers.runs = False
    assert "for this very request is there" in told(caplog, *command)
    assert list(TRAINING_JOBS.states(here.aws, Project("logged-out", "")).values()) == ["Completed"]
    assert (tmp_path / "model" / "manifest.json").is_file()


def batch(project: str, packed: Path, asked: Path, output: Path, *more: object) -> tuple[object, ...]:
    return ("batch", "--project", project, "--model", packed, "--image", IMAGE, "--role", ROLE, "--output", output,
            asked, *more)  # fmt: skip


def test_a_batch_broken_at_every_step_is_finished_by_repeating_it(
    here: Account, packed: Path, asked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = batch("lots", packed, asked, tmp_path / "answers.csv")
    for name in ("CreateModel", "CreateTransformJob"):
        here.order(operation=name, **DENIED)
        assert f"Permission sagemaker:{name} is missing" in problem(caplog, *command)
        assert TRANSFORM_JOBS.states(here.aws, Project("lots", "")) == {}
        assert models(here, "lots") == []
    here.containers.ready.clear()
    with when(": InProgress", ctrl_c):
        assert re.search(r"job lots-batch-\w+-1 goes on at AWS", told(caplog, *command, status=130))
    with when(": InProgress", lambda: here.order(operation="DescribeTransformJob", **EXPIRED)):
        assert "log in again" in problem(caplog, *command)
    here.containers.ready.set()
    said = told(caplog, *command)
    assert "for this very request is there" in said and "5 images, 0 with a problem" in said
    assert list(TRANSFORM_JOBS.states(here.aws, Project("lots", "")).values()) == ["Completed"]
    assert (tmp_path / "answers.csv").read_text().count(",a,0.9,") == 5
    assert len(models(here, "lots")) == 1
    assert "all of it is removed" in told(caplog, "delete", "--project", "lots", "--data", "--yes")
    assert "has nothing to remove" in told(caplog, "delete", "--project", "lots", "--data", "--yes")


def models(here: Account, project: str) -> list[str]:
    return [name for name in here.records._models if name.startswith(f"{project}-")]


def test_the_first_model_does_not_stay_where_the_shadows_cannot_be_made(
    here: Account, packed: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz", compresslevel=1) as tar:
        for path in artifact.iterdir():
            tar.add(path, path.name)
    deploy = ("deploy", "--project", "pair", "--model", packed, "--shadow", tmp_path / "other.tar.gz", "--image", IMAGE,
              "--role", ROLE)  # fmt: skip
    here.order(operation="CreateModel", **DENIED)
    assert "Permission sagemaker:CreateModel is missing" in problem(caplog, *deploy)  # the first one's version is there
    with when("registered ", lambda: here.order(operation="CreateModel", **DENIED)):
        assert "Permission sagemaker:CreateModel is missing" in problem(caplog, *deploy)
    assert models(here, "pair") == []
    (second,) = [
        record for record in here.records.model_packages.values()
        if record.model_package_group_name == "pair" and record.model_package_version == 2
    ]  # fmt: skip
    second.model_approval_status = "PendingManualApproval"
    assert "not deployed: approve it" in told(caplog, *deploy, "--approval", "PendingManualApproval")
    assert models(here, "pair") == []
    assert here.status(Project("pair", "")) == "gone"


@pytest.mark.parametrize("times", [2, 1000])
def test_a_role_that_was_just_made_is_waited_for(
    here: Account, packed: Path, asked: Path, data: Path, artifact: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, times: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(roles, "ASK_EVERY_S", 0.01)
    unknown = {
        "code": "ValidationException", "times": times,
        "message": f"Could not assume role {ROLE}. Please ensure that the role exists and allows principal "
        "'sagemaker.amazonaws.com' to assume the role.",
    }  # fmt: skip
    project = f"new-role-{times}"
    for operation, command in (
        ("CreateTrainingJob", (*train(here, project, data, tmp_path / "model", artifact), "--no-wait")),
        ("CreateModel", batch(project, packed, asked, tmp_path / "a.csv")),
    ):
        here.containers.runs = False
        here.order(operation=operation, **unknown)
        said = told(caplog, *command, status=0 if times == 2 else 1)
        assert said.count("SageMaker cannot take the role yet") == 1
        assert ("Could not assume role" in said.splitlines()[-1]) is (times > 2)
        (ordered,) = here.cloud._faults
        assert times - ordered["times"] == (2 if times == 2 else 1 + roles.ASKS)
        here.cloud._faults.clear()


def test_a_batch_that_fails_tells_why_and_is_run_again(
    here: Account, packed: Path, asked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sick = ("--env", "SICK=yes", "--env", "SAYS=my reason")
    for attempt in (1, 2):
        sentence = problem(caplog, *batch("ill", packed, asked, tmp_path / "a.csv", *sick))
        assert re.search(rf"Job ill-batch-\w+-{attempt} failed: ClientError: .*ping health check", sentence)
        assert "The last lines of its log:\n    starts with my reason\n  The container did not answer /ping" in sentence
    assert not (tmp_path / "a.csv").exists()
    assert "5 images, 0 with a problem" in told(caplog, *batch("ill", packed, asked, tmp_path / "a.csv"))
    assert "all of it is removed" in told(caplog, "delete", "--project", "ill", "--data", "--yes")
    assert list(data.listed(here.aws, "s3://sagemaker-eu-central-1-123456789012/ill/")) == []


def tune(here: Account, project: str, folder: Path, output: Path, artifact: Path) -> tuple[object, ...]:
    here.containers.artifact = artifact
    return ("tune", "--project", project, "--data", folder, "--image", IMAGE, "--role", ROLE, "--output", output,
            *SEARCH)  # fmt: skip


def test_a_search_broken_at_every_step_is_finished_by_repeating_it(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = tune(here, "seeks", data, tmp_path / "found", artifact)
    here.order(operation="CreateHyperParameterTuningJob", **DENIED)
    assert "Permission sagemaker:CreateHyperParameterTuningJob is missing" in problem(caplog, *command)
    assert TUNING_JOBS.states(here.aws, Project("seeks", "")) == {}
    here.containers.runs = True
    with when(": InProgress", ctrl_c):
        assert re.search(r"tuning job seeks-t-\w+-1 goes on at AWS", told(caplog, *command, status=130))
    with when(": InProgress", lambda: here.order(operation="DescribeHyperParameterTuningJob", **EXPIRED)):
        assert "log in again" in problem(caplog, *command)
    here.containers.runs = False
    said = told(caplog, *command)
    assert "for this very request is there" in said
    assert list(TUNING_JOBS.states(here.aws, Project("seeks", "")).values()) == ["Completed"]
    for name in ("best.json", "model/manifest.json"):
        assert (tmp_path / "found" / name).is_file()
    assert f"launch deploy --model {tmp_path / 'found' / 'model'} --project seeks puts it behind an endpoint" in said
    deploy = ("deploy", "--project", "seeks", "--image", IMAGE, "--role", ROLE)
    sentence = problem(caplog, *deploy)
    trial = re.search(r"no training job that ended well.* as it is: --model (seeks-t-\w+-1-00\d-\w+)\.", sentence)
    assert trial and "model: tiny version" in told(caplog, *deploy, "--model", trial[1], "--dry-run")
    assert "all of it is removed" in told(caplog, "delete", "--project", "seeks", "--data", "--yes")


def test_trials_are_told_while_they_run(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here.containers.runs = True
    command = tune(here, "tells", data, tmp_path / "found", artifact)
    with when(": epoch=1/1", lambda: setattr(here.containers, "runs", False)):
        said = told(caplog, *command)
    tables = [
        re.findall(r"^ {8}\d .*? (InProgress|Completed) ", part, re.MULTILINE)
        for part in said.split("trials of tells-")
    ]
    assert "InProgress" in tables[1] and tables[-1] == ["Completed", "Completed"]
    assert re.search(r"^  \| [12]: epoch=1/1 train_loss=1 ", said, re.MULTILINE)  # a trial's number, and its line
    assert said.index("InProgress batch_size") < said.index(": epoch=1/1") < said.index("Completed  batch_size")


def failing(here: Account, trials: int) -> None:
    here.order(operation="TrainingJob", code="", message="AlgorithmError: it diverged", times=trials)


def test_a_trial_that_fails_is_told_and_the_search_goes_on_without_it(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing(here, 1)
    said = told(caplog, *tune(here, "one-fails", data, tmp_path / "found", artifact))
    assert re.search(r"trial one-fails-t-\w+-1-00\d-\w+ failed: AlgorithmError: it diverged", said)
    assert "Completed, 1 trial done, 0 running, 1 failed or stopped" in said
    rows = said.split("    trial  accuracy  state      settings\n")[-1].splitlines()
    first = re.fullmatch(r" {8}(\d)   50\.00 %  Completed  batch_size=8 epochs=[12] learning_rate=0\.\d+", rows[0])
    other = re.match(r" {8}(\d)         -  Failed     batch_size=8", rows[1])
    assert first and other and {first[1], other[1]} == {"1", "2"}
    assert f"-00{other[1]}-" in re.findall(r"trial (\S+) failed: Algo", said)[0]  # the numbers are the jobs'
    assert (tmp_path / "found" / "best.json").is_file()


def test_a_search_of_which_every_trial_fails_tells_why_and_is_run_again(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = tune(here, "all-fail", data, tmp_path / "found", artifact)
    for attempt in (1, 2):
        failing(here, 2)
        sentence = problem(caplog, *command)
        trial = rf"all-fail-t-\w+-{attempt}"
        assert re.search(
            rf"Tuning job {trial} failed: All training jobs failed; trial {trial}-00\d-\w+: AlgorithmError: it div",
            sentence,
        )
        assert "It left no line in its log" in sentence and "That is the training's own error" in sentence
    assert not (tmp_path / "found").exists()
    told(caplog, *command)
    assert sorted(TUNING_JOBS.states(here.aws, Project("all-fail", "")).values()) == ["Completed", "Failed", "Failed"]


def test_no_capacity_is_told_with_what_to_do_whatever_asked_for_it(
    here: Account, data: Path, packed: Path, asked: Path, artifact: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    advice = "AWS has no instance of this type to spare in this region just now: try again later, or take another"
    deploy = ("deploy", "--project", "full", "--model", packed, "--image", IMAGE, "--role", ROLE)
    for what, reason, times, command in (
        (
            "TrainingJob",
            "CapacityError: Please retry later.",
            2,
            tune(here, "full", data, tmp_path / "found", artifact),
        ),
        ("TransformJob", "CapacityError: Please retry later.", 1, batch("full", packed, asked, tmp_path / "a.csv")),
        ("Endpoint", "InsufficientInstanceCapacity: Please retry with another type.", 1, deploy),
    ):
        here.order(operation=what, code="", message=reason, times=times)
        sentence = problem(caplog, *command)
        assert reason in sentence and advice in sentence
    assert here.status(Project("full", "")) == "gone" and here.cloud.plane.leftovers()["running jobs"] == []
    assert models(here, "full") == [name for name in models(here, "full") if "-batchmodel-" in name]  # of the job


def ctrl_c_in_main_thread() -> None:
    """For what happens in another thread, the cloud's."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.fixture
def sigint() -> Iterator[None]:
    """Ctrl-C as Python has it, also where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_in_an_upload_leaves_no_parts_and_the_same_command_goes_on(
    here: Account, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)  # S3's smallest
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(os.urandom(4 * 5 * 2**20 + 1))
    command = ("upload", "--project", "cut-off", "--data", data, "--weights", weights)
    here.order(operation="UploadPart", do=ctrl_c_in_main_thread, times=1)
    said = told(caplog, *command, status=130)
    assert "it stops when the files under way are through" in said and "repeat the command" in said
    client, bucket = here.client("s3"), "sagemaker-eu-central-1-123456789012"
    assert client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
    assert "uploading weights: 0 of 1 files sent" in told(caplog, *command)
    (key,) = [key for key, _ in s3.listed(here.aws, f"s3://{bucket}/cut-off/") if key.endswith("w.safetensors")]
    assert client.get_object(Bucket=bucket, Key=key)["Body"].read() == weights.read_bytes()


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_while_the_model_comes_home_leaves_nothing_half(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = train(here, "half-way", data, tmp_path / "home" / "model", artifact)
    here.containers.runs = False
    with when("validation:accuracy", lambda: here.order(operation="GetObject", do=ctrl_c_in_main_thread, times=1)):
        assert "repeat the command" in told(caplog, *command, status=130)
    assert list((tmp_path / "home").iterdir()) == []
    told(caplog, *command)
    assert (tmp_path / "home" / "model" / "manifest.json").is_file()


def test_ctrl_c_in_stop_says_that_what_was_told_to_stop_stops(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told(caplog, *train(here, "ending", data, tmp_path / "model", artifact), "--no-wait")
    (name,) = TRAINING_JOBS.states(here.aws, Project("ending", ""))
    until(lambda: name in here.cloud.plane.jobs._running, "the training")
    stop = ("stop", "--project", "ending", name)
    with when(f"job {name}: Stopping", ctrl_c):
        assert "What was told to stop stops; `status` shows it." in told(caplog, *stop, status=130)
    until(lambda: TRAINING_JOBS.states(here.aws, Project("ending", "")) == {name: "Stopped"}, "its end")
    assert f"job {name} has ended already: Stopped" in told(caplog, *stop)


def test_a_delete_broken_at_every_step_is_finished_by_repeating_it(
    here: Account, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project("goes", "delete-goes")
    here.containers.runs = True
    wanted: dict[str, Any] = config_request(project, here.model(project), Hosting())
    here.settle(project, wanted)
    autoscaling.apply(here.aws, project, Hosting(max_count=2))
    TRAINING_JOBS.start(here.aws, project, here.training(project), POLL_S)
    delete = ("delete", "--project", "goes", "--bucket", "delete-goes", "--data", "--yes")
    before = inventory.things(here.aws, project, with_data=True)
    now = inventory.things(here.aws, project, with_data=True, to_come=False)
    assert {thing.name for thing in before} - {thing.name for thing in now} == {
        project.uri(part) + "/" for part in inventory.OF_JOBS
    }
    for said, things in (
        (told(caplog, *delete, "--dry-run"), before), (shown(caplog, capsys, "status", *delete[1:5]), now)
    ):  # fmt: skip
        assert all(thing.name in said for thing in things)
        assert "goes-train-" in said and "endpoint/goes/variant/main" in said and "delete-goes/goes/data/" in said
    assert [thing.name for thing in inventory.things(here.aws, project, with_data=True)] == [t.name for t in before]
    for name in ("StopTrainingJob", "DeleteEndpoint", "DeleteEndpointConfig", "DeleteModel", "DeleteLogGroup"):
        if name == "DeleteEndpointConfig":
            with when("endpoint goes: InService", ctrl_c):
                assert "What is said to be removed is gone" in told(caplog, *delete, status=130)
        here.order(operation=name, **DENIED)
        assert f":{name} is missing" in problem(caplog, *delete)
    said = told(caplog, *delete)
    assert "all of it is removed" in said and "  bucket delete-goes, which others may use: aws s3 rb" in said
    assert [thing for thing in inventory.things(here.aws, project, with_data=True) if thing.remove] == []
    assert "has nothing to remove" in told(caplog, *delete)


def test_a_job_that_another_command_started_this_moment_is_followed(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = train(here, "twice", data, tmp_path / "model", artifact)
    told(caplog, *command, "--no-wait")
    here.containers.runs = False
    (name,) = TRAINING_JOBS.states(here.aws, Project("twice", ""))
    # Both asked what there is before either had started it.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(TRAINING_JOBS), "states", lambda *_: {})
        said = told(caplog, *command)
    assert (
        f"job {name} for this very request was started by another command, or by this one whose answer was lost" in said
    )
    assert list(TRAINING_JOBS.states(here.aws, Project("twice", ""))) == [name]
    assert (tmp_path / "model" / "manifest.json").is_file()


def test_two_deployments_at_once_end_with_one_endpoint(here: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project("both", "both")
    data.ensure_bucket(here.aws, project)
    wanted = config_request(project, here.model(project), Hosting())
    other = config_request(project, here.model(project, SAYS="other"), Hosting())
    here.containers.ready.clear()
    endpoint.ensure_config(here.aws, wanted)
    here.client("sagemaker").create_endpoint(
        EndpointName="both", EndpointConfigName=wanted["EndpointConfigName"], Tags=project.tags
    )
    found, seen = endpoint.find, []

    def nothing_yet(*given: Any) -> Any:
        seen.append(given)
        return None if len(seen) == 1 else found(*given)

    monkeypatch.setattr(endpoint, "find", nothing_yet)
    with pytest.raises(LaunchError, match="is being made by another command this moment, and not as this one asks"):
        deployment.bring(here.aws, project, None, other, Hosting(), POLL_S)
    seen.clear()
    client, describe = here.client("sagemaker"), here.client("sagemaker").describe_endpoint_config
    missing = AwsError("", "ValidationException", "DescribeEndpointConfig", "Could not find it")

    def not_yet(**given: Any) -> Any:
        client.describe_endpoint_config = describe
        raise missing

    client.describe_endpoint_config = not_yet
    with meanwhile(lambda: deployment.bring(here.aws, project, None, wanted, Hosting(), POLL_S)) as raised:
        here.containers.ready.set()
    assert not raised and here.status(project) == "InService"
    assert here.records.endpoints["both"].endpoint_config_name == wanted["EndpointConfigName"]


def test_a_terminal_that_is_closed_ends_the_waiting_and_not_the_job(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = train(here, "hung-up", data, tmp_path / "model", artifact)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with when("Training in progress", lambda: signal.raise_signal(signal.SIGHUP)):
            assert "goes on at AWS" in told(caplog, *command, status=129)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        here.containers.runs = False
        with when("for this very request is there", lambda: signal.raise_signal(signal.SIGHUP)):
            told(caplog, *command)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "model" / "manifest.json").is_file()


@pytest.mark.parametrize("answer", ["n\n", "", "\xff\n", "y\n"])
def test_delete_asks_and_takes_only_a_yes(
    here: Account, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    project = Project("asks-first", "asks-first")
    data.ensure_bucket(here.aws, project)
    here.model(project)
    delete = ("delete", "--project", "asks-first", "--bucket", "asks-first")
    monkeypatch.setattr("sys.stdin", None)  # as it is with <&-
    assert "There is no one to ask" in problem(caplog, *delete, status=2)
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    if answer == "\xff\n":  # as a terminal of UTF-8 gives a byte that is none
        monkeypatch.setattr("builtins.input", lambda _: b"\xff".decode())
    if answer == "y\n":
        assert "all of it is removed" in told(caplog, *delete)
    else:
        assert "Nothing was removed" in problem(caplog, *delete)
