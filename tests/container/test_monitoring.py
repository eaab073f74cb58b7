"""What Prometheus and Grafana are given: files they can read, and metrics that the service has."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from container.build import ROOT
from tests.container.debian import unpack

FOLDER = ROOT / "container" / "monitoring"
DASHBOARD = json.loads((FOLDER / "classifier.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_is_provisioned_from_where_compose_puts_it() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    assert "/etc/grafana/dashboards/classifier.json" in compose
    assert "path: /etc/grafana/dashboards" in (FOLDER / "dashboards.yml").read_text()
    (uid,) = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]}
    assert f"uid: {uid}" in (FOLDER / "datasource.yml").read_text()


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


@pytest.mark.container  # for the download; the images are not asked
def test_promtool_accepts_configuration_and_expressions(tmp_path: Path) -> None:
    promtool = shutil.which("promtool") or unpack("prometheus", tmp_path) / "usr" / "bin" / "promtool"
    rules = {
        "groups": [
            {"name": "panels", "rules": [{"record": f"panel:{i}", "expr": each} for i, each in enumerate(EXPRESSIONS)]}
        ]
    }
    (tmp_path / "rules.yml").write_text(json.dumps(rules))  # YAML holds JSON
    for command in (["config", str(FOLDER / "prometheus.yml")], ["rules", str(tmp_path / "rules.yml")]):
        result = subprocess.run([promtool, "check", *command], capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
