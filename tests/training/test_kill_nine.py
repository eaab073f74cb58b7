"""kill -9 at any moment, from images to report: nothing half-written is ever trained on or served, and each end is that
of a quiet run.
"""

import json
import logging
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from service.model.artifact import open_artifact
from training import checkpoint
from training.config import TrainingConfig

log = logging.getLogger(__name__)

Settings = Callable[..., TrainingConfig]
Launch = Callable[..., subprocess.Popen[bytes]]
LIMIT_S = 900
EPOCHS = 6
PHASES = {
    "images and cache": "images to train on",
    "epochs": r"training [\d,]+ parameters",
    "artifact": rf"epoch={EPOCHS}/{EPOCHS}|: epoch {EPOCHS + 1}, step 0 of it",
    "int8": r"artifact \S+ version",
    "report": r"int8: .* it took",
    "end": r"report: ",
}
"""What a run does, in order, and the line that each begins with."""


def outcome(config: TrainingConfig) -> dict[str, Any]:
    """All that a run leaves, but for times."""
    manifest = open_artifact(config.output).manifest
    metrics = json.loads(json.dumps(manifest.metrics, default=list))
    for epoch in metrics["history"]:
        del epoch["seconds"]
    evaluation = json.loads((config.folder / "evaluation.json").read_text())
    assert (config.folder / "report.html").read_text().endswith("</html>")
    return {
        "metrics": metrics, "evaluation": evaluation,
        "files": {role: file.sha256 for role, file in manifest.files.items()},
    }  # fmt: skip


def phase(lines: str) -> str | None:
    """The last phase that a run's log tells of; None before the first."""
    return next((name for name, begins in reversed(PHASES.items()) if re.search(begins, lines)), None)


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


def wait_for_images(process: subprocess.Popen[bytes], log_file: Path, shown: int) -> None:
    """Wait until the run whose log begins at `shown` has begun, or ended."""
    deadline_s = time.monotonic() + LIMIT_S
    while PHASES["images and cache"] not in log_file.read_text()[shown:] and process.poll() is None:
        assert time.monotonic() < deadline_s, log_file.read_text()
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [20])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(
    settings: Settings, launch: Launch, tmp_path: Path, kills: int
) -> None:
    pytest.importorskip("nncf")
    values = {
        "epochs": EPOCHS, "feature_cache": "on", "checkpoint_every_s": 0, "side": 16, "ema_decay": 0.9,
        "early_stopping": 5, "report": True, "quantize": "on",
    }  # fmt: skip
    quiet = settings(**values, output=tmp_path / "quiet", cache_folder=tmp_path / "quiet-features")
    config, log_file = settings(**values, output=tmp_path / "killed"), tmp_path / "log"
    process = launch(quiet, log_file)
    wait_for_images(process, log_file, 0)
    started_s = time.monotonic()
    assert process.wait(LIMIT_S) == 0, log_file.read_text()
    whole_s, expected = time.monotonic() - started_s, outcome(quiet)
    moments, hit, ends = random.Random(kills), Counter[str](), 0
    while hit.total() < kills:
        assert ends <= 2 * kills, "runs end before they can be killed"
        shown = log_file.stat().st_size
        process = launch(config, log_file)
        wait_for_images(process, log_file, shown)
        time.sleep(moments.uniform(0, whole_s))
        process.kill()
        status = process.wait()
        assert status in (-9, 0), log_file.read_text()
        if status == 0:  # it had ended and was not hit: the next begins anew
            ends += 1
            assert outcome(config) == expected
        else:
            hit[phase(log_file.read_text()[shown:]) or "start"] += 1
        assert_nothing_is_broken(config)
    assert launch(config, log_file).wait(LIMIT_S) == 0, log_file.read_text()
    log.warning("killed in %s; %d runs ended before; a quiet one took %.0f s", dict(hit), ends, whole_s)
    assert {"epochs", "int8", "report"} <= hit.keys(), hit
    assert "Traceback" not in log_file.read_text()
    assert "damaged" not in log_file.read_text()
    assert outcome(config) == expected
