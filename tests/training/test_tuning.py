"""The study: trials that are shared, continued, tried again and given up, over a real, tiny training."""

import json
import logging
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from tests.training import tiny_tuning as tiny
from training.config import TrainingConfig
from training.errors import ConfigError, DataError, ExportError, TrainingError
from training.tuning.best import read_best
from training.tuning.config import TuningConfig
from training.tuning.study import MAX_ATTEMPTS, Study
from training.tuning.trials import comparable_step

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "tiny_tuning.py"
PROCESS_LIMIT_S = 120


def open_study(folder: Path, trials: int = 10, seed: int = 0) -> Study:
    tuning = TuningConfig.create({"trials": trials, "epochs_range": "2:6", "batch_sizes": "8,16,32"})
    first = tuning.nearest({}, TrainingConfig(data=folder, output=folder))
    return Study(folder, tuning, first, {"side": 32}, seed)


def states(folder: Path) -> list[str]:
    """How each trial ended, read past our own code."""
    import optuna

    study = optuna.load_study(study_name="resnet34", storage=f"sqlite:///{folder / 'study.sqlite3'}")
    return [trial.state.name for trial in study.trials]


def wait_for(text: str, log: Path) -> str:
    deadline_s = time.monotonic() + PROCESS_LIMIT_S
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline_s, log
        time.sleep(0.02)
    return log.read_text()


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A study that two processes share, and one to be killed; started before needed, as importing torch takes long."""
    shared, killed = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("killed")
    jobs = [f"{shared}/{name}.log:{shared}:6:0.05" for name in ("first", "second")]
    command = [sys.executable, str(SCRIPT), *jobs, f"{killed}/killed.log:{killed}:3:60"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (killed / "output").open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=out, start_new_session=True)
    yield shared, killed
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# A whole study --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrainingConfig]]:
    """The folder of a study of eight trials, and the trainings made."""
    folder = tmp_path_factory.mktemp("whole")
    made: list[TrainingConfig] = []
    study = tiny.tuner(
        folder, tiny.preparation(made=made), {"momentum": 0.8, "side": 64},
        trials=8, batch_sizes="8,16,32,64", epochs_range="2:20",
    )  # fmt: skip
    study.run()
    return folder, made


def test_a_study_makes_as_many_trials_as_asked_for(whole: tuple[Path, list[TrainingConfig]]) -> None:
    folder, made = whole
    assert len(made) == len(states(folder)) == 8
    assert len({config.learning_rate for config in made}) == 8
    assert all(1e-4 <= config.learning_rate <= 1e-1 for config in made)
    assert all(config.batch_size in (8, 16, 32, 64) and 2 <= config.epochs <= 20 for config in made)
    assert {(config.momentum, config.side) for config in made} == {(0.8, 64)}


def test_the_first_trial_is_the_reference_moved_into_the_ranges(whole: tuple[Path, list[TrainingConfig]]) -> None:
    first = whole[1][0]
    assert (first.learning_rate, first.batch_size, first.epochs) == (0.017483127170473314, 64, 20)


def test_hopeless_trials_are_pruned(whole: tuple[Path, list[TrainingConfig]]) -> None:
    assert {"COMPLETE", "PRUNED"} == set(states(whole[0]))


def test_best_json_makes_the_configuration_of_the_best_trial(whole: tuple[Path, list[TrainingConfig]]) -> None:
    folder, made = whole
    content = json.loads((folder / "best.json").read_text())
    trial = made[content["trial"]]
    config = TrainingConfig.create({**read_best(folder / "best.json"), "data": trial.data, "output": trial.output})
    assert config == trial.model_copy(update={"run_folder": None})
    assert content["value"] == content["reached"]["validation_accuracy"] > 0.7
    assert sum(content["trials"].values()) == 8
    assert content["dataset"] == tiny.DATASET


def test_the_plots_are_pictures(whole: tuple[Path, list[TrainingConfig]]) -> None:
    for name in ("history.png", "importances.png", "parallel_coordinates.png"):
        with Image.open(whole[0] / name) as picture:
            assert min(picture.size) > 200


def test_a_finished_study_prepares_no_data_and_trains_nothing(
    whole: tuple[Path, list[TrainingConfig]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder, _ = whole
    before = (folder / "best.json").read_text()

    def never(_config: TrainingConfig) -> object:
        raise AssertionError

    ranges = {"batch_sizes": "8,16,32,64", "epochs_range": "2:20"}
    tiny.tuner(folder, never, {"momentum": 0.8, "side": 64}, trials=8, **ranges).run()  # type: ignore[arg-type]
    assert (folder / "best.json").read_text() == before
    rows = [line for line in caplog.messages if line.lstrip()[:1].isdigit()]
    assert len(rows) == 8
    assert "complete" in rows[0]


def test_each_trial_has_its_row_before_the_next_one_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tiny.tuner(tmp_path, tiny.preparation(), trials=3).run()
    told = [re.match(r"(trial \d):| +(\d)  ", line) for line in caplog.messages]
    assert [one or f"row {other}" for one, other in (found.groups() for found in told if found)] == [
        "trial 0", "row 0", "trial 1", "row 1", "trial 2", "row 2",
    ]  # fmt: skip


def test_tpe_draws_the_learning_rate_on_a_log_scale(tmp_path: Path) -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.samplers import TPESampler

    study = open_study(tmp_path)
    trial = study.claim()
    assert trial is not None
    assert trial.distributions == {
        "learning_rate": FloatDistribution(1e-4, 1e-1, log=True), "batch_size": CategoricalDistribution((8, 16, 32)),
        "epochs": IntDistribution(2, 6),
    }  # fmt: skip
    assert type(study._study.sampler) is TPESampler
    study.close()


# Going on -------------------------------------------------------------------------------------------------------


def test_a_continued_study_makes_what_is_left_as_it_would_have(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    at_once: list[TrainingConfig] = []
    in_parts: list[TrainingConfig] = []
    tiny.tuner(tmp_path / "a", tiny.preparation(made=at_once), trials=5).run()
    tiny.tuner(tmp_path / "b", tiny.preparation(made=in_parts), trials=3).run()
    tiny.tuner(tmp_path / "b", tiny.preparation(made=in_parts), trials=5).run()
    tuned = ("learning_rate", "batch_size", "epochs")
    assert len(in_parts) == 5
    assert [[getattr(c, n) for n in tuned] for c in at_once] == [[getattr(c, n) for n in tuned] for c in in_parts]


def test_a_killed_process_leaves_a_trial_that_is_tried_again(folders: tuple[Path, Path]) -> None:
    folder = folders[1]
    text = wait_for("trial 0:", folder / "killed.log")
    assert states(folder) == ["RUNNING"]
    os.kill(int(text.split()[1]), signal.SIGKILL)
    wait_until_dead(int(text.split()[1]))
    made: list[TrainingConfig] = []
    tiny.tuner(folder, tiny.preparation(made=made), trials=3).run()
    assert made[0].learning_rate == TrainingConfig(data=folder, output=folder).learning_rate
    assert len(made) == 3
    assert states(folder)[:2] == ["FAIL", "COMPLETE"]
    assert len(states(folder)) == 4


def wait_until_dead(pid: int) -> None:
    deadline_s = time.monotonic() + PROCESS_LIMIT_S
    while time.monotonic() < deadline_s:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.02)
    raise AssertionError


@pytest.mark.slow
def test_two_processes_share_the_trials(folders: tuple[Path, Path]) -> None:
    texts = [wait_for("status", folders[0] / f"{name}.log") for name in ("first", "second")]
    assert all("status 0" in text and "best hyperparameters" in text for text in texts), texts
    assert len(states(folders[0])) == 6
    started = [text.count(": learning_rate=") - text.count("hyperparameters: learning_rate=") for text in texts]
    assert sum(started) == 6
    assert min(started) > 0


def test_a_trial_whose_process_dies_again_and_again_counts_as_failed(tmp_path: Path) -> None:
    for number in range(MAX_ATTEMPTS):
        study = open_study(tmp_path)
        trial = study.claim()
        assert trial is not None
        assert trial.number == number
        assert trial.params["epochs"] == 6
        study.close()  # as if killed: nothing is told, the locks are free
    study = open_study(tmp_path)
    other = study.claim()
    assert other is not None
    assert other.params["learning_rate"] != trial.params["learning_rate"]
    study.close()


def test_an_interrupted_trial_is_tried_again_however_often(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for _ in range(MAX_ATTEMPTS + 2):
        trial = study.claim()
        assert trial is not None
        assert trial.params["learning_rate"] == 0.017483127170473314
        study.finish(trial, "FAIL", ended="interrupted")
    study.close()


def test_an_error_ends_the_study_and_the_trial_is_tried_again(tmp_path: Path) -> None:
    made: list[TrainingConfig] = []

    def broken(_config: TrainingConfig) -> object:
        raise DataError("The disk is gone.")

    with pytest.raises(DataError):
        tiny.tuner(tmp_path, broken, trials=2).run()  # type: ignore[arg-type]
    tiny.tuner(tmp_path, tiny.preparation(made=made), trials=2).run()
    assert made[0].learning_rate == 0.017483127170473314
    assert states(tmp_path) == ["FAIL", "COMPLETE", "COMPLETE"]


def test_when_the_time_is_over_the_trial_under_way_is_stopped_and_tried_again(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="more time"):
        tiny.tuner(tmp_path, tiny.preparation(epoch_s=0.3), trials=2, timeout_minutes=0.2 / 60).run()
    assert states(tmp_path) == ["FAIL"]
    made: list[TrainingConfig] = []
    tiny.tuner(tmp_path, tiny.preparation(made=made), trials=2).run()
    assert len(made) == 2


# What ends badly ------------------------------------------------------------------------------------------------


def test_diverged_trials_do_not_end_a_study_and_are_never_the_best(tmp_path: Path) -> None:
    tiny.tuner(tmp_path, tiny.preparation(), trials=6, learning_rate_range="1e36:3e38").run()
    content = json.loads((tmp_path / "best.json").read_text())
    assert content["trials"]["diverged"] >= 2
    assert content["trials"]["complete"] >= 1
    assert math.isfinite(content["reached"]["validation_loss"])


def test_a_study_without_any_result_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="None of 2 trials ended with a result; try smaller learning rates"):
        tiny.tuner(tmp_path, tiny.preparation(), trials=2, learning_rate_range="3e38:3.1e38").run()
    assert not (tmp_path / "best.json").exists()


def test_a_study_goes_on_with_the_same_settings_and_data_only(tmp_path: Path) -> None:
    tiny.tuner(tmp_path, tiny.preparation(), trials=1).run()
    with pytest.raises(ConfigError, match=r"was begun with side=32, not 64; epochs_range=.*not"):
        tiny.tuner(tmp_path, tiny.preparation(), {"side": 64}, trials=2, epochs_range="2:9").run()
    with pytest.raises(ConfigError, match=r"--data: the study there was begun with name=points, not others"):
        tiny.tuner(tmp_path, tiny.preparation(dataset={**tiny.DATASET, "name": "others"}), trials=2).run()


def test_a_study_that_was_emptied_or_replaced_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="training")
    folder, other = tmp_path / "a", tmp_path / "b"
    for each in (folder, other):
        each.mkdir()
        for _ in range(2):
            study = open_study(each)
            study.claim()
            study.close()
    assert caplog.messages == []
    (folder / "study.sqlite3").write_bytes(b"")
    open_study(folder).close()
    shutil.copy(other / "study.sqlite3", folder)
    for _ in range(2):
        open_study(folder).close()
    said = f"{folder / 'study.sqlite3'} is not the study that was here before, which was removed, emptied or replaced; "
    assert caplog.messages == [
        f"{said}a new one begins.", f"{said}the one there now goes on, with 2 trial(s) made or begun.",
    ]  # fmt: skip


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.sqlite3").write_bytes(b"no data base" * 100)
    with pytest.raises(ConfigError, match=r"study\.sqlite3 cannot be read as a study"):
        open_study(tmp_path)


@pytest.mark.parametrize("table", ["trials", "trial_values", "trial_user_attributes"])
def test_a_study_that_is_damaged_ends_in_a_sentence(tmp_path: Path, table: str) -> None:
    tiny.tuner(tmp_path, tiny.preparation(), trials=2).run()
    path = tmp_path / "study.sqlite3"
    with closing(sqlite3.connect(path)) as base:
        (page,) = base.execute("select rootpage from sqlite_master where name = ?", (table,)).fetchone()
        (size,) = base.execute("pragma page_size").fetchone()
    whole = path.read_bytes()
    path.write_bytes(whole[: (page - 1) * size] + bytes(range(256)) * (size // 256) + whole[page * size :])
    with pytest.raises((ConfigError, ExportError), match=r"study\.sqlite3 cannot be read .*\(.*malformed"):
        tiny.tuner(tmp_path, tiny.preparation(), trials=3).run()


def test_a_study_whose_file_takes_no_more_ends_in_a_sentence(tmp_path: Path) -> None:
    tiny.tuner(tmp_path, tiny.preparation(), trials=2).run()
    with closing(sqlite3.connect(tmp_path / "study.sqlite3")) as base, base:  # stands in for a full disk
        base.execute("create trigger full before insert on trials begin select raise(abort, 'disk is full'); end")
    with pytest.raises(ExportError, match=r"cannot be read or written \(disk is full\); free space and run the same"):
        tiny.tuner(tmp_path, tiny.preparation(), trials=3).run()


def test_results_that_are_missing_in_a_study_count_as_none(tmp_path: Path) -> None:
    tiny.tuner(tmp_path, tiny.preparation(), trials=2).run()
    with closing(sqlite3.connect(tmp_path / "study.sqlite3")) as base, base:
        base.execute("delete from trial_user_attributes")
    tiny.tuner(tmp_path, tiny.preparation(), trials=2).run()
    with closing(sqlite3.connect(tmp_path / "study.sqlite3")) as base, base:
        base.execute("delete from trial_values")
    with pytest.raises(TrainingError, match="None of 2 trials ended with a result"):
        tiny.tuner(tmp_path, tiny.preparation(), trials=2).run()


def test_validation_loss_is_minimised_when_asked_for(tmp_path: Path) -> None:
    tiny.tuner(tmp_path, tiny.preparation(), trials=4, metric="validation_loss").run()
    import optuna

    study = optuna.load_study(study_name="resnet34", storage=f"sqlite:///{tmp_path / 'study.sqlite3'}")
    content = json.loads((tmp_path / "best.json").read_text())
    assert content["value"] == content["reached"]["validation_loss"] == study.best_value
    assert study.best_value == min(trial.value for trial in study.trials if trial.state.name == "COMPLETE")


def test_in_a_schedule_trials_are_compared_by_the_share_of_the_run_that_is_over() -> None:
    def step(epoch: int, **values: object) -> int:
        return comparable_step(TrainingConfig.create({"data": "x", "output": "y", **values}), epoch)

    assert [step(7, epochs=epochs) for epochs in (10, 70)] == [7, 7]
    assert [step(7, epochs=epochs, schedule="one-cycle") for epochs in (10, 70)] == [7, 1]


# best.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "is no best.json of format 1"),
        ('{"format": 2}', "is no best.json of format 1"),
        ('{"format": 1, "settings": {}}', 'has no object "hyperparameters"'),
        ('{"format": 1, "settings": {"sides": 3}, "hyperparameters": {}}', "Unknown hyperparameter sides"),
        ('{"format": 1, "settings": {}, "hyperparameters": {"epochs": 0}}', "--epochs 0"),
        ('{"format": 1, "settings": {"data": "x"}, "hyperparameters": {}}', "sets data, which belong to the machine"),
    ],
)
def test_a_wrong_best_json_is_refused_naming_the_file(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "best.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"best.json.* {problem}"):
        read_best(path)


def test_a_missing_best_json_is_refused_and_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"best\.json is missing; `python -m training\.hpo"):
        read_best(tmp_path / "best.json")
