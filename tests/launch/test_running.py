"""What runs can be found, looked at and ended: `stop`, `logs`, and the job beside another one."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.in_process import Account, until
from tests.launch.telling import ctrl_c, problem, shown, told, when
from tests.launch.test_interrupted import batch, train, tune
from tests.rehearsal.start import IMAGE, Rehearsal
from training.launch import attempts, console
from training.launch.attempts import TRAINING_JOBS, TRANSFORM_JOBS, TUNING_JOBS
from training.launch.logs import LogTail
from training.launch.names import Project
from training.launch.session import Aws

pytestmark = pytest.mark.slow  # minutes together: a service and jobs really start

SMALL = ("--weights", "none", "--quantize", "off", "--batch-size", "8", "--report", "false")


class Terminal(io.StringIO):
    """Someone who types this."""

    def isatty(self) -> bool:
        return True


def only(states: dict[str, str]) -> str:
    (name,) = states
    return name


def test_ctrl_c_names_stop_and_stop_ends_the_job_and_says_what_stays(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = train(here, "halts", data, tmp_path / "model", artifact)
    with when("Training in progress", ctrl_c):
        said = told(caplog, *command, "--region", "eu-central-1", status=130)
    name = only(TRAINING_JOBS.states(here.aws, Project("halts", "")))
    end = f"stop {name} --project halts --region eu-central-1"
    assert f"job {name} goes on at AWS" in said and f"To end it: python -m training.launch {end}" in said
    said = told(caplog, *end.split())
    assert f"job {name} is Stopped, " in said
    assert re.search(r"its checkpoints stay in s3://\S+/halts/checkpoints/\w+/: the same command as before", said)
    assert TRAINING_JOBS.states(here.aws, Project("halts", "")) == {name: "Stopped"}
    assert here.cloud.plane.jobs._running == {}
    assert f"job {name} has ended already: Stopped" in told(caplog, *end.split())


def test_another_job_names_the_one_that_still_runs(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = train(here, "two", data, tmp_path / "model", artifact)
    assert "still running" not in told(caplog, *command, "--no-wait")
    first = only(TRAINING_JOBS.states(here.aws, Project("two", "")))
    said = told(caplog, *command, "--seed", 5, "--no-wait")
    assert re.search(
        rf"job {first} of this project is still running \(started \d+ s ago, 1 x ml\.g5\.xlarge\); "
        rf"`python -m training.launch stop {first} --project two` ends it",
        said,
    )
    here.order(operation="ListTransformJobs", code="AccessDeniedException", message="no", times=1)
    assert "cannot be told (AccessDenied" in told(caplog, *command, "--no-wait")  # that is no reason not to train
    told(caplog, "stop", "--project", "two", "--yes")
    assert set(TRAINING_JOBS.states(here.aws, Project("two", "")).values()) == {"Stopped"}


def test_stop_without_a_name_lists_and_asks(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stop = ("stop", "--project", "asks")
    assert "no job of project asks runs in eu-central-1, account 123456789012" in told(caplog, *stop)
    told(caplog, *train(here, "asks", data, tmp_path / "model", artifact), "--no-wait")
    name = only(TRAINING_JOBS.states(here.aws, Project("asks", "")))
    for chosen in ((), (name,)):
        assert f"job {name}  InProgress, started" in told(caplog, *stop, *chosen, "--dry-run")
    assert "--yes goes on without asking" in problem(caplog, *stop, status=2)
    for answer in ("n\n", ""):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        said = told(caplog, *stop, status=1)
        assert f"job {name}  InProgress, started" in said and "Nothing was stopped" in said
    monkeypatch.setattr("builtins.input", lambda _: ctrl_c())
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert "Nothing was stopped." in told(caplog, *stop, status=130)
    assert "Nothing was removed." in told(caplog, "delete", "--project", "asks", status=130)
    sentence = problem(caplog, *stop, "asks-train-00000000-1", status=2)
    assert f"project asks has no such job in eu-central-1, account 123456789012; its newest are: {name}." in sentence
    assert TRAINING_JOBS.states(here.aws, Project("asks", "")) == {name: "InProgress"}
    told(caplog, *stop, name)


def test_a_search_and_a_batch_are_stopped_too(
    here: Account, data: Path, packed: Path, asked: Path, artifact: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    project = Project("kinds", "")
    here.containers.runs = True
    told(caplog, *tune(here, "kinds", data, tmp_path / "found", artifact), "--no-wait")
    search = only(TUNING_JOBS.states(here.aws, project))
    until(lambda: len(here.cloud.plane.jobs._running) == 2, "both trials")
    trial = next(iter(here.cloud.plane.jobs._running))
    assert f"job {trial} is Stopped" in told(caplog, "stop", "--project", "kinds", trial)
    here.containers.ready.clear()
    with when(": InProgress", ctrl_c):
        told(caplog, *batch("kinds", packed, asked, tmp_path / "a.csv"), status=130)
    answers = only(TRANSFORM_JOBS.states(here.aws, project))
    assert [job.machines for job in attempts.running(here.aws, project)] == [
        "1 x ml.c6i.2xlarge", "2 trials at once, each 1 x ml.g5.xlarge"
    ]  # fmt: skip
    here.containers.ready.set()
    said = told(caplog, "stop", "--project", "kinds", "--yes")
    assert f"tuning job {search} is Stopped; the models of trials that ended stay" in said
    assert f"job {answers} is Stopped; what it wrote to S3 stays" in said or f"job {answers} is Completed" in said
    assert attempts.running(here.aws, project) == []
    assert here.cloud.plane.jobs._running == {}


@pytest.mark.timeout(300)
def test_the_process_of_a_stopped_training_ends(cloud: Rehearsal, data: Path) -> None:
    """Of the rehearsal's cloud, whose trainings are processes; newcomers try it there."""
    given = ["train", "--project", "process", "--data", data, "--image", IMAGE, "--role", "resnet34-sagemaker",
             "--output", data.parent / "process", *SMALL, "--epochs", 5000, "--no-wait"]  # fmt: skip
    done = cloud.launch(*given)
    assert done.returncode == 0, done.stderr
    client = cloud.client("sagemaker")
    (name,) = [
        each["TrainingJobName"]
        for each in client.list_training_jobs(NameContains="process-train")["TrainingJobSummaries"]
    ]
    until(lambda: client.describe_training_job(TrainingJobName=name)["SecondaryStatus"] == "Training", "the training")
    done = cloud.launch("stop", "--project", "process", name)
    assert done.returncode == 0 and f"job {name} is Stopped" in done.stderr, done.stderr
    assert client.describe_training_job(TrainingJobName=name)["TrainingJobStatus"] == "Stopped"
    assert cloud.launch("delete", "--project", "process", "--data", "--yes").returncode == 0


def test_the_log_of_a_job_is_shown_and_followed(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    line = "epoch=1/1 train_loss=1"
    logs = ("logs", "--project", "reads")
    assert "has no job and no endpoint in eu-central-1" in problem(caplog, *logs)
    told(caplog, *train(here, "reads", data, tmp_path / "model", artifact), "--no-wait")
    name = only(TRAINING_JOBS.states(here.aws, Project("reads", "")))
    until(lambda: line in shown(caplog, capsys, *logs), "the line")
    assert f"log of job {name}: /aws/sagemaker/TrainingJobs, streams {name}/*; https://" in caplog.text
    with when("log of job", ctrl_c):
        told(caplog, *logs, name, "--follow", status=130)
    with when("log of job", lambda: setattr(here.containers, "runs", False)):
        assert line in shown(caplog, capsys, *logs, "--follow")
    assert f"job {name} has ended" in caplog.text
    assert "reads-train-0: project reads has no such job" in problem(caplog, *logs, "reads-train-0", status=2)


def test_what_has_ended_is_not_told_again_line_by_line(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = train(here, "replays", data, tmp_path / "model", artifact)
    with when("Training in progress", lambda: setattr(here.containers, "runs", False)):
        assert "  | epoch=1/1" in told(caplog, *command)
    said = told(caplog, *command)
    name = only(TRAINING_JOBS.states(here.aws, Project("replays", "")))
    assert "epoch=1/1" not in said and f"its log: python -m training.launch logs {name} --project replays" in said


def test_the_log_of_a_search_is_its_newest_trials(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    told(caplog, *tune(here, "trials", data, tmp_path / "found", artifact))
    name = only(TUNING_JOBS.states(here.aws, Project("trials", "")))
    assert "epoch=1/1" in shown(caplog, capsys, "logs", "--project", "trials")
    assert re.search(rf"the trials of {name}: {name}-\d{{3}}-\w+, {name}-\d{{3}}-\w+; the newest is shown", caplog.text)


def test_a_batch_counts_answers_and_tells_its_log_but_for_the_lines_of_requests(
    here: Account, packed: Path, asked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here.containers.ready.clear()
    with when("0 of 5 images answered", here.containers.ready.set):
        said = told(caplog, *batch("counts", packed, asked, tmp_path / "a.csv"))
    assert "  | starts with nothing" in said
    of_requests = batch("counts", packed, asked, tmp_path / "b.csv")
    assert "  | starts" not in told(caplog, *of_requests, "--env", "SAYS=path=/invocations status=200")
    assert re.search(r"its log: python -m training.launch logs counts-batch-\w+-1 --project counts", said)


class _Streams:
    """CloudWatch's answers: how often each stream was read."""

    def __init__(self, count: int) -> None:
        self._names, self.read = [f"s{number:03}" for number in range(count)], []  # type: ignore[var-annotated]

    def client(self, _: str) -> Any:
        return self

    def describe_log_streams(self, **_: Any) -> dict[str, Any]:
        return {"logStreams": [{"logStreamName": n, "lastEventTimestamp": int(n[1:])} for n in self._names]}

    def get_log_events(self, **given: Any) -> dict[str, Any]:
        name = given["logStreamName"]
        self.read.append(name)
        events = [{"timestamp": int(name[1:]), "message": name}] if "nextToken" not in given else []
        return {"events": events, "nextForwardToken": "1"}


def test_of_many_streams_the_ones_written_to_last_are_read() -> None:
    streams: Any = _Streams(50)
    found: Aws = streams
    tail = LogTail(found, "group")
    assert tail.recent(3) == ["s047", "s048", "s049"]
    assert sorted(streams.read) == [f"s{number:03}" for number in range(30, 50)]
    assert tail.new_lines() == [] and set(streams.read) == {f"s{number:03}" for number in range(30, 50)}


def test_pages_of_the_console_are_those_of_the_regions_partition() -> None:
    assert console.job("eu-central-1", "t", "a").startswith(
        "https://eu-central-1.console.aws.amazon.com/sagemaker/home"
    )
    assert console.job("eu-central-1", "train", "a").endswith("#/jobs/a")
    assert "console.amazonaws.cn" in console.endpoint("cn-north-1", "a")
    group = console.log_group("eu-central-1", "/aws/sagemaker/TrainingJobs", "a/")
    assert group.endswith("log-group/$252Faws$252Fsagemaker$252FTrainingJobs$3FlogStreamNameFilter$3Da$252F")
