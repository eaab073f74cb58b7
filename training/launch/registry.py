"""The model: its archive in S3, its entry in SageMaker's registry (figures, approval), and the Model that hosts it."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from service.model.archive import unpack
from service.model.artifact import open_artifact
from service.model.errors import ArtifactError
from service.model.images import MEDIA_TYPES
from service.model.manifest import Manifest
from training.errors import ConfigError, TrainingError
from training.launch import data, ownership, roles
from training.launch.attempts import TRAINING_JOBS, TUNING_JOBS
from training.launch.errors import AwsError, LaunchError
from training.launch.jobs import describe, pack
from training.launch.names import Project, digest, split_uri
from training.launch.places import kind_at
from training.launch.session import Aws

log = logging.getLogger("training")

Approval = Literal["Approved", "PendingManualApproval"]
ARCHIVE = "model.tar.gz"
SHOWN_CLASSES = 3
"""So many classes are named where a model has others than the one before."""
JOB_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
"""What AWS allows."""


@dataclass(frozen=True)
class Located:
    """A model whose archive is known by content and lies here, unpacked and verified."""

    folder: Path
    archive: Path
    sha256: str
    manifest: Manifest
    uri: str | None
    """Where the archive lies in S3 already; None if it must be uploaded."""

    def place(self, project: Project) -> str:
        """Where the archive is, or will be."""
        return self.uri or project.uri("models", self.entry, ARCHIVE)

    @property
    def entry(self) -> str:
        """The model's own folder below the project's models."""
        return f"{self.manifest.version}-{self.sha256[:8]}"


@contextmanager
def located(aws: Aws, project: Project, given: str | None, flag: str = "--model") -> Iterator[Located]:
    """The model that `given` names, in a scratch folder while the block lasts.

    `given`: an artifact's folder, a model.tar.gz, an s3:// address, the name of a training job; None: of the
    project's newest training job that ended well. `flag`: what it was given with. Raises: LaunchError, ConfigError,
    AwsError.
    """
    require_place(given, flag)
    with TemporaryDirectory(prefix="launch-", ignore_cleanup_errors=True) as scratch:
        archive, uri = Path(scratch) / ARCHIVE, None
        is_s3 = given is not None and given.startswith("s3://")
        path = None if given is None or is_s3 else Path(given)
        kind = None if path is None else kind_at(path)
        if path is not None and kind == "folder":
            _pack(path, archive, flag)
        elif path is not None and kind == "file":
            archive = path
        elif given is not None and is_s3:
            archive, uri = data.fetch(aws, given, archive), given
        else:
            uri = archive_of_job(aws, project, given, flag)
            archive = data.fetch(aws, uri, archive)
        folder = Path(scratch) / "model"
        folder.mkdir()
        try:
            unpack(archive, folder)
            artifact = open_artifact(folder)
            artifact.verify()
        except ArtifactError as exc:
            raise LaunchError(f"{given or uri}: {exc}") from exc
        yield Located(folder, archive, _sha256(archive), artifact.manifest, uri)


def require_place(given: str | None, flag: str = "--model") -> None:
    """What `located` is given may be a model; AWS is not asked. Raises: ConfigError."""
    if given is None:
        return
    if given.startswith("s3://"):
        if not split_uri(given)[1] or given.endswith("/"):
            raise ConfigError(f"{flag} {given}: give the address of an archive, s3://bucket/folder/model.tar.gz.")
        return
    kind = kind_at(Path(given))
    if kind == "folder":
        _require_artifact(Path(given), flag)
    elif kind is None and not JOB_NAME.fullmatch(given):  # AWS would say what names of jobs look like, not of folders
        raise _no_such(given, flag)


def archive_of_job(aws: Aws, project: Project, name: str | None, flag: str = "--model") -> str:
    """The s3:// address of what a training job made. Raises: ConfigError, LaunchError, AwsError."""
    if name is None:
        listed = sorted(TRAINING_JOBS.listed(aws, project), key=lambda job: job["CreationTime"], reverse=True)
        done = (job["TrainingJobName"] for job in listed if job["TrainingJobStatus"] == "Completed")
        name = next((each for each in done if TRAINING_JOBS.has_output(aws, each)), None)
        if name is None:
            trial = _best_trial(aws, project)
            tuned = f" The best trial of `tune` can be deployed as it is: {flag} {trial}." if trial else ""
            raise LaunchError(
                f"Project {project.name} has no training job that ended well and whose model is in S3 still; give "
                f"--model FOLDER, or train first.{tuned}"
            )
        log.info("model: of the newest job, %s", name)
    try:
        job = describe(aws, name)
    except AwsError as exc:
        if exc.is_missing:
            raise _no_such(name, flag) from exc
        raise
    if job["TrainingJobStatus"] != "Completed":
        raise LaunchError(f"Job {name} is {job['TrainingJobStatus']}, so it has no model; see its log, or wait.")
    return str(job["ModelArtifacts"]["S3ModelArtifacts"])


def _best_trial(aws: Aws, project: Project) -> str | None:
    """The training job that the newest search found best, and whose model is in S3 still. Raises: AwsError."""
    listed = sorted(TUNING_JOBS.listed(aws, project), key=lambda job: job["CreationTime"], reverse=True)
    done = (
        job["HyperParameterTuningJobName"] for job in listed if job["HyperParameterTuningJobStatus"] == "Completed"
    )  # fmt: skip
    name = next((each for each in done if TUNING_JOBS.has_output(aws, each)), None)
    return None if name is None else str(TUNING_JOBS.describe(aws, name)["BestTrainingJob"]["TrainingJobName"])


def _no_such(name: str, flag: str) -> ConfigError:
    return ConfigError(f"{flag} {name}: there is no such folder, no such file, and no training job of this name.")


def upload(aws: Aws, project: Project, model: Located) -> str:
    """Bring the archive to S3 unless it is there; returns its address. Raises: AwsError."""
    if model.uri is None:
        place = model.place(project).removesuffix(ARCHIVE)
        data.put(aws, place, [(ARCHIVE, model.archive)], {ARCHIVE: model.sha256}, "uploading the model")
    return model.place(project)


def find_group(aws: Aws, project: Project) -> dict[str, Any] | None:
    """The project's group, as DescribeModelPackageGroup tells it; None where there is none. Raises: AwsError."""
    try:
        return dict(
            aws.client("sagemaker").describe_model_package_group(ModelPackageGroupName=project.package_group)
        )  # fmt: skip
    except AwsError as exc:
        if exc.is_missing:
            return None
        raise


def register(aws: Aws, project: Project, model: Located, image: str, approval: Approval) -> tuple[str, str]:
    """The registry's version for this archive and image: its ARN and approval status; made unless it is there.

    `approval`: of a new version; "Approved" approves one that waits for it, too. Raises: LaunchError where it was
    rejected, or others made the group; AwsError.
    """
    client, group = aws.client("sagemaker"), project.package_group
    _ensure_group(aws, project)
    facts = {"sha256": model.sha256, "version": model.manifest.version, "image": image}
    for arn in packages(aws, group):
        described = client.describe_model_package(ModelPackageName=arn)
        if facts.items() <= described.get("CustomerMetadataProperties", {}).items():
            status = str(described["ModelApprovalStatus"])
            if status == "Rejected":
                said = described.get("ApprovalDescription")
                raise LaunchError(
                    f"The registry has this model as {arn.split('/', 1)[1]}, and it was rejected there"
                    f"{f' ({said})' if said else ''}. Deploy another one, or have it approved in the registry."
                )
            if not _has_archive(aws, project, model, described):
                continue
            if status != approval == "Approved":
                client.update_model_package(ModelPackageArn=arn, ModelApprovalStatus=approval)
                status = approval
            log.info("the registry has this model: %s (%s)", arn, status)
            return arn, status
    made = client.create_model_package(
        ModelPackageGroupName=group,
        ModelPackageDescription=f"{model.manifest.name} {model.manifest.version}",
        InferenceSpecification={
            "Containers": [{"Image": image, "ModelDataUrl": model.place(project)}],
            "SupportedContentTypes": sorted({*MEDIA_TYPES.values(), "application/x-image", "application/json"}),
            "SupportedResponseMIMETypes": ["application/json", "application/jsonlines", "text/csv"],
        },
        ModelApprovalStatus=approval,
        ModelMetrics={"ModelQuality": {"Statistics": _statistics(aws, project, model)}},
        CustomerMetadataProperties={**facts, **_figures(model.manifest), **class_facts(model.manifest.classes)},
    )
    log.info("registered %s (%s)", made["ModelPackageArn"], approval)
    return str(made["ModelPackageArn"]), approval


def _ensure_group(aws: Aws, project: Project) -> None:
    group, there = project.package_group, find_group(aws, project)
    if there is None:
        try:
            aws.client("sagemaker").create_model_package_group(
                ModelPackageGroupName=group, ModelPackageGroupDescription=f"Models of {project.name}", Tags=project.tags
            )
            return
        except AwsError as exc:
            there = find_group(aws, project) if exc.is_there_already else None
            if there is None:
                raise
    ownership.require(aws, project, there["ModelPackageGroupArn"], f"Model package group {group}")


def _has_archive(aws: Aws, project: Project, model: Located, described: Mapping[str, Any]) -> bool:
    """Whether a version's archive is the one we have, or in S3 still: a job's output may be deleted since."""
    containers = (described.get("InferenceSpecification") or {}).get("Containers") or [{}]
    place = containers[0].get("ModelDataUrl")
    return place is None or place == model.place(project) or data.is_there(aws, place)


def packages(aws: Aws, group: str) -> list[str]:
    """The ARNs of a group's versions, newest first; none where there is no such group."""
    client, given, found = aws.client("sagemaker"), {"ModelPackageGroupName": group}, []
    while True:
        try:
            page = client.list_model_packages(**given)
        except AwsError as exc:
            if exc.is_missing:
                return []
            raise
        found += [package["ModelPackageArn"] for package in page["ModelPackageSummaryList"]]
        if not page.get("NextToken"):
            return sorted(found, key=lambda arn: -int(arn.rsplit("/", 1)[1]))
        given["NextToken"] = page["NextToken"]


@contextmanager
def new_models(aws: Aws) -> Iterator[list[str]]:
    """A list for `create_model` to note what it makes, which is removed where the block fails."""
    made: list[str] = []
    try:
        yield made
    except TrainingError as failure:
        if isinstance(failure, AwsError) and failure.code == "Unreachable":
            raise  # what was asked for last may have been made all the same, and need them
        try:
            remove_models(aws, made)
        except AwsError as exc:  # the failure itself is what must be told
            log.warning("cleaning up after it failed: %s; `status` shows what is there", exc)
        raise


def remove_models(aws: Aws, names: Iterable[str]) -> None:
    """Remove these Models; one that is not there is no error. Raises: AwsError."""
    for name in names:
        try:
            aws.client("sagemaker").delete_model(ModelName=name)
        except AwsError as exc:
            if not exc.is_missing:
                raise


def create_model(
    aws: Aws, project: Project, container: Mapping[str, Any], role: str, made: list[str], kind: str = "model"
) -> str:
    """The name of a Model of one container, made unless it is there; `made` gets it then. Raises: AwsError."""
    client, name = aws.client("sagemaker"), project.of(kind, [container, role])
    try:
        client.describe_model(ModelName=name)
    except AwsError as exc:
        if not exc.is_missing:
            raise
        given = {"Containers": [dict(container)], "ExecutionRoleArn": role, "Tags": project.tags}
        try:
            roles.until_role_is_known(lambda: client.create_model(ModelName=name, **given))
            made.append(name)
        except AwsError as refused:
            if not refused.is_there_already:  # made by another command, this moment
                raise
    return name


def _pack(folder: Path, archive: Path, flag: str) -> None:
    try:
        pack(folder, archive)
    except OSError as exc:
        place = exc.filename or archive
        raise LaunchError(f"{flag} {folder} cannot be packed: {place}: {exc.strerror or exc}.") from exc


def _sha256(archive: Path) -> str:
    try:
        with archive.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise LaunchError(f"{archive} cannot be read: {exc.strerror or exc}.") from exc


def _require_artifact(folder: Path, flag: str) -> None:
    if not (folder / "manifest.json").is_file():
        raise ConfigError(f"{flag} {folder}: there is no manifest.json in it; give an artifact's folder.")


def _figures(manifest: Manifest) -> dict[str, str]:
    found = manifest.metrics.get("validation") or {}
    names = ("accuracy", "top5_accuracy", "loss", "n")
    return {f"validation_{name}": f"{found[name]:.6g}" for name in names if isinstance(found.get(name), int | float)}


def class_facts(classes: Sequence[str]) -> dict[str, str]:
    """What the registry notes of the classes, for the next deployment to compare; it takes few characters besides
    letters, 256 in all.
    """
    noted = {"classes": str(len(classes)), "classes_digest": digest(list(classes))}
    return {**noted, "first_classes": " / ".join(shown(classes))}


def shown(classes: Sequence[str]) -> list[str]:
    """The first of the classes, in characters that the registry takes."""
    return [re.sub(r"[^\w .:=+@-]", "_", name)[:60] for name in classes[:SHOWN_CLASSES]]


def _statistics(aws: Aws, project: Project, model: Located) -> dict[str, str]:
    """The figures as the registry shows them, written to S3: beside the archive where that was uploaded by us."""
    found = model.manifest.metrics.get("validation") or {}
    metrics = {
        name: {"value": found[name], "standard_deviation": "NaN"}
        for name in ("accuracy", "top5_accuracy", "loss")
        if isinstance(found.get(name), int | float)
    }
    body = json.dumps({"multiclass_classification_metrics": metrics}, indent=1).encode()
    key = project.key("models", model.entry, "statistics.json")
    aws.client("s3").put_object(Bucket=project.bucket, Key=key, Body=body)
    return {"ContentType": "application/json", "S3Uri": f"s3://{project.bucket}/{key}"}


def accuracy_of(facts: Mapping[str, str]) -> float | None:
    """The measured accuracy that a version's metadata tell; None where they do not, or someone wrote what is none."""
    try:
        found = float(facts["validation_accuracy"])
    except (KeyError, ValueError):
        return None
    return found if 0 <= found <= 1 else None


def classes_of(facts: Mapping[str, str]) -> tuple[int, str] | None:
    """How many classes a version's metadata tell, and the first of them, `apple, bear, can, ...`; None where they do
    not, or someone wrote what is none.
    """
    try:
        count, first = int(facts["classes"]), facts["first_classes"].replace(" / ", ", ")
    except (KeyError, ValueError):
        return None
    return count, first + (", ..." if count > SHOWN_CLASSES else "")


def registered(aws: Aws, model: str) -> tuple[str | None, dict[str, str]]:
    """The package that a SageMaker model was made of, and what the registry notes of it (version, accuracy).

    None and nothing where the model is gone, or may not be asked about; nothing noted where the package is. Raises:
    AwsError.
    """
    client, package = aws.client("sagemaker"), None
    try:
        described = client.describe_model(ModelName=model)
        container = (described.get("Containers") or [described.get("PrimaryContainer") or {}])[0]
        package = container.get("ModelPackageName")
        if package is None:
            return None, {}
        noted = client.describe_model_package(ModelPackageName=package)
        return package, dict(noted.get("CustomerMetadataProperties") or {})
    except AwsError as exc:
        if exc.is_missing or exc.is_denied:
            return package, {}
        raise
