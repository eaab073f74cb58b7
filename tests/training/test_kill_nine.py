"""kill -9 at any moment: nothing half-written is ever trained on or served, and the end is that of a quiet run."""

import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from service.model.artifact import open_artifact
from training import checkpoint
from training.config import TrainingConfig
from training.run import run

Settings = Callable[..., TrainingConfig]
Launch = Callable[..., subprocess.Popen[bytes]]
LIMIT_S = 120


def outcome(folder: Path) -> dict[str, Any]:
    manifest = open_artifact(folder).manifest
    metrics = json.loads(json.dumps(manifest.metrics, default=list))
    for epoch in metrics["history"]:
        del epoch["seconds"]
    return {"metrics": metrics, "weights": manifest.files["weights"].sha256}


def assert_nothing_is_broken(config: TrainingConfig) -> None:
    """A checkpoint, if there, is whole; so is an artifact; a cache with facts has the size they tell."""
    path = config.checkpoint_folder / checkpoint.FILE
    if path.exists():
        stored = torch.load(_payload(path), weights_only=True)["facts"]
        assert checkpoint.load(config.checkpoint_folder, config, json.loads(stored)) is not None
    if (config.output / "manifest.json").exists():
        assert open_artifact(config.output).weights()
    for facts_path in config.cache_folder.glob("*/facts.json"):
        told = json.loads(facts_path.read_text())
        size = 2
        for length in told["shape"]:
            size *= length
        assert (facts_path.parent / "features.bf16").stat().st_size == size


def _payload(path: Path) -> Any:
    import io

    return io.BytesIO(path.read_bytes()[checkpoint.DIGEST_LENGTH :])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kills", [20])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(
    settings: Settings, launch: Launch, tmp_path: Path, kills: int
) -> None:
    values = {
        "epochs": 6, "feature_cache": "on", "checkpoint_every_s": 0, "side": 16, "ema_decay": 0.9, "early_stopping": 5,
    }  # fmt: skip
    quiet = settings(**values, output=tmp_path / "quiet", cache_folder=tmp_path / "quiet-features")
    config, log = settings(**values, output=tmp_path / "killed"), tmp_path / "log"
    moments = random.Random(kills)
    process = launch(config, log)
    run(quiet)
    killed = tries = 0
    while killed < kills:
        tries += 1
        assert tries <= 3 * kills, "runs end before they can be killed"
        shown = len(log.read_text())
        deadline_s = time.monotonic() + LIMIT_S
        while "images to train on" not in log.read_text()[shown:] and process.poll() is None:
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 2))
        process.kill()
        status = process.wait()
        assert status in (-9, 0), log.read_text()
        killed += status == -9  # a run that had ended was not hit: it does not count, and the next begins anew
        assert_nothing_is_broken(config)
        process = launch(config, log)
    assert process.wait(LIMIT_S) == 0, log.read_text()
    assert killed == kills
    assert "Traceback" not in log.read_text()
    assert "damaged" not in log.read_text()
    assert outcome(config.output) == outcome(quiet.output)
