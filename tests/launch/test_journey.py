"""The whole journey, the README's commands, and the notebook, in the rehearsal. Minutes each."""

import ast
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.rehearsal import pictures
from tests.rehearsal.containers import free_port
from tests.rehearsal.journey import RUN
from tests.rehearsal.start import ROOT, rehearsal
from training.launch import tour
from training.launch.flags import parser

README = (ROOT / "README.md").read_text()
NOTEBOOK = ROOT / "training" / "train_and_deploy.ipynb"
LOGIC = (
    ast.If, ast.IfExp, ast.While, ast.Try, ast.With, ast.Match, ast.BoolOp, ast.Compare, ast.FunctionDef, ast.Lambda,
    ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_rehearse_from_a_fresh_clone_passes_and_leaves_nothing(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    command = ["make", "rehearse", "REHEARSE_ARGS=--processes"]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    told = (clone / "artifacts" / "rehearsal" / "report.md").read_text()
    print(told)  # read in CI's log
    assert "Every step passed" in told
    assert "| nothing is left | PASS |" in told
    assert "- GAP, permissions: " in told and "sagemaker InvokeEndpoint: rehearsal" in told
    typed = (clone / "artifacts" / "rehearsal" / "transcript.md").read_text()
    assert "$ .venv/bin/python -m training.launch train --data " in typed and "all of it is removed" in typed
    with rehearsal() as cloud:  # nothing of AWS but IAM is asked for
        command = ["make", "iam-role"]
        done = subprocess.run(command, cwd=clone, env=cloud.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "resnet34-sagemaker is made" in done.stderr, done.stdout + done.stderr
        assert [role["RoleName"] for role in cloud.client("iam").list_roles()["Roles"]] == ["resnet34-sagemaker"]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_setup_sagemaker_and_make_notebook_from_a_fresh_clone_open_the_notebook(tmp_path: Path) -> None:
    clone, log, port = tmp_path / "clone", tmp_path / "log", free_port()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(["make", "setup-sagemaker"], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    command = [".venv/bin/python", "-m", "training.launch", "iam-role", "--policy"]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "sts:AssumeRole" in done.stdout, done.stderr

    settings = {"ServerApp": {"open_browser": False, "port": port, "port_retries": 0}}
    settings["IdentityProvider"] = {"token": "known"}
    (tmp_path / "jupyter").mkdir()
    (tmp_path / "jupyter" / "jupyter_server_config.json").write_text(json.dumps(settings))
    environment |= {f"JUPYTER_{what}_DIR": str(tmp_path / "jupyter") for what in ("CONFIG", "DATA", "RUNTIME")}
    with log.open("w") as out:
        make = subprocess.Popen(
            ["make", "notebook"], cwd=clone, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        while f"http://127.0.0.1:{port}/lab" not in log.read_text():
            assert make.poll() is None, log.read_text()
            time.sleep(0.2)
        # Its root is the folder of what it was told to open.
        while not listens(port):  # it tells its address before that
            assert make.poll() is None, log.read_text()
            time.sleep(0.2)
        asked = f"http://127.0.0.1:{port}/api/contents/{NOTEBOOK.name}?token=known"
        with urllib.request.urlopen(asked, timeout=60) as answer:
            served = json.loads(answer.read())["content"]["cells"]
        sources = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]]
        assert ["".join(cell["source"]) for cell in served] == sources
    finally:
        with suppress(ProcessLookupError):
            os.killpg(make.pid, signal.SIGTERM)
        make.wait(60)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(asked, timeout=60)


def commands() -> list[list[str]]:
    """The README's commands, in its order, as they stand there."""
    text = re.sub(r"\\\n\s+", "", README)
    found = re.findall(r"^\.venv/bin/python -m training\.launch ([^\n#]+)", text, re.MULTILINE)
    return [shlex.split(line) for line in found]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_readme_do_what_they_say_in_their_order(tmp_path: Path) -> None:
    data, asked = pictures.write(tmp_path / "drawn")
    (tmp_path / "pictures").symlink_to(data)
    (tmp_path / "photos").symlink_to(asked)
    small = {"tune": ["--trials", "2", "--epochs-range", "1:2", "--batch-sizes", "8", *RUN], "delete": ["--yes"]}
    with rehearsal() as cloud:
        cloud.push_image()
        cloud.note_images(tmp_path)
        for command in commands():
            done = cloud.launch(*command, *small.get(command[0], []), folder=tmp_path)
            assert done.returncode == 0, f"{command}: {done.stderr}"
        left = {kind: names for kind, names in cloud.ask("/rehearsal/leftovers").items() if names}
    assert left == {}
    assert (tmp_path / "answers.csv").read_text().count("\n") == (tmp_path / "batch.csv").read_text().count("\n") > 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebook_runs_from_top_to_bottom_and_shows_something_in_every_part(tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="the group notebook is not installed")
    path = tmp_path / "executed.ipynb"
    command = [sys.executable, "-m", "tests.rehearsal.notebook", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    outputs = {"".join(cell["source"]): json.dumps(cell["outputs"]) for cell in code_of(path)}
    shown = "\n".join(outputs.values())
    for part in ("PASS  credentials", "<table>", "VanishingGradient"):
        assert part in shown
    assert '"image/png"' in outputs["gallery(answers)"]
    assert outputs["for chart in charts(run):\n    display(chart)"].count('"image/png"') == 4
    beside = outputs["beside_reference(model)"]
    assert "40.71 %" in beside and "not to be compared" in beside
    assert "artifacts/tour/sagemaker-tuning" in shown and "artifacts/sagemaker" not in shown
    assert "all of it is removed" in outputs['launch("delete", *ours, "--yes")']


def test_the_notebook_has_no_logic_of_its_own_and_is_committed_without_outputs() -> None:
    for cell in code_of(NOTEBOOK):
        source = "".join(cell["source"])
        assert cell["outputs"] == [] and cell["execution_count"] is None
        found = {type(node) for node in ast.walk(ast.parse(source))}
        assert not found & set(LOGIC), source


def test_preflight_looks_at_what_the_commands_after_it_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    tour.go_home()
    assert Path.cwd() == ROOT
    of_readme = {name: flags for name, *flags in commands() if name in ("preflight", "tune", "train", "deploy")}
    (cell,) = [cell for cell in code_of(NOTEBOOK) if "parameters" in cell["metadata"].get("tags", ())]
    given: dict[str, Any] = {}
    exec("".join(cell["source"]), given)
    for tune, train, deploy in (
        [given[name] for name in ("TUNE", "TRAIN", "DEPLOY")], [of_readme[name] for name in ("tune", "train", "deploy")]
    ):  # fmt: skip
        flags = tour.preflight_flags(tune, train, deploy)
        asked = vars(parser().parse_args(["preflight", *flags]))
        assert asked == vars(parser().parse_args(["preflight", *of_readme["preflight"]]))
        assert (asked["parallel"], asked["spot"], asked["max_count"]) == (2, True, 3)
    flags = tour.preflight_flags(["--instances", 2], ["--instance", "ml.g6.xlarge"], ["--kind", "serverless"])
    asked = vars(parser().parse_args(["preflight", *flags]))
    assert (asked["instances"], asked["instance"], asked["kind"]) == (2, "ml.g6.xlarge", "serverless")
    assert (asked["spot"], asked["max_count"]) == (False, None)


@pytest.mark.slow  # as make test-slow installs the group notebook
def test_a_cell_that_cannot_go_on_is_a_sentence_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("IPython", reason="the group notebook is not installed")
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    shell = InteractiveShell()
    missing = "is not there yet: the cell of launch"
    for cell, said in (
        ('tour.launch("status", *tour.account("tour", "", ""))', "`status` ended with status 2; the lines above say"),
        ('tour.preflight_flags(["--parallel", "many"], [], [])', "TUNE in the cell of settings holds a flag"),
        ('tour.note_images({"other": "uri"})', "other: images are for train, serve, serve-cpu."),
        *((f'tour.{name}(Path("artifacts/tour/none"))', f"artifacts/tour/none {missing}")
          for name in ("rules", "profile", "charts", "beside_reference", "gallery")),
        ('tour.best_trial(Path("artifacts/tour"))', f"artifacts/tour/best.json {missing}"),
        ('tour.beside_reference(Path("."))', "The folder . is empty"),
    ):  # fmt: skip
        shown = shell.run_cell(f"from pathlib import Path\nfrom training.launch import tour\n{cell}")
        assert isinstance(shown.error_in_exec, tour.NotShown), cell
        told = capsys.readouterr().out
        assert said in told and "Traceback" not in told and ".py" not in told, told


def test_every_command_of_the_notebook_is_given_region_and_profile() -> None:
    assert tour.account("tour", "", "") == ["--project", "tour"]
    flags = ["--project", "tour", "--region", "eu-central-1", "--profile", "mine"]
    assert tour.account("tour", "eu-central-1", "mine") == flags


def test_the_notebook_keeps_apart_from_the_commands_own_project_and_folders() -> None:
    (cell,) = [cell for cell in code_of(NOTEBOOK) if "parameters" in cell["metadata"].get("tags", ())]
    given: dict[str, Any] = {}
    exec("".join(cell["source"]), given)
    own = parser().parse_args(["train", "--data", "-"])
    assert given["PROJECT"] != own.project and Path(given["OUTPUT"]) / "sagemaker" != own.output


def code_of(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
