"""The commands that predict at AWS: `deploy`, and `batch`."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from training.errors import ConfigError
from training.launch import (
    amis,
    autoscaling,
    batch,
    cost,
    data,
    endpoint,
    images,
    live,
    registry,
    results,
    roles,
    smoke,
)
from training.launch.attempts import TRANSFORM_JOBS
from training.launch.client import AsyncTarget, EndpointTarget, Target, images_in
from training.launch.errors import AwsError, LaunchError
from training.launch.hosting import (
    SERVERLESS_STARTUP_S,
    STARTUP_S,
    Hosting,
    Targets,
    config_request,
    counts_of,
    require_limits,
    require_shadow,
)
from training.launch.names import Project
from training.launch.opening import Options, as_json, as_lines, command_line, connected, project_of
from training.launch.running import tell_others
from training.launch.session import Aws
from training.launch.wait import StoppedWaiting

log = logging.getLogger("training")

SCALING_IS_OFF = (
    "The endpoint does not scale now: AWS changes the machines of none that does, so its autoscaling was taken off. "
    "This same command, once more, with --min {} --max {}, waits for the update and turns it on again."
)
STARTUP_MARGIN_S = 30
"""So much before SageMaker gives a container up, the service ends its start with a sentence; or a fifth, if less."""
SERVICE_STARTUP_S = 450
"""The service's own, which is let be where it ends in time."""


def run_deploy(options: Options, _: Sequence[str]) -> None:
    """Register the model, bring the endpoint to it, let it scale, and compare its answers with local ones."""
    aws = connected(options)
    image = images.image_for(images.hosting_target(options.kind, options.instance), options.image)
    # What cannot be is told before anything is made, and before credentials are asked for.
    variables = environment(options)
    require_limits(options.kind, variables)
    hosting_of(options, image, None)
    given = {name: value for name in vars(Targets()) if (value := getattr(options, f"scale_at_{name}"))}
    autoscaling.require_targets(options.kind, given)
    registry.require_place(options.model)
    if options.shadow:
        require_shadow(options.kind)
        registry.require_place(options.shadow, "--shadow")
    paths = images_in(options.smoke) if options.smoke else []
    smoke.require_images(paths)
    images.require_region(image, aws.region)
    project = project_of(aws, options)
    now = live.look(aws, project)
    live.require_kind(project, now, options.kind, command_line(options, "delete"))
    scaling = now.scaling if now else autoscaling.NONE
    asked = options.min_count is not None or options.max_count is not None
    kept = autoscaling.bounds(scaling) if autoscaling.keeps(scaling, asked) else None
    hosting = hosting_of(options, image, kept, autoscaling.targets(project, scaling, given))
    if given and not autoscaling.scales(hosting):
        flags = ", ".join(map(autoscaling.flag_of, given))
        raise ConfigError(f"{flags}: the endpoint does not scale, as --max is not above --min; give --max 3, say.")
    asked = asked or bool(given)
    log.info("cost: %s", hosting.price(bool(options.shadow)))
    with registry.located(aws, project, options.model) as model, _shadow(aws, project, options.shadow) as second:
        accuracy = (model.manifest.metrics.get("validation") or {}).get("accuracy")
        shown = f", validation accuracy {100 * accuracy:.2f} %" if accuracy is not None else ""
        log.info("model: %s version %s%s", model.manifest.name, model.manifest.version, shown)
        if model.manifest.caution:
            log.warning("%s", model.manifest.caution)
        live.tell_replaced(aws, now, model.manifest)
        role = roles.find_role(aws, project, options.role)
        if options.dry_run:
            hosts = {"image": image.uri, "role": role, "model data": model.place(project), **masked(variables)}
            log.info("would host it with:\n%s", as_lines(hosts))
            wanted = config_request(project, "MODEL", hosting, options.shadow and "SHADOW")
            log.info("would register it and bring endpoint %s to: %s", project.endpoint, as_json([wanted]))
            autoscaling.tell_plan(project, hosting, scaling, asked, now.endpoint if now else None)
            return
        data.ensure_bucket(aws, project)
        shadow = None
        with registry.new_models(aws) as made:
            name = hosted(aws, project, model, image, options, role, made)
            if name and second:
                shadow = hosted(aws, project, second, image, options, role, made)
        if name is None or (second and shadow is None):
            registry.remove_models(aws, made)
            log.info("not deployed: approve it in the registry and repeat the command, or leave --approval out of it")
            return
        with _costs_told(aws, project, hosting, bool(second)):
            wanted = config_request(project, name, hosting, shadow)
            before, interrupted = now.endpoint if now else None, now is not None and now.interrupted
            action = bring(aws, project, before, wanted, hosting, options.poll_seconds, interrupted)
            log.info("endpoint %s is %s", project.endpoint, action)
            autoscaling.bring(
                aws, project, hosting, scaling, asked, options.poll_seconds, interrupted=interrupted,
                arn=before["EndpointArn"] if before else None,
            )  # fmt: skip
            try:
                smoke.compare(target_of(aws, project, options.kind == "async"), model.folder, paths)
            except LaunchError as exc:
                raise LaunchError(
                    f"{exc}\n  Endpoint {project.endpoint} is {action} and in service all the same: repeat the command "
                    "to test it again, `deploy --model` with the model of before goes back to that, `delete` ends it."
                ) from exc
    log.info("%s asks it; `delete` ends it and its cost", command_line(options, "invoke IMAGE_OR_FOLDER"))


def hosting_of(
    options: Options, image: images.Image, bounds: tuple[int, int] | None,
    targets: Targets | None = None,
) -> Hosting:  # fmt: skip
    """How the endpoint is to run; `bounds`: the instances that it is to go on scaling between. Raises: ConfigError."""
    least, most = bounds or counts_of(options.kind, options.min_count, options.max_count)
    ami = options.ami or amis.ami_for(options.instance, image.cuda or amis.IMAGE_CUDA)
    return Hosting(
        options.kind, options.instance, least, most, ami, options.startup_seconds, options.capture_percent,
        options.memory, options.max_concurrency, targets or Targets(),
    )  # fmt: skip


@contextmanager
def _costs_told(aws: Aws, project: Project, hosting: Hosting, shadow: bool) -> Iterator[None]:
    """Whoever leaves (Ctrl-C) an endpoint that is there, or is being made, is told so, and what it costs."""
    try:
        yield
    except KeyboardInterrupt as exc:
        try:
            found = endpoint.find(aws, project.endpoint)
        except LaunchError:  # what it was stopped by must be told
            raise exc from exc.__cause__
        if found is None or found["EndpointStatus"] in live.GONE:
            raise
        said = str(exc) if isinstance(exc, StoppedWaiting) else "Stopped; the same command goes on from here."
        raise StoppedWaiting(
            f"{said} Endpoint {project.endpoint} is {found['EndpointStatus']}; its cost until it is deleted: "
            f"{hosting.price(shadow)}",
            ends="delete",
        ) from (exc.__cause__ or exc)


def _shadow(aws: Aws, project: Project, given: str | None) -> AbstractContextManager[registry.Located | None]:
    return registry.located(aws, project, given, "--shadow") if given else nullcontext()


def hosted(
    aws: Aws, project: Project, model: registry.Located, image: images.Image, options: Options, role: str,
    made: list[str],
) -> str | None:  # fmt: skip
    """The Model for the archive, uploaded and registered; None where it waits for approval. `made`: see `create_model`.

    Raises: LaunchError.
    """
    registry.upload(aws, project, model)
    package, approval = registry.register(aws, project, model, image.uri, options.approval)
    if approval != "Approved":
        return None
    container: dict[str, Any] = {"ModelPackageName": package}
    variables = environment(options)
    if variables:
        container["Environment"] = variables
    return registry.create_model(aws, project, container, role, made)


def bring(
    aws: Aws,
    project: Project,
    before: Mapping[str, Any] | None,
    wanted: Mapping[str, Any],
    hosting: Hosting,
    poll_s: float,
    interrupted: bool = False,
) -> str:
    """`endpoint.create_or_update`; where it fails, what was made for it is removed, and autoscaling is put back.

    `before`: the endpoint as it was; `interrupted`: see `Live`. Raises: LaunchError; StoppedWaiting, which says so
    where it does not scale.
    """
    scaled = None
    try:
        if before is not None and endpoint.changes_machines(aws, before, wanted):
            scaled = autoscaling.found(aws, project)
            autoscaling.remember(aws, before["EndpointArn"], scaled)
            autoscaling.remove(aws, project)  # AWS updates no variant to other machines while it scales
        return endpoint.create_or_update(aws, project, wanted, hosting, poll_s)
    except LaunchError:
        if not _scales_as_before(aws, project, scaled, interrupted):
            log.warning("%s", _scaling_is_off(hosting, scaled))
        try:
            undo(aws, endpoint.find(aws, project.endpoint), wanted)
        except LaunchError as exc:  # the failure itself is what must be told
            log.warning("cleaning up after it failed: %s; `status` shows what is there", exc)
        raise
    except KeyboardInterrupt as exc:
        if _scales_as_before(aws, project, scaled, interrupted):
            raise
        said = [*map(str, exc.args), _scaling_is_off(hosting, scaled)]
        raise StoppedWaiting(" ".join(said), ends="delete") from (exc.__cause__ or exc)


def _scaling_is_off(hosting: Hosting, scaled: autoscaling.Scaling | None) -> str:
    """What to say of an endpoint whose scaling, as it was, could not be put back."""
    counts = (hosting.min_count, hosting.max_count)
    target = scaled[0] if scaled else None
    if target is not None and not autoscaling.scales(hosting):
        counts = (target["MinCapacity"], target["MaxCapacity"])
    return SCALING_IS_OFF.format(*counts)


def _scales_as_before(
    aws: Aws, project: Project, scaled: autoscaling.Scaling | None, interrupted: bool
) -> bool:  # fmt: skip
    """Put back what was taken off for an update, `scaled`; no where AWS has its hands on the endpoint still."""
    if scaled is None or scaled[0] is None:
        return True
    try:
        now = endpoint.find(aws, project.endpoint)
        if now is not None and now["EndpointStatus"] != "InService":
            return False
        if now is not None:
            autoscaling.restore(aws, project, *scaled)
            if not interrupted:  # else it may be a part of what is to scale, and the note tells the rest
                autoscaling.forget(aws, now["EndpointArn"])
        return True
    except LaunchError as exc:
        log.warning("putting autoscaling back failed: %s", exc)
        return False


def undo(aws: Aws, now: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Remove the configuration and models of a deployment that failed, unless the endpoint, which is as `now` says, has
    them or may come to have them. Raises: AwsError.
    """
    if now and now["EndpointStatus"] not in ("InService", "Failed"):
        return  # on its way to them, or somewhere between the old and the new: AWS needs both
    client, name, hosts = aws.client("sagemaker"), wanted["EndpointConfigName"], now and now["EndpointConfigName"]
    if hosts == name:
        return
    kept = endpoint.models_of(client.describe_endpoint_config(EndpointConfigName=hosts)) if hosts else set()
    try:
        client.delete_endpoint_config(EndpointConfigName=name)
    except AwsError as exc:
        if not exc.is_missing:
            raise
    registry.remove_models(aws, sorted(endpoint.models_of(wanted) - kept))


def environment(options: Options) -> dict[str, str]:
    """The container's variables. Raises: ConfigError."""
    found = {}
    for text in options.env:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name):
            raise ConfigError(f"--env {name}: say NAME=VALUE, with letters, digits and _ in NAME.")
        found[name] = value
    startup_s = getattr(options, "startup_seconds", STARTUP_S)  # `batch` has neither this nor a kind
    if getattr(options, "kind", None) == "serverless":
        startup_s = SERVERLESS_STARTUP_S
    if not SERVICE_STARTUP_S + STARTUP_MARGIN_S <= startup_s <= STARTUP_S:
        found.setdefault("CLASSIFIER_START_TIMEOUT_S", str(startup_s - min(STARTUP_MARGIN_S, startup_s // 5)))
    return found


def masked(variables: Mapping[str, str]) -> dict[str, str]:
    """The container's variables as a dry run tells them: they may be secrets."""
    return {f"env {name}": "***" for name in variables}


def target_of(aws: Aws, project: Project, asynchronous: bool, name: str | None = None) -> Target:
    """The project's endpoint as something to send images to."""
    if asynchronous:
        return AsyncTarget(aws, name or project.endpoint, project.uri("async", "input"))
    return EndpointTarget(aws, name or project.endpoint)


def run_batch(options: Options, _: Sequence[str]) -> None:
    """Classify images by a batch transform. Raises: LaunchError where an image had a problem."""
    kind = results.format_of(options.output, options.format)
    results.require_writable(options.output)
    variables = environment(options)
    good, bad = batch.readable(images_in(options.images))
    for outcome in bad:
        log.warning("%s is left out: %s", outcome.path, outcome.problem)
    if not good:
        raise LaunchError("None of the images can be read.")
    aws = connected(options)
    image = images.image_for(images.hosting_target("batch", options.instance), options.image)
    registry.require_place(options.model)
    said = batch.caution(options.instance, image)
    images.require_region(image, aws.region)
    project = project_of(aws, options)
    log.info("cost: %s", cost.hourly(options.instance, options.instances))
    if said:
        log.warning("%s; without --instance it runs on %s", said, batch.INSTANCE)
    with registry.located(aws, project, options.model) as model:
        role = roles.find_role(aws, project, options.role)
        if options.dry_run:
            told = {"image": image.uri, "role": role, "model data": model.place(project)}
            told |= {"images": batch.named(project, good)[0], **masked(variables)}
            log.info(
                "would classify %d images with version %s:\n%s", len(good), model.manifest.version, as_lines(told)
            )  # fmt: skip
            return
        data.ensure_bucket(aws, project)
        container: dict[str, Any] = {"Image": image.uri, "ModelDataUrl": registry.upload(aws, project, model)}
    if variables:
        container["Environment"] = variables
    place, keys = batch.upload(aws, project, good)
    with registry.new_models(aws) as made:
        name = registry.create_model(aws, project, container, role, made, "batchmodel")
        wanted = batch.request(project, name, place, options.instance, options.instances)
        started = TRANSFORM_JOBS.start(aws, project, wanted, options.poll_seconds)
    tell_others(aws, project, options, started)
    job = batch.wait_for(aws, started, len(set(keys.values())), options.poll_seconds)
    log.info("its log: %s", command_line(options, f"logs {started}"))
    results.report(results.write([*batch.outcomes(aws, job, keys), *bad], options.output, kind), options.output)
