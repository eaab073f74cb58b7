"""The commands: each a step of the journey, put together from the modules beside this one."""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.config import FILES, TrainingConfig, merged
from training.errors import ConfigError, TrainingError
from training.flags import parse_flags, split, unknown_name
from training.instrumentation import Instrumentation
from training.launch import (
    amis,
    autoscaling,
    batch,
    cost,
    data,
    endpoint,
    images,
    inventory,
    jobs,
    preflight,
    registry,
    results,
    roles,
    smoke,
    tuning,
)
from training.launch.client import AsyncTarget, EndpointTarget, Target, UrlTarget, classify, images_in
from training.launch.errors import LaunchError
from training.launch.names import Project
from training.launch.session import Aws, connect
from training.progress import progress
from training.tuning.config import TuningConfig, split_tuning

log = logging.getLogger("training")

PLACES = ("data", "validation", "output", "run_folder", "checkpoints", "cache_folder", "loader_workers", "device")
"""Settings of a run that are the container's business, not a hyperparameter's."""

Options = argparse.Namespace


def opened(options: Options) -> tuple[Aws, Project]:
    """The account and the project that the flags name. Raises: ConfigError, AwsError."""
    aws = connect(options.region, options.profile)
    bucket = options.bucket or f"sagemaker-{aws.region}-{aws.account}"
    return aws, Project(options.project, bucket)


def run_preflight(options: Options, _: Sequence[str]) -> None:
    """See `preflight`."""
    aws, project = opened(options)
    target = images.hosting_target("realtime", options.hosting_instance)
    try:
        image = images.image_for(target, options.image)
    except ConfigError as exc:
        log.info("%s", exc)
        image = images.Image("", None)
    plan = preflight.Plan(
        image.uri or None, options.instance, options.hosting_instance, options.role, options.spot, options.ami,
        options.startup_seconds, image.cuda,
    )  # fmt: skip
    checks = preflight.run(aws, project, plan)
    log.info("preflight of project %s:\n%s", project.name, preflight.table(checks))
    preflight.require(checks)


def run_iam_role(options: Options, _: Sequence[str]) -> None:
    """See `roles.create_role`."""
    aws, project = opened(options)
    if options.dry_run:
        log.info(
            "would make role %s, taken by %s, which may:\n%s",
            roles.role_name(project), roles.SERVICE, _lines(roles.permissions(project, aws.partition)["Statement"]),
        )  # fmt: skip
        return
    roles.create_role(aws, project)


def run_upload(options: Options, _: Sequence[str]) -> None:
    """See `data`."""
    aws, project = opened(options)
    channels(aws, project, options)


def channels(aws: Aws, project: Project, options: Options) -> dict[str, str]:
    """The input channels, uploaded unless they are S3 addresses or this is a dry run. Raises: TrainingError."""
    found = {
        name: value if value.endswith("/") else f"{value}/"
        for name, value in (("train", options.data), ("validation", options.validation), ("weights", options.weights))
        if value and value.startswith("s3://")
    }
    weights = Path(options.weights) if is_file(options.weights) else None
    if "train" in found:
        local = [data.Channel("weights", ((weights.name, weights),))] if weights else []
    else:
        validation = None if "validation" in found or not options.validation else Path(options.validation)
        log.info("data: %s", data.check(Path(options.data), validation))
        local = data.channels_of(Path(options.data), validation, weights)
    if not options.dry_run and local:
        data.ensure_bucket(aws, project)
    for channel in local:
        if options.dry_run:
            found[channel.name] = project.uri("data", data.prefix_of(channel))
            log.info(
                "would upload %d files, %.1f MB, to %s", len(channel.files), channel.size / 1e6, found[channel.name]
            )  # fmt: skip
        else:
            found[channel.name] = data.upload(aws, project, channel)
    return found


def is_file(weights: str | None) -> bool:
    """Whether --weights names a file, rather than `imagenet`, `none` or an S3 address."""
    return bool(weights) and weights not in ("imagenet", "none") and not str(weights).startswith("s3://")


def hyperparameters(
    options: Options, rest: Sequence[str], program: str, tune: bool
) -> tuple[dict[str, str], TrainingConfig, TuningConfig]:
    """The training's settings in `rest`, checked here as the job will check them. Raises: ConfigError."""
    models = (TuningConfig, TrainingConfig) if tune else (TrainingConfig, Instrumentation)
    given = parse_flags(rest, f"training.launch {program}", program, models, FILES)
    misplaced = [name for name in given if name in PLACES]
    if misplaced:
        raise ConfigError(f"{', '.join(misplaced)}: the container has its own; leave it out.")
    if options.weights in ("imagenet", "none"):
        given["weights"] = options.weights
    tuning_values, values = split_tuning(given) if tune else ({}, given)
    watching, values = split(merged(values), Instrumentation)
    Instrumentation.create(watching)
    config = TrainingConfig.create({**values, "data": ".", "output": "."})
    if options.weights and options.weights not in ("imagenet", "none"):
        values.pop("weights", None)  # the channel says it
    settings = TuningConfig.create(tuning_values)
    if tune and settings.metric != "validation_accuracy":
        raise ConfigError("--metric: SageMaker's tuner is given validation:accuracy; training.hpo knows others.")
    return jobs.as_text({**values, **watching}), config, settings


def training_of(aws: Aws, project: Project, options: Options, values: Mapping[str, str], **more: Any) -> jobs.Training:
    """What the job runs, on what, with which data (uploaded now). Raises: TrainingError."""
    machines = jobs.Machines(
        options.instance, options.instances, options.volume_gb, options.max_hours, options.spot,
        retries=options.retries, keep_warm_minutes=more.pop("keep_warm_minutes", 0),
    )  # fmt: skip
    role = roles.find_role(aws, project, options.role)
    image = images.image_for("train", options.image).uri
    return jobs.Training(image, role, channels(aws, project, options), values, machines, **more)


def run_train(options: Options, rest: Sequence[str]) -> None:
    """See `jobs`."""
    values, _, _ = hyperparameters(options, rest, "train", tune=False)
    aws, project = opened(options)
    training = training_of(
        aws, project, options, values, keep_warm_minutes=options.keep_warm_minutes, debugger=options.debugger,
        mlflow=options.mlflow,
    )  # fmt: skip
    wanted = jobs.request(project, training, aws.region)
    log.info("cost: %s", cost.job(options.instance, options.instances, options.max_hours, options.spot))
    if options.dry_run:
        log.info("would start a training job with: %s", _lines([training.hyperparameters, training.channels]))
        return
    name = jobs.start(aws, project, wanted)
    if options.no_wait:
        log.info("it runs; the same command without --no-wait follows it and brings the model home")
        return
    jobs.bring_home(aws, jobs.wait_for(aws, name, options.poll_seconds), options.output)


def run_tune(options: Options, rest: Sequence[str]) -> None:
    """See `tuning`."""
    values, config, settings = hyperparameters(options, rest, "tune", tune=True)
    aws, project = opened(options)
    search = tuning.Search(settings, options.parallel, options.strategy, not options.no_early_stopping)
    tuning.ranges(settings, values)  # what cannot be tuned is said before anything is uploaded
    training = training_of(aws, project, options, values)
    wanted = tuning.request(project, training, search, aws.region)
    log.info(
        "cost: %d trials, %d at once; each %s", settings.trials, min(search.parallel, settings.trials),
        cost.job(options.instance, options.instances, options.max_hours, options.spot),
    )  # fmt: skip
    if options.dry_run:
        log.info("would start a tuning job with: %s", _lines([wanted["HyperParameterTuningJobConfig"]]))
        return
    name = tuning.start(aws, project, wanted)
    if options.no_wait:
        log.info("it runs; the same command without --no-wait follows it and brings the result home")
        return
    job = tuning.wait_for(aws, name, options.poll_seconds)
    tuning.write_best_of(job, config, options.output / "best.json")
    best = jobs.describe(aws, tuning.best_of(job)["TrainingJobName"])
    jobs.bring_home(aws, best, options.output / "model")


def run_deploy(options: Options, _: Sequence[str]) -> None:
    """See `registry`, `endpoint`, `autoscaling`, `smoke`."""
    aws, project = opened(options)
    image = images.image_for(images.hosting_target(options.kind, options.instance), options.image)
    hosting = endpoint.Hosting(
        options.kind, options.instance, options.min_count,
        options.min_count if options.max_count is None else options.max_count,
        options.ami or (amis.ami_for(options.instance, image.cuda) if image.cuda else None),
        options.startup_seconds, options.capture_percent, options.memory, options.max_concurrency,
    )  # fmt: skip
    paths = images_in(options.smoke) if options.smoke else []
    log.info("cost: %s", hosting.price)
    with registry.located(aws, project, options.model) as model:
        accuracy = (model.manifest.metrics.get("validation") or {}).get("accuracy")
        shown = f", validation accuracy {100 * accuracy:.2f} %" if accuracy is not None else ""
        log.info("model: %s version %s%s", model.manifest.name, model.manifest.version, shown)
        if options.dry_run:
            wanted = endpoint.config_request(project, "MODEL", hosting, options.shadow and "SHADOW")
            log.info("would register it and bring endpoint %s to: %s", project.endpoint, _lines([wanted]))
            return
        role = roles.find_role(aws, project, options.role)
        data.ensure_bucket(aws, project)
        name, pending = hosted(aws, project, model, image, options, role)
        if pending:
            log.info("registered; approve it in the registry, or repeat the command without --approval, to deploy it")
            return
        shadow = None
        if options.shadow:
            with registry.located(aws, project, options.shadow) as second:
                shadow, _pending = hosted(aws, project, second, image, options, role)
        wanted = endpoint.config_request(project, name, hosting, shadow)
        before = endpoint.find(aws, project.endpoint)
        if before is not None and endpoint.changes_machines(aws, before, wanted):
            autoscaling.remove(aws, project)  # AWS updates no variant to other machines while it scales
        try:
            action = endpoint.create_or_update(aws, project, wanted, hosting, options.poll_seconds)
        except LaunchError:
            undo(aws, wanted, name, before)
            raise
        log.info("endpoint %s is %s", project.endpoint, action)
        autoscaling.apply(aws, project, hosting)
        smoke.compare(target_of(aws, project, options.kind == "async"), model.folder, paths)
    log.info(
        "python -m training.launch invoke --project %s IMAGE_OR_FOLDER asks it; `delete` ends it and its cost",
        project.name,
    )  # fmt: skip


def hosted(
    aws: Aws, project: Project, model: registry.Located, image: images.Image, options: Options, role: str
) -> tuple[str, bool]:
    """The Model for the archive, uploaded and registered; and whether it waits for approval instead."""
    registry.upload(aws, project, model)
    package = registry.register(aws, project, model, image.uri, options.approval)
    if options.approval != "Approved":
        return "", True
    container: dict[str, Any] = {"ModelPackageName": package}
    if environment(options):
        container["Environment"] = environment(options)
    return registry.create_model(aws, project, container, role)[0], False


def undo(aws: Aws, wanted: Mapping[str, Any], model: str, before: Mapping[str, Any] | None) -> None:
    """Remove the configuration and model of a deployment that failed, unless the endpoint had them before."""
    name = wanted["EndpointConfigName"]
    if before is not None and before["EndpointConfigName"] == name:
        return
    client = aws.client("sagemaker")
    used = {v["ModelName"] for v in wanted["ProductionVariants"] + wanted.get("ShadowProductionVariants", [])}
    kept: set[str] = set()
    if before is not None and before["EndpointStatus"] == "InService":
        old = client.describe_endpoint_config(EndpointConfigName=before["EndpointConfigName"])
        kept = {v["ModelName"] for v in old["ProductionVariants"] + old.get("ShadowProductionVariants", [])}
    try:
        client.delete_endpoint_config(EndpointConfigName=name)
        for each in used - kept:
            client.delete_model(ModelName=each)
    except LaunchError as exc:  # the failure itself is what must be told
        log.warning("could not be removed: %s; `delete` does it later", exc)


def environment(options: Options) -> dict[str, str]:
    """The container's variables. Raises: ConfigError."""
    found = {}
    for text in options.env:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ConfigError(f"--env {text}: say NAME=VALUE.")
        found[name] = value
    return found


def target_of(aws: Aws, project: Project, asynchronous: bool, name: str | None = None) -> Target:
    """The project's endpoint as something to send images to."""
    if asynchronous:
        return AsyncTarget(aws, name or project.endpoint, project.uri("async", "input"))
    return EndpointTarget(aws, name or project.endpoint)


def run_invoke(options: Options, _: Sequence[str]) -> None:
    """See `client` and `results`. Raises: LaunchError where an image had a problem."""
    paths = images_in(options.images)
    kind = results.format_of(options.output, options.format)
    if options.url:
        target: Target = UrlTarget(options.url)
    else:
        aws, project = opened(options)
        target = target_of(aws, project, options.asynchronous, options.endpoint)
    outcomes = classify(target, paths, concurrency=options.concurrency)
    shown = progress(outcomes, f"asking {target.name}", len(paths)) if options.output else outcomes
    _report(results.write(shown, options.output, kind), options.output)


def run_batch(options: Options, _: Sequence[str]) -> None:
    """See `batch`. Raises: LaunchError where an image had a problem."""
    kind = results.format_of(options.output, options.format)
    good, bad = batch.readable(images_in(options.images))
    for outcome in bad:
        log.warning("%s is left out: %s", outcome.path, outcome.problem)
    if not good:
        raise LaunchError("None of the images can be read.")
    image = images.image_for("serve-cpu", options.image).uri
    aws, project = opened(options)
    log.info("cost: %s", cost.hourly(options.instance, options.instances))
    with registry.located(aws, project, options.model) as model:
        if options.dry_run:
            log.info("would classify %d images with version %s", len(good), model.manifest.version)
            return
        role = roles.find_role(aws, project, options.role)
        data.ensure_bucket(aws, project)
        container: dict[str, Any] = {"Image": image, "ModelDataUrl": registry.upload(aws, project, model)}
        if environment(options):
            container["Environment"] = environment(options)
        name, _new = registry.create_model(aws, project, container, role, "batchmodel")
    place, keys = batch.upload(aws, project, good)
    wanted = batch.request(project, name, place, options.instance, options.instances)
    job = batch.wait_for(aws, batch.start(aws, project, wanted), options.poll_seconds)
    _report(results.write([*batch.outcomes(aws, job, keys), *bad], options.output, kind), options.output)


def run_status(options: Options, _: Sequence[str]) -> None:
    """See `inventory`."""
    aws, project = opened(options)
    found = inventory.things(aws, project, with_data=True, with_role=True)
    log.info("project %s in %s:\n%s", project.name, aws.region, _things(found) if found else "  nothing")


def run_delete(options: Options, _: Sequence[str]) -> None:
    """See `inventory`. Raises: LaunchError where something is left."""
    aws, project = opened(options)
    every = inventory.things(aws, project, with_data=options.with_data, with_role=options.with_role)
    found = [thing for thing in every if thing.remove is not None]
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
    still = [thing for thing in left if thing.remove is not None and thing.kind not in ("training job", "tuning job")]
    if still:
        raise LaunchError(f"Still there, repeat the command in a minute:\n{_things(still)}")
    log.info("nothing is left%s", "" if options.with_data else f", but data and models in {project.uri()} (--data)")


COMMANDS: dict[str, Callable[[Options, Sequence[str]], None]] = {
    "preflight": run_preflight, "iam-role": run_iam_role, "upload": run_upload, "train": run_train, "tune": run_tune,
    "deploy": run_deploy, "invoke": run_invoke, "batch": run_batch, "status": run_status, "delete": run_delete,
}  # fmt: skip
TAKES_HYPERPARAMETERS = ("train", "tune")


def run(options: Options, rest: Sequence[str]) -> None:
    """What the command line says. Raises: TrainingError, StoppedWaiting."""
    if rest and options.command not in TAKES_HYPERPARAMETERS:
        raise ConfigError(unknown_name(rest[0], [name for name in vars(options) if name != "command"]))
    COMMANDS[options.command](options, rest)


def _report(counts: tuple[int, int], output: Path | None) -> None:
    count, bad = counts
    if output:
        log.info("%d images, %d with a problem; in %s", count, bad, output)
    if bad:
        raise TrainingError(f"{bad} of {count} images had a problem; the last column says which.")


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("There is no one to ask (no terminal): --yes removes without asking.")
    return input("Remove all of this? [y/N] ").strip().lower() in ("y", "yes")


def _things(found: Sequence[inventory.Thing]) -> str:
    width = max(len(thing.kind) for thing in found)
    return "\n".join(f"  {thing.kind:<{width}}  {thing.name}  {thing.state}".rstrip() for thing in found)


def _lines(values: Sequence[Any]) -> str:
    import json

    return "\n".join(json.dumps(value, indent=2, default=str) for value in values)
