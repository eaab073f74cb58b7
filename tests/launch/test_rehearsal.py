"""The rehearsal itself: a step that breaks in any way is told, and the walk goes on; its report and transcript."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.rehearsal import report
from tests.rehearsal.containers import ProcessEngine
from tests.rehearsal.hosting import Server
from tests.rehearsal.journey import Gap, Journey
from tests.rehearsal.report import Step, Typed
from tests.rehearsal.start import IMAGE, ROOT, Rehearsal


def test_a_step_that_breaks_in_any_way_is_a_failure_and_not_the_end(tmp_path: Path) -> None:
    journey = Journey(Rehearsal("http://127.0.0.1:9", tmp_path), tmp_path, tmp_path, tmp_path, None)
    for problem in (subprocess.TimeoutExpired("train", 600), RuntimeError("docker"), ConnectionError("gone")):

        def step(problem: Exception = problem) -> str:
            raise problem

        journey._step(step)
    assert [step.result for step in journey.steps] == ["FAIL"] * 3
    assert "TimeoutExpired" in journey.steps[0].shown


@pytest.mark.parametrize(("images", "needs"), [(None, "a container engine"), (("train", "serve"), "docker compose")])
def test_a_gap_is_called_one_once_in_the_columns_of_the_others(
    images: tuple[str, str] | None, needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # on which neither is
    journey = Journey(Rehearsal("http://127.0.0.1:9", tmp_path), tmp_path, tmp_path, tmp_path, images)
    journey._step(journey.sdk_local)
    (gap,) = journey.steps
    assert (gap.result, gap.shown) == ("GAP", str(Gap(f"the SDK's local mode needs {needs}")))
    lines = report.text([gap, Step("status", "PASS", 1.0, "shown")]).splitlines()
    assert lines[0].index("sdk local") == lines[1].index("status")


def test_the_transcript_has_each_command_as_it_is_typed_and_what_it_wrote(tmp_path: Path) -> None:
    typed = [Typed(["invoke", "two words"], 0, "12:00:00 told\nfile,label\n"), Typed(["delete"], 2, "say --yes\n")]
    steps = [Step("invoke", "PASS", 1.0, "2 pictures", typed), Step("sdk local", "GAP", 0.0, "no engine")]
    report.write(tmp_path / "report.md", steps, "processes", {})
    assert "[transcript.md](transcript.md)" in (tmp_path / "report.md").read_text()
    told = (tmp_path / "transcript.md").read_text()
    assert "## invoke: PASS, 1 s\n\n2 pictures\n" in told
    assert "~~~~text\n$ .venv/bin/python -m training.launch invoke 'two words'\n12:00:00 told\n" in told
    assert "12:00:00 told\nfile,label\n~~~~" in told and "say --yes\n(exit status 2)\n~~~~" in told
    assert told.endswith("## sdk local: GAP, 0 s\n\nno engine\n")


def test_the_cloud_by_hand_says_how_it_is_reached_refuses_other_regions_and_ends_when_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.rehearsal.cloud", "--work", str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout and process.stderr
        lines: list[str] = []
        while "with this terminal" not in (lines[-1] if lines else ""):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        (exported,) = re.findall(r"^  export (.+)$", "".join(lines), re.MULTILINE)
        variables = dict(each.split("=", 1) for each in exported.split())
        assert variables["AWS_ENDPOINT_URL"] == lines[0].strip()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | variables
        for region, status, said in (
            ("eu-central-1", 1, "Not ready: role."),
            ("us-east-1", 1, "The rehearsal has one region, eu-central-1; us-east-1 was asked for."),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "training.launch", "preflight", "--image", IMAGE, "--region", region], cwd=ROOT,
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == status and said in done.stderr + done.stdout, done.stderr + done.stdout
        process.terminate()
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


def test_help_of_the_rehearsal_imports_nothing_large() -> None:
    code = (
        "import sys; from tests.rehearsal.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'moto', 'boto3', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--processes" in done.stdout and done.stdout.endswith("[]\n")


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
