"""The page at /, its headers and its example, over HTTP against a real service. (test_page_browser.py looks at it.)"""

import base64
import hashlib
import re
import time
from pathlib import Path
from typing import Any

import pytest

from service.model.artifact import open_artifact
from service.page import STATIC
from tests.service.artifacts import changed


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_is_one_response_whose_policy_allows_its_own_style_and_script_and_nothing_else(
    server: Any, path: str
) -> None:
    answer = server.ask("GET", path)
    html = answer.body.decode()
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["x-content-type-options"] == "nosniff"
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert (
            policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        )
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert not re.search(r"<[^>]+\s(on\w+|style|src)=", html)
    assert not re.search(r"href=\"(https?:)?//", html)
    assert server.ask("HEAD", path).status == 200


def test_no_script_makes_markup_of_strings() -> None:
    for script in STATIC.glob("*.js"):
        markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function"
        assert not re.search(markup, script.read_text()), script


def test_without_the_page_its_addresses_are_404_and_the_reference_stays(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, CLASSIFIER_PAGE="false") as server:
        for path in ("/", "/model", "/example"):
            answer = server.ask("GET", path)
            assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")
        assert server.ask("GET", "/docs").status == 200
        assert "/example" not in server.ask("GET", "/docs").body.decode()


def test_the_example_is_the_artifacts_with_its_type_and_class(server: Any, artifact: Path) -> None:
    answer = server.ask("GET", "/example")
    example = open_artifact(artifact)
    assert answer.body == example.read("example")
    assert answer.headers["content-type"] == example.manifest.example.media_type
    assert answer.headers["x-example-label"] == example.manifest.example.label.replace(" ", "%20")


def test_the_model_is_named_with_a_caution_where_no_picture_taught_it(server: Any, artifact: Path) -> None:
    """In the log of each start too. A model of pictures has none."""
    manifest = open_artifact(artifact).manifest
    answer = server.ask("GET", "/model")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    facts = answer.json
    caution = facts.pop("caution")
    assert facts == {"name": "tiny", "version": manifest.version, "classes": 100}
    assert "a generated sample (drawn shapes)" in caution
    assert f"WARNING service.runtime {caution}" in server.log.read_text()
    assert manifest.model_copy(update={"dataset": {"name": "pictures"}}).caution is None


def test_an_example_that_is_gone_is_a_404_and_one_that_says_it_could_run_script_does_not(
    artifact: Path, tmp_path: Path, start_server: Any
) -> None:
    label = open_artifact(artifact).manifest.example.label
    model = changed(artifact, tmp_path / "model", example={"label": label, "media_type": "image/svg+xml"})
    with start_server(model) as server:
        answer = server.ask("GET", "/example")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert "sandbox" in answer.headers["content-security-policy"]
        open_artifact(model).path("example").unlink()
        answer = server.ask("GET", "/example")
        assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")
        assert "example image is gone" in answer.json["error"]["message"]


def test_before_the_model_is_loaded_there_is_a_page_and_no_example_yet(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, ready=False) as server:
        while True:
            try:
                answer = server.ask("GET", "/example")
            except OSError:
                assert server.process.poll() is None, server.log.read_text()
                continue
            break
        if answer.status != 200:  # else it was quicker than we
            assert (answer.status, answer.json["error"]["code"]) == (503, "not_ready")
            assert answer.headers["retry-after"]
        while (page := server.ask("GET", "/")).status == 503:  # no worker accepts yet
            assert page.json["error"]["code"] == "not_ready"
            time.sleep(0.05)
        assert page.status == 200


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_background_as_wcag_asks(dark: bool) -> None:
    """Contrast of at least 4.5 to 1 (WCAG 2.2, 1.4.3, level AA)."""
    light, _, darker = (STATIC / "page.css").read_text().partition("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", darker if dark else light))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [(text, back) for text in ("text", "muted", "accent", "bad") for back in ("back", "card")]
    pairs += [("on-accent", "accent"), ("text", "track"), ("muted", "track"), ("text", "bad-back"), ("bad", "bad-back")]
    for text, back in pairs:
        low, high = sorted((luminance(colours[text]), luminance(colours[back])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, back)
