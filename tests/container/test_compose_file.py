"""docker-compose.yml as it is written; both clients read it in test_compose.py."""

import re
from typing import Any

import yaml

from container.build import ROOT, TARGETS, version

TEXT = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, Any] = yaml.safe_load(TEXT)["services"]


def test_what_compose_builds_has_the_labels_of_make_image() -> None:
    dockerfile = (ROOT / "container" / "Dockerfile").read_text()
    builds = {name: service["build"] for name, service in SERVICES.items() if "build" in service}
    assert {build["target"] for build in builds.values()} == set(TARGETS)
    for name, build in builds.items():
        assert SERVICES[name]["image"] == f"resnet34-sagemaker:{build['target']}"
        assert build["args"].keys() == {"BASE_IMAGE", *re.findall(r'^ARG (\w+)=""$', dockerfile, re.MULTILINE)}
        assert build["args"]["VERSION"] == version()
        assert all(build["args"][label] for label in ("SOURCE", "REVISION"))


def test_what_serves_runs_as_on_an_endpoint() -> None:
    for name in ("serve", "serve-gpu"):
        service = SERVICES[name]
        assert (service["command"], service["read_only"], service["tmpfs"]) == ("serve", True, "/tmp")
        assert service["stop_grace_period"] == "30s"
        assert service["healthcheck"]["test"][-1] == "/opt/program/container/healthcheck.py"
        assert [each["read_only"] for each in service["volumes"]] == [True]
        assert service["restart"] == "no"


def test_no_two_services_publish_the_same_port() -> None:
    """A profile is started beside what has none: `--profile gpu up` starts serve as well."""
    published = [
        re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", port) for each in SERVICES.values() for port in each.get("ports", [])
    ]
    hosts = [port.rpartition(":")[0] for port in published]
    assert sorted(hosts) == sorted({"127.0.0.1:8080", "127.0.0.1:8081", "127.0.0.1:9090", "127.0.0.1:3000"})


def test_what_may_be_set_is_named_at_the_top() -> None:
    named = re.search(r"# (MODEL, .*) are yours to set; (BASE_IMAGE) replaces", TEXT)
    assert named
    variables = set(re.findall(r"\$\{(\w+)", TEXT)) - {"SOURCE", "REVISION"}  # explained where they are
    assert {*named[1].split(", "), named[2]} == variables
