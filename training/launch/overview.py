"""What `status` tells of endpoint and jobs, beyond that they are there: machines, models, prices, where to look."""

from collections.abc import Mapping, Sequence
from typing import Any

from training.launch import attempts, autoscaling, console, cost, endpoint, live, ownership, registry
from training.launch.errors import AwsError
from training.launch.logs import ENDPOINTS
from training.launch.names import Project
from training.launch.opening import Options, command_line
from training.launch.session import Aws
from training.launch.wait import age, moment_of


def of_endpoint(aws: Aws, project: Project, options: Options) -> list[str]:
    """Lines about the project's endpoint; none where there is none. Raises: AwsError."""
    there = endpoint.find(aws, project.endpoint)
    if there is None or not ownership.is_ours(aws, project, there["EndpointArn"]):
        return []
    config = _config(aws, there)
    group = f"{ENDPOINTS}/{project.endpoint}"
    rows = [
        ("created", f"{moment_of(there['CreationTime'])}, last changed {moment_of(there['LastModifiedTime'])}"),
        ("config", there["EndpointConfigName"]),
        *_variants(aws, "", config.get("ProductionVariants") or (), there.get("ProductionVariants") or ()),
        *_variants(
            aws, "shadow's ", config.get("ShadowProductionVariants") or (), there.get("ShadowProductionVariants") or ()
        ),
        ("scaling", _scaling(aws, project)),
        ("log", f"{group}, {command_line(options, 'logs endpoint')}"),
        ("console", console.endpoint(aws.region, project.endpoint)),
        ("", console.log_group(aws.region, group)),
    ]
    width = max(len(name) for name, _ in rows)
    return [
        f"endpoint {project.endpoint}: {there['EndpointStatus']}{_kind(config)}",
        *(f"  {name:<{width}}  {text}" for name, text in rows),
    ]


def of_jobs(aws: Aws, project: Project, options: Options) -> list[str]:
    """Lines about the jobs that run, and where the pages and logs of all are. Raises: AwsError."""
    found: list[str] = []
    every = attempts.every(aws, project)
    for job in [attempts.found(aws, project, each.name) or each for each in every if each.runs]:
        found += [
            f"{job.kind.what} {job.name}: {job.state}, started {age(job.created)}, {job.price}",
            f"  log      {job.kind.group}, {command_line(options, f'logs {job.name} --follow')}",
            f"  console  {console.job(aws.region, job.kind.part, job.name)}",
            f"  ends it  {command_line(options, f'stop {job.name}')}",
        ]
    kinds = dict.fromkeys(job.kind for job in every)
    if kinds:
        found.append("logs and pages of jobs")
        found += [f"  {kind.group}, {console.job(aws.region, kind.part)}" for kind in kinds]
    return found


def _config(aws: Aws, there: Mapping[str, Any]) -> Mapping[str, Any]:
    """The endpoint's configuration; nothing where it was deleted, or may not be asked about."""
    try:
        return endpoint.config_of(aws, there) or {}
    except AwsError as exc:
        if exc.is_denied:
            return {}
        raise


def _kind(config: Mapping[str, Any]) -> str:
    return f", {live.kind_of(config)}" if config else ""


def _variants(
    aws: Aws, whose: str, wanted: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Machines and model of each variant: `wanted` by the configuration, `now` as the endpoint has it."""
    rows = []
    for variant in wanted:
        summary = next((each for each in now if each["VariantName"] == variant["VariantName"]), {})
        rows.append((f"{whose}machines", _machines(variant, summary)))
        rows.append((f"{whose}model", _model(aws, variant["ModelName"])))
    return rows


def _machines(variant: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    serverless = variant.get("ServerlessConfig")
    if serverless:
        price = cost.serverless(serverless["MemorySizeInMB"])
        return f"at most {serverless['MaxConcurrency']} requests at once; {price}"
    first = variant.get("InitialInstanceCount", 1)
    runs = summary.get("CurrentInstanceCount", first)
    return f"{runs} running, {summary.get('DesiredInstanceCount', first)} desired; " + cost.hourly(
        variant["InstanceType"], runs
    )


def _model(aws: Aws, name: str) -> str:
    """Its version and accuracy too, as the registry has them."""
    package, facts = registry.registered(aws, name)
    if not package:
        return name
    version = f"version {facts['version']}" if "version" in facts else "a version of the registry"
    accuracy = registry.accuracy_of(facts)
    shown = "" if accuracy is None else f", validation accuracy {100 * accuracy:.2f} %"
    return f"{version}{shown} ({package.rsplit(':model-package/', 1)[-1]} in the registry, {name})"


def _scaling(aws: Aws, project: Project) -> str:
    target, _ = autoscaling.found(aws, project)
    return f"from {target['MinCapacity']} to {target['MaxCapacity']} instances" if target else "none"
