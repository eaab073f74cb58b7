"""A run that is stopped goes on as if it had not been: the same figures and the same weights, to the last bit."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.model.artifact import open_artifact
from service.model.interrupts import leave
from training.callbacks import Callback, RunContext, Step, StopTraining
from training.checkpoint import FILE, claimed
from training.command_line import exit_status
from training.config import TrainingConfig
from training.epoch_metrics import EpochMetrics
from training.errors import CheckpointError
from training.interruption import Interrupted, watched
from training.run import run

Settings = Callable[..., TrainingConfig]
Launch = Callable[..., subprocess.Popen[bytes]]
LIMIT_S = 150
SAVED_S = 60
"""Half of what SageMaker gives a job between SIGTERM and SIGKILL, 120 s (StopTrainingJob)."""
ROOT = Path(__file__).parents[2]
STEPS = 4
"""Of an epoch of the small run."""


class Signalled(Callback):
    """Sends this process a real signal at a step; remembers what it is told."""

    def __init__(self, *steps: int, number: int = signal.SIGTERM) -> None:
        self._steps, self._signal = steps, number
        self.first: int | None = None
        self.steps: list[int] = []
        self.ended: list[BaseException | None] = []

    def on_run_start(self, context: RunContext) -> None:
        self.first = context.first_step

    def on_step_end(self, step: Step) -> None:
        self.steps.append(step.number)
        if step.number in self._steps:
            os.kill(os.getpid(), self._signal)

    def on_run_end(self, error: BaseException | None) -> None:
        self.ended.append(error)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run measured, but for the time, and its weights."""
    manifest = open_artifact(folder).manifest
    metrics = json.loads(json.dumps(manifest.metrics, default=list))
    for epoch in metrics["history"]:
        del epoch["seconds"]
    return {"metrics": metrics, "weights": manifest.files["weights"].sha256, "frozen": manifest.architecture.frozen}


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "cached": {"feature_cache": "on"},
    "everything": {
        "freeze": "stem,layer1", "ema_decay": 0.9, "early_stopping": 9, "unfreeze_at": 2, "schedule": "one-cycle",
        "augment": "flip-crop", "optimizer": "adamw", "weight_decay": 0.1, "layer_decay": 0.7, "clip_norm": 1.0,
        "side": 16, "label_smoothing": 0.1,
    },
    "blended": {"mixup": 0.4, "cutmix": 1.0, "augment": "rand", "schedule": "cosine", "warmup_epochs": 0.5, "side": 16},
    "cached, then unfrozen": {"feature_cache": "on", "unfreeze_at": 2, "ema_decay": 0.9, "augment": "none", "side": 16},
    "cached, early stopping": {"feature_cache": "on", "early_stopping": 1, "ema_decay": 0.5, "learning_rate": 0.1},
}  # fmt: skip
QUICK = ("plain", "cached")
"""Those that `make test` runs; make test-slow runs all."""


@pytest.mark.parametrize(
    "variant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_a_run_stopped_at_three_steps_ends_as_one_that_was_not(
    settings: Settings, tmp_path: Path, variant: str
) -> None:
    values = {"epochs": 3, "checkpoint_every_s": 1e9, **VARIANTS[variant]}
    undisturbed = settings(**values, output=tmp_path / "undisturbed")
    run(undisturbed)
    config = settings(**values, output=tmp_path / "stopped")
    stops = (2, STEPS, STEPS + 3)  # within an epoch, at its end, within the next
    done = 0
    for stop in stops:
        callback = Signalled(stop)
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            run(config, [callback])
        assert (callback.first, callback.steps) == (done + 1, list(range(done + 1, stop + 1)))
        assert isinstance(callback.ended[0], Interrupted)
        assert (config.checkpoint_folder / FILE).is_file()
        assert not (config.output / "manifest.json").exists()
        done = stop
    run(config)
    assert outcome(config.output) == outcome(undisturbed.output)
    assert not (config.checkpoint_folder / FILE).exists()


def test_a_checkpoint_at_each_epochs_end_changes_nothing_and_goes_with_the_run(
    settings: Settings, tmp_path: Path
) -> None:
    for name, every_s in (("often", 0), ("never", 1e9)):
        run(settings(side=16, checkpoint_every_s=every_s, output=tmp_path / name))
    assert outcome(tmp_path / "often") == outcome(tmp_path / "never")
    assert not list(tmp_path.rglob(FILE))


class FullDisk(Callback):
    """From the first step on, checkpoints cannot be written: something is where they go."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_step_end(self, step: Step) -> None:
        (self._path / "in the way").mkdir(parents=True, exist_ok=True)


def test_checkpoints_that_cannot_be_written_cost_warnings_and_not_the_run(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(side=16, epochs=2, checkpoint_every_s=0)
    run(config, [FullDisk(config.checkpoint_folder / FILE)])
    assert len(open_artifact(config.output).manifest.metrics["history"]) == 2
    warnings = [record.getMessage() for record in caplog.records if "The training goes on without it" in record.msg]
    assert len(warnings) == 3 and "The checkpoint cannot be written into" in warnings[0]
    with pytest.raises(CheckpointError, match="cannot be written into"):  # it would be said to go on, and could not
        run(
            settings(side=16, output=tmp_path / "other"),
            [FullDisk(tmp_path / "other-run/checkpoints" / FILE), Signalled(2)],
        )


def test_a_run_that_goes_on_with_other_settings_is_refused_and_its_checkpoint_stays(
    settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(settings(side=16), [Signalled(1)])
    kept = (settings().checkpoint_folder / FILE).read_bytes()
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.01 \(now 0\.5\)"):
        run(settings(side=16, learning_rate=0.5))
    assert (settings().checkpoint_folder / FILE).read_bytes() == kept


def test_a_run_folder_in_which_another_training_writes_is_refused_wherever_checkpoints_lie(
    settings: Settings, tmp_path: Path
) -> None:
    config = settings(side=16, epochs=1, checkpoints=tmp_path / "elsewhere")
    for folder, flag in ((settings().checkpoint_folder, "--output"), (tmp_path / "elsewhere", "--checkpoints")):
        with claimed(folder, flag), pytest.raises(CheckpointError, match=f"Another training .* or name another {flag}"):
            run(config)
    run(config)


def test_a_run_that_nothing_watches_keeps_no_verdicts_and_no_profile_of_the_one_before(settings: Settings) -> None:
    names = ("rules.json", "observations.jsonl", "profile.json", "trace.json.gz")
    settings().folder.mkdir(parents=True)
    for name in names:
        (settings().folder / name).write_text("of another run")
    with pytest.raises(Interrupted):
        run(settings(side=16, epochs=1), [Signalled(1)])
    assert not [name for name in names if (settings().folder / name).exists()]
    (settings().folder / "rules.json").write_text("of this run")
    run(settings(side=16, epochs=1))
    assert (settings().folder / "rules.json").read_text() == "of this run"


def test_a_run_that_goes_on_without_the_features_it_began_with_says_that_its_model_will_differ(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(side=16, cache_folder=tmp_path / "cache", feature_cache="auto")
    with pytest.raises(Interrupted):
        run(config, [Signalled(2)])
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    run(config)
    said = "the run began from cached features and goes on without them: the model will differ, by rounding"
    assert said in caplog.text


def test_signals_that_are_ignored_stay_so_while_a_run_is_watched(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with watched() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal_number is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_signals_are_as_before_after_a_run(settings: Settings) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run(settings(side=16, epochs=1))
    with pytest.raises(Interrupted):
        run(settings(side=16, epochs=1), [Signalled(1)])
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_run_in_a_thread_trains_without_hearing_signals(settings: Settings) -> None:
    thread = threading.Thread(target=run, args=(settings(side=16, epochs=1),))
    thread.start()
    thread.join(LIMIT_S)
    assert (settings().output / "manifest.json").exists()


# Callbacks that end a run ---------------------------------------------------------------------------------------


class Raising(Callback):
    """Raises at one moment; remembers how the run ended."""

    def __init__(self, error: Exception, step: int | None = None, epoch: int | None = None) -> None:
        self._error, self._step, self._epoch = error, step, epoch
        self.ended: list[BaseException | None] = []
        self.steps = 0

    def on_step_end(self, step: Step) -> None:
        self.steps += 1
        if step.number == self._step:
            raise self._error

    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        if metrics.epoch == self._epoch:
            raise self._error

    def on_run_end(self, error: BaseException | None) -> None:
        self.ended.append(error)


@pytest.mark.parametrize("moment", [{"step": 2}, {"epoch": 1}], ids=["step", "epoch"])
def test_an_error_in_a_callback_reaches_every_callbacks_end_of_run(settings: Settings, moment: dict[str, int]) -> None:
    error = ValueError("disk gone")
    raising, other = Raising(error, **moment), Raising(error)
    with pytest.raises(ValueError, match="disk gone"):
        run(settings(side=16), [raising, other])
    assert raising.ended == other.ended == [error]
    assert not (settings().output / "manifest.json").exists()


@pytest.mark.parametrize(
    ("moment", "steps", "epochs"), [({"step": 6}, 6, 2), ({"step": 1}, 1, 1), ({"epoch": 2}, 8, 2)]
)
def test_a_callback_that_stops_the_training_ends_it_in_good_order(
    settings: Settings, caplog: pytest.LogCaptureFixture, moment: dict[str, int], steps: int, epochs: int
) -> None:
    caplog.set_level(logging.INFO)
    callback = Raising(StopTraining("loss not decreasing"), **moment)
    run(settings(side=16, epochs=3), [callback])
    metrics = open_artifact(settings().output).manifest.metrics
    assert metrics["stopped"] == "loss not decreasing"
    assert [epoch["epoch"] for epoch in metrics["history"]] == list(range(1, epochs + 1))
    assert callback.steps == steps
    assert [str(error) for error in callback.ended] == ["loss not decreasing"]
    assert f"stopped after epoch {epochs} of 3: loss not decreasing" in caplog.messages
    assert not (settings().checkpoint_folder / FILE).exists()


def test_a_run_that_is_not_stopped_ends_with_no_error_and_no_word_of_it(settings: Settings) -> None:
    callback = Raising(ValueError())
    run(settings(side=16, epochs=1), [callback])
    assert callback.ended == [None]
    assert "stopped" not in open_artifact(settings().output).manifest.metrics


# As a process ---------------------------------------------------------------------------------------------------


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_stopped_within_an_epoch_saves_and_the_same_command_goes_on(
    settings: Settings, launch: Launch, tmp_path: Path, number: int, status: int
) -> None:
    values = {"epochs": 12, "batch_size": 2, "feature_cache": "on", "side": 16}  # 16 steps an epoch
    undisturbed = settings(**values, output=tmp_path / "undisturbed")
    config, log = settings(**values, output=tmp_path / "stopped"), tmp_path / "log"
    process = launch(config, log)
    wait_for("epoch=2/", log, process)
    process.send_signal(number)
    assert process.wait(SAVED_S) == status, log.read_text()
    assert f"stopped by {signal.Signals(number).name}: a checkpoint is written" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert (config.checkpoint_folder / FILE).is_file()
    assert not (config.output / "manifest.json").exists()
    again = launch(config, log)
    assert again.wait(LIMIT_S) == 0, log.read_text()
    assert f"resumed from {config.checkpoint_folder}: epoch " in log.read_text()
    run(undisturbed)
    assert outcome(config.output) == outcome(undisturbed.output)


@pytest.mark.parametrize("moment", ["train: decoding", "feature cache"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_process_stopped_before_its_first_step_ends_at_once_and_leaves_no_half_files(
    settings: Settings, launch: Launch, tmp_path: Path, moment: str, number: int, status: int
) -> None:
    many = {"feature_cache": "on", "augment": "flip-crop", "cache_crops": 64}
    config, log = settings(**many), tmp_path / "log"
    process = launch(config, log)
    if moment == "feature cache":
        deadline_s = time.monotonic() + LIMIT_S
        while not list(config.cache_folder.glob("*/features.bf16")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
    else:
        wait_for("images to train on", log, process)
    process.send_signal(number)
    assert process.wait(20) == status, log.read_text()
    assert "Stopped before the end; the same command goes on" in log.read_text()
    assert not list(config.cache_folder.glob("*/facts.json"))
    assert not (config.output / "manifest.json").exists()


def test_a_second_signal_ends_a_process_at_once(settings: Settings, request: pytest.FixtureRequest) -> None:
    # A shell that puts pytest into the background has it ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    class Twice(Signalled):
        def on_step_end(self, step: Step) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
            raise AssertionError("the second signal was not heard")

    callback = Twice()
    with pytest.raises(KeyboardInterrupt):
        run(settings(side=16), [callback])
    assert isinstance(callback.ended[0], KeyboardInterrupt)
    assert not (settings().checkpoint_folder / FILE).exists()


# Before and after a command runs ---------------------------------------------------------------------------------


def commands() -> list[str]:
    """What can be run with `python -m`."""
    files = [path for path in (ROOT / "training").rglob("*.py") if '\nif __name__ == "__main__":\n' in path.read_text()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return sorted(name.removesuffix(".__main__") for name in names)


@pytest.mark.parametrize("command", commands())
def test_ctrl_c_while_a_command_imports_ends_it_without_a_word(command: str, tmp_path: Path) -> None:
    # Stands in for the standard library's, which every command imports first; real imports take seconds.
    (tmp_path / "logging.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs are deaf to it
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=LIMIT_S)[0], process.returncode) == ("", 130)


def test_a_command_catches_ctrl_c_while_it_runs_and_not_before_or_after(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, leave)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert exit_status(lambda: os.kill(os.getpid(), signal.SIGINT)) == 130
    assert exit_status(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == [leave, signal.SIG_DFL]
