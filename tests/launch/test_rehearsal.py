"""The rehearsal's own report: a step that breaks in any way is told, and the walk goes on."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.rehearsal import report
from tests.rehearsal.containers import ProcessEngine
from tests.rehearsal.hosting import Server
from tests.rehearsal.journey import Journey
from tests.rehearsal.report import Step
from tests.rehearsal.start import Rehearsal


def test_a_step_that_breaks_in_any_way_is_a_failure_and_not_the_end(tmp_path: Path) -> None:
    journey = Journey(Rehearsal("http://127.0.0.1:9", tmp_path), tmp_path, tmp_path, tmp_path, None)
    for problem in (subprocess.TimeoutExpired("train", 600), RuntimeError("docker"), ConnectionError("gone")):

        def step(problem: Exception = problem) -> str:
            raise problem

        journey._step(step)
    assert [step.result for step in journey.steps] == ["FAIL"] * 3
    assert "TimeoutExpired" in journey.steps[0].shown


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (["PASS", "PASS"], "Every step passed;"),
        (["PASS", "GAP"], "Every step passed but step 1, which could not be shown here;"),
        (["FAIL", "GAP"], "FAILED: step 0;"),
    ],
)
def test_the_report_says_passed_of_what_passed_alone(tmp_path: Path, results: list[report.Result], said: str) -> None:
    steps = [Step(f"step {number}", result, 1.0, "") for number, result in enumerate(results)]
    report.write(tmp_path / "report.md", steps, "processes", {})
    assert said in (tmp_path / "report.md").read_text()


def test_a_server_that_answers_no_http_is_not_healthy(tmp_path: Path) -> None:
    code = (
        "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
        "while True:\n c, _ = s.accept(); c.recv(99); c.sendall(b'no http\\r\\n\\r\\n'); c.close()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout

    class Alive:
        port = int(process.stdout.readline())

        def is_alive(self) -> bool:
            return process.poll() is None

        def stop(self) -> None:
            process.kill()

        def wait(self) -> int:
            return process.wait()

    class Quiet:
        def close(self) -> None: ...

    server = Server(Alive(), tmp_path / "model", Quiet())  # type: ignore[arg-type]
    start_s = time.monotonic()
    assert not server.answers(within_s=1.5)
    assert time.monotonic() - start_s >= 1.5
    server.stop()
    process.wait()
    process.stdout.close()
    ProcessEngine().close()
