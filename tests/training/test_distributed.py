"""Two processes make the steps of one, and what they leave one can go on with."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from service.model.artifact import open_artifact
from training.checkpoint import FILE
from training.config import TrainingConfig
from training.distributed import ALONE, Group
from training.errors import PeerError
from training.run import run

Settings = Callable[..., TrainingConfig]
Launch = Callable[..., subprocess.Popen[bytes]]
ROOT = Path(__file__).parents[2]
TWO = ("training.elastic", "--standalone", "--nproc-per-node", "2", "-m")
LIMIT_S = 200
SAME = 1e-3
"""Relative: sums in another order, enlarged by batch norm over a few near-equal images."""


def history(folder: Path) -> list[dict[str, float]]:
    return [dict(epoch) for epoch in open_artifact(folder).manifest.metrics["history"]]


@pytest.mark.parametrize(
    "values",
    [
        {"feature_cache": "on", "learning_rate": 1e-3},
        # Every image's partner is in the other process's share, but for the first one's of the batch of 5.
        {"batch_size": 14, "mixup": 0.4, "cutmix": 1.0, "learning_rate": 1e-3},
        # 33 images in batches of 14: the last has 5, of which one process gets 3, the other 2.
        pytest.param(
            {
                "freeze": "stem,layer1",
                "batch_size": 14,
                "augment": "flip-crop",
                "learning_rate": 1e-3,
                "clip_norm": 1.0,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"unfreeze_at": 2, "ema_decay": 0.5, "learning_rate": 1e-3, "early_stopping": 5}, marks=pytest.mark.slow
        ),
    ],
    ids=["cached", "mixed", "last batch odd", "unfrozen later"],
)
def test_two_processes_train_as_one_and_write_one_artifact(
    settings: Settings, launch: Launch, tmp_path: Path, values: dict[str, object]
) -> None:
    one, two = (settings(**values, output=tmp_path / name) for name in ("one", "two"))
    log = tmp_path / "log"
    process = launch(two, log, *TWO)
    run(one)
    assert process.wait(LIMIT_S) == 0, log.read_text()
    epochs = list(zip(history(one.output), history(two.output), strict=True))
    assert len(epochs) == 2
    for alone, together in epochs:
        for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "learning_rate"):
            assert together[name] == pytest.approx(alone[name], rel=SAME), name
    assert log.read_text().count("epoch=1/") == 1
    assert len(list(tmp_path.rglob("manifest.json"))) == 2
    assert not list(tmp_path.rglob(f"{FILE}*"))


@pytest.mark.slow
def test_sigterm_ends_both_and_one_process_goes_on_from_their_checkpoint(
    settings: Settings, launch: Launch, tmp_path: Path
) -> None:
    config, log = settings(epochs=300, side=16, batch_size=4), tmp_path / "log"
    process = launch(config, log, *TWO)
    deadline_s = time.monotonic() + LIMIT_S
    while "epoch=2/" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert (config.checkpoint_folder / FILE).is_file(), log.read_text()
    assert not (config.output / "manifest.json").exists()
    before = len(log.read_text())
    alone = launch(config, log)
    while "epoch=" not in log.read_text()[before:]:
        assert alone.poll() is None, log.read_text()[before:]
        assert time.monotonic() < deadline_s + LIMIT_S
        time.sleep(0.02)
    assert f"resumed from {config.checkpoint_folder}: epoch " in log.read_text()[before:]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[/gloo/tcp/pair.cc:537] Read error. This is typically caused by a bug. GLHF!"), "Read error"),
        (RuntimeError("[/gloo/tcp/pair.cc:1] Connection closed by peer [::1]:9"), "Connection closed by peer [::1]:9"),
        (DistNetworkError("Connection reset by peer\nException raised from recvBytes"), "Connection reset by peer"),
        (DistStoreError("wait timeout after 9ms, keys: /0"), "wait timeout after 9ms, keys: /0"),
        (
            DistBackendError("NCCL error, system error\nLast error:\nsocket: Connection closed by remote peer"),
            "socket: Connection closed by remote peer",
        ),
    ],
)
def test_what_the_network_says_of_a_lost_process_becomes_a_sentence(error: RuntimeError, said: str) -> None:
    sentence = rf"^Training process 1 has lost the others \({re.escape(said)}\): one of them,"
    with pytest.raises(PeerError, match=sentence), Group(1, 2).peer_errors():
        raise error


@pytest.mark.parametrize(
    ("group", "error"),
    [
        (ALONE, RuntimeError("[/src/gloo/pair.cc:537] Read error")),
        (Group(0, 2), RuntimeError("the loader timed out")),
        (Group(0, 2), RuntimeError("[enforce fail at /gloo/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 20 vs 4")),
        (Group(0, 2), DistBackendError("NCCL error, invalid usage\nLast error:\nDuplicate GPU detected")),
        (Group(0, 2), DistNetworkError("The server socket has failed to listen: EADDRINUSE\nException raised from x")),
    ],
)
def test_other_errors_stay_as_they_are(group: Group, error: RuntimeError) -> None:
    with pytest.raises(RuntimeError) as caught, group.peer_errors():
        raise error
    assert caught.value is error


FAILS_FIRST = """
import sys, time
import training.command_line as c, training.run as r
from training.distributed import Group
from training.environment import ranks, write_failure
from training.errors import DataError

def fail(config, callbacks, group, device, int8):
    if group.is_first:
        raise DataError("This picture is broken.")
    group.any(True, device)

def slowly(*given):
    time.sleep(0 if place.rank else 2)
    write_failure(*given)

place = ranks()
r._run, c.write_failure = fail, slowly
config = r.TrainingConfig.create({"data": sys.argv[1], "output": sys.argv[2], "device": "cpu", "quantize": "off"})
sys.exit(c.exit_status(lambda: r.run(config, (), Group(**vars(place)))))
"""


def test_what_failed_first_is_the_reason_and_not_what_the_others_say_of_it(shades: Path, tmp_path: Path) -> None:
    (tmp_path / "input" / "config").mkdir(parents=True)
    (tmp_path / "input" / "config" / "hyperparameters.json").write_text("{}")
    (tmp_path / "fails.py").write_text(FAILS_FIRST)
    command = [sys.executable, "-m", *TWO[:-1], str(tmp_path / "fails.py"), str(shades), str(tmp_path / "trained")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SAGEMAKER_BASE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "output" / "failure").read_text().startswith("This picture is broken.\n\n"), done.stdout


BATCH_NORM = """
import json, sys, torch
from torch import nn
from training.distributed import Group, share_statistics
from training.environment import ranks

def main():
    group = Group(**vars(ranks()))
    group.join(torch.device("cpu"))
    torch.manual_seed(0)
    batch = torch.randn(5, 3, 4, 4) * 2 + 30
    wanted = torch.randn(5, 3, 4, 4)
    plain, shared = nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))
    for norm in (plain, shared[0]):
        nn.init.constant_(norm.weight, 1.5); nn.init.constant_(norm.bias, 0.3)
    share_statistics(shared, group)
    worst = {}
    def compare(name, one, other):
        worst[name] = max(worst.get(name, 0.0), float((one - other).detach().abs().max()))
    for _ in range(3):
        whole = batch.clone().requires_grad_()
        expected = plain(whole)
        plain.zero_grad(); (expected * wanted).sum().backward()
        mine = group.share(5)
        part = batch[mine].clone().requires_grad_()
        got = shared(part)
        shared.zero_grad(); (got * wanted[mine]).sum().backward()
        compare("output", got, expected[mine])
        compare("input gradient", part.grad, whole.grad[mine])
        compare("weight gradient", group.sum(shared[0].weight.grad.clone()), plain.weight.grad)
        compare("bias gradient", group.sum(shared[0].bias.grad.clone()), plain.bias.grad)
        compare("mean", shared[0].running_mean, plain.running_mean)
        compare("variance", shared[0].running_var, plain.running_var)
    plain.eval(); shared.eval()
    compare("evaluation", shared(batch), plain(batch))
    worst["tracked"] = int(shared[0].num_batches_tracked) - int(plain.num_batches_tracked)
    if group.is_first:
        open(sys.argv[1], "w").write(json.dumps(worst))
    group.leave()

main()
"""


def test_batch_norm_over_two_processes_is_batch_norm_of_the_joined_batch(tmp_path: Path) -> None:
    (tmp_path / "compare.py").write_text(textwrap.dedent(BATCH_NORM))
    command = [sys.executable, "-m", *TWO[:-1], str(tmp_path / "compare.py"), str(tmp_path / "found.json")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {
        "output", "input gradient", "weight gradient", "bias gradient", "mean", "variance", "evaluation", "tracked",
    }  # fmt: skip
    assert all(difference < 2e-4 for difference in found.values()), found
