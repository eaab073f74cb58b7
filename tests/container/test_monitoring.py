"""What Prometheus and Grafana are given: files they can read, and metrics that the service has."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from container.build import ROOT
from tests.conftest import free_port, workers_of
from tests.container.debian import unpack

FOLDER = ROOT / "container" / "monitoring"
DASHBOARD = json.loads((FOLDER / "classifier.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_is_provisioned_from_where_compose_puts_it() -> None:
    """Grafana reads its provisioning folder (grafana.com/docs, administration/provisioning): the files say the rest."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    grafana, prometheus = services["grafana"], services["prometheus"]
    at = {target: ROOT / source for source, target, mode in (each.split(":") for each in grafana["volumes"])}
    assert {each.rpartition(":")[2] for each in grafana["volumes"]} == {"ro"}
    provisioning = Path("/etc/grafana/provisioning")
    ((where, file),) = [(w, f) for w, f in at.items() if Path(w).parent == provisioning / "dashboards"]
    assert Path(where).suffix == ".yml"
    (provider,) = yaml.safe_load(file.read_text())["providers"]
    assert provider["type"] == "file"
    (dashboard,) = [file for where, file in at.items() if str(Path(where).parent) == provider["options"]["path"]]
    assert json.loads(dashboard.read_text()) == DASHBOARD
    assert at[grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]] == dashboard
    ((where, file),) = [(w, f) for w, f in at.items() if Path(w).parent == provisioning / "datasources"]
    assert Path(where).suffix == ".yml"
    (source,) = yaml.safe_load(file.read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    asked = [each["datasource"] for panel in DASHBOARD["panels"] for each in (panel, *panel["targets"])]
    assert asked
    assert all(each == {"type": source["type"], "uid": source["uid"]} for each in asked)
    assert f"--config.file={prometheus['volumes'][0].split(':')[1]}" in prometheus["command"]
    assert ROOT / prometheus["volumes"][0].split(":")[0] == FOLDER / "prometheus.yml"


def test_every_panel_has_its_place_and_says_what_to_make_of_it() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    taken = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    assert all(panel["description"] for panel in DASHBOARD["panels"])
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_every_metric_of_the_dashboard_is_one_of_the_service() -> None:
    source = ROOT / "service" / "exposition.py"
    if not source.is_file():
        pytest.skip("this tree has no service/exposition.py")
    named = {re.sub(r"_(total|bucket|sum|count|info)$", "", name)
             for each in EXPRESSIONS for name in re.findall(r"\b(?:classifier|process)_\w+", each)}  # fmt: skip
    there = set(re.findall(r'"((?:classifier|process)_\w+)"', source.read_text()))
    assert named
    assert named <= there


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `prometheus` and `promtool`."""
    if installed := shutil.which("prometheus"):
        return Path(installed).parent
    return unpack(tmp_path_factory.mktemp("prometheus"), "prometheus") / "usr" / "bin"


@pytest.mark.container  # for the download; the images are not asked
def test_promtool_accepts_configuration_and_expressions(prometheus: Path, tmp_path: Path) -> None:
    rules = {
        "groups": [
            {"name": "panels", "rules": [{"record": f"panel:{i}", "expr": each} for i, each in enumerate(EXPRESSIONS)]}
        ]
    }
    (tmp_path / "rules.yml").write_text(json.dumps(rules))  # YAML holds JSON
    for command in (["config", str(FOLDER / "prometheus.yml")], ["rules", str(tmp_path / "rules.yml")]):
        result = subprocess.run(
            [prometheus / "promtool", "check", *command], capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.container
def test_every_panel_shows_what_a_real_service_did(
    prometheus: Path, artifact: Path, start_server: Any, tmp_path: Path
) -> None:
    """Prometheus itself scrapes a service that answers, refuses, and loses a worker; then each panel has a figure."""
    image = io.BytesIO()
    Image.linear_gradient("L").save(image, "jpeg")
    with start_server(artifact, CLASSIFIER_WORKERS="2") as server, _scraping(prometheus, server.port, tmp_path) as port:
        _until(lambda: _query(port, "classifier_workers_ready"), "the service has been scraped")
        os.kill(workers_of(server.process.pid)[0], signal.SIGKILL)
        empty = list(EXPRESSIONS)
        until_s = time.monotonic() + 120
        while empty and time.monotonic() < until_s:
            statuses = [server.ask("POST", "/invocations", body).status for body in (image.getvalue(), b"no image")]
            assert set(statuses) <= {200, 400, 503}  # 503: of the worker's successor, until it accepts
            time.sleep(1)
            empty = [each for each in empty if not _figures(_query(port, each))]
        assert not empty
        (model,) = _query(port, "classifier_model_info")
    assert model["metric"]["engine"].startswith("openvino")


@contextmanager
def _scraping(prometheus: Path, service_port: int, folder: Path) -> Iterator[int]:
    """Our configuration with the service's address here; yields Prometheus's own port."""
    text = (FOLDER / "prometheus.yml").read_text()
    assert "classifier:8080" in text
    (folder / "prometheus.yml").write_text(text.replace("classifier:8080", f"127.0.0.1:{service_port}"))
    port = free_port()
    command = [
        prometheus / "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT, cwd=folder
        )
    try:
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _query(port: int, expression: str) -> list[Any]:
    """Series of an instant query (https://prometheus.io/docs/prometheus/latest/querying/api/), [] while it starts."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            found: list[Any] = json.loads(response.read())["data"]["result"]
    except urllib.error.URLError:
        return []
    return found


def _figures(series: list[Any]) -> list[float]:
    """The values of all series, NaN left out."""
    return [value for each in series if not math.isnan(value := float(each["value"][1]))]


def _until(condition: Callable[[], object], what: str, limit_s: float = 60) -> None:
    until_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until_s, f"not within {limit_s:g} s: {what}"
        time.sleep(0.5)
