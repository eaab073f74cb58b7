"""A deployment over an endpoint that is there: what it keeps, what it says of the change, and what it refuses."""

import os
import re
import shutil
from pathlib import Path

import pytest

from service.model.artifact import open_artifact
from service.model.manifest import GENERATED_SAMPLE, sealed
from tests.launch.in_process import ROLE, Account
from tests.launch.telling import DENIED, ctrl_c, problem, sigterm, told, when
from tests.rehearsal.start import IMAGE
from training.launch import autoscaling, endpoint, registry, smoke
from training.launch.errors import AwsError
from training.launch.hosting import Hosting, Kind, config_request
from training.launch.jobs import pack
from training.launch.live import Live, tell_replaced
from training.launch.names import Project

BUCKET = "sagemaker-eu-central-1-123456789012"
CHANGES = ("Create", "Put", "Update", "Delete", "Register")


@pytest.fixture(autouse=True)
def agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoints here are fakes, which predict nothing; `test_smoke` is about that."""
    monkeypatch.setattr(smoke, "compare", lambda *_: 0)


def deploy(project: str, model: object, *more: object) -> tuple[object, ...]:
    return ("deploy", "--project", project, "--model", model, "--image", IMAGE, "--role", ROLE, *more)


def live(here: Account, name: str, hosting: Hosting) -> tuple[Project, dict[str, object]]:
    project = Project(name, BUCKET)
    wanted = config_request(project, here.model(project), hosting)
    assert here.settle(project, wanted, hosting) == "created"
    return project, wanted


@pytest.mark.parametrize(
    ("is_now", "asked", "said"),
    [
        ("realtime", "serverless", "a real-time one, and --kind serverless asks for a serverless one"),
        ("realtime", "async", "a real-time one, and --kind async asks for an asynchronous one"),
        ("serverless", "realtime", "a serverless one, and --kind realtime asks for a real-time one"),
        ("async", "serverless", "an asynchronous one, and --kind serverless asks for a serverless one"),
    ],
)
def test_another_kind_is_refused_before_anything_is_made(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture, is_now: Kind, asked: Kind, said: str
) -> None:
    name = f"{is_now[:4]}-{asked[:4]}"
    live(here, name, Hosting(is_now))
    here.cloud._answers.clear()
    for more in ((), ("--dry-run",)):
        sentence = problem(caplog, *deploy(name, packed, "--kind", asked, *more), status=2)
        assert f"Endpoint {name} is {said}, which no update makes of it: give another --project" in sentence
        assert f"launch delete --project {name}" in sentence
    changes = [call for call in here.calls if call.split()[1].startswith(CHANGES)]
    assert changes in ([], ["logs PutLogEvents"])  # the container's own


def test_the_rehearsal_refuses_to_make_a_real_time_endpoint_serverless_as_aws_does(here: Account) -> None:
    project, old = live(here, "turned", Hosting())
    model = endpoint.models_of(old).pop()
    wanted = config_request(project, model, Hosting("serverless"))
    with pytest.raises(AwsError, match="real-time endpoint to a serverless one is not supported"):
        here.settle(project, wanted, Hosting("serverless"))


def test_the_rehearsal_stores_no_requests_of_serverless_endpoints_as_aws_does(here: Account) -> None:
    project = Project("uncaptured", BUCKET)
    wanted = config_request(project, "model", Hosting(capture_percent=20))
    wanted["ProductionVariants"] = config_request(project, "model", Hosting("serverless"))["ProductionVariants"]
    with pytest.raises(AwsError, match="Data capture is not supported for serverless endpoints"):
        here.aws.client("sagemaker").create_endpoint_config(**wanted)


def bounds(here: Account, name: str) -> tuple[int, int] | None:
    target = autoscaling.found(here.aws, Project(name, BUCKET))[0]
    return target and (target["MinCapacity"], target["MaxCapacity"])


@pytest.mark.slow
def test_scaling_stays_until_someone_says_otherwise_and_each_change_is_told(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = deploy("keeps", packed)
    said = told(caplog, *command, "--max", 3)
    assert "endpoint keeps scales from 1 to 3 instances (keeps-requests, keeps-concurrency)\n" in f"{said}\n"
    as_before = "endpoint keeps scales from 1 to 3 instances as before; --max 1 ends that"
    said = told(caplog, *command)
    assert "endpoint keeps is unchanged" in said and as_before in said
    assert "cost: 1 to 3 x ml.g4dn.xlarge: about 0.74 to 2.21 USD per hour, 540 to 1,610 a month" in said
    assert "would let it scale from 1 to 3 instances, as before" in told(caplog, *command, "--dry-run")
    said = told(caplog, *command, "--instance", "ml.g4dn.2xlarge")  # for which AWS wants it taken off
    assert "endpoint keeps is updated" in said and as_before in said
    assert bounds(here, "keeps") == (1, 3)
    assert len(autoscaling.found(here.aws, Project("keeps", BUCKET))[1]) == 2
    elsewhere = ("--instance", "ml.g4dn.2xlarge")
    said = told(caplog, *command, *elsewhere, "--max", 2, "--dry-run")
    assert "would let it scale from 1 to 2 instances (keeps-requests, keeps-concurrency), before from 1 to 3" in said
    assert "keeps scales from 1 to 2 instances (keeps-requests, keeps-concurrency), before from 1 to 3" in told(
        caplog, *command, *elsewhere, "--max", 2
    )
    # What each instance is to have: told with its flag, and kept like the counts.
    aim = "{} requests a minute (--scale-at-requests) or {} requests at once (--scale-at-concurrency)"
    assert f"instances are added where one has more than {aim.format(1200, 16)}" in told(caplog, *command, *elsewhere)
    given = (*command, *elsewhere, "--scale-at-requests", 600)
    assert f"would add instances where one has more than {aim.format(600, 16)}" in told(caplog, *given, "--dry-run")
    for changed in (given, (*command, *elsewhere), (*command, *elsewhere, "--max", 2)):
        assert f"instances are added where one has more than {aim.format(600, 16)}" in told(caplog, *changed)
        policies_now = autoscaling.found(here.aws, Project("keeps", BUCKET))[1]
        tracked = {each["PolicyName"]: each["TargetTrackingScalingPolicyConfiguration"] for each in policies_now}
        assert {name: each["TargetValue"] for name, each in tracked.items()} == {
            "keeps-requests": 600, "keeps-concurrency": 16
        }  # fmt: skip
        assert bounds(here, "keeps") == (1, 2)
    said = told(caplog, *command, *elsewhere, "--max", 1, "--dry-run")
    assert "would end its scaling, which is from 1 to 2 instances" in said and bounds(here, "keeps") == (1, 2)
    here.records.endpoints["keeps"].production_variants[0]["DesiredInstanceCount"] = 2  # what scaling has reached
    said = told(caplog, *command, *elsewhere, "--max", 1)
    assert "endpoint keeps is unchanged" in said
    assert "endpoint keeps no longer scales, before from 1 to 2; instances: 1" in said
    found = here.client("sagemaker").describe_endpoint(EndpointName="keeps")
    assert found["ProductionVariants"][0]["DesiredInstanceCount"] == 1 and bounds(here, "keeps") is None
    assert "scales" not in told(caplog, *command, *elsewhere)


def test_an_end_of_scaling_that_broke_off_is_finished_by_repeating_it(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = deploy("broke-off", packed)
    told(caplog, *command, "--max", 3)
    here.records.endpoints["broke-off"].production_variants[0]["DesiredInstanceCount"] = 3  # what scaling has reached
    here.order(operation="UpdateEndpointWeightsAndCapacities", **DENIED)
    assert "is missing" in problem(caplog, *command, "--max", 1)
    assert bounds(here, "broke-off") is None
    said = told(caplog, *command, "--max", 1)
    assert "endpoint broke-off had 3 instances and does not scale; now: 1" in said
    found = here.client("sagemaker").describe_endpoint(EndpointName="broke-off")
    assert found["ProductionVariants"][0]["DesiredInstanceCount"] == 1
    assert "had" not in told(caplog, *command, "--max", 1)


class Killed(BaseException):
    """As of kill -9: nothing of the command runs any more."""


def test_scaling_that_a_killed_update_took_off_is_turned_on_again_by_the_repeat(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = deploy("killed", packed)
    told(caplog, *command, "--max", 3)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(endpoint, "create_or_update", lambda *_: (_ for _ in ()).throw(Killed()))
        told(caplog, *command, "--instance", "ml.g4dn.2xlarge")
    assert bounds(here, "killed") is None
    said = told(caplog, *command, "--instance", "ml.g4dn.2xlarge")
    assert "left endpoint killed without its autoscaling, from 1 to 3 instances" in said
    assert "endpoint killed scales from 1 to 3 instances as before" in said and bounds(here, "killed") == (1, 3)
    assert len(autoscaling.found(here.aws, Project("killed", BUCKET))[1]) == 2
    told(caplog, *command, "--instance", "ml.g4dn.2xlarge", "--max", 1)
    assert bounds(here, "killed") is None
    assert "autoscaling" not in told(caplog, *command, "--instance", "ml.g4dn.2xlarge")


def policies(here: Account, name: str) -> dict[str, object]:
    """Each policy's target tracking, by its name."""
    found = autoscaling.found(here.aws, Project(name, BUCKET))[1]
    return {policy["PolicyName"]: policy["TargetTrackingScalingPolicyConfiguration"] for policy in found}


def noted(here: Account, name: str) -> tuple[int, int] | None:
    """What the endpoint's tag tells of scaling that was taken off."""
    return autoscaling.taken_off(here.aws, here.client("sagemaker").describe_endpoint(EndpointName=name)["EndpointArn"])


def test_policies_of_ones_own_survive_an_update_to_other_machines(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command, project = deploy("own", packed), Project("own", BUCKET)
    told(caplog, *command, "--max", 3)
    of_ours = autoscaling.policies(project, Hosting())["own-requests"]
    for name, target in (("own-requests", 77.0), ("by-hand", 7.0)):
        here.client("application-autoscaling").put_scaling_policy(
            **autoscaling._place(project), PolicyName=name, PolicyType="TargetTrackingScaling",
            TargetTrackingScalingPolicyConfiguration={**of_ours, "TargetValue": target},
        )  # fmt: skip
    before = policies(here, "own")
    assert set(before) == {"own-requests", "own-concurrency", "by-hand"}
    said = told(caplog, *command, "--instance", "ml.g4dn.2xlarge")
    assert "endpoint own is updated" in said and "endpoint own scales from 1 to 3 instances as before" in said
    assert policies(here, "own") == before and bounds(here, "own") == (1, 3) and noted(here, "own") is None


def test_scaling_that_was_half_gone_is_not_taken_for_whole_where_the_repeat_fails(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command, project = deploy("half", packed), Project("half", BUCKET)
    told(caplog, *command, "--max", 3)
    arn = here.client("sagemaker").describe_endpoint(EndpointName="half")["EndpointArn"]
    autoscaling.remember(here.aws, arn, autoscaling.found(here.aws, project))
    autoscaling._delete_policy(here.aws, project, "half-requests")  # and killed
    here.order(operation="UpdateEndpoint", **DENIED)
    assert "UpdateEndpoint is missing" in problem(caplog, *command, "--instance", "ml.g4dn.2xlarge")
    assert noted(here, "half") == (1, 3) and set(policies(here, "half")) == {"half-concurrency"}
    told(caplog, *command, "--instance", "ml.g4dn.2xlarge")
    assert noted(here, "half") is None and set(policies(here, "half")) == {"half-requests", "half-concurrency"}


def test_a_count_that_someone_set_by_hand_stays_until_someone_says_otherwise(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def count() -> int:
        found = here.client("sagemaker").describe_endpoint(EndpointName="counted")
        return int(found["ProductionVariants"][0]["DesiredInstanceCount"])

    command = deploy("counted", packed)
    told(caplog, *command)
    here.records.endpoints["counted"].production_variants[0]["DesiredInstanceCount"] = 3
    assert "would set its instances" not in told(caplog, *command, "--dry-run")
    assert "had 3 instances" not in told(caplog, *command) and count() == 3
    said = told(caplog, *command, "--min", 1, "--dry-run")
    assert "would set its instances to 1: it has 3, and does not scale" in said and count() == 3
    assert "had 3 instances and does not scale; now: 1" in told(caplog, *command, "--min", 1) and count() == 1


def test_an_asynchronous_endpoint_goes_on_waking_from_0(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = deploy("sleeps", packed, "--kind", "async")
    assert "(sleeps-backlog, sleeps-wake)" in told(caplog, *command, "--min", 0, "--max", 2, "--dry-run")
    told(caplog, *command, "--min", 0, "--max", 2)
    said = told(caplog, *command, "--instance", "ml.g4dn.2xlarge")
    assert "scales from 0 to 2 instances as before; --min 1 --max 1 ends that" in said
    names = {policy["PolicyName"] for policy in autoscaling.found(here.aws, Project("sleeps", BUCKET))[1]}
    assert names == {"sleeps-backlog", "sleeps-wake"}


def test_who_leaves_an_endpoint_is_told_that_it_is_there_and_what_it_costs(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = deploy("left", packed, "--max", 2)
    price = "its cost until it is deleted: 1 to 2 x ml.g4dn.xlarge: about 0.74 to 1.47 USD per hour, 540 to 1,070"
    here.containers.ready.clear()
    with when("endpoint left: Creating", ctrl_c):
        said = told(caplog, *command, status=130)
    assert "endpoint left goes on at AWS" in said and f"Endpoint left is Creating; {price}" in said
    here.containers.ready.set()
    for stop, status in ((ctrl_c, 130), (sigterm, 143)):
        with when("endpoint left scales", stop):
            said = told(caplog, *command, status=status)
        assert "Stopped; the same command goes on from here." in said
        assert "To end it: python -m training.launch delete --project left" in said
        assert f"Endpoint left is InService; {price}" in said
    with when("registry has this model", ctrl_c):  # before anything of the endpoint
        assert "its cost until" not in told(caplog, *command, status=130)


def test_an_asynchronous_endpoint_is_asked_as_one_without_being_told(
    here: Account, packed: Path, asked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = told(caplog, *deploy("waits-for", packed, "--kind", "async", "--min", 0, "--max", 1))
    assert "invoke IMAGE_OR_FOLDER --project waits-for asks it" in said.splitlines()[-1]
    invoke = ("invoke", "--project", "waits-for", asked, "--output", tmp_path / "a.csv")
    assert "5 images, 0 with a problem" in told(caplog, *invoke)
    assert (tmp_path / "a.csv").read_text().count(",a,0.9,") == 5
    assert "sagemaker InvokeEndpointAsync" in here.calls and "sagemaker InvokeEndpoint" not in here.calls
    here.order(operation="DescribeEndpoint", **DENIED)  # who may ask it, and may not look it up
    assert "is asynchronous" in problem(caplog, *invoke)
    here.order(operation="DescribeEndpoint", **DENIED)
    assert "5 images, 0 with a problem" in told(caplog, *invoke, "--asynchronous")


@pytest.fixture(scope="module")
def better(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a version that was measured at 99 %, packed."""
    folder = tmp_path_factory.mktemp("better")
    copied = shutil.copytree(artifact, folder / "model", copy_function=os.link)
    manifest = open_artifact(copied).manifest
    measured = {**manifest.metrics, "validation": {**(manifest.metrics["validation"] or {}), "accuracy": 0.99}}
    (copied / "manifest.json").unlink()
    (copied / "manifest.json").write_bytes(
        sealed(manifest.model_copy(update={"version": "better", "metrics": measured}))
    )
    return pack(copied, folder / "model.tar.gz")


def test_which_version_takes_the_place_of_which_is_told_and_a_worse_one_warned_of(
    here: Account, packed: Path, better: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = told(caplog, *deploy("versions", better))
    assert "takes the place of" not in said
    assert "takes the place of" not in told(caplog, *deploy("versions", better, "--dry-run"))
    said = told(caplog, *deploy("versions", packed, "--dry-run"))
    place = r"version \S+ \(validation accuracy (\S+ %)\) takes the place of better \(validation accuracy 99\.00 %\)"
    found = re.search(place, said)
    assert found and f"the measured accuracy falls from 99.00 % to {found[1]}; `deploy --model`" in said
    told(caplog, *deploy("versions", packed))
    said = told(caplog, *deploy("versions", better, "--dry-run"))
    assert "version better (validation accuracy 99.00 %) takes the place of" in said and "falls" not in said


def test_other_classes_are_told_and_so_is_a_model_of_the_generated_sample(
    here: Account, artifact: Path, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = shutil.copytree(artifact, tmp_path / "model", copy_function=os.link)
    manifest = open_artifact(copied).manifest
    names = [name if name == manifest.example.label else f"{name}, else" for name in manifest.classes]
    (copied / "manifest.json").unlink()
    (copied / "manifest.json").write_bytes(
        sealed(
            manifest.model_copy(
                update={"version": "other", "classes": tuple(names), "dataset": {"name": GENERATED_SAMPLE}}
            )
        )
    )
    told(caplog, *deploy("classes", packed))
    assert "other classes" not in told(caplog, *deploy("classes", packed, "--dry-run"))
    for more in (("--dry-run",), ()):
        said = told(caplog, *deploy("classes", copied, *more))
        count, first, before = len(names), ", ".join(registry.shown(names)), ", ".join(manifest.classes[:3])
        assert f"other classes: {count} instead of {count} ({first}" in said and f" instead of {before}" in said
        assert "This model was trained on a generated sample" in said


def test_an_accuracy_that_someone_made_no_number_of_is_none() -> None:
    for noted in ("n/a", "", "nan", "97"):
        assert registry.accuracy_of({"validation_accuracy": noted}) is None
    assert registry.accuracy_of({}) is None and registry.accuracy_of({"validation_accuracy": "0.97"}) == 0.97


def test_classes_that_someone_edited_in_the_registry_end_no_deployment(
    here: Account, artifact: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, now = open_artifact(artifact).manifest, Live({}, {"ProductionVariants": [{"ModelName": "m"}]})
    edits: tuple[dict[str, str], ...] = ({}, {"classes": "3"}, {"classes": "many", "first_classes": "a / b"})
    for edited in edits:
        facts = {"version": "of before", "classes_digest": "other", **edited}
        assert registry.classes_of(facts) is None
        monkeypatch.setattr(registry, "registered", lambda *_, facts=facts: ("arn", facts))
        caplog.clear()
        tell_replaced(here.aws, now, manifest)
        assert "other classes: whoever calls the endpoint gets other labels" in caplog.text
    assert registry.classes_of(registry.class_facts(["a", "b", "c", "d"])) == (4, "a, b, c, ...")
