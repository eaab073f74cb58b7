"""The rules of a run together: they are fed, their findings logged and written to `rules.json`, some end the run.

    {"rules": [{"rule", "status", "parameters", "action", "observed", "count", "judged", "unjudged", "message",
                "firings": [{"step", "tensor", "value", "threshold", "message", "advice"}]}]}

`status` is one of SageMaker's (RuleEvaluationStatus of DescribeTrainingJob): InProgress, NoIssuesFound, IssuesFound,
Error. NoIssuesFound is also that of a rule that could not judge, as AWS has no word for it: `judged` is then false, and
`unjudged` says why. `observed` counts what the rule looks at; `count` all firings, `firings` holds the first of each
tensor.
"""

import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from service.model.files import replace
from training.callbacks import StopTraining
from training.debugging.observations import Observation
from training.debugging.rules import Firing, Pace, Rule
from training.debugging.rules_metrics import StalledTrainingRule
from training.debugging.rules_tensors import UnchangedTensor

log = logging.getLogger(__name__)

FILE = "rules.json"
MAX_FIRINGS = 20
"""Firings that are kept of a rule."""


@dataclass
class Verdict:
    """A rule, what it found, and what is done about it."""

    rule: Rule
    stop: bool = False
    """Whether a firing ends the run."""
    firings: list[Firing] = field(default_factory=list)
    count: int = 0
    observed: int = 0
    """Observations of the kinds that the rule looks at; none: there was nothing to judge."""
    error: str | None = None
    over: bool = False
    pace: Pace | None = None
    """Of the run, where that is known."""
    step: int = 0
    """The last that was seen."""

    @property
    def status(self) -> str:
        """SageMaker's word."""
        if self.error is not None:
            return "Error"
        if self.count:
            return "IssuesFound"
        return "NoIssuesFound" if self.over else "InProgress"

    @property
    def unjudged(self) -> str:
        """Why a rule has found no issues because it could not judge; empty where it could."""
        if self.rule.judged or self.status != "NoIssuesFound":
            return ""
        if self.pace is None:
            return "too few steps were saved" if self.observed else "saw nothing to judge"
        first = self.rule.judges_from(self.pace)
        if first <= self.step:
            return "saw nothing to judge"
        return f"judges from step {first:,} on, the run had {self.step:,}"

    def entry(self) -> dict[str, object]:
        """As in `rules.json`."""
        return {
            "rule": self.rule.name, "status": self.status, "parameters": self.rule.parameters,
            "action": "stop" if self.stop else None, "observed": self.observed, "count": self.count,
            "judged": self.rule.judged, "unjudged": self.unjudged, "message": self.error,
            "firings": [asdict(firing) for firing in self.firings],
        }  # fmt: skip

    def add(self, firing: Firing) -> None:
        """Count a firing; keep it when it is the first of its tensor."""
        self.count += 1
        if len(self.firings) < MAX_FIRINGS and all(kept.tensor != firing.tensor for kept in self.firings):
            self.firings.append(firing)


class RuleSet:
    """Rules with their actions. Used live by `Observer`, or afterwards by `judge`."""

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self.verdicts = list(verdicts)
        self._folder: Path | None = None
        self._warned = False
        self._watchdog: _Watchdog | None = None
        self._lock = threading.Lock()  # the watchdog's thread adds firings too

    @property
    def atol(self) -> float:
        """The `atol` that observations are to be made with: UnchangedTensor's."""
        unchanged = [verdict.rule for verdict in self.verdicts if isinstance(verdict.rule, UnchangedTensor)]
        return unchanged[0].atol if unchanged else UnchangedTensor.atol

    def start(self, folder: Path, earlier: Iterable[Observation]) -> None:
        """Begin a run whose `rules.json` goes into `folder`; `earlier`: what was seen before it was resumed."""
        self._folder = folder
        for seen in earlier:
            for verdict in self.verdicts:
                self._look(verdict, seen)
        for verdict in self.verdicts:
            if isinstance(verdict.rule, StalledTrainingRule):
                verdict.rule.live = True
                self._watchdog = self._watchdog or _Watchdog(self, verdict, verdict.rule)
        if self._watchdog is not None:
            self._watchdog.start()
        self.write()

    def observe(self, observations: Iterable[Observation]) -> None:
        """Show the rules what was seen next. Raises: StopTraining when a rule with the action "stop" fires."""
        fired: list[tuple[Verdict, Firing]] = []
        changed = False
        for seen in observations:
            for verdict in self.verdicts:
                firings = self._look(verdict, seen)
                fired += [(verdict, firing) for firing in firings]
                changed = changed or bool(firings)
        if changed:
            self.write()
        for verdict, firing in fired:
            if verdict.stop:
                raise StopTraining(self._sentence(verdict, firing))

    def progressed(self, step: int) -> None:
        """A step or an epoch has ended."""
        if self._watchdog is not None:
            self._watchdog.progressed(step)

    def check_stalled(self) -> None:
        """Raises: StopTraining when the run had stalled and StalledTrainingRule is to stop it."""
        if self._watchdog is not None and self._watchdog.stop_asked:
            raise StopTraining(self._watchdog.stop_asked)

    def finish(self) -> None:
        """The run is over: what has not fired has found nothing."""
        if self._watchdog is not None:
            self._watchdog.stop()
        for verdict in self.verdicts:
            verdict.over = True
        self.write()
        if self._folder is None:
            return  # judged afterwards: whoever asked shows the verdicts
        found = [verdict.rule.name for verdict in self.verdicts if verdict.count]
        unjudged = [verdict.rule.name for verdict in self.verdicts if verdict.unjudged]
        log.info(
            "rules: %d of %d found issues%s%s",
            len(found), len(self.verdicts), ": " + ", ".join(found) if found else "",
            f"; too little was seen to judge (rules.json says why): {', '.join(unjudged)}" if unjudged else "",
        )  # fmt: skip

    def write(self) -> None:
        """Replace `rules.json` by what is known now, so that a reader sees the old one or the new.

        A full disk costs a warning, not the run or its rules.
        """
        if self._folder is None:
            return
        with self._lock:
            entries = [verdict.entry() for verdict in self.verdicts]
            content = json.dumps({"rules": entries}, indent=2, allow_nan=False) + "\n"
            try:
                replace(self._folder / FILE, content.encode())
                self._warned = False
            except OSError as exc:
                if not self._warned:
                    log.warning("%s cannot be written (%s); the rules go on", FILE, exc.strerror or exc)
                self._warned = True

    def add(self, verdict: Verdict, firing: Firing) -> None:
        """Note a firing; live, the first of a rule is logged as a warning."""
        with self._lock:
            verdict.add(firing)
        log.log(
            logging.WARNING if verdict.count == 1 and self._folder is not None else logging.DEBUG,
            "rule=%s step=%d %s",
            verdict.rule.name, firing.step, self._finding(firing),
        )  # fmt: skip

    def _look(self, verdict: Verdict, seen: Observation) -> list[Firing]:
        verdict.step = seen.step
        if seen.kind == "start":
            verdict.pace = Pace.told_by(seen)
        if verdict.error is not None:
            return []
        verdict.observed += seen.kind in verdict.rule.kinds
        try:
            firings = list(verdict.rule.observe(seen))
        except Exception as exc:  # noqa: BLE001  # a rule must not end a training run; its status hands the error on
            verdict.error = f"{type(exc).__name__}: {exc}"
            log.warning("rule=%s cannot go on: %s", verdict.rule.name, verdict.error)
            self.write()
            return []
        for firing in firings:
            self.add(verdict, firing)
        return firings

    @classmethod
    def _sentence(cls, verdict: Verdict, firing: Firing) -> str:
        return f"{verdict.rule.name}: {cls._finding(firing)}"

    @staticmethod
    def _finding(firing: Firing) -> str:
        where = f"{firing.tensor}: " if firing.tensor else ""
        return f"{where}{firing.message} {firing.advice}"


def told(entry: Mapping[str, Any]) -> str:
    """The status of an entry of `rules.json` for people: whether the rule judged at all is part of it."""
    return f"not judged: {entry['unjudged']}" if entry["unjudged"] else str(entry["status"])


def judge(rules: RuleSet, observations: Iterable[Observation]) -> RuleSet:
    """Evaluate rules on a run that is over; actions do nothing."""
    for verdict in rules.verdicts:
        verdict.stop = False
    rules.observe(observations)
    rules.finish()
    return rules


class _Watchdog:
    """A thread that fires StalledTrainingRule when a run makes no progress."""

    def __init__(self, rules: RuleSet, verdict: Verdict, rule: StalledTrainingRule) -> None:
        self._rules, self._verdict, self._rule = rules, verdict, rule
        self._step, self._last_s, self._reported = 0, time.monotonic(), False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stalled-training", daemon=True)
        self.stop_asked: str | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def progressed(self, step: int) -> None:
        self._step, self._last_s, self._reported = step, time.monotonic(), False

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, max(0.05, self._rule.threshold / 4))):
            waited_s = time.monotonic() - self._last_s
            if waited_s <= self._rule.threshold or self._reported:
                continue
            self._reported = True
            firing = self._rule.stalled(self._step, waited_s)
            self._rules.add(self._verdict, firing)
            self._rules.write()
            if self._verdict.stop or self._rule.stop_training_on_fire:
                self.stop_asked = f"{self._rule.name}: {firing.message}"
