"""Judge a run that is over: `python -m training.debugging FOLDER [--rules FILE]`.

FOLDER is that of a run (with observations.jsonl) or of tensors that smdebug wrote. Exit status: 0 no issues (or
too little to judge), 3 issues found, 2 wrong usage.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.debugging import observations, smdebug_files
from training.debugging.configuration import create_rules, read_rules
from training.debugging.observations import Observation
from training.debugging.verdicts import RuleSet, judge
from training.errors import TrainingError

log = logging.getLogger(__name__)

NO_ISSUES, WRONG_USAGE, ISSUES = 0, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m training.debugging", description="Judge a training run by SageMaker Debugger's rules."
    )
    parser.add_argument("folder", type=Path, help="a run's folder, or one with tensors that smdebug wrote")
    parser.add_argument("--rules", type=Path, help="a .json or .toml file with rules; default: all of them")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        rules = read_rules(options.rules) if options.rules else create_rules()
        judge(rules, seen_in(options.folder, rules.atol))
    except TrainingError as exc:
        log.error("%s", exc)
        return WRONG_USAGE
    for line in table(rules):
        log.info("%s", line)
    return ISSUES if any(verdict.count for verdict in rules.verdicts) else NO_ISSUES


def seen_in(folder: Path, atol: float) -> Iterator[Observation]:
    """The observations in a folder of either kind. Raises: DataError."""
    if not (folder / observations.FILE).exists() and smdebug_files.is_trial(folder):
        return smdebug_files.read_trial(folder, atol)
    return observations.read(folder / observations.FILE)


def table(rules: RuleSet) -> Iterator[str]:
    """The verdicts, a line a rule and one below for each firing."""
    for verdict in rules.verdicts:
        note = verdict.error or (f"{verdict.count} times" if verdict.count else verdict.unjudged)
        status = "not judged" if verdict.unjudged else verdict.status
        yield f"{verdict.rule.name:<26} {status:<14} {note}".rstrip()
        for firing in verdict.firings:
            yield f"    step {firing.step:<7} {firing.tensor}: {firing.message}"
        if verdict.count > len(verdict.firings):
            yield f"    and {verdict.count - len(verdict.firings)} times more, of these tensors or others"
        if verdict.count:
            yield f"    -> {verdict.rule.advice}"


if __name__ == "__main__":
    sys.exit(main())
