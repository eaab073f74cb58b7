"""Log lines: text or JSON, in UTC, whatever says them; probes once per change; nothing secret."""

import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service.logs import JsonFormatter, UnblockedHandler, shown
from service.model.artifact import open_artifact
from service.record import RequestRecord
from tests.conftest import Server, environment, free_port

ROOT = Path(__file__).parent.parent.parent
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "sentinel/aws+secret", "AWS_SESSION_TOKEN": "sentinel-session",
    "HF_TOKEN": "hf_sentinel", "DATABASE_URL": "postgres://someone:sentinel-pass@db/x",
}  # fmt: skip


def objects(log: str) -> list[dict[str, Any]]:
    """Each line as JSON; fails on one that is none."""
    lines = [json.loads(line) for line in log.splitlines()]
    for line in lines:
        assert TIME.fullmatch(line["time"])
        assert {"level", "logger", "message"} <= set(line)
        assert isinstance(line["pid"], int)
    return lines


def until(condition: Callable[[], Any], limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def run(code: str, **environment: str) -> str:
    """What a process prints that configures logging and then runs `code`; stderr must be empty."""
    result = subprocess.run(
        [sys.executable, "-c", f"import logging\nfrom service.logs import configure_logging\n{code}"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert result.stderr == ""
    return result.stdout


def test_every_line_of_two_workers_from_start_to_stop_is_an_object_with_typed_fields(
    artifact: Path, start_server: Any
) -> None:
    body = open_artifact(artifact).read("example")
    with start_server(artifact, CLASSIFIER_WORKERS="2", CLASSIFIER_LOG_FORMAT="json", TZ="Asia/Tokyo") as server:
        assert server.ask("POST", "/invocations", body, {"X-Request-Id": "good"}).status == 200
        assert server.ask("POST", "/invocations", b"bad", {"X-Request-Id": "bad"}).status == 400
        no_form = {"X-Request-Id": "form", "Content-Type": "multipart/form-data; boundary=b"}
        assert server.ask("POST", "/invocations", b"bad", no_form).status == 400
        # Each by a worker of its own, maybe, which has written its line when it has.
        until(lambda: all(name in server.log.read_text() for name in ('"good"', '"bad"', '"form"')))
        os.kill(server.workers()[0], signal.SIGKILL)
        until(lambda: server.log.read_text().count("ready: http://") == 3)
    lines = objects(server.log.read_text())
    said = " | ".join(line["message"] for line in lines)
    for words in ("settings: ", "layout: 2 workers", "model tiny version", "SIGKILL", "stopped"):
        assert words in said
    by_id = {line["request_id"]: line for line in lines if "request_id" in line}
    good, bad = by_id["good"], by_id["bad"]
    assert (good["method"], good["path"], good["status"], good["code"]) == ("POST", "/invocations", 200, "ok")
    assert (good["batch_size"], good["bytes_in"]) == (1, len(body))
    for name in ("decode_ms", "queue_ms", "infer_ms", "total_ms"):
        assert isinstance(good[name], float)
    assert (bad["status"], bad["code"], bad["level"]) == (400, "unreadable_image", "INFO")
    assert "infer_ms" not in bad
    assert by_id["form"]["code"] == "malformed_request"
    assert not [line for line in lines if "multipart" in line["logger"]]  # one line for a request, whatever it is
    age = datetime.now(UTC) - datetime.fromisoformat(good["time"])
    assert 0 <= age.total_seconds() < 600  # UTC, though the process lives in Tokyo


def test_a_model_that_cannot_be_served_is_one_object(artifact: Path, tmp_path: Path, start_server: Any) -> None:
    with start_server(tmp_path, ready=False, CLASSIFIER_LOG_FORMAT="json") as server:
        assert server.process.wait(60) == 1
    (error,) = [line for line in objects(server.log.read_text()) if line["level"] == "ERROR"]
    assert "is empty; name the folder" in error["message"]


def test_traces_warnings_and_what_nobody_caught_are_one_object_each() -> None:
    printed = run(
        "import threading, warnings\n"
        "configure_logging('info', 'json')\n"
        "warnings.warn('a\\nwarning', stacklevel=1)\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: logging.getLogger('x').exception('two\\nlines %s', 'here')\n"
        "thread = threading.Thread(target=lambda: [][0], name='worker thread')\n"
        "thread.start(); thread.join()\n"
        "raise ValueError('the end')\n"
    )
    warning, caught, thread, end = objects(printed)
    assert warning["logger"] == "py.warnings" and "a\nwarning" in warning["message"]
    assert caught["message"] == "two\nlines here"
    assert caught["exception"].startswith("Traceback")
    assert caught["exception"].endswith("ZeroDivisionError: division by zero")
    assert "worker thread" in thread["message"] and "IndexError" in thread["exception"]
    assert end["level"] == "CRITICAL" and "ValueError: the end" in end["exception"]


def test_text_lines_have_utc_times_and_libraries_are_quiet() -> None:
    printed = run(
        "configure_logging('info')\n"
        "logging.getLogger('service').info('one %d', 1)\n"
        "logging.getLogger('uvicorn.error').info('not shown')\n"
        "logging.getLogger('PIL').info('not shown')\n",
        TZ="Asia/Tokyo",
    )
    (line,) = printed.splitlines()
    stamp, rest = line.split(" ", 1)
    assert TIME.fullmatch(stamp)
    assert rest == "INFO service one 1"


@pytest.mark.parametrize("format", ["text", "json"])
def test_characters_that_stdout_cannot_say_cost_no_line(format: str) -> None:
    code = f"configure_logging('info', {format!r})\nlogging.getLogger('x').info('caf\\u00e9 \\udcff \\U0001f41d')\n"
    printed = run(code, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert "café" in (json.loads(printed)["message"] if format == "json" else printed)
    assert printed.count("\n") == 1


def test_no_character_divides_an_object() -> None:
    printed = run("configure_logging('info', 'json')\nlogging.getLogger('x').info('a\\u2028b\\u0085c')\n")
    (line,) = objects(printed)
    assert line["message"] == "a\u2028b\u0085c"


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    code = (
        "import logging, os\nfrom service.logs import configure_logging\nconfigure_logging('info')\n"
        "for n in range(1000): logging.getLogger('x').info('line %d', n)\nos._exit(7)\n"
    )
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (7, "")


def test_a_path_of_a_client_cannot_forge_a_line_nor_fill_the_log() -> None:
    record = RequestRecord("id", "GET", "/a\nb c" + "x" * 100_000, status=404, code="not_found")
    assert "\n" not in str(record)
    assert len(str(record)) < 500
    assert len(record.fields()["path"]) == 200
    line = JsonFormatter().format(logging.LogRecord("r", logging.INFO, "", 0, record, None, None))
    assert "\n" not in line
    assert json.loads(line)["status"] == 404


def test_settings_that_tell_of_a_secret_are_masked() -> None:
    line = shown({"port": 80, "api_token": "t1", "hub_key": "k1", "host": "tcp://me:pw@host/x", "Password": "p"})
    assert line == "port=80 api_token=*** hub_key=*** host=tcp://***@host/x Password=***"


@pytest.mark.parametrize("level", ["info", "debug"])
def test_no_secret_of_the_environment_nor_of_a_request_is_ever_written(
    artifact: Path, start_server: Any, level: str
) -> None:
    body = open_artifact(artifact).read("example")
    told = {
        "Authorization": "Bearer sentinel-bearer", "Cookie": "session=sentinel-cookie",
        "X-Request-Id": "sentinel bad id", "X-Amzn-SageMaker-Custom-Attributes": "sentinel-attributes",
        "Content-Type": "image/png; sentinel-type=1",
        "Accept": "sentinel/accept",
    }  # fmt: skip
    with start_server(artifact, CLASSIFIER_LOG_LEVEL=level, **SECRETS) as server:
        for method, path in (("POST", "/invocations"), ("GET", "/ping"), ("GET", "/nothing"), ("GET", "/metrics")):
            for headers in (told, {}):
                answer = server.ask(method, f"{path}?token=sentinel-query", body, headers)
                said = answer.body + json.dumps(answer.headers).encode()
                assert not [name for name, secret in SECRETS.items() if secret.encode() in said]
        os.kill(server.process.pid, signal.SIGTERM)
        server.process.wait(60)
    assert "sentinel" not in server.log.read_text()


def test_a_failing_or_changed_probe_is_one_line_and_one_that_succeeds_none(artifact: Path, start_server: Any) -> None:
    def lines() -> list[str]:
        return [line for line in server.log.read_text().splitlines() if "service.requests" in line]

    with start_server(artifact, ready=False) as server:
        while True:  # as a platform would ask
            try:
                if server.ask("GET", "/ping").status == 200:
                    break
            except OSError:
                time.sleep(0.05)
        until(lambda: any("status=200" in line for line in lines()))
        told = lines()
        for _ in range(20):
            for path in ("/ping", "/metrics"):
                assert server.ask("GET", path).status == 200
        assert lines() == told
    codes = [re.search(r"code=(\w+)", line)[1] for line in told]  # type: ignore[index]
    states = [code for code in codes if code != "not_ready"]  # what the supervisor answers, of a machine this slow
    assert codes[-1] == "ready"
    assert len(codes) > 1
    assert len(states) == len(set(states))
    assert set(states) <= {"loading", "warming_up", "ready"}


def test_a_long_line_that_nobody_reads_is_dropped_though_a_piece_of_it_would_fit() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"." * select.PIPE_BUF)
        os.set_blocking(writer, True)
        os.read(reader, select.PIPE_BUF)  # one piece has room
        handler = UnblockedHandler(stream)
        for message in ("x" * 20_000, "short"):
            handler.emit(logging.makeLogRecord({"msg": message}))
        while select.select([reader], [], [], 0)[0]:
            os.read(reader, 65536)
        handler.emit(logging.makeLogRecord({"msg": "the next"}))
        assert os.read(reader, 65536) == b"\n2 lines before this were not read\nthe next\n"
    os.close(reader)


def test_a_log_that_nobody_reads_holds_up_no_request(artifact: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "service", "--model", str(artifact), "--host", "127.0.0.1", "--port", str(port)]
    service = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert service.stdout is not None
    try:
        server = Server(service, port, Path(os.devnull))
        server.wait_until_ready()
        for _ in range(600):  # a line each, in a pipe of 64 KiB
            assert server.ask("POST", "/invocations", b"no image").status == 400
        assert server.ask("GET", "/ping").status == 200
        first = service.stdout.read(30_000).decode()
        until(lambda: server.ask("POST", "/invocations", b"no image").status == 400)
        service.send_signal(signal.SIGTERM)
        said = first + service.stdout.read().decode()
        assert service.wait(60) == 0
    finally:
        service.kill()
        service.stdout.close()
    assert re.search(r"WARNING service\.logs [0-9]+ lines before this were not read", said)
