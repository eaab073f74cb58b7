"""Jobs found again, and when the next attempt is made; what a stopped job goes on to write; logs."""

from typing import Any

import pytest

from tests.launch.in_process import POLL_S, Account, until
from training.launch import batch, data, inventory, jobs, registry, tuning
from training.launch.attempts import TRAINING_JOBS, TRANSFORM_JOBS, TUNING_JOBS, Jobs
from training.launch.errors import AwsError, LaunchError
from training.launch.logs import LAST_LINES, LogTail
from training.launch.names import Project
from training.launch.session import Aws
from training.tuning.config import TuningConfig


def start(here: Account, project: Project, **hyperparameters: str) -> str:
    return TRAINING_JOBS.start(here.aws, project, here.training(project, **hyperparameters), POLL_S)


def ended(here: Account, kind: Jobs, name: str) -> str:
    assert kind.wait_until_over(here.aws, name, POLL_S) == "Completed"
    return name


def test_a_job_whose_output_was_deleted_is_run_again(here: Account) -> None:
    project = Project("again", "again")
    first = ended(here, TRAINING_JOBS, start(here, project))
    assert start(here, project) == first
    inventory.delete_objects(here.aws, project)
    second = ended(here, TRAINING_JOBS, start(here, project))
    assert second == f"{first.removesuffix('-1')}-2"
    assert start(here, project) == second


def test_a_search_and_a_batch_whose_output_was_deleted_are_run_again(here: Account) -> None:
    project = Project("others", "others")
    here.training(project)
    training = jobs.Training("image", "arn:aws:iam::123456789012:role/r", {"train": project.uri("data") + "/"}, {})
    search = tuning.request(project, training, tuning.Search(TuningConfig(trials=1), 1), "eu-central-1")
    model, place = here.model(project), project.uri("batch", "1", "input") + "/"
    transform = batch.request(project, model, place, "ml.m5.large")
    for kind, wanted in ((TUNING_JOBS, search), (TRANSFORM_JOBS, transform)):
        here.client("s3").put_object(Bucket="others", Key=project.key("batch", "1", "input", "x.png"), Body=b"x")
        first = ended(here, kind, kind.start(here.aws, project, wanted, POLL_S))
        assert kind.start(here.aws, project, wanted, POLL_S) == first
        inventory.delete_objects(here.aws, project)
        here.training(project)
        assert kind.start(here.aws, project, wanted, POLL_S) == f"{first.removesuffix('-1')}-2"


def test_the_newest_model_is_of_a_job_whose_archive_is_there(here: Account) -> None:
    project = Project("newest", "newest")
    older, newer = (ended(here, TRAINING_JOBS, start(here, project, seed=seed)) for seed in ("1", "2"))
    assert newer in registry.archive_of_job(here.aws, project, None)
    for key, _ in list(data.listed(here.aws, project.uri("jobs", newer))):
        here.client("s3").delete_object(Bucket="newest", Key=key)
    assert older in registry.archive_of_job(here.aws, project, None)
    inventory.delete_objects(here.aws, project)
    with pytest.raises(LaunchError, match="no training job that ended well and whose model is in S3 still"):
        registry.archive_of_job(here.aws, project, None)


def test_a_job_that_is_being_stopped_is_waited_for_before_the_next_attempt(here: Account) -> None:
    project = Project("stopping", "stopping")
    here.containers.runs = True
    first = start(here, project)
    until(lambda: "Training" in TRAINING_JOBS.describe(here.aws, first)["SecondaryStatus"], "the start")
    TRAINING_JOBS.stop(here.aws, first)
    assert TRAINING_JOBS.states(here.aws, project) == {first: "Stopping"}
    second = start(here, project)
    assert second == f"{first.removesuffix('-1')}-2"
    assert TRAINING_JOBS.states(here.aws, project)[first] == "Stopped"
    inventory.remove(here.aws, inventory.things(here.aws, project), POLL_S)


def test_the_next_attempt_has_the_next_number_whatever_is_missing(here: Account) -> None:
    project = Project("counts", "counts")
    here.order(operation="TrainingJob", code="", message="CapacityError", times=2)
    first, second = (start(here, project) for _ in range(2))
    until(lambda: set(TRAINING_JOBS.states(here.aws, project).values()) == {"Failed"}, "both failures")
    del here.records.training_jobs[first]
    assert start(here, project) == f"{second.removesuffix('-2')}-3"


def test_delete_waits_for_the_last_words_of_jobs_before_it_empties_the_bucket(here: Account) -> None:
    project = Project("last", "last")
    here.containers.runs = True
    running = start(here, project, seed="1")
    stopping = start(here, project, seed="2")
    for name in (running, stopping):
        until(lambda name=name: name in here.cloud.plane.jobs._running, "the start")  # type: ignore[misc]
    TRAINING_JOBS.stop(here.aws, stopping)
    found = inventory.things(here.aws, project, with_data=True)
    assert {(thing.name, thing.state) for thing in found if thing.remove} >= {
        (running, "InProgress"), (stopping, "Stopping")
    }  # fmt: skip
    inventory.remove(here.aws, found, POLL_S)
    assert set(TRAINING_JOBS.states(here.aws, project).values()) == {"Stopped"}
    assert list(data.listed(here.aws, f"{project.uri()}/")) == []
    assert [thing for thing in inventory.things(here.aws, project, with_data=True) if thing.remove] == []


def test_to_stop_what_has_just_ended_is_no_error_and_to_be_refused_is(here: Account) -> None:
    project = Project("ends", "ends")
    TRAINING_JOBS.stop(here.aws, ended(here, TRAINING_JOBS, start(here, project)))
    here.containers.runs = True
    name = start(here, project, seed="2")
    here.order(operation="StopTrainingJob", code="AccessDeniedException", message="no", times=1)
    with pytest.raises(AwsError, match="sagemaker:StopTrainingJob is missing"):
        TRAINING_JOBS.stop(here.aws, name)
    inventory.remove(here.aws, inventory.things(here.aws, project), POLL_S)


class _Logs:
    """CloudWatch's answers as its manual has them, which moto's are not: pages may be empty before the end."""

    def __init__(self, streams: dict[str, list[list[tuple[int, str]]]]) -> None:
        self._streams = streams

    def client(self, _: str) -> Any:
        return self

    def describe_log_streams(self, **_: Any) -> dict[str, Any]:
        return {"logStreams": [{"logStreamName": name} for name in self._streams]}

    def get_log_events(self, **given: Any) -> dict[str, Any]:
        pages, place = self._streams[given["logStreamName"]], int(given.get("nextToken", 0))
        events = [{"timestamp": when, "message": text} for when, text in (pages[place] if place < len(pages) else [])]
        return {"events": events, "nextForwardToken": str(min(place + 1, len(pages)))}


def tail_of(streams: dict[str, list[list[tuple[int, str]]]]) -> LogTail:
    logs: Any = _Logs(streams)
    found: Aws = logs
    return LogTail(found, "group")


def test_empty_pages_do_not_end_a_log_and_the_streams_are_told_by_time() -> None:
    tail = tail_of({"b": [[], [], [(3, "three")]], "a": [[(1, "one"), (4, "four\n")], [], [(5, "path=/ping 503")]]})
    assert tail.new_lines() == ["one", "three", "four"]
    assert tail.new_lines() == []


def test_the_last_lines_are_the_last_of_all_streams() -> None:
    late, early = [(100 + n, f"late {n}") for n in range(LAST_LINES)], [(n, f"early {n}") for n in range(LAST_LINES)]
    assert tail_of({"a": [late], "b": [early]}).last_lines() == [text for _, text in late]
