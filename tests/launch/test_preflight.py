"""Preflight in the rehearsal's account: both images, quotas for what is wanted, permissions of the project's own."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.launch.in_process import ROLE, Account
from tests.launch.telling import EXPIRED, problem, shown, told
from tests.rehearsal.start import IMAGE, REGION, Rehearsal
from training.launch import images, preflight, quotas, rights
from training.launch.checks import Check, Plan
from training.launch.deployment import SERVICE_STARTUP_S
from training.launch.hosting import DEFAULTS, LIMITS
from training.launch.names import Project
from training.launch.policies import (
    CALLER_ACTIONS,
    LINK,
    LINKED_ROLE,
    SCALING_SERVICE,
    caller_actions,
    permissions,
    trust_policy,
)
from training.launch.roles import find_role
from training.launch.session import Aws, connect

GPU, CPU = "ml.g4dn.xlarge", "ml.c6i.xlarge"
TRAINING = "ml.g5.xlarge"
PROJECT = Project("resnet34", "mine")
PLAN = Plan(TRAINING, GPU, role=f"arn:aws:iam::123456789012:role/{PROJECT.name}-sagemaker")


def checks(found: Iterator[Check]) -> list[tuple[str, str, str]]:
    return [(check.result, check.found, check.fix) for check in found]


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """artifacts/image.json of an empty checkout, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / images.PUSHED


def test_the_image_for_training_is_looked_at_as_well(aws: Aws, pushed: Path) -> None:
    Rehearsal.note_images(pushed.parents[1])
    assert [result for result, *_ in checks(preflight._images(aws, Plan(TRAINING, GPU)))] == [
        "PASS"
    ] * 3  # train, serve, and serve-cpu for batch
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


def test_batch_needs_the_image_for_processors_which_is_named(aws: Aws, pushed: Path) -> None:
    Rehearsal.note_images(pushed.parents[1])
    noted = json.loads(pushed.read_text())
    del noted["serve-cpu"]
    pushed.write_text(json.dumps(noted))
    *_, (result, found, how) = checks(preflight._images(aws, Plan(TRAINING, GPU)))
    assert (result, found) == ("WARN", "none to classify in a batch") and "make push TARGET=serve-cpu" in how
    *_, (result, found, _) = checks(preflight._images(aws, Plan(TRAINING, CPU)))
    assert (result, found) == ("FAIL", "none to host")  # the endpoint's as well


def test_quotas_are_compared_with_what_is_wanted(aws: Aws, cloud: Rehearsal) -> None:
    def results(**wanted: Any) -> list[str]:
        return [result for result, *_ in checks(quotas.of(aws, Plan(TRAINING, CPU, **wanted)))]

    training, hosting, batch = (
        f"{TRAINING} for training job usage", f"{CPU} for endpoint usage", "ml.c6i.2xlarge for transform job usage"
    )  # fmt: skip
    found = checks(quotas.of(aws, Plan(TRAINING, CPU, spot_count=1)))
    assert found == [  # the third is AWS's default, which the account's own list leaves out
        ("PASS", f"'{name}' is {count}", "")
        for name, count in ((training, 2), (training.replace(" for", " for spot"), 1), (hosting, 4), (batch, 1))
    ]
    assert results(training_count=3, hosting_count=5) == ["FAIL", "FAIL", "PASS"]
    assert results(hosting_count=3) == ["PASS", "WARN", "PASS"]  # an update in place takes six of four
    assert results(spot_count=2) == ["PASS", "FAIL", "PASS", "PASS"]
    assert results(batch_instance="ml.c5.xlarge") == ["PASS", "PASS", "WARN"]  # who makes no batch needs none
    assert results(kind="serverless") == ["PASS", "PASS", "PASS"]
    assert results(kind="serverless", max_concurrency=11) == ["PASS", "FAIL", "PASS"]
    denied = {"code": "AccessDeniedException", "message": "no", "times": 1}
    cloud.order({"operation": "ListAWSDefaultServiceQuotas", **denied})
    assert results() == ["PASS", "PASS", "WARN"]  # what the account has of its own is told all the same
    cloud.order({"operation": "ListServiceQuotas", **denied})
    assert results() == ["WARN"]
    for given in (("ml.g99.xlarge", CPU), (TRAINING, "ml.g99.xlarge")):
        listed = checks(quotas.of(aws, Plan(*given)))
        assert ["WARN" for result, text, _ in listed if "ml.g99" in text and "is not listed" in text] == ["WARN"]


def test_permissions_are_asked_for_things_of_the_project(aws: Aws) -> None:
    assert [result for result, *_ in checks(rights.of_caller(aws, PROJECT, PLAN))] == ["PASS"]
    asked = caller_actions(PROJECT, "aws", "eu-central-1", "123456789012")
    assert set(CALLER_ACTIONS) == set().union(*asked.values()) and len(set(CALLER_ACTIONS)) == len(CALLER_ACTIONS)
    for resource, actions in asked.items():
        assert resource == "*" or re.fullmatch(r"arn:aws:[a-z0-9-]+:[a-z0-9-]*:(\d{12})?:.+", resource), resource
        assert resource == "*" or {action.partition(":")[0] for action in actions} == {resource.split(":")[2]}
    of_endpoint = set(asked["arn:aws:sagemaker:eu-central-1:123456789012:endpoint/resnet34"])
    for action in ("CreateEndpoint", "InvokeEndpoint", "AddTags", "ListTags"):  # the note on scaling is a tag
        assert f"sagemaker:{action}" in of_endpoint


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
    table = told(caplog, "preflight", *project, "--image", IMAGE, status=1)
    sentence = problem(caplog, "train", *project, "--data", data, "--image", IMAGE)
    for said in (table, sentence):
        assert "iam-role --project no-role` makes one, or give --role ARN; with --policy it prints" in said
    assert "sts:AssumeRole" not in sentence  # which stays one
    printed = json.loads(shown(caplog, capsys, "iam-role", *project, "--policy"))
    assert printed["trust policy"] == trust_policy()
    row = table[table.index("Its trust policy: ") : table.index("  PASS  permissions")]
    trust, may = row.removeprefix("Its trust policy: ").split("Its permissions: ")
    assert [json.loads(trust), json.loads(may)] == list(printed.values())  # as they are shown, ready to be copied
    allowed = json.dumps(printed["permissions"])
    assert "s3:GetObject" in allowed and "arn:aws:s3:::sagemaker-eu-central-1" in allowed
    assert "iam CreateRole" not in here.calls


def test_of_an_image_that_is_not_there_the_driver_does_not_pass(aws: Aws) -> None:
    for image, results in ((IMAGE, ["WARN"] * 2), (IMAGE.replace(":rehearsal", ":nothing"), [])):
        found = preflight.run(aws, PROJECT, Plan(TRAINING, GPU, image, "resnet34-sagemaker"))
        assert [check.result for check in found if check.name == "driver"] == results


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


def test_the_hosts_driver_is_compared_with_the_images_cuda(pushed: Path) -> None:
    def drivers(instance: str = GPU, image: str | None = None, training: str = TRAINING, **more: str) -> list[Any]:
        return checks(preflight._drivers(Plan(training, instance, image, **more)))  # type: ignore[arg-type]

    def driver(*given: str, **more: str) -> tuple[str, str, str]:
        row: tuple[str, str, str] = drivers(*given, **more)[1]
        return row

    Rehearsal.note_images(pushed.parents[1])
    assert [result for result, *_ in drivers()] == ["PASS", "PASS"] and "runs the image's CUDA 13.0" in driver()[1]
    result, found, fix = driver(ami="al2-ami-sagemaker-inference-gpu-2")
    assert result == "FAIL" and "cannot run CUDA 13.0" in found and "al2023-ami-sagemaker-inference-gpu-4-1" in fix
    result, found, fix = driver(ami="al-none")
    assert (result, found) == ("FAIL", "--ami al-none is unknown") and "al2023-ami-sagemaker-inference-gpu-4-1" in fix
    assert driver(CPU)[:2] == ("PASS", f"{CPU} has no GPU; take the image for CPUs")
    assert drivers(training=CPU)[0][:2] == ("PASS", f"{CPU} has no GPU; trainings compute on its processor")
    # Of an image that is given and was not noted nobody knows, which is no PASS; old GPUs are refused all the same.
    other = IMAGE.replace(":rehearsal", ":other")
    for result, found, fix in drivers(image=other):
        assert result == "WARN" and "CUDA 13.0, which is not known" in found
        assert f'"uri": "{other}", "cuda": "13.0"' in fix
    for image in (None, other):
        old = drivers("ml.p3.2xlarge", image, "ml.p3.2xlarge")
        assert [result for result, *_ in old] == ["FAIL", "FAIL"], old
        assert all("CUDA 13 dropped its GPU" in said for _, said, _ in old)
    pushed.write_text(json.dumps({"train": {"uri": other, "cuda": "12.4"}}))
    (_, training, _), (result, found, _) = drivers("ml.p3.2xlarge", other, "ml.p3.2xlarge")
    assert "the image's CUDA 12.4" in training
    assert result == "PASS" and "gpu-3-1 (driver 550, CUDA 12.4) runs the image's CUDA 12.4" in found
    pushed.write_text(json.dumps({"serve-cpu": {"uri": other, "cuda": None}}))
    assert all(result == "WARN" and "leaves it unused" in found for result, found, _ in drivers(image=other))


def test_of_a_batch_on_a_gpu_image_and_driver_are_looked_at(aws: Aws, pushed: Path) -> None:
    Rehearsal.note_images(pushed.parents[1])
    plan = Plan(TRAINING, CPU, batch_instance=GPU)
    assert len(checks(preflight._drivers(Plan(TRAINING, CPU)))) == 2
    *_, (result, found, fix) = checks(preflight._drivers(plan))
    assert result == "WARN" and "by forward compatibility alone" in found and "runs on ml.c6i.2xlarge" in fix
    noted = json.loads(pushed.read_text())
    pushed.write_text(json.dumps({**noted, "serve": {**noted["serve"], "cuda": "12.2"}}))
    *_, (result, found, _) = checks(preflight._drivers(plan))
    assert result == "PASS" and "al2-ami-sagemaker-batch-gpu-535" in found
    del noted["serve"]
    pushed.write_text(json.dumps(noted))
    *_, (result, found, fix) = checks(preflight._images(aws, plan))
    assert (result, found) == ("WARN", "none to classify in a batch") and "make push TARGET=serve`" in fix
    assert len(checks(preflight._drivers(plan))) == 2  # nobody knows what it will bring
    old = checks(preflight._drivers(Plan(TRAINING, CPU, batch_instance="ml.p3.2xlarge")))[2]
    assert old[0] == "FAIL" and "CUDA 13 dropped its GPU" in old[1]
    other = IMAGE.replace(":rehearsal", ":other")
    *_, (result, found, fix) = checks(preflight._drivers(Plan(TRAINING, CPU, other, batch_instance=GPU)))
    assert result == "WARN" and "CUDA later than 12.2, if the image brings such, runs by forward comp" in found
    assert f'"uri": "{other}"' in fix
    pushed.write_text(json.dumps({"serve": {"uri": IMAGE, "cuda": None}}))
    *_, (result, found, fix) = checks(preflight._drivers(plan))
    assert result == "WARN" and "leaves it unused" in found and "--batch-instance" in fix


@pytest.mark.parametrize(("seconds", "result"), [(59, "FAIL"), (60, "PASS"), (3600, "PASS"), (3601, "FAIL")])
def test_limits_are_those_of_aws(seconds: int, result: str) -> None:
    ((found, said, _),) = checks(preflight._limits(Plan(TRAINING, GPU, startup_s=seconds)))
    assert found == result and str(seconds) in said


def test_a_serverless_endpoint_has_three_minutes_to_start_whatever_is_asked_for() -> None:
    def row(startup_s: int = PLAN.startup_s) -> tuple[str, str, str]:
        (found,) = checks(preflight._limits(Plan(TRAINING, GPU, kind="serverless", startup_s=startup_s)))
        return found

    assert row()[0] == "PASS" and "containers ready within 180 s" in row()[1]
    assert row(900)[:2] == (
        "FAIL", "--startup-seconds 900: AWS gives serverless endpoints 180 s, no more and no less; leave it out."
    )  # fmt: skip


def test_the_services_own_limits_are_within_awss() -> None:
    fields = Settings.model_fields
    assert fields["max_payload_bytes"].default == LIMITS["realtime"].payload_mb * 2**20
    assert fields["deadline_s"].default < LIMITS["realtime"].timeout_s
    assert fields["start_timeout_s"].default == SERVICE_STARTUP_S < PLAN.startup_s
    assert {name: int(given) for name, given in DEFAULTS.items()} == {
        f"CLASSIFIER_{name.upper()}": fields[name].default for name in ("max_payload_bytes", "max_body_bytes")
    }
    for kind, said in (
        ("realtime", "up to 25 MB, answers within 60 s (AWS's; larger or slower ones: --kind async, with --env"),
        ("serverless", "up to 4 MB, answers within 60 s"),
        ("async", "up to 1024 MB, answers within 3600 s (AWS's; with --env CLASSIFIER_MAX_PAYLOAD_BYTES=..."),
    ):
        ((_, found, _),) = checks(preflight._limits(Plan(TRAINING, GPU, kind=kind)))  # type: ignore[arg-type]
        assert f"requests {said}" in found


def caller(
    here: Account, name: str, monkeypatch: pytest.MonkeyPatch, statements: list[dict[str, Any]], path: str = "/team/"
) -> Aws:
    """An account as a session of a role sees it, which has a path and may do what the statements allow."""
    iam = here.client("iam")
    made = iam.create_role(RoleName=name, Path=path, AssumeRolePolicyDocument=json.dumps(trust_policy()))["Role"]
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
    assert rows(caller(here, "least", monkeypatch, least)) == [
        ("PASS", f"all {len(CALLER_ACTIONS)} actions that the commands use"[:38])
    ]
    less = [statement for statement in least if "iam:PassRole" not in statement["Action"]]
    ((result, found, fix),) = checks(rights.of_caller(caller(here, "less", monkeypatch, less), PROJECT, PLAN))
    assert (result, found, fix) == ("FAIL", "2 are missing", "Ask for: iam:PassRole, iam:GetRole")
    elsewhere = [*less, {"Effect": "Allow", "Action": ["iam:*"], "Resource": "arn:aws:iam::123456789012:role/other"}]
    ((result, *_),) = checks(rights.of_caller(caller(here, "other", monkeypatch, elsewhere), PROJECT, PLAN))
    assert result == "FAIL"  # the action is allowed, on another role


def rows(aws: Aws, plan: Plan = PLAN) -> list[tuple[str, str]]:
    return [(result, found[:38]) for result, found, _ in checks(rights.of_caller(aws, PROJECT, plan))]


def test_it_is_the_role_that_is_given_which_the_caller_must_be_allowed_to_pass(
    here: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        name: here.client("iam").create_role(
            RoleName=name, Path="/team/", AssumeRolePolicyDocument=json.dumps(trust_policy())
        )["Role"]["Arn"]
        for name in ("given", "ungiven")
    }
    mine = [
        {"Effect": "Allow", "Action": list(actions), "Resource": resource}
        for resource, actions in caller_actions(PROJECT, "aws", REGION, "123456789012", made["given"]).items()
    ]
    aws = caller(here, "passes-one", monkeypatch, mine)
    for role, result in ((made["given"], "PASS"), ("given", "PASS"), (made["ungiven"], "FAIL"), (None, "FAIL")):
        assert [found for found, _ in rows(aws, Plan(TRAINING, GPU, role=role))] == [result], role


def test_the_role_of_autoscaling_must_be_there_or_may_be_made(here: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """At an account's first endpoint that scales AWS makes it in the caller's name."""
    less = [
        {"Effect": "Allow", "Action": list(actions), "Resource": resource}
        for resource, actions in caller_actions(PROJECT, "aws", REGION, "123456789012").items()
        if LINK not in actions
    ]
    aws = caller(here, "no-link", monkeypatch, less, path="/")

    def found() -> tuple[str, str]:
        ((result, _, fix),) = checks(rights.of_caller(aws, PROJECT, PLAN))
        return result, fix

    assert found() == ("FAIL", f"Ask for: {LINK}")
    here.order(operation="GetRole", code="AccessDenied", message="no", status=403, times=2)  # its own, and that one
    assert found() == ("WARN", f"They are: {LINK}")
    iam = here.client("iam")
    iam.create_role(RoleName=LINKED_ROLE, Path=f"/aws-service-role/{SCALING_SERVICE}/", AssumeRolePolicyDocument="{}")
    try:
        assert found()[0] == "PASS"
    finally:
        iam.delete_role(RoleName=LINKED_ROLE)


def role_rows(aws: Aws, role: str) -> list[tuple[str, str, str]]:
    plan = Plan(TRAINING, GPU, role=role)
    return checks(preflight._role(aws, PROJECT, plan)) + checks(rights.of_role(aws, PROJECT, plan))


def test_a_role_is_looked_at_for_whom_it_trusts_and_what_it_may(here: Account) -> None:
    iam = here.client("iam")
    may = permissions(PROJECT)["Statement"]
    of_ec2 = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}

    def made(name: str, trust: dict[str, Any], statements: list[dict[str, Any]]) -> str:
        arn = str(iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"])
        policy = {"Version": "2012-10-17", "Statement": statements}
        iam.put_role_policy(RoleName=name, PolicyName="may", PolicyDocument=json.dumps(policy))
        return arn

    assert [row[0] for row in role_rows(here.aws, made("right", trust_policy(), may))] == ["PASS", "PASS"]
    (result, found, fix), _ = role_rows(here.aws, made("ec2s", {"Statement": [of_ec2]}, may))
    assert result == "FAIL" and "does not trust sagemaker.amazonaws.com" in found and "sts:AssumeRole" in fix
    no_bucket = [each for each in may if "s3:" not in json.dumps(each)]
    _, (result, found, fix) = role_rows(here.aws, made("no-bucket", trust_policy(), no_bucket))
    assert (result, found) == ("FAIL", "it may not do 6 things that jobs do") and "s3:GetObject, s3:PutObject" in fix
    other = permissions(Project("resnet34", "other"))["Statement"]
    assert role_rows(here.aws, made("other-bucket", trust_policy(), other))[1][0] == "FAIL"
    no_log = [each for each in may if "logs:" not in json.dumps(each)]
    _, (result, _, fix) = role_rows(here.aws, made("no-log", trust_policy(), no_log))
    assert result == "WARN" and "logs:PutLogEvents" in fix  # jobs run without
    assert checks(rights.of_role(here.aws, PROJECT, Plan(TRAINING, GPU, role="arn:wrong"))) == []  # said before
    here.order(operation="SimulatePrincipalPolicy", code="AccessDenied", message="no", status=403, times=1)
    _, (result, found, _) = role_rows(here.aws, "right")
    assert (result, found) == ("WARN", "what it may do cannot be looked at (AccessDenied)")


def test_without_credentials_or_with_old_ones_the_table_is_one_row_that_says_so(
    here: Account, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def only_row(*more: str) -> str:
        said = told(caplog, "preflight", "--image", IMAGE, "--role", ROLE, *more, status=1)
        table, error = said.split(":\n", 1)[1].splitlines()
        assert error == "Not ready: credentials. What to do stands above."
        return table

    for bucket in ((), ("--bucket", "mine")):  # with one, it is not needed to name the bucket
        here.order(operation="GetCallerIdentity", **{**EXPIRED, "status": 403})
        assert re.match(r"  FAIL  credentials  The AWS credentials have expired .*log in again", only_row(*bucket))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    assert re.match(r"  FAIL  credentials  There are no AWS credentials; `aws configure`", only_row())


def test_a_region_that_is_missing_or_mistyped_is_a_row_with_what_to_do(
    here: Account, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def only_row(*more: str) -> str:
        table, error = told(caplog, "preflight", "--image", IMAGE, *more, status=1).split(":\n", 1)[1].splitlines()
        assert error == "Not ready: region. What to do stands above."
        return table

    mistyped = only_row("--region", "eu-cenrtal-1")
    assert re.match(r"  FAIL  region  Region eu-cenrtal-1: .* Did you mean eu-central-1\?", mistyped)
    assert re.match(r"  FAIL  region  Region eu central: .*; give --region\.", only_row("--region", "eu central"))
    ((credentials, *_), region) = checks(preflight._identity(here.aws))
    assert (credentials, region) == ("PASS", ("PASS", REGION, ""))
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    assert re.match(r"  FAIL  region  No AWS region is set: give --region eu-central-1, say", only_row())


def test_a_bucket_in_another_region_is_refused(here: Account, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = {"LocationConstraint": "us-west-2"}
    here.aws.client("s3", "us-west-2").create_bucket(Bucket="far-away", CreateBucketConfiguration=elsewhere)
    sentence = (
        "Bucket far-away is in us-west-2, and jobs in eu-central-1 take no other region's: name one there with "
        "--bucket, or give --region us-west-2."
    )
    said = told(caplog, "preflight", "--image", IMAGE, "--role", ROLE, "--bucket", "far-away", status=1)
    assert f"FAIL  bucket       {sentence}" in said
    assert problem(caplog, "upload", "--data", data, "--bucket", "far-away") == sentence


def test_where_the_project_has_no_role_the_execution_role_of_this_machine_is_taken(
    here: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws = caller(here, "notebook", monkeypatch, [{"Effect": "Allow", "Action": "sagemaker:*", "Resource": "*"}])
    assert aws.identity["Arn"].endswith(":assumed-role/notebook/me")
    assert find_role(aws, Project("has-none", "b"), None) == "arn:aws:iam::123456789012:role/team/notebook"


def test_preflight_tells_what_all_instances_cost_as_the_commands_do(
    here: Account, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "run", lambda _aws, _project, plan: list(preflight._prices(plan)))
    many = ("--parallel", 5, "--instances", 2, "--min", 2, "--max", 10)
    said = told(caplog, "preflight", *many)
    assert "PASS  cost  training 10 x ml.g5.xlarge: about 14.08 USD per hour" in said
    assert "PASS  cost  endpoint 2 to 10 x ml.g4dn.xlarge: about 1.47 to 7.36 USD per hour, 1,070 to 5,370 a" in said
    assert said.endswith("\nReady: nothing failed.")
    said = told(caplog, "preflight", "--hosting-instance", "ml.g5.24xlarge")
    assert "WARN  cost  endpoint 1 x ml.g5.24xlarge: not in our price table" in said
    assert said.endswith("\nReady: nothing failed; warnings, which stand above, are of: cost.")
    assert "--min is at least 1" in problem(caplog, "preflight", "--min", 5, "--max", 3, status=2)
    sleeping = ("preflight", "--kind", "async", "--min", 0)
    assert "--min 0 --max 0: --max is at least 1 (where" in problem(caplog, *sleeping, status=2)
    assert "endpoint 0 to 1 x ml.g4dn.xlarge" in told(caplog, *sleeping, "--max", 1)
    serverless = ("preflight", "--kind", "serverless")
    assert "--max-concurrency says how many" in problem(caplog, *serverless, "--max", 3, status=2)
    assert "endpoint serverless, 4096 MB" in told(caplog, *serverless)
