"""The registry's word counts: a version that was rejected, that waits, that someone approved."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from service.model.artifact import open_artifact
from tests.launch.in_process import Account
from tests.rehearsal.start import IMAGE
from training.launch import data, deployment, registry
from training.launch.errors import LaunchError
from training.launch.images import Image
from training.launch.names import Project, split_uri
from training.launch.opening import Options


def hosted(
    here: Account, project: Project, packed: Path, approval: str, startup_s: int = 600, env: Sequence[str] = (),
    kind: str = "realtime",
) -> str | None:  # fmt: skip
    data.ensure_bucket(here.aws, project)
    options = Options(approval=approval, env=list(env), startup_seconds=startup_s, kind=kind)
    with registry.located(here.aws, project, str(packed)) as model:
        return deployment.hosted(
            here.aws, project, model, Image(IMAGE, None), options, "arn:aws:iam::123456789012:role/r", []
        )


def records(here: Account, project: Project) -> list[Any]:
    """The versions in moto's records: its UpdateModelPackage forgets the metadata, which AWS keeps."""
    every = here.records.model_packages.values()
    return [record for record in every if record.model_package_group_name == project.package_group]


def versions(here: Account, project: Project) -> list[str]:
    return [record.model_approval_status for record in records(here, project)]


def decide(here: Account, project: Project, status: str) -> None:
    (version,) = records(here, project)
    version.model_approval_status = status


def test_a_version_waits_until_someone_approves_it_and_then_the_same_command_goes_on(
    here: Account, packed: Path
) -> None:  # fmt: skip
    project = Project("asks", "asks")
    for _ in range(2):
        assert hosted(here, project, packed, "PendingManualApproval") is None
    decide(here, project, "Approved")
    name = hosted(here, project, packed, "PendingManualApproval")
    assert name and project.owns("model", name)
    assert versions(here, project) == ["Approved"]


def test_to_deploy_without_asking_approves_what_waits(here: Account, packed: Path) -> None:
    project = Project("waited", "waited")
    assert hosted(here, project, packed, "PendingManualApproval") is None
    assert hosted(here, project, packed, "Approved")
    assert versions(here, project) == ["Approved"]


@pytest.mark.parametrize("approval", ["Approved", "PendingManualApproval"])
def test_what_was_rejected_is_not_deployed(here: Account, packed: Path, approval: str) -> None:
    project = Project(f"no-{approval[:2].lower()}", "rejected")
    assert hosted(here, project, packed, "PendingManualApproval") is None
    decide(here, project, "Rejected")
    with pytest.raises(LaunchError, match=r"as no-../1, and it was rejected there.* or have it approved"):
        hosted(here, project, packed, approval)
    assert versions(here, project) == ["Rejected"]


def test_the_figures_lie_beside_the_archive(here: Account, packed: Path) -> None:
    project = Project("figures", "figures")
    assert hosted(here, project, packed, "Approved")
    keys = [key for key, _ in data.listed(here.aws, project.uri("models") + "/")]
    folder = keys[0].rsplit("/", 1)[0]
    assert keys == [f"{folder}/model.tar.gz", f"{folder}/statistics.json"]
    # One that is in S3 already stays where it is; its figures go to the project's models.
    with registry.located(here.aws, project, f"s3://figures/{keys[0]}") as model:
        other = Project("others-figures", "figures")
        registry.register(here.aws, other, model, IMAGE, "Approved")
        assert model.place(other) == f"s3://figures/{keys[0]}"
    assert [key for key, _ in data.listed(here.aws, other.uri("models") + "/")] == [
        f"others-figures/models/{folder.rsplit('/', 1)[1]}/statistics.json"
    ]


def test_the_registry_shows_what_the_model_was_measured_at(here: Account, artifact: Path, packed: Path) -> None:
    project, measured = Project("measured", "measured"), open_artifact(artifact).manifest.metrics["validation"]
    assert measured and hosted(here, project, packed, "Approved")
    (version,) = records(here, project)
    described = here.client("sagemaker").describe_model_package(ModelPackageName=version.arn)
    assert described["ModelApprovalStatus"] == "Approved"
    facts = described["CustomerMetadataProperties"]
    assert facts["version"] == open_artifact(artifact).manifest.version
    place = described["ModelMetrics"]["ModelQuality"]["Statistics"]
    assert place["ContentType"] == "application/json"
    bucket, key = split_uri(place["S3Uri"])
    body = here.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    written = json.loads(body)["multiclass_classification_metrics"]
    for name in ("accuracy", "top5_accuracy", "loss"):
        assert float(facts[f"validation_{name}"]) == pytest.approx(measured[name], rel=1e-5)
        assert written[name]["value"] == measured[name]


@pytest.mark.parametrize(
    ("kind", "startup_s", "env", "given"),
    [
        ("realtime", 600, (), None),
        ("realtime", 900, (), "870"),  # before SageMaker gives the container up, it ends with a sentence of its own
        ("realtime", 480, (), None),  # the service's own 450 s end in time
        ("realtime", 300, (), "270"),
        ("realtime", 60, (), "48"),
        ("realtime", 900, ("CLASSIFIER_START_TIMEOUT_S=5",), "5"),
        ("serverless", 600, (), "150"),
    ],
)
def test_the_container_is_told_when_sagemaker_gives_its_start_up(
    here: Account, packed: Path, kind: str, startup_s: int, env: Sequence[str], given: str | None
) -> None:
    project = Project(f"start-{kind[:1]}-{startup_s}-{len(env)}", "start")
    name = hosted(here, project, packed, "Approved", startup_s, env, kind)
    (container,) = here.client("sagemaker").describe_model(ModelName=name)["Containers"]
    assert container.get("Environment", {}).get("CLASSIFIER_START_TIMEOUT_S") == given


def test_a_version_whose_archive_was_deleted_is_not_taken_for_one_that_is_here(here: Account, packed: Path) -> None:
    project, s3 = Project("deleted", "deleted"), here.client("s3")
    data.ensure_bucket(here.aws, project)
    s3.upload_file(str(packed), "deleted", "deleted/jobs/j/output/model.tar.gz")
    with registry.located(here.aws, project, "s3://deleted/deleted/jobs/j/output/model.tar.gz") as model:
        first, _ = registry.register(here.aws, project, model, IMAGE, "Approved")
        assert registry.register(here.aws, project, model, IMAGE, "Approved")[0] == first
    with registry.located(here.aws, project, str(packed)) as model:
        assert registry.register(here.aws, project, model, IMAGE, "Approved")[0] == first  # of the same content
        s3.delete_object(Bucket="deleted", Key="deleted/jobs/j/output/model.tar.gz")
        second, _ = registry.register(here.aws, project, model, IMAGE, "Approved")
    assert second != first
    described = here.client("sagemaker").describe_model_package(ModelPackageName=second)
    place = described["InferenceSpecification"]["Containers"][0]["ModelDataUrl"]
    assert place.startswith("s3://deleted/deleted/models/")
