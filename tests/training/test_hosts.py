"""`python -m training` on two hosts of one SageMaker job: they train as one, and one that is left ends with a sentence.

Both are this machine, by two of its names; each has an /opt/ml of its own.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.model.artifact import open_artifact
from tests.conftest import free_port
from tests.training.conftest import FROZEN, Settings
from tests.training.test_distributed import SAME, history
from training.run import run

ROOT = Path(__file__).parents[2]
HOSTS = ("127.0.0.1", "127.0.0.2")
MAIN = "import runpy, training.torchrun as t; t.MASTER_PORT = {port}; runpy.run_module('training', run_name='__main__')"
"""`python -m training` with a port that nobody else of this machine uses."""
START_LIMIT_S, END_LIMIT_S = 400, 90

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Job = Callable[..., list[subprocess.Popen[bytes]]]


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()


def failure_of(folder: Path) -> str:
    return (folder / "output" / "failure").read_text()


def files_of(folder: Path) -> set[str]:
    """What the platform takes from a host: files below model and output."""
    found = (path for name in ("model", "output") for path in (folder / name).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in found}


def end(process: subprocess.Popen[bytes]) -> None:
    """Everything that runs on a host ends at once, and the kernel closes its connections."""
    if process.poll() is not None:  # waited for: the number may be another's by now
        return
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for each in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


@pytest.fixture
def job(shades: Path, backbone: Path, tmp_path: Path) -> Iterator[Job]:
    """`job(epochs=2)` starts one training on two hosts, whose folders are `tmp_path / host`."""
    running: list[subprocess.Popen[bytes]] = []

    def start(**hyperparameters: object) -> list[subprocess.Popen[bytes]]:
        code = MAIN.format(port=free_port())
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SM_", "SAGEMAKER_"))}
        given = {"weights": backbone, "freeze": FROZEN, "hidden_units": 8, "validation_fraction": 0.2, "device": "cpu"}
        given |= {"report": "false", "quantize": "off", **hyperparameters}
        for host in HOSTS:
            folder = tmp_path / host
            files: dict[str, dict[str, Any]] = {
                "hyperparameters": {name: str(value) for name, value in given.items()},
                "resourceconfig": {"current_host": host, "hosts": HOSTS, "network_interface_name": "lo"},
            }
            (folder / "input" / "config").mkdir(parents=True)
            for name, content in files.items():
                (folder / "input" / "config" / f"{name}.json").write_text(json.dumps(content))
            (folder / "input" / "data").mkdir()
            (folder / "input" / "data" / "train").symlink_to(shades)
            environ = {**kept, "SAGEMAKER_BASE_DIR": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            with (folder / "log").open("wb") as log:
                command = [sys.executable, "-c", code]
                running.append(subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log))
        return running

    yield start
    for process in running:
        end(process)


def test_two_hosts_of_a_job_train_as_one_process_and_the_first_writes_the_model(
    settings: Settings, job: Job, tmp_path: Path
) -> None:
    # 33 images in batches of 14: the last has 5. Each host computes its features in a folder that only it sees.
    values = {"batch_size": 14, "learning_rate": 1e-3, "epochs": 2, "feature_cache": "on"}
    running = job(**values)
    run(alone := settings(**values, output=tmp_path / "alone"))
    first, second = (tmp_path / host for host in HOSTS)
    assert [process.wait(START_LIMIT_S) for process in running] == [0, 0], log_of(first) + log_of(second)
    open_artifact(first / "model").verify()
    assert "output/data/metrics.jsonl" in files_of(first) and "output/failure" not in files_of(first)
    assert files_of(second) == set()
    for host, said in ((first, 1), (second, 0)):
        assert log_of(host).count("epoch=2/2") == said
        assert log_of(host).count("torchrun: 1 process(es) on each of 2 host(s) (127.0.0.1, 127.0.0.2)") == 1
    epochs = list(zip(history(alone.output), history(first / "model"), strict=True))
    assert len(epochs) == 2
    for one, together in epochs:
        for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "learning_rate"):
            assert together[name] == pytest.approx(one[name], rel=SAME), name


@pytest.mark.parametrize("lost", [0, 1], ids=["first", "second"])
def test_where_all_of_one_host_is_killed_the_other_ends_soon_and_says_so(job: Job, tmp_path: Path, lost: int) -> None:
    running, first, left = job(epochs=100_000, batch_size=9), tmp_path / HOSTS[0], tmp_path / HOSTS[1 - lost]
    deadline_s = time.monotonic() + START_LIMIT_S
    while "epoch=2/" not in log_of(first):
        assert [process.poll() for process in running] == [None, None], log_of(first)
        assert time.monotonic() < deadline_s, log_of(first)
        time.sleep(0.05)
    end(running[lost])
    assert running[1 - lost].wait(END_LIMIT_S) == 1, log_of(left)
    sentence, _, trace = failure_of(left).partition("\n\n")
    assert sentence.startswith(f"Training process {1 - lost} has lost the others (")
    assert sentence.endswith("started again, the training goes on from its last checkpoint, if there is one.")
    assert "gloo" not in sentence and "Traceback" in trace
    assert f"ERROR {sentence}" in log_of(left) and "A fault of this program" not in log_of(left)
    assert not list(tmp_path.rglob("manifest.json"))
