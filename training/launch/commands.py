"""The commands: each a step of the journey, put together from the modules beside this one."""

import difflib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import closing

from training.errors import ConfigError
from training.flags import misplaced
from training.launch import (
    checks,
    inventory,
    live,
    overview,
    policies,
    preflight,
    remains,
    results,
    roles,
)
from training.launch.client import Target, UrlTarget, classify, images_in
from training.launch.deployment import run_batch, run_deploy, target_of
from training.launch.errors import AwsError, LaunchError
from training.launch.experiments import channels, require_addresses, require_here, run_train, run_tune
from training.launch.flags import options_of
from training.launch.hosting import Hosting, counts_of
from training.launch.names import Project
from training.launch.opening import Options, opened, opened_or_placeholders
from training.launch.regions import RegionError
from training.launch.running import agreed, run_logs, run_stop
from training.launch.session import Aws
from training.launch.wait import moment_of
from training.progress import progress

log = logging.getLogger("training")


def run_preflight(options: Options, _: Sequence[str]) -> None:
    """Tell what could go wrong. Raises: LaunchError where something is not ready."""
    least, most = counts_of(options.kind, options.min_count, options.max_count)
    Hosting(options.kind, options.hosting_instance, least, most)  # refuses what cannot be
    plan = checks.Plan(
        options.instance, options.hosting_instance, options.image, options.role,
        options.instances * options.parallel, most, least, options.instances if options.spot else 0, options.ami,
        options.startup_seconds, options.kind, options.max_concurrency, options.batch_instance,
    )  # fmt: skip
    try:
        aws, project = opened(options)
        found = preflight.run(aws, project, plan)
    except AwsError as exc:  # to name the bucket it asked whose account this is
        found = [checks.failed("credentials", exc)]
    except RegionError as exc:  # without one nothing else can be asked
        found = [checks.failed("region", exc)]
    log.info("preflight of project %s:\n%s", options.project, checks.table(found))
    checks.require(found)
    log.info("Ready: %s.", checks.ready(found))


def run_iam_role(options: Options, _: Sequence[str]) -> None:
    """Make the role that jobs run as, or bring it up to date."""
    if options.policy:
        partition, project = opened_or_placeholders(options)
        allowed = policies.permissions(project, partition, [options.mlflow] if options.mlflow else ())
        results.show(json.dumps({"trust policy": policies.trust_policy(), "permissions": allowed}, indent=2))
        return
    aws, project = opened(options)
    if options.dry_run:
        roles.tell_plan(aws, project, options.mlflow)
    else:
        roles.create_role(aws, project, options.mlflow)


def run_upload(options: Options, _: Sequence[str]) -> None:
    """Check the data and send what is not in S3 yet."""
    require_here(options)
    aws, project = opened(options)
    require_addresses(aws, options)
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
    """Write what the project has at AWS to stdout."""
    aws, project = opened(options)
    found = inventory.things(aws, project, with_data=True, with_role=True, to_come=False)
    results.show(f"project {project.name} in {aws.region}, account {aws.account}, bucket {project.bucket}")
    results.show(_things(found) if found else "  nothing")
    for lines in (overview.of_endpoint(aws, project, options), overview.of_jobs(aws, project, options)):
        if lines:
            results.show("\n".join(["", *lines]))


def run_delete(options: Options, _: Sequence[str]) -> None:
    """List what the project has, ask, remove it. Raises: LaunchError where something is left."""
    aws, project = opened(options)
    every = inventory.things(aws, project, with_data=options.with_data, with_role=options.with_role)
    found = [thing for thing in every if thing.remove is not None]
    kept = [thing for thing in every if thing.remove is None and thing.kind == inventory.OBJECTS]
    if kept:
        log.info("kept, as these commands did not write it:\n%s", _things(kept))
    where = f"{aws.region}, account {aws.account}"
    if not found:
        log.info("project %s has nothing to remove in %s", project.name, where)
    else:
        log.info("to be removed of project %s in %s:\n%s", project.name, where, _things(found))
        if any(thing.kind == inventory.ROLE for thing in found):
            log.warning(
                "role %s is one for all regions, as IAM is: jobs and endpoints of the project in other regions lose it",
                project.role,
            )  # fmt: skip
        if not options.dry_run:
            _remove(aws, project, options, found)
    remains.tell(aws, project, options, ended=any(thing.kind in inventory.JOBS for thing in every))


def _remove(aws: Aws, project: Project, options: Options, found: list[inventory.Thing]) -> None:
    if not options.yes and not agreed("Remove all of this?", "Nothing was removed."):
        raise LaunchError("Nothing was removed.")
    inventory.remove(aws, found, options.poll_seconds)
    left = inventory.things(aws, project, with_data=options.with_data, with_role=options.with_role)
    still = [thing for thing in left if thing.remove is not None]
    if still:
        raise LaunchError(f"Still there, repeat the command in a minute:\n{_things(still)}")
    log.info("all of it is removed")


COMMANDS: dict[str, Callable[[Options, Sequence[str]], None]] = {
    "preflight": run_preflight, "iam-role": run_iam_role, "upload": run_upload, "train": run_train, "tune": run_tune,
    "deploy": run_deploy, "invoke": run_invoke, "batch": run_batch, "status": run_status, "logs": run_logs,
    "stop": run_stop, "delete": run_delete,
}  # fmt: skip
TAKES_HYPERPARAMETERS = ("train", "tune")


def run(options: Options, rest: Sequence[str]) -> None:
    """What the command line says. Raises: TrainingError, StoppedWaiting."""
    if rest and options.command not in TAKES_HYPERPARAMETERS:
        known = options_of(options.command)
        if rest[0].split("=")[0] in known:
            raise ConfigError(misplaced(rest[0].split("=")[0], f"training.launch {options.command}"))
        close = difflib.get_close_matches(rest[0].split("=")[0], known, 1)
        meant = f"Did you mean {close[0]}?" if close else f"{options.command} knows {', '.join(known)}."
        raise ConfigError(f"Unknown {rest[0]}. {meant}")
    COMMANDS[options.command](options, rest)


def _things(found: Sequence[inventory.Thing]) -> str:
    width = max(len(thing.kind) for thing in found)
    lines = []
    for thing in found:
        made = f"made {moment_of(thing.created)}" if thing.created else ""
        parts = (f"  {thing.kind:<{width}}", thing.name, thing.state, made)
        lines.append("  ".join(part for part in parts if part))
    return "\n".join(lines)
