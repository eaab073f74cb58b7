"""The commands about what runs: `stop` ends jobs, `logs` shows what they and the endpoint print."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.errors import ConfigError
from training.launch import attempts, console, endpoint, results, tuning
from training.launch.attempts import TRAINING_JOBS, TUNING_JOBS, Job
from training.launch.errors import AwsError, LaunchError
from training.launch.logs import ENDPOINTS, LogTail
from training.launch.names import Project
from training.launch.opening import Options, command_line, opened
from training.launch.session import Aws
from training.launch.wait import StoppedWaiting, age

log = logging.getLogger("training")

ENDPOINT = "endpoint"
"""What `logs` calls the project's endpoint; no job's name has no digest."""


def agreed(question: str, otherwise: str) -> bool:
    """Whether someone at the terminal says yes. Raises: ConfigError where there is none; KeyboardInterrupt that says
    `otherwise`.
    """
    if sys.stdin is None or not sys.stdin.isatty():  # None: it is closed
        raise ConfigError("There is no one to ask (no terminal): --yes goes on without asking.")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, UnicodeDecodeError):  # Ctrl-D; bytes that are no text are no yes
        return False
    except KeyboardInterrupt as exc:
        raise KeyboardInterrupt(otherwise) from exc


def tell_others(aws: Aws, project: Project, options: Options, started: str) -> None:
    """Say which other jobs of the project cost still, where that may be asked: who changed a flag has two."""
    try:
        others = attempts.running(aws, project, but=started)
    except AwsError as exc:
        log.info("whether other jobs of the project run cannot be told (%s)", exc.code)
        return
    for job in others:
        log.warning(
            "%s %s of this project is still running (started %s, %s); `%s` ends it",
            job.kind.what, job.name, age(job.created), job.machines, command_line(options, f"stop {job.name}"),
        )  # fmt: skip


def run_stop(options: Options, _: Sequence[str]) -> None:
    """End jobs and wait until they have; nothing that they wrote is removed. Raises: LaunchError, ConfigError."""
    aws, project = opened(options)
    if options.jobs:
        chosen = [_named(aws, project, name) for name in dict.fromkeys(options.jobs)]
    else:
        chosen = attempts.running(aws, project)
        if not chosen:
            log.info("no job of project %s runs in %s, account %s", project.name, aws.region, aws.account)
            return
        _tell_chosen(aws, project, chosen)
        if not options.dry_run and not options.yes and not agreed("Stop all of these?", "Nothing was stopped."):
            raise LaunchError("Nothing was stopped.")
    if options.dry_run:
        if options.jobs:
            _tell_chosen(aws, project, chosen)
        return
    for job in chosen:
        if job.state == "InProgress":
            job.kind.stop(aws, job.name)
            log.info("%s %s is told to stop, which takes two minutes at most", job.kind.what, job.name)
    try:
        for job in chosen:
            _tell_end(aws, job, job.kind.wait_until_over(aws, job.name, options.poll_seconds))
    except KeyboardInterrupt as exc:
        raise StoppedWaiting("Stopped waiting. What was told to stop stops; `status` shows it.") from (
            exc.__cause__ or exc
        )


def _tell_chosen(aws: Aws, project: Project, chosen: Sequence[Job]) -> None:
    shown = "\n".join(
        f"  {job.kind.what} {job.name}  {job.state}, started {age(job.created)}, {job.machines}" for job in chosen
    )
    log.info("to be stopped, of project %s in %s:\n%s", project.name, aws.region, shown)


def _named(aws: Aws, project: Project, name: str) -> Job:
    found = attempts.found(aws, project, name)
    if found is None:
        known = ", ".join(job.name for job in attempts.every(aws, project)[:5]) or "none"
        raise ConfigError(
            f"{name}: project {project.name} has no such job in {aws.region}, account {aws.account}; its newest are: "
            f"{known}."
        )
    return found


def _tell_end(aws: Aws, job: Job, state: str) -> None:
    """What a job came to that was stopped, and what stays of it."""
    if not job.runs:
        log.info("%s %s has ended already: %s", job.kind.what, job.name, state)
        return
    told = job.kind.describe(aws, job.name)
    billed = told.get("BillableTimeInSeconds")
    stays = "what it wrote to S3 stays"
    checkpoints = (told.get("CheckpointConfig") or {}).get("S3Uri")
    if checkpoints and state == "Stopped":
        stays = f"its checkpoints stay in {checkpoints}: the same command as before goes on from them"
    elif job.kind is TUNING_JOBS:
        stays = "the models of trials that ended stay; the same command as before makes a search anew"
    log.info(
        "%s %s is %s%s; %s", job.kind.what, job.name, state, f", {billed} s are billed" if billed else "", stays
    )  # fmt: skip


@dataclass(frozen=True)
class _Log:
    """Where the lines of something are."""

    what: str
    group: str
    prefix: str
    ends: str
    """The command that ends what writes them."""
    is_over: Callable[[], bool]


def run_logs(options: Options, _: Sequence[str]) -> None:
    """Write the last lines of a log to stdout, and with --follow those that come. Raises: LaunchError, ConfigError."""
    aws, project = opened(options)
    found = _log_of(aws, project, options.name)
    log.info(
        "log of %s: %s, streams %s*; %s",
        found.what, found.group, found.prefix, console.log_group(aws.region, found.group, found.prefix),
    )  # fmt: skip
    tail = LogTail(aws, found.group, found.prefix)
    lines = tail.recent(options.lines)
    for line in lines:
        results.show(line)
    if tail.problem:
        raise LaunchError(f"The log cannot be read: {tail.problem}")
    if not lines and not options.follow and found.is_over():
        raise LaunchError(f"There is no line: {found.what} is not there, or left none in {aws.region}.")
    if not lines:
        log.info("there is no line yet")
    try:
        while options.follow:
            over = found.is_over()
            for line in tail.new_lines():
                results.show(line)
            if over:
                log.info("%s has ended", found.what)
                return
            time.sleep(options.poll_seconds)
    except KeyboardInterrupt as exc:
        raise StoppedWaiting(f"Stopped following; {found.what} goes on.", ends=found.ends) from exc


def _log_of(aws: Aws, project: Project, name: str | None) -> _Log:
    if name is None:
        newest = attempts.every(aws, project)[:1]
        if newest:
            name = newest[0].name
        elif endpoint.find(aws, project.endpoint):
            name = ENDPOINT
        else:
            raise LaunchError(f"Project {project.name} has no job and no endpoint in {aws.region}, so there is no log.")
    if name in (ENDPOINT, project.endpoint):
        return _Log(
            f"endpoint {project.endpoint}", f"{ENDPOINTS}/{project.endpoint}", "", "delete",
            lambda: endpoint.find(aws, project.endpoint) is None,
        )  # fmt: skip
    job = _named(aws, project, name)
    if job.kind is TUNING_JOBS:
        trials = sorted(tuning.trials(aws, name), key=lambda trial: trial["CreationTime"].timestamp())
        if not trials:
            raise LaunchError(f"Tuning job {name} is {job.state} and has no trial yet, so there is no log.")
        log.info("the trials of %s: %s; the newest is shown", name, ", ".join(t["TrainingJobName"] for t in trials))
        name = str(trials[-1]["TrainingJobName"])
        job = Job(TRAINING_JOBS, name, trials[-1]["TrainingJobStatus"], job.created)
    return _Log(
        f"{job.kind.what} {name}", job.kind.group, f"{name}/", f"stop {name}",
        lambda: not _still_runs(job, aws),
    )  # fmt: skip


def _still_runs(job: Job, aws: Aws) -> bool:
    return job.kind.describe(aws, job.name)[f"{job.kind.field}Status"] in attempts.RUNNING
