"""docker-compose.yml with each client that is there: Compose v2 and docker-compose 1.29."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from container.build import ROOT
from container.engine import docker
from service.model.artifact import open_artifact
from tests.conftest import free_port
from tests.container.conftest import run

pytestmark = [pytest.mark.container, pytest.mark.timeout(600)]

CLIENTS = {"v2": ("docker", "compose"), "1.29": ("docker-compose",)}
PROFILES = ("gpu", "training", "training-gpu", "monitoring")
Compose = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(params=CLIENTS)
def compose(request: pytest.FixtureRequest, engine: None, model: Path, base_image: str) -> Iterator[Compose]:
    """One client with a project of its own, taken down at the end."""
    words = CLIENTS[request.param]
    try:
        found = run(*words, "version")
    except FileNotFoundError:
        pytest.skip(f"{' '.join(words)} is not installed")
    if found.returncode or (request.param == "1.29") != ("1.29" in found.stdout):
        pytest.skip(f"{' '.join(words)} is not Compose {request.param}: {(found.stdout or found.stderr).strip()[:100]}")
    project = f"contract{uuid.uuid4().hex[:8]}"
    port = str(free_port())
    env = {**os.environ, "MODEL": str(model), "PORT": port, "BASE_IMAGE": base_image}

    def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(*words, "--project-name", project, *arguments, cwd=ROOT, env={**env, **variables})

    call.port, call.project = port, project  # type: ignore[attr-defined]
    yield call
    call("down", "--volumes", "--timeout", "5")


def container_of(compose: Any) -> dict[str, Any]:
    project = f"label=com.docker.compose.project={compose.project}"
    (name,) = docker("ps", "--all", "--quiet", "--filter", project).split()
    inspected: dict[str, Any] = json.loads(docker("inspect", name))[0]
    return inspected


def test_up_serves_the_model_as_sagemaker_would_and_down_drains(
    compose: Any, image: Callable[[str], str], model: Path
) -> None:
    image("serve-cpu")
    up = compose("up", "--detach", "--no-build")
    assert up.returncode == 0, up.stderr
    host = container_of(compose)["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert "/tmp" in host["Tmpfs"]
    (mount,) = container_of(compose)["Mounts"]
    assert (mount["Destination"], mount["RW"]) == ("/opt/ml/model", False)
    for _ in range(300):
        if container_of(compose)["State"]["Health"]["Status"] == "healthy":
            break
        time.sleep(0.2)
    artifact = open_artifact(model)
    request = urllib.request.Request(
        f"http://127.0.0.1:{compose.port}/invocations", artifact.read("example"),
        {"Content-Type": artifact.manifest.example.media_type},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["predictions"][0]["label"] in artifact.manifest.classes
    assert container_of(compose)["State"]["Health"]["Status"] == "healthy"
    stop = compose("stop")
    assert stop.returncode == 0, stop.stderr
    assert container_of(compose)["State"]["ExitCode"] == 0
    assert compose("down").returncode == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{compose.port}/ping", timeout=5)


def test_every_profile_is_understood(compose: Any) -> None:
    flags = [word for profile in PROFILES for word in ("--profile", profile)]
    shown = compose(*flags, "config")
    assert shown.returncode == 0, shown.stderr
    for service in ("serve", "serve-gpu", "train", "train-gpu", "prometheus", "grafana"):
        assert f"  {service}:" in shown.stdout
    assert "nvidia" in shown.stdout


def test_a_missing_model_folder_is_said_and_not_made(compose: Any, image: Callable[[str], str], tmp_path: Path) -> None:
    image("serve-cpu")
    missing = tmp_path / "none"
    up = compose("up", "--detach", "--no-build", MODEL=str(missing))
    assert up.returncode != 0
    assert str(missing) in up.stderr
    assert not missing.exists()


def test_the_training_profile_makes_a_model(
    compose: Any, image: Callable[[str], str], sample_root: Path, tmp_path: Path
) -> None:
    image("train")
    flags = ["--epochs", "1", "--batch-size", "50", "--weights", "none", "--freeze", "none", "--quantize", "off"]
    folders = {"DATA": str(sample_root), "OUTPUT": str(tmp_path / "out")}
    result = compose("--profile", "training", "run", "--rm", "-T", "train", "train", *flags, **folders)
    assert result.returncode == 0, result.stderr[-2000:]
    assert open_artifact(tmp_path / "out" / "model").manifest.version
