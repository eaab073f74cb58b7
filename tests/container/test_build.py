"""What a build is told besides the target: labels that name the code and no one's password, Docker's media types."""

import re
from pathlib import Path

import pytest

from container import build
from container.engine import ContainerError


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
        if arguments[0] == "buildx" and not buildx:
            raise ContainerError("docker buildx failed: 'buildx' is not a docker command.")
        return store

    monkeypatch.setattr(build, "docker", docker)
    assert build.media_types("x") == flags


def test_the_dockerfile_pulls_no_frontend_and_keeps_its_default_last() -> None:
    text = (Path(build.__file__).with_name("Dockerfile")).read_text()
    assert "# syntax" not in text.lower()
    stages = re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE)
    assert stages[-1] == "serve"
    assert set(build.TARGETS) <= set(stages)
