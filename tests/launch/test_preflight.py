"""Preflight in the rehearsal's account: both images, quotas for what is wanted, permissions of the project's own."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.in_process import ROLE, Account
from tests.launch.telling import problem, shown, told
from tests.rehearsal.start import IMAGE, REGION, Rehearsal
from training.launch import images, preflight
from training.launch.names import Project
from training.launch.preflight import Check, Plan
from training.launch.roles import CALLER_ACTIONS, caller_actions, find_role, trust_policy
from training.launch.session import Aws, connect

GPU, CPU = "ml.g4dn.xlarge", "ml.c6i.xlarge"
TRAINING = "ml.g5.xlarge"
PROJECT = Project("resnet34", "mine")


def checks(found: Iterator[Check]) -> list[tuple[str, str, str]]:
    return [(check.result, check.found, check.fix) for check in found]


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """artifacts/image.json of an empty checkout, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / images.PUSHED


def test_the_image_for_training_is_looked_at_as_well(aws: Aws, pushed: Path) -> None:
    Rehearsal.note_images(pushed.parents[1])
    assert [result for result, *_ in checks(preflight._images(aws, Plan(TRAINING, GPU)))] == ["PASS", "PASS"]
    noted = json.loads(pushed.read_text())
    del noted["train"]
    noted["serve-cpu"]["uri"] = IMAGE.replace(":rehearsal", ":other")
    pushed.write_text(json.dumps(noted))
    (train, none, how), (host, what, push) = checks(preflight._images(aws, Plan(TRAINING, CPU)))
    assert (train, none) == ("FAIL", "none to train") and "make push TARGET=train" in how
    assert host == "FAIL" and ":other" in what and "make push TARGET=serve-cpu" in push
    assert checks(preflight._images(aws, Plan(TRAINING, GPU, IMAGE)))[0][0] == "PASS"  # one for both


def test_a_manifest_that_createmodel_refuses_is_told(aws: Aws, cloud: Rehearsal) -> None:
    kind = "application/vnd.oci.image.manifest.v1+json"
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "size": 1, "digest": f"sha256:{'3' * 64}"}
    manifest = {
        "schemaVersion": 2, "mediaType": kind, "layers": [layer],
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "size": 1, "digest": f"sha256:{'2' * 64}"},
    }  # fmt: skip
    cloud.client("ecr").put_image(
        repositoryName="resnet34-sagemaker", imageManifest=json.dumps(manifest), imageTag="oci",
        imageManifestMediaType=kind,
    )  # fmt: skip
    uri = IMAGE.replace(":rehearsal", ":oci")
    ((result, found, _),) = checks(preflight._images(aws, Plan(TRAINING, GPU, uri)))
    assert result == "FAIL" and kind in found


def test_quotas_are_compared_with_what_is_wanted(aws: Aws) -> None:
    def results(**wanted: int) -> list[str]:
        return [result for result, *_ in checks(preflight._quotas(aws, Plan(TRAINING, CPU, **wanted)))]  # type: ignore[arg-type]

    assert results() == ["PASS", "PASS"]
    assert results(training_count=2, hosting_count=5) == ["FAIL", "FAIL"]
    assert results(hosting_count=3) == ["PASS", "WARN"]  # an update in place takes six of four
    (spot, *_), _ = checks(preflight._quotas(aws, Plan(TRAINING, CPU, spot=True)))
    assert spot == "FAIL"
    for training, hosting in ((TRAINING, "ml.g99.xlarge"), ("ml.g99.xlarge", CPU)):
        found = checks(preflight._quotas(aws, Plan(training, hosting)))
        assert ["WARN" for result, text, _ in found if "ml.g99" in text and "is not listed" in text] == ["WARN"]


def test_permissions_are_asked_for_things_of_the_project(aws: Aws) -> None:
    assert [result for result, *_ in checks(preflight._permissions(aws, PROJECT))] == ["PASS"]
    asked = caller_actions(PROJECT, "aws", "eu-central-1", "123456789012")
    assert set(CALLER_ACTIONS) == set().union(*asked.values()) and len(set(CALLER_ACTIONS)) == len(CALLER_ACTIONS)
    for resource, actions in asked.items():
        assert resource == "*" or re.fullmatch(r"arn:aws:[a-z0-9-]+:[a-z0-9-]*:(\d{12})?:.+", resource), resource
        assert resource == "*" or {action.partition(":")[0] for action in actions} == {resource.split(":")[2]}
    assert {"sagemaker:CreateEndpoint", "sagemaker:InvokeEndpoint"} <= set(
        asked["arn:aws:sagemaker:eu-central-1:123456789012:endpoint/resnet34"]
    )


def test_a_bucket_of_another_account_is_a_failure_with_what_to_do(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    denied = {"operation": "HeadBucket", "code": "AccessDenied", "message": "Forbidden", "times": 1, "status": 403}
    here.order(**denied)
    said = told(caplog, "preflight", "--image", IMAGE, "--role", ROLE, status=1)
    assert re.search(r"FAIL  bucket .*s3:ListBucket is missing.*\n +Name a bucket of yours with --bucket\.", said)
    here.order(**denied)
    sentence = problem(caplog, "upload", "--data", data)
    assert re.search(r"Bucket sagemaker-\S+ is another account's, or s3:ListBucket is missing; name one with", sentence)


def test_without_a_role_preflight_and_train_name_what_makes_one_and_what_prints_its_policies(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    project = ("--project", "no-role")
    for said in (
        told(caplog, "preflight", *project, "--image", IMAGE, status=1),
        problem(caplog, "train", *project, "--data", data, "--image", IMAGE),
    ):
        assert "iam-role --project no-role` makes one, or give --role ARN; with --policy it prints" in said
        assert "sts:AssumeRole" not in said
    printed = json.loads(shown(caplog, capsys, "iam-role", *project, "--policy"))
    assert printed["trust policy"] == trust_policy()
    allowed = json.dumps(printed["permissions"])
    assert "s3:GetObject" in allowed and "arn:aws:s3:::sagemaker-eu-central-1" in allowed
    assert "iam CreateRole" not in here.calls


def test_of_an_image_that_is_not_there_the_driver_does_not_pass(aws: Aws) -> None:
    for image, result in ((IMAGE, "PASS"), (IMAGE.replace(":rehearsal", ":nothing"), "WARN")):
        found = preflight.run(aws, PROJECT, Plan(TRAINING, GPU, image, "resnet34-sagemaker"))
        assert [check.result for check in found if check.name == "driver"] == [result]


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("docker.io/library/resnet34:1", "is not in ECR"),
        (IMAGE.replace("eu-central-1", "us-east-1"), "it is in us-east-1, jobs run in eu-central-1"),
        (IMAGE.replace("123456789012", "999999999999"), "999999999999"),
    ],
)
def test_an_image_that_jobs_cannot_pull_is_told(aws: Aws, uri: str, said: str) -> None:
    ((result, found, fix),) = checks(preflight._images(aws, Plan(TRAINING, GPU, uri)))
    assert result == "FAIL" and said in found and fix


def test_the_hosts_driver_is_compared_with_the_images_cuda() -> None:
    def driver(instance: str = GPU, image: str | None = IMAGE, **more: str) -> tuple[str, str, str]:
        ((result, found, fix),) = checks(preflight._driver(Plan(TRAINING, instance, image, **more)))  # type: ignore[arg-type]
        return result, found, fix

    assert driver()[0] == "PASS" and "CUDA 13.0, which --image is taken to bring" in driver()[1]
    result, found, fix = driver(ami="al2-ami-sagemaker-inference-gpu-2")
    assert result == "FAIL" and "cannot run CUDA 13.0" in found and "al2023-ami-sagemaker-inference-gpu-4-1" in fix
    result, found, fix = driver(ami="al-none")
    assert (result, found) == ("FAIL", "--ami al-none is unknown") and "al2023-ami-sagemaker-inference-gpu-4-1" in fix
    assert driver(CPU)[:2] == ("PASS", f"{CPU} has no GPU; take the image for CPUs")


@pytest.mark.parametrize(("seconds", "result"), [(59, "FAIL"), (60, "PASS"), (3600, "PASS"), (3601, "FAIL")])
def test_limits_are_those_of_aws(seconds: int, result: str) -> None:
    ((found, said, _),) = checks(preflight._limits(Plan(TRAINING, GPU, startup_s=seconds)))
    assert found == result and str(seconds) in said


def caller(here: Account, name: str, monkeypatch: pytest.MonkeyPatch, statements: list[dict[str, Any]]) -> Aws:
    """An account as a session of a role sees it, which has a path and may do what the statements allow."""
    iam = here.client("iam")
    made = iam.create_role(RoleName=name, Path="/team/", AssumeRolePolicyDocument=json.dumps(trust_policy()))["Role"]
    policy = {"Version": "2012-10-17", "Statement": statements}
    iam.put_role_policy(RoleName=name, PolicyName="may", PolicyDocument=json.dumps(policy))
    given = here.client("sts").assume_role(RoleArn=made["Arn"], RoleSessionName="me")["Credentials"]
    for variable, field in (
        ("AWS_ACCESS_KEY_ID", "AccessKeyId"), ("AWS_SECRET_ACCESS_KEY", "SecretAccessKey"),
        ("AWS_SESSION_TOKEN", "SessionToken"),
    ):  # fmt: skip
        monkeypatch.setenv(variable, given[field])
    return connect(REGION)


def test_a_caller_with_no_more_than_it_needs_passes_and_what_is_missing_is_named(
    here: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = [
        {"Effect": "Allow", "Action": list(actions), "Resource": resource}
        for resource, actions in caller_actions(PROJECT, "aws", REGION, "123456789012").items()
    ]
    assert [r for r, *_ in checks(preflight._permissions(caller(here, "least", monkeypatch, least), PROJECT))] == [
        "PASS"
    ]
    less = [statement for statement in least if "iam:PassRole" not in statement["Action"]]
    ((result, found, fix),) = checks(preflight._permissions(caller(here, "less", monkeypatch, less), PROJECT))
    assert (result, found, fix) == ("FAIL", "2 are missing", "Ask for: iam:PassRole, iam:GetRole")
    elsewhere = [*less, {"Effect": "Allow", "Action": ["iam:*"], "Resource": "arn:aws:iam::123456789012:role/other"}]
    ((result, *_),) = checks(preflight._permissions(caller(here, "other", monkeypatch, elsewhere), PROJECT))
    assert result == "FAIL"  # the action is allowed, on another role


def test_where_the_project_has_no_role_the_execution_role_of_this_machine_is_taken(
    here: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws = caller(here, "notebook", monkeypatch, [{"Effect": "Allow", "Action": "sagemaker:*", "Resource": "*"}])
    assert aws.identity["Arn"].endswith(":assumed-role/notebook/me")
    assert find_role(aws, Project("has-none", "b"), None) == "arn:aws:iam::123456789012:role/team/notebook"
