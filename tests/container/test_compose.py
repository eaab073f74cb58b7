"""docker-compose.yml with both clients: Compose v2 (Debian's as a plugin where there is none) and docker-compose 1.29.

Prometheus is the pinned image where it can be pulled, else Debian's on the base image. Grafana is the pinned image, and
where that cannot be pulled only its files are looked at (test_monitoring.py).
"""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from container.build import ROOT
from container.engine import docker
from service.model.artifact import open_artifact
from tests.conftest import free_port
from tests.container.conftest import run
from tests.container.debian import unpack
from tests.container.test_monitoring import DASHBOARD, EXPRESSIONS

pytestmark = [pytest.mark.container, pytest.mark.timeout(600)]

CLIENTS = {"v2": ("docker", "compose"), "1.29": ("docker-compose",)}
BUILDKIT = {"DOCKER_BUILDKIT": "1", "COMPOSE_DOCKER_CLI_BUILD": "1"}
PROFILES = ("gpu", "training", "training-gpu", "monitoring")
Compose = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(params=CLIENTS)
def compose(request: pytest.FixtureRequest, engine: None, model: Path, base_image: str) -> Iterator[Compose]:
    """One client with a project of its own, taken down at the end."""
    words = CLIENTS[request.param]
    more: dict[str, str] = request.getfixturevalue("plugins") if request.param == "v2" else {}
    try:
        found = run(*words, "version", env={**os.environ, **more})
    except FileNotFoundError:
        pytest.skip(f"{' '.join(words)} is not installed")
    if found.returncode or (request.param == "1.29") != ("1.29" in found.stdout):
        pytest.skip(f"{' '.join(words)} is not Compose {request.param}: {(found.stdout or found.stderr).strip()[:100]}")
    project = f"contract{uuid.uuid4().hex[:8]}"
    port = str(free_port())
    env = {**os.environ, **more, "MODEL": str(model), "PORT": port, "BASE_IMAGE": base_image}

    def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(*words, "--project-name", project, *arguments, cwd=ROOT, env={**env, **variables})

    call.port, call.project = port, project  # type: ignore[attr-defined]
    yield call
    flags = [word for profile in PROFILES for word in ("--profile", profile)]
    call(*flags, "down", "--volumes", "--remove-orphans", "--timeout", "5")


def container_of(compose: Any, service: str = "serve") -> dict[str, Any]:
    (name,) = docker(
        "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={compose.project}",
        "--filter", f"label=com.docker.compose.service={service}",
    ).split()  # fmt: skip
    inspected: dict[str, Any] = json.loads(docker("inspect", name))[0]
    return inspected


def wait_until_healthy(compose: Any) -> None:
    for _ in range(600):
        if container_of(compose)["State"]["Health"]["Status"] == "healthy":
            return
        time.sleep(0.2)
    pytest.fail(compose("logs").stdout)


def classify(compose: Any, model: Path) -> str:
    """The likeliest class of the artifact's example."""
    artifact = open_artifact(model)
    request = urllib.request.Request(
        f"http://127.0.0.1:{compose.port}/invocations", artifact.read("example"),
        {"Content-Type": artifact.manifest.example.media_type},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["predictions"][0]["label"])


def test_build_makes_the_image_that_up_serves(compose: Any, image: Callable[[str], str]) -> None:
    """From the layers that `make image` left: what that tells besides makes the labels, no file."""
    name = image("serve-cpu")
    before = json.loads(docker("image", "inspect", name))[0]
    built = compose("build", "serve", **BUILDKIT)
    inspected = json.loads(docker("image", "inspect", name))[0]
    docker("tag", before["Id"], name)  # with its labels, which other tests look at
    assert built.returncode == 0, built.stderr
    assert inspected["Id"] != before["Id"]
    assert inspected["RootFS"]["Layers"] == before["RootFS"]["Layers"]
    labels, made = (each["Config"]["Labels"] for each in (inspected, before))
    labels = {name: value for name, value in labels.items() if not name.startswith("com.docker.compose.")}
    assert labels == {**made, **{f"org.opencontainers.image.{name}": "unknown" for name in ("revision", "source")}}


def test_up_serves_the_model_as_sagemaker_would_and_down_drains(
    compose: Any, image: Callable[[str], str], model: Path
) -> None:
    image("serve-cpu")
    up = compose("up", "--detach", "--no-build")
    assert up.returncode == 0, up.stderr
    host = container_of(compose)["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert "/tmp" in host["Tmpfs"]
    config = container_of(compose)["Config"]
    assert config["Cmd"] == ["serve"]
    assert config["StopTimeout"] == 30, "as SageMaker's between SIGTERM and SIGKILL"
    ours = json.loads(docker("image", "inspect", image("serve-cpu")))[0]["Config"]["Healthcheck"]
    assert config["Healthcheck"]["Test"] == ours["Test"]
    assert config["Healthcheck"]["Interval"] == 5e9 != ours["Interval"], "compose's own"
    (mount,) = container_of(compose)["Mounts"]
    assert (mount["Destination"], mount["RW"]) == ("/opt/ml/model", False)
    wait_until_healthy(compose)
    assert classify(compose, model) in open_artifact(model).manifest.classes
    assert container_of(compose)["State"]["Health"]["Status"] == "healthy"
    stop = compose("stop")
    assert stop.returncode == 0, stop.stderr
    assert container_of(compose)["State"]["ExitCode"] == 0
    assert compose("down").returncode == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{compose.port}/ping", timeout=5)


@pytest.fixture(scope="module")
def monitoring(base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The files of compose: with another image for Prometheus where the pinned one cannot be had."""
    files = ["--file", "docker-compose.yml"]
    pinned = re.search(r"image: (prom/prometheus\S+)", (ROOT / "docker-compose.yml").read_text())
    assert pinned is not None
    if run("docker", "pull", "--quiet", pinned[1]).returncode == 0:
        yield files
        return
    if not base_image:
        pytest.skip(f"{pinned[1]} cannot be pulled, and there is no local base image to run Debian's Prometheus on")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "context").mkdir()
    shutil.copy(unpack(folder, "prometheus") / "usr" / "bin" / "prometheus", folder / "context")
    (folder / "context" / "Dockerfile").write_text(
        f'FROM {base_image}\nCOPY prometheus /bin/\nWORKDIR /prometheus\nENTRYPOINT ["/bin/prometheus"]\n'
    )  # as the pinned image starts
    docker("build", "--tag", "contract-prometheus", str(folder / "context"))
    (folder / "override.yml").write_text(json.dumps({"services": {"prometheus": {"image": "contract-prometheus"}}}))
    yield [*files, "--file", str(folder / "override.yml")]
    docker("rmi", "contract-prometheus")


def test_prometheus_scrapes_the_service_and_every_panel_has_its_data(
    compose: Any, image: Callable[[str], str], model: Path, monitoring: list[str]
) -> None:
    """`--profile monitoring` as it is, without Grafana: its panels' questions are asked here."""
    image("serve-cpu")
    up = compose(*monitoring, "--profile", "monitoring", "up", "--detach", "--no-build", "serve", "prometheus")
    assert up.returncode == 0, up.stderr
    wait_until_healthy(compose)
    ends_s = time.monotonic() + 120
    while not asked('count_over_time(up{job="classifier"}[5m]) >= 4 and up{job="classifier"} == 1'):
        assert time.monotonic() < ends_s, compose(*monitoring, "logs", "prometheus").stdout
        classify(compose, model)
        time.sleep(1)
    metrics = set(answer_of("label/__name__/values"))
    for expression in EXPRESSIONS:
        names = set(re.findall(r"\b(?:classifier|process)_\w+", expression))
        assert names
        assert names <= metrics, f"{expression}: {names - metrics} is not scraped"
        # A panel of what should not be (refusals, deaths) is empty while all is well.
        assert asked(expression) or expression.endswith(" > 0"), f"no data: {expression}"


@pytest.fixture(scope="module")
def grafana(engine: None) -> None:
    """The pinned Grafana."""
    pinned = re.search(r"image: (grafana/grafana\S+)", (ROOT / "docker-compose.yml").read_text())
    assert pinned is not None
    if run("docker", "pull", "--quiet", pinned[1]).returncode != 0:
        pytest.skip(f"{pinned[1]} cannot be pulled, so that the dashboard is seen in no Grafana")


def test_grafana_has_the_provisioned_dashboard_and_asks_prometheus(
    grafana: None, compose: Any, image: Callable[[str], str], monitoring: list[str]
) -> None:
    """Asked as anyone on this machine may: without logging in."""
    image("serve-cpu")
    up = compose(
        *monitoring, "--profile", "monitoring", "up", "--detach", "--no-build", "serve", "prometheus", "grafana"
    )
    assert up.returncode == 0, up.stderr
    ends_s = time.monotonic() + 120
    while of_grafana("health") is None or not asked('up{job="classifier"} == 1'):
        assert time.monotonic() < ends_s, compose(*monitoring, "logs", "grafana", "prometheus").stdout
        time.sleep(1)
    found = of_grafana("dashboards/uid/classifier")
    assert found["meta"]["provisioned"]
    assert [each["title"] for each in found["dashboard"]["panels"]] == [each["title"] for each in DASHBOARD["panels"]]
    (source,) = [
        each for each in of_grafana("frontend/settings")["datasources"].values() if each["type"] == "prometheus"
    ]
    assert (source["uid"], source["isDefault"]) == ("prometheus", True)
    query = {"refId": "A", "datasource": {"uid": "prometheus"}, "expr": 'up{job="classifier"}', "instant": True}
    answer = of_grafana("ds/query", {"from": "now-5m", "to": "now", "queries": [query]})
    assert answer["results"]["A"]["frames"][0]["data"]["values"][1] == [1]


def of_grafana(path: str, asked: object = None) -> Any:
    """What Grafana's API says; None while it does not answer."""
    body = None if asked is None else json.dumps(asked).encode()
    request = urllib.request.Request(f"http://127.0.0.1:3000/api/{path}", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)
    except urllib.error.HTTPError as exc:
        pytest.fail(f"{path}: {exc.code} {exc.read().decode()}")
    except OSError:
        return None


def answer_of(path: str, **parameters: str) -> Any:
    url = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)["data"]
    except urllib.error.HTTPError as exc:
        pytest.fail(f"{parameters}: {exc.read().decode()}")


def asked(expression: str) -> list[Any]:
    """What Prometheus has for an expression now; nothing while it does not answer yet."""
    try:
        result: list[Any] = answer_of("query", query=expression)["result"]
    except OSError:
        return []
    return result


def test_every_profile_is_understood_and_what_is_not_set_is_the_readmes(compose: Any) -> None:
    flags = [word for profile in PROFILES for word in ("--profile", profile)]
    shown = compose(*flags, "config", MODEL="", PORT="")
    assert shown.returncode == 0, shown.stderr
    services = yaml.safe_load(shown.stdout)["services"]
    assert services.keys() == {"serve", "serve-gpu", "train", "train-gpu", "prometheus", "grafana"}
    for name, port in (("serve", 8080), ("serve-gpu", 8081)):
        (volume,), (published,) = services[name]["volumes"], services[name]["ports"]
        assert (ROOT / volume["source"], volume["target"]) == (ROOT / "artifacts" / "model", "/opt/ml/model")
        if not isinstance(published, str):  # Compose v2 takes it apart
            published = "{host_ip}:{published}:{target}".format(**published)
        assert published.removesuffix("/tcp") == f"127.0.0.1:{port}:8080"


@pytest.mark.parametrize("profile", ["gpu", "training-gpu"])
def test_the_profiles_for_gpus_ask_the_engine_for_one(
    profile: str, compose: Any, image: Callable[[str], str], sample_root: Path, tmp_path: Path
) -> None:
    """Made and not started, as no GPU is here."""
    service, target = {"gpu": ("serve-gpu", "serve"), "training-gpu": ("train-gpu", "train")}[profile]
    image(target)
    folders = {"DATA": str(sample_root), "OUTPUT": str(tmp_path)}
    made = compose("--profile", profile, "up", "--no-start", "--no-build", service, **folders)
    assert made.returncode == 0, made.stderr
    (asked,) = container_of(compose, service)["HostConfig"]["DeviceRequests"]
    assert (asked["Driver"], asked["Count"], asked["Capabilities"]) == ("nvidia", 1, [["gpu"]])


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
