"""Preflight: everything that could stop the journey, looked at before anything costs. A table of PASS and FAIL."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from training.errors import TrainingError
from training.launch import amis, cost, roles
from training.launch.errors import QUOTAS, AwsError, LaunchError
from training.launch.names import Project
from training.launch.session import Aws

log = logging.getLogger("training")

Result = Literal["PASS", "FAIL", "WARN"]
PAYLOAD_MB, TIMEOUT_S = 25, 60
MANIFESTS = (
    "application/vnd.docker.distribution.manifest.v2+json", "application/vnd.oci.image.manifest.v1+json",
)  # fmt: skip
"""What CreateModel takes. An image index (BuildKit's default, with its provenance) it refuses."""
_ECR = re.compile(r"(\d{12})\.dkr\.ecr\.([\w-]+)\.amazonaws\.com(?:\.cn)?/([^:@]+)(?:[:@](.+))?")


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    result: Result
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Plan:
    """What is going to be used."""

    image: str | None
    training_instance: str
    hosting_instance: str
    role: str | None = None
    spot: bool = False
    ami: str | None = None
    startup_s: int = 600
    cuda: tuple[int, int] | None = amis.IMAGE_CUDA
    """Of the image; None: it has none."""


def run(aws: Aws, project: Project, plan: Plan) -> list[Check]:
    """Every check, whatever the ones before it found."""
    steps: list[Callable[[], Iterator[Check]]] = [
        lambda: _identity(aws), lambda: _bucket(aws, project), lambda: _role(aws, project, plan),
        lambda: _permissions(aws), lambda: _image(aws, plan), lambda: _driver(plan), lambda: _quotas(aws, plan),
        lambda: _limits(plan), lambda: _prices(plan),
    ]  # fmt: skip
    checks: list[Check] = []
    names = ("credentials", "bucket", "role", "permissions", "image", "driver", "quotas", "limits", "cost")
    for name, step in zip(names, steps, strict=True):
        try:
            checks += step()
        except TrainingError as exc:
            checks.append(Check(name, "FAIL", str(exc).splitlines()[0], "\n".join(str(exc).splitlines()[1:])))
            if name == "credentials":
                break  # nothing else can be asked
    return checks


def table(checks: list[Check]) -> str:
    """The checks as text; what to do below each that did not pass."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"  {check.result}  {check.name:<{width}}  {check.found}")
        if check.fix and check.result != "PASS":
            lines += [f"        {'':<{width}}  {line}" for line in check.fix.splitlines()]
    return "\n".join(lines)


def _identity(aws: Aws) -> Iterator[Check]:
    yield Check("credentials", "PASS", f"{aws.identity['Arn']}, account {aws.account}, region {aws.region}")


def _bucket(aws: Aws, project: Project) -> Iterator[Check]:
    try:
        aws.client("s3").head_bucket(Bucket=project.bucket, ExpectedBucketOwner=aws.account)
        yield Check("bucket", "PASS", project.bucket)
    except AwsError as exc:
        if exc.is_missing:
            yield Check("bucket", "PASS", f"{project.bucket} is not there; `upload` makes it")
        else:
            yield Check("bucket", "FAIL", str(exc), "Name a bucket of yours with --bucket.")


def _role(aws: Aws, project: Project, plan: Plan) -> Iterator[Check]:
    arn = roles.find_role(aws, project, plan.role)
    name = arn.rsplit("/", 1)[1]
    try:
        role = aws.client("iam").get_role(RoleName=name)["Role"]
    except AwsError as exc:
        yield Check(
            "role", "WARN", f"{arn} cannot be looked at ({exc.code})", "That is fine if others made it for you."
        )
        return
    if roles.trusts_sagemaker(role):
        yield Check("role", "PASS", f"{arn}, which SageMaker may take")
    else:
        yield Check("role", "FAIL", f"{arn} does not trust {roles.SERVICE}", f"Trust policy: {roles.trust_policy()}")


def _permissions(aws: Aws) -> Iterator[Check]:
    arn = aws.identity["Arn"]
    if arn.endswith(":root"):
        yield Check("permissions", "WARN", "you are the account's root user, who may do all", "Use a role of your own.")
        return
    found = re.fullmatch(r"(arn:[^:]+):sts::(\d+):assumed-role/([^/]+)/.+", arn)
    source = f"{found[1]}:iam::{found[2]}:role/{found[3]}" if found else arn
    try:
        denied = []
        for first in range(0, len(roles.CALLER_ACTIONS), 50):
            names = list(roles.CALLER_ACTIONS[first : first + 50])
            answer = aws.client("iam").simulate_principal_policy(PolicySourceArn=source, ActionNames=names)
            denied += [
                each["EvalActionName"] for each in answer["EvaluationResults"] if each["EvalDecision"] != "allowed"
            ]
    except AwsError as exc:
        yield Check(
            "permissions", "WARN", f"cannot be looked at ({exc.code})", "iam:SimulatePrincipalPolicy would tell."
        )  # fmt: skip
        return
    if denied:
        yield Check("permissions", "FAIL", f"{len(denied)} are missing", f"Ask for: {', '.join(denied)}")
    else:
        yield Check("permissions", "PASS", f"all {len(roles.CALLER_ACTIONS)} actions that the commands use")


def _image(aws: Aws, plan: Plan) -> Iterator[Check]:
    if plan.image is None:
        yield Check("image", "FAIL", "none is given", "Build and push one (make push), then --image URI.")
        return
    parts = _ECR.fullmatch(plan.image)
    if not parts:
        yield Check(
            "image", "FAIL", f"{plan.image} is not in ECR", "SageMaker pulls from there; make push prints the address."
        )  # fmt: skip
        return
    account, region, repository, reference = parts.groups()
    if region != aws.region:
        yield Check(
            "image", "FAIL", f"it is in {region}, jobs run in {aws.region}", "Push it to the region of the jobs."
        )
        return
    name = reference or "latest"
    wanted = {"imageDigest": name} if name.startswith("sha256:") else {"imageTag": name}
    try:
        details = aws.client("ecr").describe_images(
            registryId=account, repositoryName=repository, imageIds=[wanted]
        )["imageDetails"][0]  # fmt: skip
    except AwsError as exc:
        if exc.is_denied and account != aws.account:
            yield Check("image", "WARN", f"{plan.image} is another account's and cannot be looked at")
            return
        yield Check("image", "FAIL", f"{plan.image}: {exc.text or exc}", "make push puts it there.")
        return
    kind = details.get("imageManifestMediaType", MANIFESTS[0])
    if kind not in MANIFESTS:
        yield Check(
            "image", "FAIL", f"its manifest is {kind}, which CreateModel refuses",
            "Build with --provenance=false --platform linux/amd64 and push again.",
        )  # fmt: skip
        return
    yield Check("image", "PASS", f"{plan.image}, {details.get('imageSizeInBytes', 0) / 1e9:.1f} GB")


def _driver(plan: Plan) -> Iterator[Check]:
    instance = plan.hosting_instance
    if not amis.has_gpu(instance):
        yield Check("driver", "PASS", f"{instance} has no GPU; take the image for CPUs")
        return
    cuda = plan.cuda or amis.IMAGE_CUDA
    wanted = amis.ami_for(instance, cuda)
    chosen = plan.ami or wanted or ""
    known = {ami.name: ami for ami in amis.AMIS}
    if chosen not in known:
        yield Check("driver", "FAIL", f"--ami {chosen} is unknown", f"Known are: {', '.join(known)}")
        return
    ami = known[chosen]
    shown = f"{chosen} (driver {ami.driver}, CUDA {ami.cuda[0]}.{ami.cuda[1]})"
    if ami.cuda < cuda:
        yield Check("driver", "FAIL", f"{shown} cannot run CUDA {cuda[0]}.{cuda[1]}", f"Leave --ami out: {wanted}")
    else:
        yield Check("driver", "PASS", f"{instance} with {shown} runs the image's CUDA {cuda[0]}.{cuda[1]}")


def _quotas(aws: Aws, plan: Plan) -> Iterator[Check]:
    job = "spot training job" if plan.spot else "training job"
    wanted = (f"{plan.training_instance} for {job} usage", f"{plan.hosting_instance} for endpoint usage")
    found: dict[str, float] = {}
    try:
        for page in aws.client("service-quotas").get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker"):
            found |= {q["QuotaName"]: q["Value"] for q in page["Quotas"] if q["QuotaName"] in wanted}
    except AwsError as exc:
        yield Check("quotas", "WARN", f"cannot be looked at ({exc.code})", str(exc))
        return
    for name in wanted:
        value = found.get(name)
        if value is None:
            yield Check("quota", "WARN", f"'{name}' is not listed", "Is this an instance type of this region?")
        elif value < 1:
            yield Check(
                "quota", "FAIL", f"'{name}' is {value:g}",
                f"Ask for 1 or more: {QUOTAS}",
            )  # fmt: skip
        else:
            yield Check("quota", "PASS", f"'{name}' is {value:g}")


def _limits(plan: Plan) -> Iterator[Check]:
    if not 60 <= plan.startup_s <= 3600:
        yield Check("limits", "FAIL", f"--startup-seconds {plan.startup_s}", "60 to 3600 are allowed.")
        return
    yield Check(
        "limits", "PASS",
        f"requests up to {PAYLOAD_MB} MB, answers within {TIMEOUT_S} s (AWS's; larger or slower ones: --kind async), "
        f"containers ready within {plan.startup_s} s",
    )  # fmt: skip


def _prices(plan: Plan) -> Iterator[Check]:
    yield Check("cost", "PASS", f"training {cost.hourly(plan.training_instance)}")
    yield Check("cost", "PASS", f"endpoint {cost.hourly(plan.hosting_instance)}")


def require(checks: list[Check]) -> None:
    """Raises: LaunchError where a check failed."""
    failed = [check.name for check in checks if check.result == "FAIL"]
    if failed:
        raise LaunchError(f"Not ready: {', '.join(dict.fromkeys(failed))}. What to do stands above.")
