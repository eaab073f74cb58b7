"""Endpoints in every state that AWS knows: what a failed deployment leaves, and what one that waits does."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.launch.in_process import POLL_S, Account, meanwhile, until
from tests.launch.telling import DENIED, ctrl_c, when
from training.launch import autoscaling, deployment, endpoint, inventory
from training.launch.errors import AwsError, JobFailed, LaunchError
from training.launch.hosting import VARIANT, Hosting, config_request
from training.launch.logs import ENDPOINTS
from training.launch.names import Project
from training.launch.wait import StoppedWaiting

BUCKET = "states"


def configs(here: Account, project: Project) -> set[str]:
    return {name for name in here.records.endpoint_configs if name.startswith(f"{project.name}-config-")}


def models(here: Account, project: Project) -> set[str]:
    return {name for name in here.records._models if name.startswith(f"{project.name}-model-")}


def bring(here: Account, project: Project, wanted: dict[str, Any], hosting: Hosting | None = None) -> str:
    before = endpoint.find_ours(here.aws, project)
    return deployment.bring(here.aws, project, before, wanted, hosting or Hosting(), POLL_S)


@contextmanager
def being_updated(here: Account, project: Project, wanted: dict[str, Any]) -> Iterator[list[BaseException]]:
    """The block runs while `bring` waits for an update, whose containers do not come up by themselves."""
    here.containers.ready.clear()
    with meanwhile(lambda: bring(here, project, wanted)) as raised:
        until(lambda: here.status(project) == "Updating", "the update")
        yield raised


def live(here: Account, name: str) -> tuple[Project, dict[str, Any]]:
    """An endpoint in service, and its configuration."""
    project = Project(name, BUCKET)
    wanted = config_request(project, here.model(project), Hosting())
    assert here.settle(project, wanted) == "created"
    return project, wanted


def test_what_an_endpoint_is_being_updated_to_stays_when_the_waiting_fails(here: Account) -> None:
    project, _ = live(here, "waits")
    wanted = config_request(project, here.model(project, SAYS="new"), Hosting())
    with being_updated(here, project, wanted) as raised:
        here.order(operation="DescribeEndpoint", **DENIED)
    assert isinstance(raised[0], AwsError), raised
    here.containers.ready.set()
    until(lambda: here.status(project) == "InService", "the update's end")
    assert here.records.endpoints["waits"].endpoint_config_name == wanted["EndpointConfigName"]
    assert len(configs(here, project)) == len(models(here, project)) == 2


def test_a_repeated_update_that_fails_leaves_the_live_endpoints_own_model(here: Account) -> None:
    project, old = live(here, "repeats")
    model = old["ProductionVariants"][0]["ModelName"]
    wanted = config_request(project, model, Hosting(instance="ml.g4dn.2xlarge"))
    record = here.records.endpoints["repeats"]
    record.endpoint_status = "Updating"  # as an interrupted command left it
    here.order(operation="Endpoint", code="", message="no capacity", times=1)
    with meanwhile(lambda: bring(here, project, wanted)) as raised:
        time.sleep(5 * POLL_S)
        record.endpoint_status = "InService"  # AWS went back; the update is tried again, and fails
    assert "The update of endpoint repeats failed: no capacity" in str(raised[0])
    assert here.status(project) == "InService"
    assert models(here, project) == {model}
    assert configs(here, project) == {old["EndpointConfigName"]}


def test_a_creation_that_is_under_way_and_fails_leaves_nothing(here: Account) -> None:
    project = Project("underway", BUCKET)
    wanted = config_request(project, here.model(project, SICK="yes", SAYS="my reason"), Hosting())
    here.containers.ready.clear()
    endpoint.ensure_config(here.aws, wanted)
    here.client("sagemaker").create_endpoint(
        EndpointName="underway", EndpointConfigName=wanted["EndpointConfigName"], Tags=project.tags
    )
    with meanwhile(lambda: bring(here, project, wanted)) as raised:
        here.containers.ready.set()
    assert isinstance(raised[0], JobFailed), raised
    assert "ping health check" in str(raised[0]) and "    starts with my reason" in str(raised[0])
    assert here.status(project) == "gone"
    assert configs(here, project) == models(here, project) == set()


@pytest.mark.parametrize("state", ["OutOfService", "UpdateRollbackFailed"])
def test_an_endpoint_that_is_broken_is_said_to_be_and_left_as_it_is(here: Account, state: str) -> None:
    project, old = live(here, "broken" if state == "OutOfService" else "mixed")
    here.records.endpoints[project.name].endpoint_status = state
    new = config_request(project, here.model(project, SAYS="new"), Hosting())
    for wanted in (old, new):
        with pytest.raises(JobFailed, match=rf"it is {state}(.|\n)*launch delete --project {project.name}`, then dep"):
            bring(here, project, wanted)
    assert len(models(here, project)) == 2 and configs(here, project) == {old["EndpointConfigName"]}
    inventory.remove(here.aws, inventory.things(here.aws, project), POLL_S)
    assert here.status(project) == "gone"


def test_a_deployment_whose_way_back_failed_keeps_both_configurations(here: Account) -> None:
    project, old = live(here, "halfway")
    wanted = config_request(project, here.model(project, SAYS="new"), Hosting())
    with being_updated(here, project, wanted) as raised:
        here.records.endpoints["halfway"].endpoint_status = "UpdateRollbackFailed"
    assert "UpdateRollbackFailed" in str(raised[0])
    assert configs(here, project) == {old["EndpointConfigName"], wanted["EndpointConfigName"]}
    assert len(models(here, project)) == 2


def test_delete_waits_for_a_way_back_however_it_ends(here: Account) -> None:
    project, _ = live(here, "rolling")
    record = here.records.endpoints["rolling"]
    record.endpoint_status = "RollingBack"
    found = inventory.things(here.aws, project)
    with meanwhile(lambda: inventory.remove(here.aws, found, POLL_S)) as raised:
        time.sleep(5 * POLL_S)
        assert "rolling" in here.records.endpoints
        record.endpoint_status = "UpdateRollbackFailed"
    assert not raised and here.status(project) == "gone"
    assert [thing for thing in inventory.things(here.aws, project) if thing.remove] == []


def test_delete_waits_for_an_endpoint_that_is_being_deleted(here: Account) -> None:
    project, _ = live(here, "going")
    here.records.endpoints["going"].endpoint_status = "Deleting"
    found = [thing for thing in inventory.things(here.aws, project) if thing.kind == "endpoint"]
    with meanwhile(lambda: inventory.remove(here.aws, found, POLL_S)) as raised:
        time.sleep(5 * POLL_S)
        assert "going" in here.records.endpoints  # nobody asked a second time
        del here.records.endpoints["going"]
    assert not raised


def scaling(found: tuple[dict[str, Any] | None, list[dict[str, Any]]]) -> tuple[int, int, list[tuple[str, Any]]]:
    """The bounds, and each policy's name and target."""
    target, policies = found
    assert target
    kept = "TargetTrackingScalingPolicyConfiguration"
    return target["MinCapacity"], target["MaxCapacity"], sorted((p["PolicyName"], p[kept]) for p in policies)


def test_autoscaling_is_put_back_when_an_update_to_other_machines_fails(here: Account) -> None:
    project, _ = live(here, "scaled")
    autoscaling.apply(here.aws, project, Hosting(max_count=3))
    before = autoscaling.found(here.aws, project)
    wanted = config_request(project, here.model(project, SICK="yes"), Hosting(instance="ml.g4dn.2xlarge"))
    with pytest.raises(JobFailed, match="The model that was there before still answers"):
        bring(here, project, wanted)
    assert scaling(autoscaling.found(here.aws, project)) == scaling(before)


def wake_alarms(here: Account, project: Project) -> list[dict[str, Any]]:
    found = here.client("cloudwatch").describe_alarms(AlarmNames=[f"{project.name}-wake"])["MetricAlarms"]
    return list(found)


def test_the_alarm_that_wakes_goes_with_its_policy_and_comes_back_with_it(here: Account) -> None:
    project, _ = live(here, "wakes")
    autoscaling.apply(here.aws, project, Hosting("async", min_count=0, max_count=2))
    assert len(wake_alarms(here, project)) == 1
    before = autoscaling.found(here.aws, project)
    autoscaling.apply(here.aws, project, Hosting("async", min_count=1, max_count=2))
    assert wake_alarms(here, project) == []
    autoscaling.remove(here.aws, project)
    assert autoscaling.found(here.aws, project) == (None, [])
    autoscaling.restore(here.aws, project, *before)
    policies = {policy["PolicyName"]: policy for policy in autoscaling.found(here.aws, project)[1]}
    assert set(policies) == {"wakes-backlog", "wakes-wake"}
    assert wake_alarms(here, project)[0]["AlarmActions"] == [policies["wakes-wake"]["PolicyARN"]]
    autoscaling.remove(here.aws, project)
    assert wake_alarms(here, project) == []


def test_an_update_shows_the_new_instances_lines_and_not_the_old_ones(
    here: Account, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "training")
    project = Project("talks", BUCKET)
    assert here.settle(project, config_request(project, here.model(project, SAYS="old"), Hosting()))
    caplog.clear()  # on a busy machine it was waited for, and its line shown then
    logs, group = here.client("logs"), {"logGroupName": f"{ENDPOINTS}/talks"}
    old = logs.describe_log_streams(**group)["logStreams"][0]["logStreamName"]
    until(lambda: bool(logs.get_log_events(**group, logStreamName=old)["events"]), "its line")
    sick = config_request(project, here.model(project, SICK="yes", SAYS="new"), Hosting())
    with being_updated(here, project, sick) as raised:
        now_ms = int(time.time() * 1000)
        requests = [{"timestamp": now_ms + n, "message": "a request of the old"} for n in range(20)]
        logs.put_log_events(**group, logStreamName=old, logEvents=requests)
        here.containers.ready.set()
    assert str(raised[0]).split("The last lines of its log:")[1].split("\n")[1].strip() == "starts with new"
    assert "starts with new" in caplog.text
    assert "starts with old" not in caplog.text and "a request of the old" not in caplog.text


def test_an_endpoint_of_others_is_neither_updated_nor_made_anew(here: Account) -> None:
    project = Project("foreign", BUCKET)
    wanted = config_request(project, here.model(project), Hosting())
    endpoint.ensure_config(here.aws, wanted)
    here.client("sagemaker").create_endpoint(
        EndpointName="foreign", EndpointConfigName=wanted["EndpointConfigName"], Tags=[{"Key": "team", "Value": "x"}]
    )
    until(lambda: here.status(project) == "InService", "it")
    for state in ("InService", "Failed"):
        here.records.endpoints["foreign"].endpoint_status = state
        with pytest.raises(LaunchError, match=r"Endpoint foreign was not made by these commands .* another --project"):
            here.settle(project, wanted)
        assert here.status(project) == state


def test_ctrl_c_in_an_update_to_other_machines_says_that_nothing_scales_and_what_changes_that(here: Account) -> None:
    project, _ = live(here, "turns")
    autoscaling.apply(here.aws, project, Hosting(max_count=3))
    before = autoscaling.found(here.aws, project)
    hosting = Hosting(instance="ml.g4dn.2xlarge", max_count=3)
    wanted = config_request(project, here.model(project, SAYS="new"), hosting)
    here.order(operation="UpdateEndpoint", **DENIED)
    with pytest.raises(AwsError, match="sagemaker:UpdateEndpoint is missing"):
        bring(here, project, wanted, hosting)
    assert scaling(autoscaling.found(here.aws, project)) == scaling(before)  # nothing has begun, so it is put back
    here.model(project, SAYS="new")  # which went with the rest of the deployment that failed
    here.containers.ready.clear()
    with (
        when("endpoint turns: Updating", ctrl_c),
        pytest.raises(StoppedWaiting, match=r"goes on at AWS.*does not scale now.*This same command, once more"),
    ):
        bring(here, project, wanted, hosting)
    assert autoscaling.found(here.aws, project) == (None, [])
    here.containers.ready.set()
    assert bring(here, project, wanted, hosting) in ("updated", "unchanged")  # it may be through with it by now
    autoscaling.apply(here.aws, project, hosting)  # what `deploy` does next
    assert scaling(autoscaling.found(here.aws, project)) == scaling(before)


def test_ctrl_c_before_an_update_has_begun_puts_autoscaling_back(here: Account) -> None:
    project, _ = live(here, "not-yet")
    autoscaling.apply(here.aws, project, Hosting(max_count=3))
    before = autoscaling.found(here.aws, project)
    hosting = Hosting(instance="ml.g4dn.2xlarge", max_count=3)
    wanted = config_request(project, here.model(project, SAYS="new"), hosting, here.model(project, SAYS="2"))
    with when("no alarm watches this update", ctrl_c), pytest.raises(KeyboardInterrupt) as stopped:
        bring(here, project, wanted, hosting)
    assert not isinstance(stopped.value, StoppedWaiting)
    assert scaling(autoscaling.found(here.aws, project)) == scaling(before)
    assert "UpdateEndpoint" not in " ".join(here.calls)


def test_an_update_carries_both_alarms_and_one_with_a_shadow_says_that_none_watches(
    here: Account, caplog: pytest.LogCaptureFixture
) -> None:
    project, old = live(here, "watched")
    new = here.model(project, SAYS="new")
    wanted = config_request(project, new, Hosting())
    assert bring(here, project, wanted) == "updated"
    alarms = ["watched-5xx", "watched-latency"]
    given = here.cloud.plane.hosting.updates["watched"]["DeploymentConfig"]
    assert [each["AlarmName"] for each in given["AutoRollbackConfiguration"]["Alarms"]] == alarms
    made = here.client("cloudwatch").describe_alarms(AlarmNames=alarms)["MetricAlarms"]
    for alarm in made:
        assert {each["Value"] for each in alarm["Dimensions"]} == {"watched", VARIANT}
        raised_s = alarm["Period"] * alarm["EvaluationPeriods"]
        assert given["BlueGreenUpdatePolicy"]["TerminationWaitInSeconds"] >= raised_s + 120  # before the old ones go
    assert len(made) == 2
    model = old["ProductionVariants"][0]["ModelName"]
    shadowed = config_request(project, model, Hosting(), new)
    with caplog.at_level(logging.INFO, "training"):
        assert bring(here, project, shadowed) == "updated"
    assert "no alarm watches this update" in caplog.text
    assert "DeploymentConfig" not in here.cloud.plane.hosting.updates["watched"]


def test_an_alarm_of_others_is_not_overwritten_and_what_needs_it_is_refused(here: Account) -> None:
    project, old = live(here, "alarmed")
    cloudwatch = here.client("cloudwatch")
    for name in ("latency", "wake"):
        cloudwatch.put_metric_alarm(
            AlarmName=f"alarmed-{name}", Namespace="Theirs", MetricName="Theirs", Statistic="Average", Period=60,
            EvaluationPeriods=1, Threshold=1.0, ComparisonOperator="GreaterThanThreshold",
        )  # fmt: skip
    theirs = cloudwatch.describe_alarms(AlarmNames=["alarmed-latency", "alarmed-wake"])["MetricAlarms"]
    wanted = config_request(project, here.model(project, SAYS="new"), Hosting())
    with pytest.raises(LaunchError, match=r"Alarm alarmed-latency was not made by these commands .* another --project"):
        bring(here, project, wanted)
    assert configs(here, project) == {old["EndpointConfigName"]} and len(models(here, project)) == 1
    with pytest.raises(LaunchError, match=r"Alarm alarmed-wake was not made by these commands"):
        autoscaling.apply(here.aws, project, Hosting("async", min_count=0, max_count=2))
    assert autoscaling.found(here.aws, project) == (None, [])
    inventory.remove(here.aws, inventory.things(here.aws, project), POLL_S)
    names = ["alarmed-5xx", "alarmed-latency", "alarmed-wake"]
    assert cloudwatch.describe_alarms(AlarmNames=names)["MetricAlarms"] == theirs


def test_scaling_that_another_command_removes_this_moment_is_no_error(
    here: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, _ = live(here, "twofold")
    autoscaling.apply(here.aws, project, Hosting(max_count=2))
    before = autoscaling.found(here.aws, project)
    autoscaling.remove(here.aws, project)
    monkeypatch.setattr(autoscaling, "found", lambda *_: before)  # as a second command saw it
    autoscaling.remove(here.aws, project)
