"""The entry point as a process: `serve` and `train` run, anything else is refused; where the healthcheck asks."""

import http.server
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from container import entry
from container.healthcheck import port
from tests.conftest import answered_by, environment, free_port

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


def test_awss_sdk_may_tidy_up_and_nothing_else() -> None:
    if Path("/delete").exists():
        pytest.skip("/delete is there, whose it is is not known")
    result = start("chmod", "-R", "777", "/delete", LC_ALL="C")
    assert (result.returncode, result.stdout) == (1, "")
    assert "cannot access '/delete'" in result.stderr
    for others in (("chmod",), ("chmod", "-R", "777", "/opt"), ("chmod", "-R", "777", "/delete", "/opt")):
        assert start(*others).returncode == 2


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


class Started(Exception):
    """In place of os.execve, which does not return."""


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with SageMaker's default driver of g4dn, of which there is none here, and torch for CUDA 13.

    Returns: what stands for /opt/ml/output.
    """

    def execve(path: str, command: list[str], _environment: dict[str, str]) -> None:
        raise Started(command)

    monkeypatch.setattr(entry, "has_gpu", lambda _: True)
    monkeypatch.setattr(entry, "driver_version", lambda: "470.57.02")
    monkeypatch.setattr(entry, "torch_cuda", lambda _: "13.0")
    monkeypatch.setattr(entry, "OUTPUT", tmp_path)
    monkeypatch.setattr(os, "execve", execve)
    for name in ("CUDA_VISIBLE_DEVICES", "CLASSIFIER_ENGINE", "CLASSIFIER_LOG_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("command", ["serve", "train"])
def test_a_driver_that_is_too_old_ends_the_start_with_one_line(
    command: str, old_driver: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main([command]) == 1
    said = capsys.readouterr()
    assert said.out.count("\n") == 1
    assert not said.err
    assert " ERROR container NVIDIA driver 470.57.02 is too old for CUDA 13.0 of this image" in said.out
    assert "InferenceAmiVersion=al2023-ami-sagemaker-inference-gpu-4-1" in said.out
    failure = old_driver / "failure"
    if command == "train":  # SageMaker shows it as the job's FailureReason
        assert failure.read_text() in said.out
        assert failure.read_text().startswith("NVIDIA driver 470.57.02 is too old")
    else:
        assert not failure.exists()


@pytest.mark.parametrize(
    ("command", "variable", "value"),
    [
        ("serve", "CUDA_VISIBLE_DEVICES", ""),
        ("train", "CUDA_VISIBLE_DEVICES", ""),
        ("serve", "CUDA_VISIBLE_DEVICES", "-1"),
        ("serve", "CLASSIFIER_ENGINE", "openvino-fp32"),
    ],
)
def test_who_wants_no_gpu_starts_beside_an_old_driver(
    command: str, variable: str, value: str, old_driver: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    with pytest.raises(Started, match=entry.COMMANDS[command]):
        entry.main([command])
    assert " INFO container NVIDIA driver 470.57.02 is too old" in capsys.readouterr().out
    assert not (old_driver / "failure").exists()


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
        else:
            pytest.fail(log.read_text())
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


@pytest.mark.parametrize(
    ("status", "delay_s", "code", "said"),
    [(200, 0, 0, '200 {"status": "?"}'), (503, 0, 1, '503 {"status": "?"}'), (200, 2.5, 1, "timed out")],
)
def test_the_healthcheck_is_as_strict_as_sagemaker(status: int, delay_s: float, code: int, said: str) -> None:
    """Loading, failing and stopping are 503; more than 2 s are no answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(delay_s)
            body = b'{"status": "?"}' if self.path == "/ping" else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with answered_by(Handler) as url:
        environ = {**os.environ, "CLASSIFIER_PORT": url.rpartition(":")[2]}
        command = [sys.executable, "-I", "-S", str(ROOT / "container" / "healthcheck.py")]
        result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code
    assert said in result.stdout
