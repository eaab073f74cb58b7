"""Preflight: everything that could stop the journey, looked at before anything costs. A table of PASS and FAIL."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from container.registry import SCHEMA_2
from training.errors import ConfigError, TrainingError
from training.launch import amis, cost, images, roles
from training.launch.errors import QUOTAS, AwsError, LaunchError
from training.launch.names import Project
from training.launch.session import Aws

log = logging.getLogger("training")

Result = Literal["PASS", "FAIL", "WARN"]
PAYLOAD_MB, TIMEOUT_S = 25, 60
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

    training_instance: str
    hosting_instance: str
    image: str | None = None
    """For training and hosting alike; None: those that were pushed."""
    role: str | None = None
    training_count: int = 1
    """Instances of all trainings that run at once."""
    hosting_count: int = 1
    spot: bool = False
    ami: str | None = None
    startup_s: int = 600

    @property
    def hosting_target(self) -> images.Target:
        """Which of the images the endpoint runs."""
        return images.hosting_target("realtime", self.hosting_instance)


def run(aws: Aws, project: Project, plan: Plan) -> list[Check]:
    """Every check, whatever the ones before it found."""
    steps: list[Callable[[], Iterator[Check]]] = [
        lambda: _identity(aws), lambda: _bucket(aws, project), lambda: _role(aws, project, plan),
        lambda: _permissions(aws, project), lambda: _images(aws, plan), lambda: _driver(plan),
        lambda: _quotas(aws, plan), lambda: _limits(plan), lambda: _prices(plan),
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
    if any(check.name == "image" and check.result == "FAIL" for check in checks):
        checks = [_unsure(check) if check.name == "driver" and check.result == "PASS" else check for check in checks]
    return checks


def _unsure(driver: Check) -> Check:
    """Of an image that is not there nobody knows what it brings."""
    return Check("driver", "WARN", "cannot be told without the image", f"It is so once that is there: {driver.found}.")


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
        yield Check(
            "role", "FAIL", f"{arn} does not trust {roles.SERVICE}", f"Trust policy: {json.dumps(roles.trust_policy())}"
        )


def _permissions(aws: Aws, project: Project) -> Iterator[Check]:
    arn = aws.identity["Arn"]
    if arn.endswith(":root"):
        yield Check("permissions", "WARN", "you are the account's root user, who may do all", "Use a role of your own.")
        return
    source = _policies_of(aws, arn)
    # What a policy may ask of iam:PassRole.
    service = {
        "ContextKeyName": "iam:PassedToService", "ContextKeyType": "string", "ContextKeyValues": [roles.SERVICE]
    }  # fmt: skip
    denied: list[str] = []
    unsure: list[str] = []
    try:
        for resource, actions in roles.caller_actions(project, aws.partition, aws.region, aws.account).items():
            answer = aws.client("iam").simulate_principal_policy(
                PolicySourceArn=source, ActionNames=list(actions), ResourceArns=[resource], ContextEntries=[service]
            )
            for each in answer["EvaluationResults"]:
                if each["EvalDecision"] != "allowed":
                    (unsure if each.get("MissingContextValues") else denied).append(each["EvalActionName"])
    except AwsError as exc:
        yield Check(
            "permissions", "WARN", f"cannot be looked at ({exc.code})", "iam:SimulatePrincipalPolicy would tell."
        )  # fmt: skip
        return
    if denied:
        yield Check("permissions", "FAIL", f"{len(denied)} are missing", f"Ask for: {', '.join(denied)}")
    if unsure:
        yield Check(
            "permissions", "WARN", f"{len(unsure)} depend on conditions that cannot be simulated",
            f"They are: {', '.join(unsure)}",
        )  # fmt: skip
    if not denied and not unsure:
        yield Check("permissions", "PASS", f"all {len(roles.CALLER_ACTIONS)} actions that the commands use")


def _policies_of(aws: Aws, arn: str) -> str:
    """Whose policies count for this caller: of a session the role's, whose path the session does not tell."""
    found = re.fullmatch(r"(arn:[^:]+):sts::(\d+):assumed-role/([^/]+)/.+", arn)
    if not found:
        return arn
    try:
        return str(aws.client("iam").get_role(RoleName=found[3])["Role"]["Arn"])
    except AwsError:
        return f"{found[1]}:iam::{found[2]}:role/{found[3]}"


def _images(aws: Aws, plan: Plan) -> Iterator[Check]:
    """One that is given is both; those that were pushed are two."""
    targets: tuple[images.Target, ...] = (plan.hosting_target,) if plan.image else ("train", plan.hosting_target)
    for target in targets:
        try:
            uri = images.image_for(target, plan.image).uri
        except ConfigError as exc:
            yield Check("image", "FAIL", f"none to {'train' if target == 'train' else 'host'}", str(exc))
        else:
            yield _image(aws, uri, images.PUSH.format(target))


def _image(aws: Aws, uri: str, push: str) -> Check:
    parts = _ECR.fullmatch(uri)
    if not parts:
        return Check("image", "FAIL", f"{uri} is not in ECR", f"SageMaker pulls from there; `{push}` brings one.")
    account, region, repository, reference = parts.groups()
    if region != aws.region:
        return Check("image", "FAIL", f"it is in {region}, jobs run in {aws.region}", "Push it to the jobs' region.")
    name = reference or "latest"
    wanted = {"imageDigest": name} if name.startswith("sha256:") else {"imageTag": name}
    try:
        details = aws.client("ecr").describe_images(
            registryId=account, repositoryName=repository, imageIds=[wanted]
        )["imageDetails"][0]  # fmt: skip
    except AwsError as exc:
        if exc.is_denied and account != aws.account:
            return Check("image", "WARN", f"{uri} is another account's and cannot be looked at")
        return Check("image", "FAIL", f"{uri}: {exc.text or exc}", f"`{push}` brings one.")
    kind = details.get("imageManifestMediaType", SCHEMA_2)
    if kind != SCHEMA_2:
        return Check(
            "image", "FAIL", f"{uri} has the manifest {kind}; CreateModel takes {SCHEMA_2} alone",
            f"`{push}` builds and sends such a one: no attestations, no index, no OCI media types.",
        )  # fmt: skip
    return Check("image", "PASS", f"{uri}, {details.get('imageSizeInBytes', 0) / 1e9:.1f} GB")


def _driver(plan: Plan) -> Iterator[Check]:
    instance = plan.hosting_instance
    if not amis.has_gpu(instance):
        yield Check("driver", "PASS", f"{instance} has no GPU; take the image for CPUs")
        return
    try:
        cuda = images.image_for(plan.hosting_target, plan.image).cuda or amis.IMAGE_CUDA
    except ConfigError:  # said under "image"
        cuda = amis.IMAGE_CUDA
    wanted = amis.ami_for(instance, cuda)
    chosen = plan.ami or wanted or ""
    known = {ami.name: ami for ami in amis.AMIS}
    if chosen not in known:
        yield Check("driver", "FAIL", f"--ami {chosen} is unknown", f"Known are: {', '.join(known)}")
        return
    ami = known[chosen]
    shown = f"{chosen} (driver {ami.driver}, CUDA {ami.cuda[0]}.{ami.cuda[1]})"
    brought = f"CUDA {cuda[0]}.{cuda[1]}" + (", which --image is taken to bring" if plan.image else "")
    if ami.cuda < cuda:
        yield Check("driver", "FAIL", f"{shown} cannot run {brought}", f"Leave --ami out: {wanted}")
    else:
        yield Check("driver", "PASS", f"{instance} with {shown} runs the image's {brought}")


def _quotas(aws: Aws, plan: Plan) -> Iterator[Check]:
    job = "spot training job" if plan.spot else "training job"
    training, hosting = f"{plan.training_instance} for {job} usage", f"{plan.hosting_instance} for endpoint usage"
    wanted = {training: plan.training_count, hosting: plan.hosting_count}
    found: dict[str, float] = {}
    try:
        for page in aws.client("service-quotas").get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker"):
            found |= {q["QuotaName"]: q["Value"] for q in page["Quotas"] if q["QuotaName"] in wanted}
    except AwsError as exc:
        yield Check("quotas", "WARN", f"cannot be looked at ({exc.code})", str(exc))
        return
    for name, count in wanted.items():
        value = found.get(name)
        if value is None:
            yield Check("quota", "WARN", f"'{name}' is not listed", "Is this an instance type of this region?")
        elif value < count:
            yield Check("quota", "FAIL", f"'{name}' is {value:g}, {count} are wanted", f"Ask for more: {QUOTAS}")
        elif name == hosting and value < 2 * count:
            yield Check(
                "quota", "WARN", f"'{name}' is {value:g}",
                f"While an endpoint is updated its old and new instances run, {2 * count} in all: {QUOTAS}",
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
