"""Preflight: everything that could stop the journey, looked at before anything costs. A table of PASS and FAIL."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

from container.registry import SCHEMA_2
from training.errors import ConfigError, TrainingError
from training.launch import amis, batch, cost, data, hosting, images, policies, quotas, rights, roles
from training.launch.checks import Check, Plan, failed
from training.launch.errors import AwsError, LaunchError
from training.launch.names import Project
from training.launch.session import Aws

log = logging.getLogger("training")

BATCH = "classify in a batch"


def run(aws: Aws, project: Project, plan: Plan) -> list[Check]:
    """Every check, whatever the ones before it found."""
    steps: list[Callable[[], Iterator[Check]]] = [
        lambda: _identity(aws), lambda: _bucket(aws, project), lambda: _role(aws, project, plan),
        lambda: rights.of_role(aws, project, plan), lambda: rights.of_caller(aws, project, plan),
        lambda: _images(aws, plan), lambda: _drivers(plan), lambda: quotas.of(aws, plan), lambda: _limits(plan),
        lambda: _prices(plan),
    ]  # fmt: skip
    checks: list[Check] = []
    names = ("credentials", "bucket", "role", "role", "permissions", "image", "driver", "quotas", "limits", "cost")
    for name, step in zip(names, steps, strict=True):
        try:
            checks += step()
        except TrainingError as exc:
            checks.append(failed(name, exc))
            if name == "credentials":
                break  # nothing else can be asked
    if any(check.name == "image" and check.result == "FAIL" for check in checks):
        # Of an image that is not there nobody knows what it brings.
        checks = [check for check in checks if check.name != "driver" or check.result == "FAIL"]
    return checks


def _identity(aws: Aws) -> Iterator[Check]:
    yield Check("credentials", "PASS", f"{aws.identity['Arn']}, account {aws.account}")
    yield Check("region", "PASS", aws.region)


def _bucket(aws: Aws, project: Project) -> Iterator[Check]:
    try:
        found = aws.client("s3").head_bucket(Bucket=project.bucket, ExpectedBucketOwner=aws.account)
    except AwsError as exc:
        if exc.is_missing:
            yield Check("bucket", "PASS", f"{project.bucket} is not there; `upload` makes it")
        else:
            yield Check("bucket", "FAIL", str(exc), "Name a bucket of yours with --bucket.")
        return
    data.require_region(aws, project, found)
    yield Check("bucket", "PASS", project.bucket)


def _role(aws: Aws, project: Project, plan: Plan) -> Iterator[Check]:
    try:
        arn = roles.find_role(aws, project, plan.role)
    except LaunchError as exc:
        if isinstance(exc, AwsError) and not exc.is_missing:
            raise
        yield Check("role", "FAIL", str(exc), _policies(aws, project) if plan.role is None else "")
        return
    name = arn.rsplit("/", 1)[1]
    try:
        role = aws.client("iam").get_role(RoleName=name)["Role"]
    except AwsError as exc:
        yield Check(
            "role", "WARN", f"{arn} cannot be looked at ({exc.code})", "That is fine if others made it for you."
        )
        return
    if policies.trusts_sagemaker(role):
        yield Check("role", "PASS", f"{arn}, which SageMaker may take")
    else:
        yield Check(
            "role", "FAIL", f"{arn} does not trust {policies.SERVICE}",
            f"Trust policy: {json.dumps(policies.trust_policy())}",
        )  # fmt: skip


def _policies(aws: Aws, project: Project) -> str:
    """What `iam-role` gives the role that it makes, for who makes roles: JSON, a line for each statement."""
    allowed = policies.permissions(project, aws.partition)
    statements = ",\n  ".join(map(json.dumps, allowed["Statement"]))
    return (
        f"Its trust policy: {json.dumps(policies.trust_policy())}\n"
        f'Its permissions: {{"Version": "{allowed["Version"]}", "Statement": [\n  {statements}\n]}}'
    )


def _images(aws: Aws, plan: Plan) -> Iterator[Check]:
    """One that is given is all; those that were pushed are one for each use. Who makes no batch needs none for that."""
    if plan.image:
        yield _image(aws, plan.image, images.PUSH.format(plan.hosting_target))
        return
    uses: dict[images.Target, str] = {"train": "train", plan.hosting_target: "host"}
    for target, use in {**uses, plan.batch_target: uses.get(plan.batch_target, BATCH)}.items():
        try:
            found = _image(aws, images.image_for(target, None).uri, images.PUSH.format(target))
        except ConfigError as exc:
            found = Check("image", "FAIL", f"none to {use}", str(exc))
        yield replace(found, result="WARN") if use == BATCH and found.result == "FAIL" else found


def _image(aws: Aws, uri: str, push: str) -> Check:
    parts = images.ECR.fullmatch(uri)
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


def _drivers(plan: Plan) -> Iterator[Check]:
    looks: list[Callable[[Plan], Check | None]] = [_training_driver, _hosting_driver]
    if amis.has_gpu(plan.batch_instance):
        looks.append(_batch_driver)
    for look in looks:
        try:
            if row := look(plan):
                yield row
        except ConfigError as exc:
            yield failed("driver", exc)


def _brought(plan: Plan, target: images.Target) -> images.Image:
    try:
        return images.image_for(target, plan.image)
    except ConfigError:  # said under "image"
        return images.Image("", amis.IMAGE_CUDA)


def _training_driver(plan: Plan) -> Check:
    instance, image = plan.training_instance, _brought(plan, "train")
    if not amis.has_gpu(instance):
        return Check("driver", "PASS", f"{instance} has no GPU; trainings compute on its processor")
    if image.cuda is None:
        return _without_cuda(instance, "--instance", "train")
    amis.require_gpu(instance, image.cuda)
    if not image.known:
        return _unknown(instance, image, "train")
    return Check(
        "driver", "PASS",
        f"{instance} has a GPU that the image's CUDA {amis.shown(image.cuda)} knows; its driver is AWS's choice for "
        "trainings, and the job's log begins with how the two go together",
    )  # fmt: skip


def _hosting_driver(plan: Plan) -> Check:
    instance, image = plan.hosting_instance, _brought(plan, plan.hosting_target)
    if plan.kind == "serverless":
        return Check("driver", "PASS", "serverless endpoints have no GPU; take the image for CPUs")
    if not amis.has_gpu(instance):
        return Check("driver", "PASS", f"{instance} has no GPU; take the image for CPUs")
    if image.cuda is None:
        return _without_cuda(instance, "--hosting-instance", "serve")
    wanted = amis.ami_for(instance, image.cuda)
    chosen = plan.ami or wanted or ""
    known = {ami.name: ami for ami in amis.AMIS}
    if chosen not in known:
        return Check("driver", "FAIL", f"--ami {chosen} is unknown", f"Known are: {', '.join(known)}")
    ami = known[chosen]
    shown = f"{chosen} (driver {ami.driver}, CUDA {amis.shown(ami.cuda)})"
    brought = f"CUDA {amis.shown(image.cuda)}"
    if ami.cuda < image.cuda:
        taken = "" if image.known else ", which --image is taken to bring"
        return Check("driver", "FAIL", f"{shown} cannot run {brought}{taken}", f"Leave --ami out: {wanted}")
    if not image.known:
        return _unknown(f"{instance} with {shown}", image, "serve")
    return Check("driver", "PASS", f"{instance} with {shown} runs the image's {brought}")


def _batch_driver(plan: Plan) -> Check | None:
    instance, image = plan.batch_instance, _brought(plan, plan.batch_target)
    if image.cuda is None:
        return _without_cuda(instance, "--batch-instance", "serve")
    said = batch.caution(instance, image)
    if not image.uri:
        return None  # there is none, which is said under "image"
    if said:
        fix = f"Without --batch-instance it runs on {batch.INSTANCE}, which needs no driver."
        return Check("driver", "WARN", said, fix if image.known else f"{fix}\n{_to_note(image, 'serve')}")
    return Check("driver", "PASS", f"{instance} with {amis.BATCH_AMI.name} runs the image's CUDA in a batch")


def _unknown(where: str, image: images.Image, target: images.Target) -> Check:
    """The row for an image that was not noted: that it fits is not said of what nobody knows."""
    taken = amis.shown(image.cuda or amis.IMAGE_CUDA)
    return Check(
        "driver", "WARN", f"{where} fits if the image that --image names brings CUDA {taken}, which is not known",
        _to_note(image, target),
    )  # fmt: skip


def _to_note(image: images.Image, target: images.Target) -> str:
    noted = json.dumps({target: {"uri": image.uri, "cuda": amis.shown(image.cuda or amis.IMAGE_CUDA)}})
    return f"Note what it brings in {images.PUSHED}: {noted}"


def _without_cuda(instance: str, flag: str, target: images.Target) -> Check:
    return Check(
        "driver", "WARN", amis.UNUSED.format(instance),
        f"Take another {flag}, or the image that `{images.PUSH.format(target)}` brings.",
    )  # fmt: skip


def _limits(plan: Plan) -> Iterator[Check]:
    if not 60 <= plan.startup_s <= 3600:
        yield Check("limits", "FAIL", f"--startup-seconds {plan.startup_s}", "60 to 3600 are allowed.")
        return
    try:
        hosting.Hosting(plan.kind, startup_s=plan.startup_s)
    except ConfigError as exc:
        yield failed("limits", exc)
        return
    limits = hosting.LIMITS[plan.kind]
    larger = "" if plan.kind == "async" else "larger or slower ones: --kind async, "
    startup_s = hosting.SERVERLESS_STARTUP_S if plan.kind == "serverless" else plan.startup_s
    yield Check(
        "limits", "PASS",
        f"requests up to {limits.payload_mb} MB, answers within {limits.timeout_s} s (AWS's; {larger}"
        "with --env CLASSIFIER_MAX_PAYLOAD_BYTES=..., CLASSIFIER_MAX_BODY_BYTES=... and CLASSIFIER_DEADLINE_S=...), "
        f"containers ready within {startup_s} s",
    )  # fmt: skip


def _prices(plan: Plan) -> Iterator[Check]:
    """All instances at once: those of every training in parallel, the endpoint's from at least to at most."""
    yield _price("training", plan.training_instance, cost.hourly(plan.training_instance, plan.training_count))
    yield _price("endpoint", None if plan.kind == "serverless" else plan.hosting_instance, plan.hosting.price())


def _price(what: str, instance: str | None, shown: str) -> Check:
    if instance is None or cost.is_known(instance):
        return Check("cost", "PASS", f"{what} {shown}")
    return Check("cost", "WARN", f"{what} {shown}", "Look there what it costs before anything is started.")
