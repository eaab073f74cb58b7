"""The commands that learn: data brought to S3, settings checked, `train` and `tune`."""

import logging
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.config import FILES, TrainingConfig, merged
from training.data.folder import BrokenFiles
from training.data.sides import hint
from training.errors import ConfigError
from training.flags import parse_flags, split
from training.instrumentation import Instrumentation
from training.launch import amis, cost, data, debugger, images, jobs, places, roles, source, tuning
from training.launch.attempts import TRAINING_JOBS, TUNING_JOBS
from training.launch.flags import options_of
from training.launch.names import Project, split_uri
from training.launch.opening import Options, as_json, as_lines, command_line, connected, project_of
from training.launch.running import tell_others
from training.launch.session import Aws
from training.tuning.config import SOURCES, TuningConfig, split_tuning

log = logging.getLogger("training")

PLACES = ("data", "validation", "output", "run_folder", "checkpoints", "cache_folder", "loader_workers", "device")
"""Settings of a run that are the container's business, not a hyperparameter's."""


def channels(
    aws: Aws, project: Project, options: Options, broken_files: BrokenFiles = "refuse", side_px: int | None = None
) -> dict[str, str]:  # fmt: skip
    """The input channels, uploaded unless they are S3 addresses or this is a dry run. Raises: TrainingError.

    `side_px`: what the training looks at, where nobody has said so: pictures that are far larger are told.
    """
    here, there = places_of(options)
    if options.validation and ("train" in there) != ("validation" in there):
        raise ConfigError(
            f"--data {options.data} --validation {options.validation}: one is in S3 and the other here, so they cannot "
            "be checked together; give two folders or two s3:// addresses."
        )
    local = [data.channel_of(name, place) for name, place in here.items()]
    if "train" in here:
        dataset = data.check(here["train"], here.get("validation"), broken_files)
        local = [data.counted(channel, dataset) for channel in local]
        said = None if side_px is None else hint(dataset.train, side_px)
        if said:
            log.warning("%s", said)
    if not options.dry_run and local:
        data.ensure_bucket(aws, project)
    found = {name: s3_channel(name, uri) for name, uri in there.items()}
    for channel in local:
        if options.dry_run:
            found[channel.name] = project.uri("data", data.prefix_of(channel))
            log.info(
                "would upload %d files, %.1f MB, to %s", len(channel.files), channel.size / 1e6, found[channel.name]
            )  # fmt: skip
        else:
            found[channel.name] = data.upload(aws, project, channel)
    return found


def places_of(options: Options) -> tuple[dict[str, Path], dict[str, str]]:
    """The channels that the flags give: those on this machine, and those in S3."""
    weights = None if options.weights in ("imagenet", "none") else options.weights
    given = {"train": options.data, "validation": options.validation, "weights": weights}
    there = {name: place for name, place in given.items() if place and place.startswith("s3://")}
    return {name: Path(place) for name, place in given.items() if place and name not in there}, there


def require_here(options: Options) -> None:
    """What the flags name on this machine is there: told before AWS is asked. Raises: ConfigError, DataError."""
    for name, place in places_of(options)[0].items():
        data.require_place(name, place)
        if name == "train":
            data.require_classes(place)


def require_addresses(aws: Aws, options: Options) -> None:
    """Something is at the s3:// addresses that flags give. Raises: ConfigError; AwsError."""
    for name in ("data", "validation", "weights"):
        given = getattr(options, name)
        if given and given.startswith("s3://"):
            data.require_there(aws, name, s3_channel(name, given))


def s3_channel(name: str, uri: str) -> str:
    """The address as AWS takes it, as a prefix: that of a folder ends with a slash, weights may be one object.

    Raises: ConfigError where it is no S3 address.
    """
    split_uri(uri)
    return uri if name == "weights" or uri.endswith("/") else f"{uri}/"


def hyperparameters(
    options: Options, rest: Sequence[str], program: str, tune: bool
) -> tuple[dict[str, str], TrainingConfig, TuningConfig]:
    """The training's settings in `rest`, checked here as the job will check them. Raises: ConfigError."""
    models = (TuningConfig, TrainingConfig) if tune else (TrainingConfig, Instrumentation)
    given = parse_flags(rest, f"training.launch {program}", program, models, FILES, besides=options_of(program))
    best = given.get("from_tuning")
    if best is not None and places.kind_at(Path(str(best))) is None:
        raise ConfigError(
            f"--from-tuning {best} is missing; `python -m training.launch tune` writes best.json into its --output "
            "(by itself artifacts/sagemaker-tuning), `python -m training.hpo` likewise."
        )
    misplaced = [name for name in given if name in PLACES]
    if misplaced:
        raise ConfigError(f"{', '.join(misplaced)}: the container has its own; leave it out.")
    if options.weights in ("imagenet", "none"):
        given["weights"] = options.weights
    tuning_values, values = split_tuning(given) if tune else ({}, given)
    watching, values = split(merged(values), Instrumentation)
    Instrumentation.create(watching)
    if tune and watching:
        raise ConfigError(f"{', '.join(watching)}: trials are not watched, so leave it out of --recipe.")
    config = TrainingConfig.create({**values, "data": ".", "output": "."})
    if options.weights and options.weights not in ("imagenet", "none"):
        values.pop("weights", None)  # the channel says it
    settings = TuningConfig.create(tuning_values)
    if tune:
        settings.require_possible(values, config)
    if tune and settings.metric != "validation_accuracy":
        raise ConfigError("--metric: SageMaker's tuner is given validation:accuracy; training.hpo knows others.")
    if tune and settings.timeout_minutes is not None:
        raise ConfigError("--timeout-minutes is for training.hpo; here --trials and --max-hours bound a search.")
    return jobs.as_text({**values, **watching}), config, settings


def effective(options: Options, config: TrainingConfig, tuned: Collection[str] = ()) -> str:
    """The settings that a job runs with, given or not, but for those that are `tuned`, as a line."""
    found = {name: value for name, value in config.model_dump(mode="json").items() if name not in (*PLACES, *tuned)}
    found |= {"freeze": ",".join(config.frozen) or "none", "weights": options.weights or config.weights}
    return " ".join(f"{name}={value}" for name, value in found.items())


def told(project: Project, training: jobs.Training) -> dict[str, object]:
    """What a job would run, for people to read."""
    machines = training.machines
    ends = f"ends after {machines.max_hours:g} h"
    if machines.spot:
        ends += f", {machines.wait_hours:g} h later where it waits for capacity"
    if machines.keep_warm_minutes:
        ends += f", then is kept warm for {machines.keep_warm_minutes} min"
    found: dict[str, object] = {
        "image": training.image, "role": training.role,
        "machines": f"{machines.count} x {machines.instance}, {machines.volume_gb} GB each; {ends}",
        "spot": "yes, on spare capacity" if machines.spot else "no",
    }  # fmt: skip
    found |= {f"channel {name}": uri for name, uri in training.channels.items()}
    found["hyperparameters"] = " ".join(f"{n}={v}" for n, v in training.hyperparameters.items()) or "none but defaults"
    found["output"] = project.uri("jobs")
    return found


def machines_of(options: Options, keep_warm_minutes: int = 0) -> jobs.Machines:
    """What the flags say the job runs on. Raises: ConfigError."""
    return jobs.Machines(
        options.instance, options.instances, options.volume_gb, options.max_hours, options.spot,
        retries=options.retries, keep_warm_minutes=keep_warm_minutes,
    )  # fmt: skip


def image_of(options: Options, region: str) -> images.Image:
    """The image that the job runs, on machines that can run it; AWS is not asked. Raises: ConfigError."""
    if options.send_code and not options.image:
        raise ConfigError("--send-code is for an image without our code: give its URI with --image.")
    image = images.image_for("train", options.image)
    images.require_region(image, region)
    amis.family(options.instance)
    if image.cuda and (image.known or not options.send_code):  # of AWS's image nobody has said what it brings
        amis.require_gpu(options.instance, image.cuda)  # an old GPU is told before anything is uploaded
    return image


def training_of(
    aws: Aws, project: Project, options: Options, image: images.Image, values: Mapping[str, str],
    machines: jobs.Machines, *, config: TrainingConfig, **more: Any,
) -> jobs.Training:  # fmt: skip
    """What the job runs, with which data (uploaded now). Raises: TrainingError."""
    role = roles.find_role(aws, project, options.role)
    require_addresses(aws, options)
    if options.send_code:
        values = {**values, **source.hyperparameters(aws, project, options.dry_run, source.groups_of(values))}
    side_px = None if "side" in config.model_fields_set else config.side
    channel = channels(aws, project, options, config.broken_files, side_px)
    others = sorted({split_uri(uri)[0] for uri in channel.values()} - {project.bucket})
    if others and not options.role:
        log.warning(
            "bucket %s: the role that iam-role makes reads %s alone; give a --role that may read it, or --bucket",
            ", ".join(others), project.bucket,
        )  # fmt: skip
    return jobs.Training(image.uri, role, channel, values, machines, **more)


def run_train(options: Options, rest: Sequence[str]) -> None:
    """Start the training job, or find it again; follow it, and bring its model home."""
    values, config, _ = hyperparameters(options, rest, "train", tune=False)
    places.require_output(options.output)
    require_here(options)
    machines = machines_of(options, options.keep_warm_minutes)
    if options.mlflow:
        values = {**values, "mlflow_uri": options.mlflow}  # what the training itself reports to
    if options.send_code:
        source.require_sendable(values, options.debugger)
    aws = connected(options)
    image = image_of(options, aws.region)
    if options.debugger:
        debugger.rules_image(aws.region)  # a region without is told before anything is uploaded
    project = project_of(aws, options)
    training = training_of(
        aws, project, options, image, values, machines,
        config=config, debugger=options.debugger, mlflow=options.mlflow,
    )  # fmt: skip
    wanted = jobs.request(project, training, aws.region)
    log.info(
        "cost: %s",
        cost.job(
            options.instance, options.instances, options.max_hours, options.spot,
            warm_minutes=options.keep_warm_minutes,
        ),
    )  # fmt: skip
    if options.dry_run:
        log.info(
            "would start a training job:\n%s",
            as_lines({"job": TRAINING_JOBS.planned(aws, project, wanted), **told(project, training)}),
        )  # fmt: skip
        log.info("would train with: %s", effective(options, config))
        return
    name = TRAINING_JOBS.start(aws, project, wanted, options.poll_seconds)
    tell_others(aws, project, options, name)
    if options.no_wait:
        _tell_on_its_own(options, name, "model")
        return
    job = jobs.wait_for(aws, name, options.poll_seconds)
    log.info("its log: %s", command_line(options, f"logs {name}"))
    jobs.bring_home(aws, job, options.output)


def run_tune(options: Options, rest: Sequence[str]) -> None:
    """Start the tuning job, or find it again; follow its trials, and bring the best one home."""
    values, config, settings = hyperparameters(options, rest, "tune", tune=True)
    places.require_output(options.output / "model")
    require_here(options)
    search = tuning.Search(settings, options.parallel, options.strategy, not options.no_early_stopping)
    tuning.ranges(settings, values)  # what cannot be tuned is said before anything is uploaded
    if options.parallel > settings.trials:
        log.warning("--parallel %d: of --trials %d no more run at once", options.parallel, settings.trials)
    machines = machines_of(options)
    aws = connected(options)
    image = image_of(options, aws.region)
    project = project_of(aws, options)
    training = training_of(aws, project, options, image, values, machines, config=config)
    wanted = tuning.request(project, training, search, aws.region)
    log.info(
        "cost: %d trials, %d at once; each %s", settings.trials, min(search.parallel, settings.trials),
        cost.job(options.instance, options.instances, options.max_hours, options.spot, settings.trials),
    )  # fmt: skip
    if options.dry_run:
        log.info(
            "would start a tuning job:\n%s",
            as_lines({"job": TUNING_JOBS.planned(aws, project, wanted), **told(project, training)}),
        )  # fmt: skip
        log.info("would search with: %s", as_json([wanted["HyperParameterTuningJobConfig"]]))
        tuned = [name for name in SOURCES if name not in values]
        log.info("would try them with: %s", effective(options, config, tuned))
        return
    name = TUNING_JOBS.start(aws, project, wanted, options.poll_seconds)
    tell_others(aws, project, options, name)
    if options.no_wait:
        _tell_on_its_own(options, name, "result")
        return
    job = tuning.wait_for(aws, name, options.poll_seconds)
    tuning.write_best_of(job, config, options.output / "best.json")
    best = jobs.describe(aws, tuning.best_of(job)["TrainingJobName"])
    jobs.bring_home(aws, best, options.output / "model")
    log.info(
        "%s puts it behind an endpoint as it is; `train --from-tuning %s` trains anew with what it found",
        command_line(options, f"deploy --model {shlex.quote(str(options.output / 'model'))}"),
        shlex.quote(str(options.output / "best.json")),
    )  # fmt: skip


def _tell_on_its_own(options: Options, name: str, what: str) -> None:
    log.info(
        "it runs; the same command without --no-wait follows it and brings the %s home; `%s` shows its log, `%s` "
        "ends it",
        what, command_line(options, f"logs {name} --follow"), command_line(options, f"stop {name}"),
    )  # fmt: skip
