"""The commands: each a step of the journey, put together from the modules beside this one."""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import closing

from training.errors import ConfigError
from training.launch import (
    inventory,
    live,
    preflight,
    results,
    roles,
)
from training.launch.client import Target, UrlTarget, classify, images_in
from training.launch.deployment import run_batch, run_deploy, target_of
from training.launch.errors import LaunchError
from training.launch.experiments import channels, run_train, run_tune
from training.launch.flags import options_of
from training.launch.opening import Options, as_json, opened
from training.progress import progress

log = logging.getLogger("training")


def run_preflight(options: Options, _: Sequence[str]) -> None:
    """Tell what could go wrong. Raises: LaunchError where something is not ready."""
    aws, project = opened(options)
    plan = preflight.Plan(
        options.instance, options.hosting_instance, options.image, options.role,
        options.instances * options.parallel, options.max_count, options.spot, options.ami, options.startup_seconds,
    )  # fmt: skip
    checks = preflight.run(aws, project, plan)
    log.info("preflight of project %s:\n%s", project.name, preflight.table(checks))
    preflight.require(checks)


def run_iam_role(options: Options, _: Sequence[str]) -> None:
    """Make the role that jobs run as, or bring it up to date."""
    aws, project = opened(options)
    if options.dry_run:
        allowed = roles.permissions(project, aws.partition, options.mlflow)["Statement"]
        log.info(
            "would make role %s, taken by %s, which may:\n%s",
            roles.role_name(project), roles.SERVICE, as_json(allowed),
        )  # fmt: skip
        return
    roles.create_role(aws, project, options.mlflow)


def run_upload(options: Options, _: Sequence[str]) -> None:
    """Check the data and send what is not in S3 yet."""
    aws, project = opened(options)
    channels(aws, project, options, options.broken_files)


def run_invoke(options: Options, _: Sequence[str]) -> None:
    """Classify images and write what came of them. Raises: LaunchError where an image had a problem."""
    paths = images_in(options.images)
    kind = results.format_of(options.output, options.format)
    if options.url and options.asynchronous:
        raise ConfigError("--asynchronous is for an endpoint of SageMaker, not for --url: leave one out.")
    if options.url:
        target: Target = UrlTarget(options.url)
    else:
        aws, project = opened(options)
        name = options.endpoint or project.endpoint
        target = target_of(aws, project, options.asynchronous or live.is_asynchronous(aws, name), name)
    with closing(target):
        outcomes = classify(target, paths, concurrency=options.concurrency)
        shown = progress(outcomes, f"asking {target.name}", len(paths)) if options.output else outcomes
        counts = results.write(shown, options.output, kind)
    results.report(counts, options.output)


def run_status(options: Options, _: Sequence[str]) -> None:
    """List what the project has at AWS."""
    aws, project = opened(options)
    found = inventory.things(aws, project, with_data=True, with_role=True)
    log.info("project %s in %s:\n%s", project.name, aws.region, _things(found) if found else "  nothing")


def run_delete(options: Options, _: Sequence[str]) -> None:
    """List what the project has, ask, remove it. Raises: LaunchError where something is left."""
    aws, project = opened(options)
    every = inventory.things(aws, project, with_data=options.with_data, with_role=options.with_role)
    found = [thing for thing in every if thing.remove is not None]
    kept = [thing for thing in every if thing.remove is None and thing.kind == inventory.OBJECTS]
    if kept:
        log.info("kept, as these commands did not write it:\n%s", _things(kept))
    if not found:
        log.info("project %s has nothing to remove", project.name)
        return
    log.info("to be removed:\n%s", _things(found))
    if options.dry_run:
        return
    if not options.yes and not _agreed():
        raise LaunchError("Nothing was removed.")
    inventory.remove(aws, found, options.poll_seconds)
    left = inventory.things(aws, project, with_data=options.with_data, with_role=options.with_role)
    still = [thing for thing in left if thing.remove is not None]
    if still:
        raise LaunchError(f"Still there, repeat the command in a minute:\n{_things(still)}")
    log.info("nothing is left%s", "" if options.with_data else f", but data and models in {project.uri()} (--data)")
    log.info(
        "what stays by design: bucket %s, AWS's records and logs of jobs that have ended, images in ECR%s",
        project.bucket, "" if options.with_role else ", the role that iam-role made (--role)",
    )  # fmt: skip


COMMANDS: dict[str, Callable[[Options, Sequence[str]], None]] = {
    "preflight": run_preflight, "iam-role": run_iam_role, "upload": run_upload, "train": run_train, "tune": run_tune,
    "deploy": run_deploy, "invoke": run_invoke, "batch": run_batch, "status": run_status, "delete": run_delete,
}  # fmt: skip
TAKES_HYPERPARAMETERS = ("train", "tune")


def run(options: Options, rest: Sequence[str]) -> None:
    """What the command line says. Raises: TrainingError, StoppedWaiting."""
    if rest and options.command not in TAKES_HYPERPARAMETERS:
        raise ConfigError(f"Unknown {rest[0]}; {options.command} knows {', '.join(options_of(options.command))}.")
    COMMANDS[options.command](options, rest)


def _agreed() -> bool:
    if sys.stdin is None or not sys.stdin.isatty():  # None: it is closed
        raise ConfigError("There is no one to ask (no terminal): --yes removes without asking.")
    try:
        return input("Remove all of this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        return False


def _things(found: Sequence[inventory.Thing]) -> str:
    width = max(len(thing.kind) for thing in found)
    return "\n".join(f"  {thing.kind:<{width}}  {thing.name}  {thing.state}".rstrip() for thing in found)
