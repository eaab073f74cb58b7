"""What is known of a request, in headers: Server-Timing and X-Request-Id, of every answer, whatever its outcome."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.metrics import Metrics, rejected_cell, request_cell
from service.model.artifact import open_artifact
from service.telemetry import Telemetry, current
from service.tracing import Tracing

METRIC = re.compile(r"([a-z]+);dur=(\d+\.\d)")
"""https://www.w3.org/TR/server-timing/#the-server-timing-header-field: a token, then its duration in ms."""


def timings(header: str) -> dict[str, float]:
    found = [METRIC.fullmatch(part) for part in header.split(", ")]
    assert all(found), header
    return {match[1]: float(match[2]) for match in found if match}


def test_an_answer_tells_the_time_of_each_stage(artifact: Path, server: Any) -> None:
    answer = server.ask("POST", "/invocations", open_artifact(artifact).read("example"))
    stages = timings(answer.headers["server-timing"])
    assert list(stages) == ["decode", "queue", "infer", "total"]
    assert stages["infer"] > 0
    assert sum(stages.values()) - stages["total"] <= stages["total"] + 0.2  # each is rounded


def test_an_error_tells_how_far_it_came(server: Any) -> None:
    answer = server.ask("POST", "/invocations", b"no image")
    assert answer.status == 400
    assert list(timings(answer.headers["server-timing"])) == ["decode", "total"]
    assert answer.headers["x-request-id"] == answer.json["error"]["request_id"]


def test_probes_have_an_id_and_no_times(server: Any) -> None:
    headers = server.ask("GET", "/ping").headers
    assert re.fullmatch(r"[0-9a-f]{32}", headers["x-request-id"])
    assert "server-timing" not in headers


@pytest.mark.parametrize("asked", ["/invocations", "/ping"])
def test_an_exception_is_counted_and_told_in_a_sentence(asked: str, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        current().decode_ms = 1.25
        raise RuntimeError("a bug")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    counted = Metrics()
    scope = {"type": "http", "method": "POST", "path": asked, "headers": [(b"x-request-id", b"mine")]}
    asyncio.run(Telemetry(app, counted, Tracing())(scope, receive, send))
    assert sent[0]["status"] == 500
    headers = dict(sent[0]["headers"])
    assert headers[b"x-request-id"] == b"mine"
    assert (b"server-timing" in headers) == (asked == "/invocations")
    assert b'"code": "internal_error"' in sent[1]["body"]
    assert counted.page.value(request_cell(asked, 500)) == 1
    assert counted.page.value(rejected_cell("internal_error")) == (asked == "/invocations")
    assert "RuntimeError: a bug" in caplog.text
