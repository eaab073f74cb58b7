"""The study: trials in an SQLite file that survives every end, shared by all processes that open it.

A trial is claimed, reported on and finished under one lock (`training.tuning.lock`), so that two processes together
make the number of trials asked for, not twice that. One whose process died, or that was interrupted, is tried again
with the same hyperparameters.
"""

import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from training.errors import ConfigError, ExportError
from training.tuning.config import SOURCES, TuningConfig
from training.tuning.lock import StudyLock

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

FILE = "study.sqlite3"
MAX_ATTEMPTS = 3
"""How often a trial may end its process (killed for its memory, say) before it counts as failed."""
WARMUP_EPOCHS = 3
"""No trial is pruned before: the first epochs mostly show how a learning rate starts."""
INTERRUPTED = "interrupted"


class Study:
    """Claims and finishes trials. Open it once in a process."""

    def __init__(
        self, folder: Path, tuning: TuningConfig, first: Mapping[str, object], facts: Mapping[str, object], seed: int
    ) -> None:
        """Open the study in `folder`, or begin one.

        `first`: the hyperparameters that are tuned, with the values to try first. `facts`: what must be the same in
        every trial (JSON).

        Raises: ConfigError when the study there was begun with other facts, or cannot be read.
        """
        import optuna

        optuna.logging.disable_default_handler()  # its lines repeat ours
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._tuning, self._seed = tuning, seed
        self._distributions: dict[str, BaseDistribution] = tuning.distributions(first)
        # With few trials of the default ten drawn at random, TPE has something to learn from and to do.
        self._startup = max(3, tuning.trials // 3)
        self._lock = StudyLock(folder / "study.lock")
        self._path = folder / FILE
        self.running_elsewhere = 0
        """Trials that other processes ran at the last `claim`."""
        with self._access():
            self._study = _open(folder / FILE, tuning.direction, self._startup)
            ranges = {SOURCES[name]: getattr(tuning, SOURCES[name]) for name in self._distributions}
            facts = json.loads(json.dumps({**facts, **ranges, "metric": tuning.metric}))
            self._compare_with_last(folder / FILE)
            known = self._study.user_attrs.get("facts")
            if known is None:  # the queue first: whoever is killed in between begins again
                self._study.enqueue_trial(dict(first), skip_if_exists=True)
                self._study.set_user_attr("facts", facts)
            elif known != facts:
                raise ConfigError(f"--output {folder}: {_difference(known, facts)}; give those, or another folder.")

    def _compare_with_last(self, path: Path) -> None:
        """Say so when the file is not the one that was here when the study was opened last; remember this one."""
        before, name = self._lock.name(), self._study.user_attrs.get("name")
        if name is None:
            name = uuid.uuid4().hex
            self._study.set_user_attr("name", name)
        if before and before != name:
            count = sum(trial.state.name != "WAITING" for trial in self.trials())
            goes_on = self._study.user_attrs.get("facts") is not None
            log.warning(
                "%s is not the study that was here before, which was removed, emptied or replaced; %s.",
                path,
                f"the one there now goes on, with {count} trial(s) made or begun" if goes_on else "a new one begins",
            )  # fmt: skip
        if before != name:
            self._lock.note(name)

    def claim(self) -> "optuna.Trial | None":
        """The next trial, with its hyperparameters; None when all are made or under way."""
        with self._access():
            self._queue_retries()
            trials = self.trials()
            again = {trial.user_attrs.get("retry_of") for trial in trials}
            counted = [trial for trial in trials if trial.state.name != "WAITING" and trial.number not in again]
            self.running_elsewhere = sum(trial.state.name == "RUNNING" for trial in trials)
            if len(counted) >= self._tuning.trials:
                return None
            # One seed for each trial, so that processes do not draw the same and a continued study goes on as it
            # would have.
            seed = np.random.SeedSequence([self._seed, len(counted)]).generate_state(1)[0]
            self._study.sampler = _sampler(int(seed), self._startup)
            trial = self._study.ask(self._distributions)
            self._lock.hold(trial.number)
            return trial

    def report(self, trial: "optuna.Trial", step: int, value: float) -> bool:
        """Note the metric at a step (from 1) of a claimed trial. Returns: whether others make it hopeless."""
        with self._access():
            trial.report(value, step)
            return trial.should_prune()

    def finish(self, trial: "optuna.Trial", state: str, value: float | None = None, **notes: object) -> None:
        """End a claimed trial. `state`: "COMPLETE" with its value, "PRUNED", or "FAIL", which is tried again.

        `notes` (JSON): `ended` says how in a word or two, `reached` what the network did at the end, `seconds` how
        long the training took.
        """
        from optuna.trial import TrialState

        with self._access():
            for name, note in notes.items():
                trial.set_user_attr(name, note)
            self._study.tell(trial, value, state=TrialState[state])
            self._lock.release(trial.number)

    def require_dataset(self, facts: Mapping[str, object]) -> None:
        """Remember on which data the trials are made. Raises: ConfigError when earlier ones were on other data."""
        given = json.loads(json.dumps(facts))
        with self._access():
            known = self._study.user_attrs.get("dataset")
            if known is None:
                self._study.set_user_attr("dataset", given)
            elif known != given:
                raise ConfigError(f"--data: {_difference(known, given)}; give that data, or another --output.")

    def dataset(self) -> dict[str, object]:
        """What `require_dataset` was told; empty before."""
        with self._access():
            return dict(self._study.user_attrs.get("dataset", {}))

    def trials(self) -> "list[FrozenTrial]":
        """All trials, in the order of their numbers."""
        return self._study.get_trials(deepcopy=False)

    def finished(self) -> "list[FrozenTrial]":
        """The trials that are over, read while no other process writes."""
        with self._access():
            return [trial for trial in self.trials() if trial.state.is_finished()]

    @contextmanager
    def _access(self) -> Iterator[None]:
        """The study, while no other process reads or writes it.

        Raises: ExportError when its file is damaged or the disk full.
        """
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        with self._lock.exclusive():
            try:
                yield
            # KeyError and RuntimeError are Optuna's too, where rows are missing or a trial is not what it was.
            except (OptunaError, SQLAlchemyError, KeyError, RuntimeError) as exc:
                raise ExportError(
                    f"The study {self._path} cannot be read or written ({_cause(exc)}); free space and run the same "
                    "command again, which goes on with the trials that are there, or give another --output."
                ) from exc

    def close(self) -> None:
        """Let go of the file and of every lock."""
        self._study._storage.remove_session()
        self._lock.close()

    def _queue_retries(self) -> None:
        """Fail trials that nobody runs any more; queue each failed one again, unless it failed too often."""
        from optuna.trial import TrialState

        for trial in self.trials():
            if trial.state.name == "RUNNING" and not self._lock.is_held_elsewhere(trial.number):
                self._study._storage.set_trial_user_attr(trial._trial_id, "ended", "killed")
                self._study.tell(trial.number, state=TrialState.FAIL)
        trials = self.trials()
        again = {trial.user_attrs.get("retry_of") for trial in trials}
        for trial in trials:
            if trial.state.name != "FAIL" or trial.number in again:
                continue
            # An interruption is no fault of the trial.
            attempts = trial.user_attrs.get("attempts", 0) + (trial.user_attrs.get("ended") != INTERRUPTED)
            if attempts < MAX_ATTEMPTS:
                log.info("trial %d ended early (%s): it is tried again", trial.number, trial.user_attrs.get("ended"))
                self._study.enqueue_trial(trial.params, {"retry_of": trial.number, "attempts": attempts})


def _open(path: Path, direction: Literal["maximize", "minimize"], startup: int) -> "optuna.Study":
    import optuna
    from sqlalchemy.exc import DatabaseError
    from sqlalchemy.pool import NullPool

    try:
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{path}",
            # No connection stays open between uses, as loader workers are forked and must not inherit one. The
            # timeout is for foreign readers, such as optuna-dashboard: our own processes wait for the lock.
            engine_kwargs={"poolclass": NullPool, "connect_args": {"timeout": 60}},
        )
        return optuna.create_study(
            storage=storage,
            study_name="resnet34",
            direction=direction,
            load_if_exists=True,
            # Median rather than hyperband: ten trials, spread over hyperband's brackets, leave two or three to
            # compare in each.
            pruner=optuna.pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=WARMUP_EPOCHS),
        )
    except (DatabaseError, RuntimeError, optuna.exceptions.OptunaError) as exc:
        raise ConfigError(f"{path} cannot be read as a study ({_cause(exc)}); give another --output.") from exc


def _cause(exc: BaseException) -> BaseException:
    """What SQLite said, without what Optuna and SQLAlchemy add."""
    while (inner := getattr(exc, "orig", None) or exc.__cause__) is not None:
        exc = inner
    return exc


def _sampler(seed: int, startup: int) -> "optuna.samplers.BaseSampler":
    """TPE (Bergstra et al. 2011, https://papers.nips.cc/paper/4443); trials under way count as bad ones, so that
    processes at work together try different places."""
    import optuna

    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)


def _difference(known: Mapping[str, object], given: Mapping[str, object]) -> str:
    old, new = _flat(known), _flat(given)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    pairs = [f"{name}={old.get(name)}, not {new.get(name)}" for name in names]
    return f"the study there was begun with {'; '.join(pairs)}"


def _flat(facts: Mapping[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in facts.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat
