"""`python -m service` as a process: start, refusal to start, stop."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from service.model.artifact import open_artifact
from tests.conftest import Server, environment, free_port

ROOT = Path(__file__).parent.parent.parent


def run_service(model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a service that is expected to end by itself."""
    command = [sys.executable, "-m", "service", "--model", str(model), "--host", "127.0.0.1", *flags]
    one = {**os.environ, "CLASSIFIER_WORKERS": "1"}
    return subprocess.run(command, cwd=ROOT, env=one, capture_output=True, text=True, timeout=120)


def refusal(model: Path) -> str:
    """The one error line of a start that failed; fails when there is a trace or another exit status."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    result = run_service(model, "--port", str(port))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    (line,) = [line for line in result.stdout.splitlines() if " ERROR " in line]
    return line


def copy(artifact: Path, to: Path) -> Path:
    shutil.copytree(artifact, to)
    return to


def test_the_example_of_the_artifact_is_classified_over_http(server: Any, artifact: Path) -> None:
    example = open_artifact(artifact)
    answer = server.ask(
        "POST", "/invocations", example.read("example"), {"Content-Type": example.manifest.example.media_type}
    )
    assert answer.status == 200
    assert answer.json["model"] == {"name": "tiny", "version": example.manifest.version}
    assert answer.json["predictions"][0]["label"] in example.manifest.classes


def test_the_log_names_model_engine_and_a_curl_line_that_works(server: Any) -> None:
    log = server.log.read_text()
    assert re.search(r"engine openvino-(bf16|fp32) on \d+ threads?: the artifact has no int8 network; self-check", log)
    (line,) = [line for line in log.splitlines() if "to try: curl" in line]
    command = line.split("to try: ")[1]
    result = subprocess.run(["sh", "-c", f"{command} -s"], capture_output=True, text=True, timeout=60, check=True)
    assert '"predictions"' in result.stdout


def test_an_archive_is_served_and_leaves_nothing_behind(artifact: Path, tmp_path: Path, start_server: Any) -> None:
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(artifact, arcname=".")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with start_server(archive, TMPDIR=str(scratch)) as server:
        assert server.ask("GET", "/ping").status == 200
        assert list(scratch.iterdir())
    assert not list(scratch.iterdir())


def test_a_missing_model_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    """At once: before the port is taken and a worker started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run_service(tmp_path / "none", "--port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert f"ERROR service The model cannot be served. There is no model at {tmp_path / 'none'}" in result.stdout


def test_an_empty_folder_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    assert f"The folder {tmp_path} is empty; name the folder" in refusal(tmp_path)


@pytest.mark.parametrize("role", ["weights", "self_check", "example", "manifest"])
def test_a_flipped_byte_ends_the_start_with_one_sentence_naming_the_file(
    artifact: Path, tmp_path: Path, role: Any
) -> None:
    broken = copy(artifact, tmp_path / "model")
    path = broken / "manifest.json" if role == "manifest" else open_artifact(broken).path(role)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert f"{path} is " in refusal(broken)


def test_a_file_that_is_no_archive_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.tar.gz").write_bytes(b"not an archive")
    assert "model.tar.gz is no readable tar archive" in refusal(tmp_path / "model.tar.gz")


def test_a_port_in_use_ends_the_start_with_a_sentence(artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run_service(artifact, "--port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert "in use" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_service_with_status_0_and_no_trace(
    artifact: Path, start_server: Any, number: signal.Signals
) -> None:
    with start_server(artifact) as server:
        server.process.send_signal(number)
        assert server.process.wait(30) == 0
        log = server.log.read_text()
    assert "stopped" in log
    assert "Traceback" not in log


def test_a_signal_while_loading_ends_the_service_with_status_0(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, ready=False) as server:
        while "listening" not in server.log.read_text():
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


@pytest.mark.parametrize("moment", ["importing", "loading"])
def test_ctrl_c_in_a_terminal_ends_a_service_that_starts_without_a_trace(
    artifact: Path, tmp_path: Path, moment: str
) -> None:
    (tmp_path / "logging.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    extra = {"PYTHONPATH": str(tmp_path)} if moment == "importing" else {"CLASSIFIER_WORKERS": "2"}
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "--model", str(artifact), "--port", str(free_port())],
            cwd=ROOT, env=environment(**extra), stdout=out, stderr=out, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs are deaf to it
        )  # fmt: skip
    while moment not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    time.sleep(0.2 if moment == "loading" else 0)  # the workers are importing
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    assert process.wait(60) == (130 if moment == "importing" else 0), log.read_text()
    assert "Traceback" not in log.read_text()


def test_the_service_ends_when_its_parent_is_killed(artifact: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'service', '--model', {str(artifact)!r},"
        f" '--host', '127.0.0.1', '--port', '{port}'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    log = tmp_path / "log"
    with log.open("w") as out:
        parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=out, stderr=out)
    try:
        while "listening" not in log.read_text():
            time.sleep(0.05)
            assert parent.poll() is None, log.read_text()
        child = int(log.read_text().split()[0])
        parent.kill()
        parent.wait()
        for _ in range(600):
            if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
                break
            time.sleep(0.1)
        else:
            os.kill(child, signal.SIGKILL)
            raise AssertionError("the service outlived its parent")
    finally:
        with contextlib.suppress(OSError):
            parent.kill()
    assert "the process that started the service has ended" in log.read_text()


def test_descriptors_that_were_closed_at_the_start_are_taken_by_no_socket(artifact: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "service", "--model", str(artifact), "--host", "127.0.0.1", "--port", str(port)]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    process = subprocess.Popen(shell, cwd=ROOT, env=environment(CLASSIFIER_WORKERS="2"), text=True)
    (tmp_path / "log").touch()
    server = Server(process, port, tmp_path / "log")
    try:
        server.wait_until_ready()
        assert server.ask("POST", "/invocations", open_artifact(artifact).read("example")).status == 200
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
