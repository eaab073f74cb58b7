"""The OpenAPI document says what a real service does: its examples are posted, its commands run, its errors made."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import jsonschema_rs
import pytest

from service.errors import CONNECTION_ERRORS, HTTP_ERRORS
from service.metrics import STATES
from service.openapi import ATTRIBUTES, ERRORS, MESSAGES, PICTURE, document
from service.reference import reference
from service.runtime import MEANING, State
from service.settings import Settings

Json = dict[str, Any]

WITH, WITHOUT = document(Settings()), document(Settings(page=False))
ROOT = Path(__file__).parent.parent.parent
INVOCATIONS = WITH["paths"]["/invocations"]["post"]
EXAMPLES = [
    (media_type, name, example)
    for media_type, body in INVOCATIONS["requestBody"]["content"].items()
    for name, example in body.get("examples", {}).items()
]


def resolved(node: Any, root: Json) -> Any:
    """The document without references, which the validator would look for elsewhere."""
    if isinstance(node, dict) and "$ref" in node:
        target = root
        for step in node["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return resolved(target, root)
    if isinstance(node, dict):
        return {key: resolved(value, root) for key, value in node.items()}
    return [resolved(value, root) for value in node] if isinstance(node, list) else node


def assert_documented(answer: Any, operation: Json) -> None:
    """Status, headers, content type and body of an answer are as the operation states."""
    response = resolved(operation["responses"][str(answer.status)], WITH)
    media_type = answer.headers["content-type"].split(";")[0]
    assert media_type in response["content"]
    assert {name.lower() for name in response["headers"]} & {"x-request-id"} <= set(answer.headers)
    if answer.status in (429, 503) and "Retry-After" in response["headers"]:
        assert "retry-after" in answer.headers
    if media_type == "application/json":
        jsonschema_rs.validate(response["content"][media_type]["schema"], answer.json)


def post(server: Any, body: bytes, media_type: str, path: str = "/invocations", **headers: str) -> Any:
    answer = server.ask("POST", path, body, {"Content-Type": media_type, **headers})
    assert_documented(answer, INVOCATIONS)
    return answer


@pytest.mark.parametrize(("media_type", "name", "example"), EXAMPLES, ids=[f"{e[0]} {e[1]}" for e in EXAMPLES])
def test_every_example_of_a_body_is_answered_as_documented(
    server: Any, media_type: str, name: str, example: Json
) -> None:
    if "externalValue" in example:
        body = server.ask("GET", f"/{example['externalValue']}").body
    else:
        body = json.dumps(example["value"]).encode()
        schema = INVOCATIONS["requestBody"]["content"][media_type]["schema"]
        jsonschema_rs.validate(schema, example["value"])
    answer = post(server, body, media_type)
    assert answer.status == 200
    assert ("results" in answer.json) == name.startswith("several")
    if "of which one is none" in name:
        assert [*map(list, answer.json["results"])] == [["predictions"], ["error"]]


@pytest.mark.parametrize("sample", INVOCATIONS["x-codeSamples"], ids=lambda sample: sample["label"])
def test_every_command_runs_as_it_stands(server: Any, sample: Json, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    source = sample["source"].replace(":8080/", f":{server.port}/")
    assert source != sample["source"]
    lines = [f"{line} --fail --silent" for line in source.splitlines()]
    result = subprocess.run(
        ["sh", "-ec", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    if sample["label"] == "a table":
        assert result.stdout.startswith("image,rank,label,")
    else:
        schema = resolved(INVOCATIONS["responses"]["200"]["content"]["application/json"]["schema"], WITH)
        jsonschema_rs.validate(schema, json.loads(result.stdout))


@pytest.mark.parametrize("media_type", [*INVOCATIONS["responses"]["200"]["content"]])
def test_every_type_of_answer_is_given_on_request_and_its_example_has_that_form(server: Any, media_type: str) -> None:
    body = json.dumps({"images": [PICTURE, ""]}).encode()
    answer = post(server, body, "application/json", "/invocations?top_k=2", Accept=media_type)
    assert answer.status == 200
    assert answer.headers["content-type"].split(";")[0] == media_type
    example = next(reversed(INVOCATIONS["responses"]["200"]["content"][media_type]["examples"].values()))["value"]
    if media_type == "text/csv":
        assert answer.body.decode().splitlines()[0] == example.splitlines()[0]
    elif media_type == "application/jsonlines":
        assert [[*json.loads(line)] for line in answer.body.splitlines()] == [
            [*json.loads(line)] for line in example.splitlines()
        ]
    else:
        assert [[*result] for result in answer.json["results"]] == [[*result] for result in example["results"]]


def test_every_example_of_an_answer_is_of_its_schema() -> None:
    checked = 0
    for methods in resolved(WITH["paths"], WITH).values():
        for operation in methods.values():
            for response in operation["responses"].values():
                for content in response["content"].values():
                    for example in content.get("examples", {}).values():
                        jsonschema_rs.validate(content["schema"], example["value"])
                        checked += 1
    assert checked > 20


def test_every_error_is_documented_with_its_status_and_a_sentence() -> None:
    assert {status for status, _ in HTTP_ERRORS.values()} <= set(ERRORS)
    stated = {
        (int(status), code)
        for status, response in INVOCATIONS["responses"].items()
        for content in response["content"].values()
        for code in content["examples"]
        if int(status) >= 400
    }
    assert set(HTTP_ERRORS.values()) <= stated
    assert {(status, code) for code, status in CONNECTION_ERRORS.items()} <= stated
    assert {code for _, code in stated} == set(MESSAGES)


def test_the_codes_of_the_readme_are_those_of_the_document() -> None:
    table = re.search(r"\| Status \| Codes \|\n\|---\|---\|\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())
    assert table is not None
    assert set(re.findall(r"`(\w+)`", table[1])) - {"not_found"} == set(MESSAGES)


def test_the_states_are_those_of_the_runtime() -> None:
    assert {*MEANING, "ready"} == set(get_args(State)) == set(STATES)


def long(text: str) -> str:
    """A sentence without what differs from case to case."""
    return re.sub(r"[\d,]+|\([^)]*\)|'[^']*'", "#", text)


@pytest.mark.parametrize(
    ("code", "method", "path", "body", "headers"),
    [
        ("malformed_request", "POST", "/invocations?top_k=all", b"", {}),
        ("method_not_allowed", "GET", "/invocations", b"", {}),
        ("not_acceptable", "POST", "/invocations", b"", {"Accept": "image/png"}),
        ("unsupported_media_type", "POST", "/invocations", b"hello", {"Content-Type": "text/plain"}),
        ("payload_too_large", "POST", "/invocations", b"", {"Content-Length": "31457280"}),
        ("unreadable_image", "POST", "/invocations", base64.b64decode(PICTURE)[:40], {"Content-Type": "image/gif"}),
    ],
)
def test_the_sentences_of_the_document_are_those_of_the_service(
    server: Any, code: str, method: str, path: str, body: bytes, headers: dict[str, str]
) -> None:
    answer = server.ask(method, path, body, headers)
    assert_documented(answer, INVOCATIONS)
    assert answer.json["error"]["code"] == code
    begins = len(long(MESSAGES[code])) if code != "unreadable_image" else len("The image is damaged or incomplete")
    assert long(answer.json["error"]["message"])[:begins] == long(MESSAGES[code])[:begins]


@pytest.mark.parametrize(("path", "method"), [(path, m) for path, of in WITH["paths"].items() for m in of])
def test_every_other_operation_is_answered_as_documented(server: Any, path: str, method: str) -> None:
    if path == "/invocations":
        return  # all of the above
    answer = server.ask(method.upper(), path)
    assert answer.status == 200
    assert_documented(answer, WITH["paths"][path][method])


def test_custom_attributes_choose_top_k_and_come_back(server: Any) -> None:
    (parameter,) = [p for p in INVOCATIONS["parameters"] if p["name"] == ATTRIBUTES]
    answer = post(server, base64.b64decode(PICTURE), "image/gif", **{ATTRIBUTES: parameter["example"]})
    assert len(answer.json["predictions"]) == 3
    assert answer.headers[ATTRIBUTES.lower()] == parameter["example"]


def test_the_service_gives_out_this_document_and_what_it_names_is_there(server: Any) -> None:
    given = server.ask("GET", "/openapi.json").json
    assert given == document(Settings(port=server.port))
    operations = [operation["operationId"] for methods in given["paths"].values() for operation in methods.values()]
    assert len(operations) == len(set(operations))
    resolved(given, given)


def test_without_the_page_nothing_refers_to_its_example() -> None:
    assert "/example" in json.dumps(WITH)
    assert "externalValue" not in json.dumps(WITHOUT)
    assert "/example" not in json.dumps(WITHOUT)


def test_the_reference_shows_every_operation_status_code_and_schema(server: Any) -> None:
    html = server.ask("GET", "/docs").body.decode()
    for path in WITH["paths"]:
        assert f"</span> {path}</h2>" in html
    for code in MESSAGES:
        assert f"<code>{code}</code>" in html
    for listed in re.findall(r"Codes: (.*?)</span>", html):
        assert set(re.findall(r"<code>(.*?)</code>", listed)) <= set(MESSAGES)
    for name in WITH["components"]["schemas"]:
        assert f'id="schema-{name}"' in html
    linked = set(re.findall(r'href="#([\w-]+)"', html))
    assert linked
    assert linked <= set(re.findall(r'id="([\w-]+)"', html))


def test_the_reference_escapes_what_the_document_says() -> None:
    hostile = json.loads(json.dumps(WITH).replace("Classify", "<script>alert(1)</script>"))
    assert "<script>" not in reference(hostile)
