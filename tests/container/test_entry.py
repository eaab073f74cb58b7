"""The entry point as a process: `serve` and `train` run, anything else is refused; where the healthcheck asks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from container.healthcheck import port
from tests.conftest import environment, free_port

ROOT = Path(__file__).parent.parent.parent


def start(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "container.entry", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("arguments", [(), ("bash",), ("Serve",), ("--port", "9000")])
def test_anything_else_is_refused_with_one_sentence_and_status_2(arguments: tuple[str, ...]) -> None:
    result = start(*arguments)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "it understands: serve, train." in result.stderr


@pytest.mark.parametrize(("command", "module"), [("serve", "service"), ("train", "training")])
def test_flags_reach_what_runs(command: str, module: str) -> None:
    result = start(command, "--no-such-flag", "1")
    assert result.returncode == 2
    assert "no-such-flag" in result.stdout + result.stderr


def test_the_first_line_tells_driver_cuda_and_engines() -> None:
    first = start("serve", "--help").stdout.splitlines()[0]
    assert " container " in first
    assert "engines: torch, OpenVINO." in first


def test_the_first_line_is_json_where_the_service_writes_json() -> None:
    line = json.loads(start("serve", "--no-such-flag", CLASSIFIER_LOG_FORMAT="json").stdout.splitlines()[0])
    assert line["level"] == "INFO"
    assert line["logger"] == "container"


def test_sigterm_reaches_the_service_which_ends_with_status_0(artifact: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "container.entry", "serve", "--model", str(artifact), "--port", str(free_port())]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=out)
    try:
        for _ in range(600):
            if "ready: http" in log.read_text():
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "stopped" in log.read_text()


@pytest.mark.parametrize(
    ("command", "environ", "expected"),
    [
        ("python\0-m\0service\0", {}, 8080),
        ("python\0-m\0service\0", {"SAGEMAKER_BIND_TO_PORT": "9001"}, 9001),
        ("python\0-m\0service\0", {"SAGEMAKER_BIND_TO_PORT": "9001", "CLASSIFIER_PORT": "9002"}, 9002),
        ("docker-init\0--\0python\0-m\0service\0--port\09003\0", {"CLASSIFIER_PORT": "9002"}, 9003),
        ("python\0-m\0service\0--port=9004\0", {}, 9004),
    ],
)
def test_the_healthcheck_asks_where_the_service_listens(command: str, environ: dict[str, str], expected: int) -> None:
    assert port(command.encode(), environ) == expected


def test_the_healthcheck_fails_where_nothing_listens() -> None:
    environ = {**os.environ, "CLASSIFIER_PORT": str(free_port())}
    command = [sys.executable, "-I", "-S", str(ROOT / "container" / "healthcheck.py")]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "refused" in result.stdout.lower()
