"""What a build is told besides the target: labels that name the code and no one's password, Docker's media types."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from container import build


@pytest.mark.parametrize(
    ("remote", "label"),
    [
        ("https://github.com/me/classifier.git", "https://github.com/me/classifier.git"),
        ("https://me:ghp_secret@github.com/me/classifier", "https://github.com/me/classifier"),
        ("ssh://git@git.example.com:2222/me/classifier", "ssh://git.example.com:2222/me/classifier"),
        ("git@github.com:me/classifier.git", "github.com:me/classifier.git"),
        ("/home/me/classifier", "unknown"),
        ("file:///home/me/classifier", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_label_of_the_source_names_no_user_password_or_folder(remote: str, label: str) -> None:
    assert build.source(remote) == label


def test_version_and_revision_are_the_projects() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", build.version())
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", build.revision())


@pytest.mark.parametrize(
    ("buildx", "store", "flags"),
    [
        (False, "", ["--tag", "x"]),
        (True, "[[Backing Filesystem extfs]]", ["--provenance=false", "--sbom=false", "--tag", "x"]),
        (
            True,
            "[[driver-type io.containerd.snapshotter.v1]]",
            ["--provenance=false", "--sbom=false", "--output", "type=image,name=x,oci-mediatypes=false"],
        ),
    ],
)
def test_attestations_and_oci_types_are_off_as_far_as_docker_knows_them(
    buildx: bool, store: str, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other versions of docker say, which cannot all be had here."""

    def docker(*arguments: str) -> str:
        if arguments == ("build", "--help"):
            return (
                "Usage:  docker buildx build\n  --provenance string" if buildx else "Usage:  docker build\n  --platform"
            )
        return store

    monkeypatch.setattr(build, "docker", docker)
    assert build.media_types("x") == flags


def test_the_dockerfile_pulls_no_frontend_and_keeps_its_default_last() -> None:
    text = (Path(build.__file__).with_name("Dockerfile")).read_text()
    assert "# syntax" not in text.lower()
    stages = re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE)
    assert stages[-1] == "serve"
    assert set(build.TARGETS) <= set(stages)


def test_make_builds_on_the_base_image_of_the_environment_and_anew_when_asked() -> None:
    env = {**os.environ, "BASE_IMAGE": "from/environment"}
    command = ["make", "--dry-run", "image", "TARGET=serve-cpu"]
    told = subprocess.run(command, cwd=build.ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert '--target "serve-cpu"' in told
    assert '--base-image "from/environment"' in told
    assert "--fresh" not in told
    given = subprocess.run([*command, "BASE_IMAGE=given", "FRESH=1"], cwd=build.ROOT, env=env, capture_output=True,
                           text=True, check=True).stdout  # fmt: skip
    assert '--base-image "given" --fresh' in given


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["push"], 'container.push --target "serve" --image "resnet34-sagemaker:serve" \n'),
        (
            ["push", "TARGET=train", "PUSH_ARGS=--repository pets --region eu-west-1"],
            'container.push --target "train" --image "resnet34-sagemaker:train" --repository pets --region eu-west-1\n',
        ),
        (["push", "IMAGE=mine"], 'container.push --target "serve" --image "mine" \n'),
        (["serve", "MODEL="], 'service --model "artifacts/model" --host "127.0.0.1" --port "8080"\n'),
        (["contract"], 'container.contract "resnet34-sagemaker:serve" --model "artifacts/model" \n'),
        (
            ["contract", "IMAGE=theirs:1", "MODEL=pets", "CONTRACT_ARGS=--docker-options='--gpus all'"],
            'container.contract "theirs:1" --model "pets" --docker-options=\'--gpus all\'\n',
        ),
    ],
)
def test_make_passes_on_what_it_is_given(words: list[str], said: str) -> None:
    told = subprocess.run(
        ["make", "--dry-run", *words], cwd=build.ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert f"-m {said}" in told
    assert ("--group sagemaker" in told) is (words[0] == "push")


def test_the_bases_are_pinned_and_hold_no_compiler() -> None:
    """By version and date (their -devel and -runtime images are larger, and torch brings its own CUDA)."""
    text = (Path(build.__file__).with_name("Dockerfile")).read_text()
    (cuda,) = re.findall(r"^ARG CUDA_BASE_IMAGE=(\S+)$", text, re.MULTILINE)
    (cpu,) = re.findall(r"^ARG CPU_BASE_IMAGE=(\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:13\.0\.\d+-base-ubuntu\d\d\.04", cuda)
    assert re.fullmatch(r"ubuntu:[a-z]+-20\d{6}", cpu)


@pytest.mark.parametrize(("base_image", "flags"), [("", ["--no-cache", "--pull"]), ("local/base", ["--no-cache"])])
def test_a_fresh_build_takes_no_layer_from_before(
    base_image: str, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base of one's own may be nowhere to be pulled from."""
    asked: list[tuple[str, ...]] = []

    def docker(*arguments: str, **_: object) -> str:
        asked.append(arguments)
        return ""

    monkeypatch.setattr(build, "docker", docker)
    monkeypatch.setattr(build, "require_engine", lambda: None)
    build.build("serve-cpu", "x", base_image, fresh=True)
    assert [each for each in asked[-1] if each in ("--no-cache", "--pull")] == flags
