"""What tests of the images share: an engine, or a skip that says why; the images, built once; what was measured."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from container.build import build
from container.engine import ContainerError, docker, require_engine
from container.running import LABEL
from tests.container.debian import unpack

LOCAL_BASE = "local/base:bookworm"
"""What ../shared/tools/docker-up makes, where no image can be pulled."""
MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say at the end of the run, in its log too, what was measured."""
    return request.config.stash.setdefault(MEASURED, []).append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Sizes, layers, durations and verdicts, which pytest would show of failed tests alone."""
    for number, said in enumerate(config.stash.get(MEASURED, [])):
        if number == 0:
            terminalreporter.write_sep("=", "measured")
        terminalreporter.write_line(said.rstrip("\n"))


@pytest.fixture(scope="session")
def engine() -> None:
    """A docker engine."""
    try:
        require_engine()
    except ContainerError as exc:
        pytest.skip(f"no docker engine: {exc}")


@pytest.fixture(scope="session")
def base_image(engine: None) -> str:
    """BASE_IMAGE, else the local base where it is there, else the pinned ones ("")."""
    given = os.environ.get("BASE_IMAGE")
    if given:
        return given
    return LOCAL_BASE if docker("image", "ls", "--quiet", LOCAL_BASE).strip() else ""


@pytest.fixture(scope="session")
def image(base_image: str) -> Callable[[str], str]:
    """The image of a target, built from this tree; the second time it is there already."""
    built: dict[str, str] = {}

    def image_of(target: str) -> str:
        if target not in built:
            built[target] = build(target, f"resnet34-sagemaker:{target}", base_image)
        return built[target]

    return image_of


@pytest.fixture(scope="session")
def model(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real artifact that the engine can mount: below a folder that is open to all."""
    folder = tmp_path_factory.mktemp("mounted") / "model"
    shutil.copytree(artifact, folder)
    for parent in (folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def plugins(engine: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables with which docker has compose and buildx: none, or those of a configuration with Debian's plugins.

    There `docker build` is buildx's, as it is from Docker 23 on (docs.docker.com/reference/cli/docker/buildx/install).
    """
    if all(run("docker", plugin, "version").returncode == 0 for plugin in ("compose", "buildx")):
        return {}
    folder = tmp_path_factory.mktemp("plugins")
    found = unpack(folder, "docker-compose", "docker-buildx", suite="trixie") / "usr" / "libexec" / "docker"
    shutil.copytree(found, folder / "config")
    (folder / "config" / "config.json").write_text(json.dumps({"aliases": {"builder": "buildx"}}))
    host = (
        os.environ.get("DOCKER_HOST") or docker("context", "inspect", "--format", "{{.Endpoints.docker.Host}}").strip()
    )
    return {"DOCKER_CONFIG": str(folder / "config"), "DOCKER_HOST": host}


@pytest.fixture(scope="session")
def layers() -> Callable[[str], list[tuple[str, int]]]:
    """What made each layer of an image, the newest first, and its bytes."""

    def of(image: str) -> list[tuple[str, int]]:
        lines = docker("history", "--no-trunc", "--human=false", "--format", "{{json .}}", image).splitlines()
        return [(entry["CreatedBy"], int(entry["Size"])) for entry in map(json.loads, lines)]

    return of


@pytest.fixture(scope="session")
def inside(engine: None) -> Callable[..., str]:
    """The output of a shell script inside an image, without network."""

    def run(image: str, script: str) -> str:
        return docker("run", "--rm", "--label", LABEL, "--network", "none", "--entrypoint", "sh", image, "-c", script)

    return run


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command whose output is looked at."""
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, **options)
