"""Preflight in the rehearsal's account: both images, quotas for what is wanted, permissions of the project's own."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rehearsal.start import IMAGE, Rehearsal
from training.launch import images, preflight
from training.launch.names import Project
from training.launch.preflight import Check, Plan
from training.launch.roles import CALLER_ACTIONS, caller_actions
from training.launch.session import Aws

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


def test_permissions_are_asked_for_things_of_the_project(aws: Aws) -> None:
    assert [result for result, *_ in checks(preflight._permissions(aws, PROJECT))] == ["PASS"]
    asked = caller_actions(PROJECT, "aws", "eu-central-1", "123456789012")
    assert len(set(CALLER_ACTIONS)) == len(CALLER_ACTIONS) == sum(map(len, asked.values()))
    for resource, actions in asked.items():
        assert resource == "*" or re.fullmatch(r"arn:aws:[a-z0-9-]+:[a-z0-9-]*:(\d{12})?:.+", resource), resource
        assert resource == "*" or {action.partition(":")[0] for action in actions} == {resource.split(":")[2]}
    assert {"sagemaker:CreateEndpoint", "sagemaker:InvokeEndpoint"} <= set(
        asked["arn:aws:sagemaker:eu-central-1:123456789012:endpoint/resnet34"]
    )
