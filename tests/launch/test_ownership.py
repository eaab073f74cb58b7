"""What is not ours stays: others' things of the project's name, and projects whose name begins as ours does."""

import json
from pathlib import Path

import pytest

from tests.launch.in_process import POLL_S, Account, until
from tests.launch.telling import shown, told
from tests.rehearsal.start import IMAGE
from training.launch import autoscaling, data, endpoint, inventory, registry
from training.launch.errors import AwsError, LaunchError
from training.launch.hosting import Hosting, config_request
from training.launch.logs import ENDPOINTS
from training.launch.names import Project

THEIRS = [{"Key": "team", "Value": "x"}]
LONGER = ("train", "t", "batch", "model", "config", "batchmodel")


def test_a_name_belongs_to_one_project_only() -> None:
    foo, content = Project("foo", "b"), {"a": 1}
    for kind in LONGER:
        assert foo.owns(kind, foo.of(kind, content)) and foo.owns(kind, f"{foo.of(kind, content)}-12")
        assert not foo.owns(kind, f"foo-{kind}-by-hand")
        for part in LONGER:
            longer = Project(f"foo-{part}", "b")
            names = [longer.of(other, content) for other in LONGER]
            assert not any(foo.owns(kind, name) or foo.owns(kind, f"{name}-1") for name in names)


def removed(here: Account, project: Project) -> list[str]:
    found = inventory.things(here.aws, project, with_data=True, with_role=True)
    inventory.remove(here.aws, found, POLL_S)
    return [thing.kind for thing in found if thing.remove]


def test_delete_leaves_everything_of_the_name_that_others_made(here: Account) -> None:
    project, sagemaker = Project("theirs", "delete-theirs"), here.client("sagemaker")
    here.model(Project("mine", "delete-theirs"))
    model = Project("mine", "delete-theirs").of("model", {})
    sagemaker.create_endpoint_config(
        EndpointConfigName="theirs", ProductionVariants=[
            {"VariantName": "main", "ModelName": model, "InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
        ],
    )  # fmt: skip
    sagemaker.create_endpoint(EndpointName="theirs", EndpointConfigName="theirs", Tags=THEIRS)
    until(lambda: here.status(project) == "InService", "it")
    autoscaling.apply(here.aws, project, Hosting(max_count=2))
    here.client("cloudwatch").put_metric_alarm(
        AlarmName="theirs-latency", Namespace="AWS/SageMaker", MetricName="ModelLatency", Statistic="Average",
        Period=60, EvaluationPeriods=1, Threshold=1.0, ComparisonOperator="GreaterThanThreshold", Tags=THEIRS,
    )  # fmt: skip
    sagemaker.create_model_package_group(ModelPackageGroupName="theirs", Tags=THEIRS)
    package = sagemaker.create_model_package(
        ModelPackageGroupName="theirs", InferenceSpecification={
            "Containers": [{"Image": IMAGE}], "SupportedContentTypes": ["a/b"], "SupportedResponseMIMETypes": ["a/b"]
        },
    )["ModelPackageArn"]  # fmt: skip
    here.client("iam").create_role(RoleName="theirs-sagemaker", AssumeRolePolicyDocument=json.dumps({}), Tags=THEIRS)
    assert removed(here, project) == []
    assert here.status(project) == "InService"
    assert autoscaling.found(here.aws, project)[0]
    assert here.client("cloudwatch").describe_alarms(AlarmNames=["theirs-latency"])["MetricAlarms"]
    assert here.client("logs").describe_log_groups(logGroupNamePrefix=f"{ENDPOINTS}/theirs")["logGroups"]
    assert registry.packages(here.aws, "theirs") == [package]
    assert here.client("iam").get_role(RoleName="theirs-sagemaker")


def test_delete_removes_all_that_is_ours(here: Account) -> None:
    project, sagemaker = Project("ours", "delete-ours"), here.client("sagemaker")
    wanted = config_request(project, here.model(project), Hosting())
    here.settle(project, wanted)
    autoscaling.apply(here.aws, project, Hosting(max_count=2))
    endpoint.put_alarms(here.aws, project)
    sagemaker.create_model_package_group(ModelPackageGroupName="ours", Tags=project.tags)
    here.client("iam").create_role(RoleName="ours-sagemaker", AssumeRolePolicyDocument="{}", Tags=project.tags)
    here.client("s3").put_object(Bucket=project.bucket, Key="ours/data/x", Body=b"x")
    kinds = [
        "autoscaling", "endpoint", "endpoint configuration", "model", "model package group", "alarm", "alarm",
        "log group", "objects in S3", "role",
    ]  # fmt: skip
    assert removed(here, project) == kinds
    assert removed(here, project) == []


def test_a_project_neither_stops_nor_removes_what_a_longer_named_one_has(here: Account) -> None:
    short, sagemaker = Project("bar", "delete-bar"), here.client("sagemaker")
    here.containers.runs = True
    for part in ("train", "model", "config"):
        longer = Project(f"bar-{part}", "delete-bar")
        sagemaker.create_training_job(TrainingJobName=f"{longer.of('train', 1)}-1", **here.training(longer))
        endpoint.ensure_config(here.aws, config_request(longer, here.model(longer), Hosting()))
    assert inventory.things(here.aws, short, with_role=True) == []
    with pytest.raises(LaunchError, match="Project bar has no training job"):
        registry.archive_of_job(here.aws, short, None)
    for part in ("train", "model", "config"):
        kinds = removed(here, Project(f"bar-{part}", "delete-bar"))
        assert kinds[:3] == ["training job", "endpoint configuration", "model"]


def test_a_model_is_not_registered_among_those_of_others(here: Account, artifact: Path) -> None:
    project = Project("group", "register-theirs")
    here.client("sagemaker").create_model_package_group(ModelPackageGroupName="group", Tags=THEIRS)
    with (
        registry.located(here.aws, project, str(artifact)) as model,
        pytest.raises(LaunchError, match=r"Model package group group was not made by these commands"),
    ):
        registry.register(here.aws, project, model, IMAGE, "Approved")
    assert registry.packages(here.aws, "group") == []


def test_objects_below_the_prefix_that_the_commands_did_not_write_are_said_to_be_and_kept(
    here: Account, caplog: pytest.LogCaptureFixture
) -> None:
    project, s3 = Project("shelf", "delete-shelf"), here.client("s3")
    data.ensure_bucket(here.aws, project)
    theirs = {"shelf/notes.txt", "shelf/photos/a.png", "shelf/photos/b.png", "shelfmark/data/z", "shelf/data"}
    for key in theirs | {"shelf/data/train-1/x", "shelf/jobs/j/output/model.tar.gz"}:
        s3.put_object(Bucket="delete-shelf", Key=key, Body=b"x")
    delete = ("delete", "--project", "shelf", "--bucket", "delete-shelf", "--data")
    said, stays = told(caplog, *delete, "--dry-run").split("\nwhat stays:\n")
    kept, removed = said.split("to be removed of project shelf in eu-central-1, account 123456789012:\n")
    assert "  bucket delete-shelf, which others may use: aws s3 rb s3://delete-shelf" in stays
    assert kept.startswith("kept, as these commands did not write it:\n")
    for name, count in (("notes.txt", 1), ("photos/", 2), ("data", 1)):
        assert f"s3://delete-shelf/shelf/{name}  {count} files, 0.0 MB; not written by these commands\n" in kept
    assert [line.split()[3] for line in removed.splitlines()] == [
        "s3://delete-shelf/shelf/data/", "s3://delete-shelf/shelf/jobs/"
    ]  # fmt: skip
    assert "all of it is removed" in told(caplog, *delete, "--yes")
    assert {key for key, _ in data.listed(here.aws, "s3://delete-shelf/")} == theirs


def test_an_object_that_s3_does_not_let_go_is_told(here: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 answers 200 and lists what it kept; moto keeps nothing, so its answer is changed on the way."""
    project, s3 = Project("locked", "delete-locked"), here.client("s3")
    data.ensure_bucket(here.aws, project)
    s3.put_object(Bucket="delete-locked", Key="locked/data/x", Body=b"x")
    error = {"Key": "locked/data/x", "Code": "AccessDenied", "Message": "Access Denied"}
    monkeypatch.setattr(s3, "delete_objects", lambda **_: {"Errors": [error]})
    with pytest.raises(AwsError, match="Permission s3:DeleteObject is missing"):
        inventory.delete_objects(here.aws, project)


def test_what_is_written_is_what_delete_knows() -> None:
    with pytest.raises(AssertionError, match="would not be deleted"):
        Project("p", "b").uri("elsewhere", "x")


def test_what_is_left_of_an_upload_that_was_killed_is_listed_and_removed(
    here: Account, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    project, s3 = Project("killed", "delete-killed"), here.client("s3")
    data.ensure_bucket(here.aws, project)

    def unfinished() -> set[str]:
        found = s3.list_multipart_uploads(Bucket="delete-killed").get("Uploads", [])
        return {each["Key"] for each in found}

    for key in ("killed/data/weights-1/w.pth", "killed/theirs/x", "killed-not/data/x"):
        s3.create_multipart_upload(Bucket="delete-killed", Key=key)
    delete = ("delete", "--project", "killed", "--bucket", "delete-killed", "--yes", "--data")
    said = shown(caplog, capsys, "status", *delete[1:5])
    assert "killed/data/  0 files, 0.0 MB, 1 uploads that were broken off" in said
    assert "all of it is removed" in told(caplog, *delete)
    assert unfinished() == {"killed-not/data/x", "killed/theirs/x"}
    s3.create_multipart_upload(Bucket="delete-killed", Key="killed/data/x")
    here.order(operation="GetBucket", code="AccessDenied", message="no", times=1, status=403)  # no leave to list them
    assert "has nothing to remove" in told(caplog, *delete)
