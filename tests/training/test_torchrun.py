"""The entry of the container: what it runs, and that torchrun's processes find each other, save and end."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tests.conftest import free_port
from training.__main__ import main, split_entry, take_flag
from training.elastic import killed
from training.environment import SageMakerJob, environment_with
from training.errors import ConfigError
from training.torchrun import command, run_child, variables, wait_for_name

SUMS = """
import json, os, pathlib, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
path = pathlib.Path(sys.argv[1]) / str(dist.get_rank())
path.write_text(json.dumps([total.item(), os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]]))
dist.destroy_process_group()
"""
LOSES_ONE = """
import os, signal, time
from training.environment import ROOT, write_failure
if os.environ["RANK"] == "0":
    write_failure("RuntimeError: Connection closed by peer")
while not (ROOT / "output" / "failure").exists():
    time.sleep(0.01)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
SAVES_ON_SIGTERM = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def save(*_):
    (folder / f"saved-{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / f"started-{rank}").touch()
time.sleep(60)
"""
LIMIT_S = 90


def job(*hosts: str, current: str) -> SageMakerJob:
    return SageMakerJob(None, current, hosts, "lo", Path(), Path(), None, None, {})


def module(folder: Path, name: str, code: str) -> dict[str, str]:
    """Write a module; returns the variables a process needs to find it."""
    (folder / f"{name}.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def test_two_hosts_meet_and_add_up(tmp_path: Path) -> None:
    master = f"127.0.0.1:{free_port()}"
    extra = module(tmp_path, "sums", SUMS)
    running = []
    for host in ("algo-1", "algo-2"):
        here = job("algo-1", "algo-2", current=host)
        line = command("sums", [str(tmp_path)], 1, here, master)
        environ = environment_with(variables(1, here)) | extra
        running.append(subprocess.Popen(line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in running:
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output
    assert [json.loads((tmp_path / name).read_text()) for name in "01"] == [[3.0, "2", "0"], [3.0, "2", "0"]]


def test_a_killed_process_is_the_reason_that_the_platform_is_told(tmp_path: Path) -> None:
    config = tmp_path / "input" / "config"
    config.mkdir(parents=True)
    (config / "hyperparameters.json").write_text("{}")
    extra = {**module(tmp_path, "loses", LOSES_ONE), "SAGEMAKER_BASE_DIR": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        line, environ = command("loses", [], 2, None), environment_with(variables(2, None)) | extra
        assert subprocess.run(line, env=environ, stdout=log, stderr=log, timeout=LIMIT_S).returncode == 1
    reason, _, trace = (tmp_path / "output" / "failure").read_text().partition("\n\n")
    assert reason == (
        "Training process 1 was ended by SIGKILL, most likely for want of memory: a smaller --batch-size or fewer "
        "--loader-workers need less; the others could not go on without it."
    )
    assert "exitcode  : -9" in trace and reason in (tmp_path / "log").read_text()


def test_a_host_that_does_not_come_is_waited_for_and_the_platform_told(tmp_path: Path) -> None:
    config = tmp_path / "input" / "config"
    config.mkdir(parents=True)
    (config / "hyperparameters.json").write_text("{}")
    line = command("sums", [], 1, job("algo-1", "algo-2", current="algo-1"), f"127.0.0.1:{free_port()}")
    line.insert(line.index("--master-addr"), "--rdzv-conf=timeout=5")  # torchrun's own is 10 minutes
    environ = {**os.environ, "SAGEMAKER_BASE_DIR": str(tmp_path)}
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1, done.stderr
    reason, _, _ = (tmp_path / "output" / "failure").read_text().partition("\n\n")
    assert reason.startswith("The hosts did not come together (Timed out after ")
    assert reason.endswith("1/2 clients joined); the missing one's log says why; start the job again.")
    assert f"ERROR {reason}" in done.stdout


def test_a_port_that_is_in_use_is_not_told_as_a_host_that_is_missing(tmp_path: Path) -> None:
    config = tmp_path / "input" / "config"
    config.mkdir(parents=True)
    (config / "hyperparameters.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        master = f"127.0.0.1:{taken.getsockname()[1]}"
        line = command("sums", [], 1, job("algo-1", "algo-2", current="algo-1"), master)
        environ = {**os.environ, "SAGEMAKER_BASE_DIR": str(tmp_path)}
        done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1, done.stderr
    reason, _, _ = (tmp_path / "output" / "failure").read_text().partition("\n\n")
    assert reason.startswith("torchrun could not bring the processes together (") and "EADDRINUSE" in reason
    assert "missing" not in reason


def test_processes_that_torchrun_ends_are_not_the_reason() -> None:
    def failure(exitcode: int, timestamp: int) -> ProcessFailure:
        found = ProcessFailure(0, 1, exitcode, "none")
        found.timestamp = timestamp
        return found

    assert killed({0: failure(1, 50), 1: failure(-signal.SIGTERM, 51), 2: failure(-signal.SIGKILL, 160)}) is None
    assert killed({0: failure(1, 50), 1: failure(-signal.SIGABRT, 52)}) is None
    assert "process 1 was ended by SIGABRT" in (killed({0: failure(1, 52), 1: failure(-signal.SIGABRT, 50)}) or "")
    assert killed({0: failure(1, 50), 1: failure(-signal.SIGABRT, 50)}) is None
    left = killed({0: failure(-signal.SIGABRT, 50), 1: failure(-signal.SIGTERM, 50)}) or ""
    assert "it has lost the others" in left and "could not go on without it" not in left
    both = killed({0: failure(-signal.SIGABRT, 50), 1: failure(-signal.SIGKILL, 50)}) or ""
    assert both.startswith("Training process 1 was ended by SIGKILL")
    assert "process 2 was ended by SIGSEGV; the" in (killed({0: failure(1, 50), 2: failure(-signal.SIGSEGV, 50)}) or "")


def test_sigterm_reaches_every_process_which_saves(tmp_path: Path) -> None:
    extra = module(tmp_path, "saves", SAVES_ON_SIGTERM)
    line = command("saves", [str(tmp_path)], 2, None)
    code = f"import sys; from training.torchrun import run_child; sys.exit(run_child({line!r}, {{}}))"
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=environment_with(variables(2, None)) | extra,
        stderr=subprocess.DEVNULL,
    )
    deadline_s = time.monotonic() + LIMIT_S
    while len(list(tmp_path.glob("started-*"))) < 2:
        assert parent.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(LIMIT_S) != 0  # torchrun says so although its processes ended well
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_the_exit_status_of_the_child_is_returned() -> None:
    assert run_child([sys.executable, "-c", "raise SystemExit(3)"], {}) == 3
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_child([sys.executable, "-c", killed], {}) == 128 + signal.SIGKILL


def test_signals_go_to_the_child_and_later_to_this_process_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    waits = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); time.sleep(60)"
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert run_child([sys.executable, "-c", waits], {}) in (7, 128 + signal.SIGTERM)
    timer.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_host_needs_no_address() -> None:
    line = command("training.train_model", ["--epochs", "1"], 8, None)
    assert line[:3] == [sys.executable, "-m", "training.elastic"]
    assert "--standalone" in line
    assert line[-4:] == ["-m", "training.train_model", "--epochs", "1"]


def test_several_hosts_meet_at_the_first() -> None:
    line = " ".join(command("x", [], 4, job("algo-1", "algo-2", current="algo-2")))
    assert "--nnodes 2 --nproc-per-node 4" in line
    assert "--node-rank 1 --master-addr algo-1 --master-port 29500" in line
    assert variables(4, job("algo-1", "algo-2", current="algo-2"))["NCCL_SOCKET_IFNAME"] == "lo"


def test_a_name_that_the_network_does_not_know_is_waited_for_and_then_refused() -> None:
    wait_for_name("localhost")
    with pytest.raises(ConfigError, match=r"algo-9\.invalid.*start the job again"):
        wait_for_name("algo-9.invalid", limit_s=0)


def test_flags_are_taken_in_both_spellings() -> None:
    assert take_flag(["--a", "1", "--entry=hpo", "--b"], "entry") == ("hpo", ["--a", "1", "--b"])
    assert take_flag(["--entry", "hpo", "--a"], "entry") == ("hpo", ["--a"])
    assert take_flag(["--a", "1"], "entry") == (None, ["--a", "1"])
    assert split_entry(["--epochs", "1"], "train_model") == ("train_model", ["--epochs", "1"])


@pytest.mark.parametrize("arguments", [["--entry", "serve"], ["--entry"], ["--entry="]])
def test_an_unknown_entry_is_refused_and_the_known_are_listed(
    arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert main(arguments) == 2
    assert "known are train_model, hpo" in caplog.text


def test_without_gpus_the_training_runs_in_this_process(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert main(["--device", "cpu", "--epoch", "3"]) == 2
    assert "Did you mean --epochs?" in caplog.text
    assert "torchrun" not in caplog.text


def test_a_search_on_several_hosts_is_refused_and_the_platform_told(tmp_path: Path) -> None:
    config = tmp_path / "input" / "config"
    config.mkdir(parents=True)
    (config / "hyperparameters.json").write_text('{"entry": "hpo", "trials": "3"}')
    (config / "resourceconfig.json").write_text('{"current_host": "algo-1", "hosts": ["algo-1", "algo-2"]}')
    assert main([], root=tmp_path) == 2
    failure = (tmp_path / "output" / "failure").read_text()
    assert "a study (hyperparameter trials) runs on one host, this job has 2" in failure
