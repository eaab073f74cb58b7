"""The account's quotas beside what is wanted: so many instances of a type at once, and in which use."""

from collections.abc import Iterator

from training.launch.checks import Check, Plan
from training.launch.errors import QUOTAS, AwsError
from training.launch.session import Aws

SERVERLESS = "Maximum total concurrency that can be allocated across all serverless endpoints"


def of(aws: Aws, plan: Plan) -> Iterator[Check]:
    """A row for each quota."""
    serverless = plan.kind == "serverless"
    training, spot, hosting, batch = (
        f"{plan.training_instance} for training job usage",
        f"{plan.training_instance} for spot training job usage",
        SERVERLESS if serverless else f"{plan.hosting_instance} for endpoint usage",
        f"{plan.batch_instance} for transform job usage",
    )
    wanted = {training: plan.training_count}
    if plan.spot_count:
        wanted[spot] = plan.spot_count
    wanted |= {hosting: plan.max_concurrency if serverless else plan.hosting_count, batch: 1}
    try:
        found = _values(aws, set(wanted))
    except AwsError as exc:
        yield Check("quotas", "WARN", f"cannot be looked at ({exc.code})", str(exc))
        return
    for name, count in wanted.items():
        value = found.get(name)
        if value is None:
            yield Check("quota", "WARN", f"'{name}' is not listed", "Is this an instance type of this region?")
        elif value < count and name == batch:
            yield Check("quota", "WARN", f"'{name}' is {value:g}, so `batch` cannot run", f"Ask for more: {QUOTAS}")
        elif value < count:
            yield Check("quota", "FAIL", f"'{name}' is {value:g}, {count} are wanted", f"Ask for more: {QUOTAS}")
        elif name == hosting and not serverless and value < 2 * count:
            yield Check(
                "quota", "WARN", f"'{name}' is {value:g}",
                f"While an endpoint is updated its old and new instances run, {2 * count} in all: {QUOTAS}",
            )  # fmt: skip
        else:
            yield Check("quota", "PASS", f"'{name}' is {value:g}")


def _values(aws: Aws, names: set[str]) -> dict[str, float]:
    """The quotas of these names: the account's own, and AWS's defaults of what it has none of its own for.

    Raises: AwsError where not even the account's own may be looked at.
    """
    found = _listed(aws, "list_service_quotas", names)
    if names <= found.keys():
        return found
    try:
        return _listed(aws, "list_aws_default_service_quotas", names) | found
    except AwsError:
        return found


def _listed(aws: Aws, operation: str, names: set[str]) -> dict[str, float]:
    pages = aws.client("service-quotas").get_paginator(operation).paginate(ServiceCode="sagemaker")
    return {
        quota["QuotaName"]: float(quota["Value"])
        for page in pages
        for quota in page["Quotas"]
        if quota["QuotaName"] in names
    }
