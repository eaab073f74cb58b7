"""The commands that predict at AWS: `deploy`, and `batch`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from training.errors import ConfigError
from training.launch import amis, autoscaling, batch, cost, data, endpoint, images, registry, results, roles, smoke
from training.launch.attempts import TRANSFORM_JOBS
from training.launch.client import AsyncTarget, EndpointTarget, Target, images_in
from training.launch.errors import LaunchError
from training.launch.names import Project
from training.launch.opening import Options, as_json, opened
from training.launch.session import Aws

log = logging.getLogger("training")


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
            log.info("would register it and bring endpoint %s to: %s", project.endpoint, as_json([wanted]))
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
    job = batch.wait_for(aws, TRANSFORM_JOBS.start(aws, project, wanted), options.poll_seconds)
    results.report(results.write([*batch.outcomes(aws, job, keys), *bad], options.output, kind), options.output)
