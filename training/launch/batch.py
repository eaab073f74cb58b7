"""Batch transform: a folder of images classified by a job that starts, answers and ends.

On processors by itself: AWS's hosts for batch transform have driver 535 at most, no CUDA 13 (`TransformAmiVersion` in
botocore's model, 2026-11-22). On a GPU the image that has CUDA goes through forward compatibility. One image a request:
pictures have no lines. The container's /execution-parameters say the rest.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from service.model.errors import ImageError
from service.model.images import MEDIA_TYPES, decode
from training.errors import DataError
from training.launch import amis, data
from training.launch.client import Outcome, Reply, content_of, understood
from training.launch.errors import AwsError, JobFailed, failure_advice
from training.launch.hosting import LIMITS
from training.launch.images import Image
from training.launch.jobs import OVER
from training.launch.logs import TRANSFORM, LogTail
from training.launch.names import Project, digest, split_uri
from training.launch.session import Aws, read_body
from training.launch.wait import POLL_S, wait

log = logging.getLogger("training")

INSTANCE = "ml.c6i.2xlarge"
MAX_PAYLOAD_MB = LIMITS["realtime"].payload_mb
"""What the service takes by itself."""
TIMEOUT_S, RETRIES = 120, 3


def readable(paths: Sequence[Path]) -> tuple[list[Path], list[Outcome]]:
    """The images that can be decoded, and what is wrong with the others: one bad record would fail the whole job."""
    good, bad = [], []
    for path in paths:
        try:
            content = content_of(path)
            decode(content)
            if len(content) > MAX_PAYLOAD_MB * 2**20:
                raise DataError(f"it is larger than the {MAX_PAYLOAD_MB} MB that a job takes")
            good.append(path)
        except (ImageError, DataError, OSError) as exc:
            bad.append(Outcome(path, problem=str(exc)))
    return good, bad


def upload(aws: Aws, project: Project, paths: Sequence[Path]) -> tuple[str, dict[Path, str]]:
    """Bring the images to S3: the address of their folder, and the key of each below it. Raises: AwsError."""
    place, keys, sums = named(project, paths)
    unique = {keys[path]: path for path in paths}
    data.put(aws, place, list(unique.items()), {keys[path]: sums[path] for path in paths}, "uploading images")
    return place, keys


def named(project: Project, paths: Sequence[Path]) -> tuple[str, dict[Path, str], dict[Path, str]]:
    """The address of the images' folder in S3, the key of each below it, and its SHA-256. Raises: DataError."""
    sums = {path: _sum(path) for path in paths}
    # Named by content: two files of the same name may come from two folders, and keys may hold no odd characters.
    keys = {path: f"{sums[path][:32]}{_ending(path)}" for path in paths}
    return project.uri("batch", digest(sorted(keys.values())), "input") + "/", keys, sums


def _sum(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}.") from exc


def _ending(path: Path) -> str:
    ending = path.suffix.lower()
    return ending if ending in MEDIA_TYPES else ""


def caution(instance: str, image: Image) -> str:
    """What is to be known of a GPU's host and the image, as a sentence; empty where nothing is.

    Raises: ConfigError where the GPU is too old for the image.
    """
    if not amis.has_gpu(instance):
        return ""
    if image.cuda is None:
        return amis.UNUSED.format(instance)
    amis.require_gpu(instance, image.cuda)
    if image.cuda <= amis.BATCH_AMI.cuda:
        return ""
    newest = amis.shown(amis.BATCH_AMI.cuda)
    cuda = amis.shown(image.cuda) if image.known else f"later than {newest}, if the image brings such,"
    return (
        f"{instance}: batch transform's hosts have driver {amis.BATCH_AMI.driver} at most, on which CUDA {cuda} runs "
        "by forward compatibility alone; a job for which that fails ends at its start"
    )


def request(project: Project, model: str, place: str, instance: str = INSTANCE, count: int = 1) -> dict[str, Any]:
    """CreateTransformJob's arguments but for the name."""
    resources: dict[str, Any] = {"InstanceType": instance, "InstanceCount": count}
    if amis.has_gpu(instance):
        resources["TransformAmiVersion"] = amis.BATCH_AMI.name
    output = place.removesuffix("input/") + f"output-{digest([model, place])}"
    return {
        "ModelName": model,
        "BatchStrategy": "SingleRecord",
        "MaxPayloadInMB": MAX_PAYLOAD_MB,  # with it, at most 4 at once: the product may be 100 MB
        "MaxConcurrentTransforms": 100 // MAX_PAYLOAD_MB,
        "ModelClientConfig": {"InvocationsTimeoutInSeconds": TIMEOUT_S, "InvocationsMaxRetries": RETRIES},
        "TransformInput": {
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": place}},
            "ContentType": "application/octet-stream",
            "CompressionType": "None",
            "SplitType": "None",
        },
        "TransformOutput": {"S3OutputPath": output, "Accept": "application/json", "AssembleWith": "None"},
        "TransformResources": resources,
        "Tags": project.tags,
    }


def wait_for(aws: Aws, name: str, images: int, poll_s: float = POLL_S) -> dict[str, Any]:
    """Until the job ends, telling how many of its `images` are answered, and its log but for the lines of requests.

    Returns: its description. Raises: JobFailed; StoppedWaiting; AwsError.
    """
    client, count = aws.client("sagemaker"), _Answered(aws, images)

    def state(job: dict[str, Any]) -> str:
        status = str(job["TransformJobStatus"])
        return status if status in OVER else f"{status}, {count.of(job['TransformOutput']['S3OutputPath'])}"

    tail = _WithoutRequests(aws, TRANSFORM, f"{name}/")
    job = wait(
        lambda: dict(client.describe_transform_job(TransformJobName=name)), state,
        lambda job: job["TransformJobStatus"] in OVER, f"job {name}", tail, poll_s, f"stop {name}",
    )  # fmt: skip
    if job["TransformJobStatus"] != "Completed":
        reason = job.get("FailureReason") or job["TransformJobStatus"]
        lines = LogTail(aws, TRANSFORM, f"{name}/").last_lines()
        raise JobFailed(f"Job {name}", reason, lines, failure_advice(reason))
    return job


class _WithoutRequests(LogTail):
    """A job's log without the line that the service writes of each request: images are counted."""

    def new_lines(self) -> list[str]:
        return [line for line in super().new_lines() if "/invocations" not in line]


class _Answered:
    """Counts a job's answers in S3, seldom enough that the counting takes a tenth of the time at most."""

    def __init__(self, aws: Aws, images: int) -> None:
        self._aws, self._images = aws, images
        self._shown, self._next_s = f"0 of {images} images answered", 0.0

    def of(self, place: str) -> str:
        """`3000 of 100000 images answered`, in steps of a twentieth."""
        start_s = time.monotonic()
        if start_s >= self._next_s:
            with suppress(AwsError):  # who may not list them is told in the end
                step, done = max(1, self._images // 20), sum(1 for _ in data.listed(self._aws, place))
                self._shown = f"{done - done % step} of {self._images} images answered"
            self._next_s = time.monotonic() + 10 * (time.monotonic() - start_s)
        return self._shown


def outcomes(aws: Aws, job: dict[str, Any], keys: dict[Path, str]) -> list[Outcome]:
    """What the job wrote about each image, in the order of `keys`. Raises: AwsError."""
    bucket, prefix = split_uri(job["TransformOutput"]["S3OutputPath"])
    s3 = aws.client("s3")
    there = {key for key, _ in data.listed(aws, job["TransformOutput"]["S3OutputPath"])}
    found = []
    for path, key in keys.items():
        target = f"{prefix.rstrip('/')}/{key}.out"
        if target not in there:
            found.append(Outcome(path, problem="the job wrote no answer"))
            continue
        body = read_body(s3.get_object(Bucket=bucket, Key=target), "s3", "GetObject")
        found.append(understood(path, Reply(200, {}, body)))
    return found
