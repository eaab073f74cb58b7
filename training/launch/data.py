"""Data to S3: checked here first, uploaded in parts with checksums, and only what is not there yet.

Each channel lies below a prefix that follows from its content (`PROJECT/data/train-DIGEST/`): a job's data cannot
change under it, and a repeated upload sends what is missing and nothing else.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError

from training.data.dataset import Dataset, FileImages
from training.data.folder import BrokenFiles, images_below
from training.data.layouts import CIFAR100, open_dataset, require_layout
from training.errors import ConfigError, DataError
from training.launch.errors import AwsError, LaunchError
from training.launch.names import Project, digest, split_uri
from training.launch.places import kind_at
from training.launch.session import Aws, unreachable
from training.progress import progress

log = logging.getLogger("training")

THREADS = 16
PART_BYTES = 16 * 2**20
SHA256 = "sha256"
"""The metadata that every object of ours carries: what a repeated upload compares."""


@dataclass(frozen=True)
class Channel:
    """Files of one of the job's input channels: train, validation or weights."""

    name: str
    files: tuple[tuple[str, Path], ...]
    """Relative key and where the file lies, by key."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(_size(path) for _, path in self.files)


def channel_of(name: str, place: Path) -> Channel:
    """The channel that a place here is: a folder, or of weights a file. Raises: ConfigError where there is none;
    DataError.
    """
    require_place(name, place)
    if name != "weights":
        return Channel(name, tuple(_files(place)))
    return Channel(name, ((_key(place, Path(place.name)), place),))


def require_place(name: str, place: Path) -> None:
    """Something lies here that could be the channel; no image is read. Raises: ConfigError, DataError."""
    if name == "weights":
        if kind_at(place) != "file":
            raise ConfigError(f"--weights {place}: there is no such file; allowed are a file, imagenet and none.")
    elif kind_at(place) != "folder":
        raise ConfigError(f"--{'data' if name == 'train' else name} {place}: there is no such folder.")
    elif name == "train":
        require_layout(place)


def require_classes(place: Path) -> None:
    """There are two folders of images at least. Raises: DataError."""
    if place.name == CIFAR100 or (place / CIFAR100).is_dir():
        return
    classes = {path.parent.name for path in images_below(place)}
    if len(classes) < 2:
        raise DataError(
            f"--data {place} has {len(classes) or 'no'} folder{'' if classes else 's'} of images, and at least 2 are "
            "needed: one for each class."
        )


def check(data: Path, validation: Path | None, broken_files: BrokenFiles = "refuse") -> Dataset:
    """Open the data as the training will, so that what it would refuse is refused before anything costs.

    Raises: DataError.
    """
    dataset = open_dataset(
        data, validation_fraction=0.1, seed=0, broken_files=broken_files, validation_root=validation
    )  # fmt: skip
    log.info(
        "data: %s: %d classes, %d images to train on, %d to validate on",
        dataset.name, len(dataset.classes), len(dataset.train), len(dataset.validation),
    )  # fmt: skip
    return dataset


def counted(channel: Channel, dataset: Dataset) -> Channel:
    """The channel without the files that `check` has not counted as images: what the job is not to read, it is not
    given.
    """
    sides = [images for images in (dataset.train, dataset.validation) if isinstance(images, FileImages)]
    if channel.name == "weights" or not sides:
        return channel
    paths = {path for images in sides for path in images.paths}
    return replace(channel, files=tuple((key, path) for key, path in channel.files if path in paths))


def upload(aws: Aws, project: Project, channel: Channel) -> str:
    """Bring the channel's files to S3; returns the s3:// address of its folder. Raises: AwsError, LaunchError."""
    sums = _hashed(channel)
    place = project.uri("data", prefix_of(channel, sums))
    put(aws, place, list(channel.files), sums, f"uploading {channel.name}")
    return place


def prefix_of(channel: Channel, sums: dict[str, str] | None = None) -> str:
    """`train-3f2a9c41/`: where the channel lies, which follows from its content."""
    return f"{channel.name}-{digest(sums or _hashed(channel))}/"


def put(aws: Aws, place: str, files: list[tuple[str, Path]], sums: dict[str, str], what: str) -> int:
    """Upload `files` (key below `place`, path) that are not there with their checksum; returns how many it sent."""
    s3 = aws.client("s3")
    bucket, prefix = split_uri(place)
    there = dict(listed(aws, place))
    config = TransferConfig(multipart_threshold=4 * PART_BYTES, multipart_chunksize=PART_BYTES, use_threads=False)

    def send(key: str, path: Path) -> bool:
        target = prefix + key
        if there.get(target) == _size(path):
            head = s3.head_object(Bucket=bucket, Key=target)
            if head["Metadata"].get(SHA256) == sums[key]:
                return False
        extra = {"Metadata": {SHA256: sums[key]}, "ChecksumAlgorithm": "SHA256"}  # S3 checks what arrives by it
        try:
            s3.upload_file(str(path), bucket, target, ExtraArgs=extra, Config=config)
        except OSError as exc:
            raise DataError(f"{path} cannot be read: {exc.strerror}.") from exc
        return True

    sent: int = sum(progress(_in_threads(send, files), what, total=len(files)))
    others = "" if sent == len(files) else ", the others were there"
    log.info("%s: %d of %d files sent%s (%s)", what, sent, len(files), others, place)
    return sent


def listed(aws: Aws, place: str) -> Iterator[tuple[str, int]]:
    """Key and size in bytes of every object below `place`."""
    bucket, prefix = split_uri(place)
    for page in aws.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            yield entry["Key"], entry["Size"]


def is_there(aws: Aws, uri: str) -> bool:
    """Whether the object is in S3; yes where that may not be asked. Raises: AwsError."""
    bucket, key = split_uri(uri)
    try:
        aws.client("s3").head_object(Bucket=bucket, Key=key)
    except AwsError as exc:
        if not (exc.is_missing or exc.is_denied):
            raise
        return exc.is_denied
    return True


def require_there(aws: Aws, flag: str, uri: str) -> None:
    """Raises: ConfigError where S3 has nothing at the address that `--flag` gives; AwsError. The role that jobs run as
    may read what whoever starts them may not, so that is a warning.
    """
    try:
        if not any(True for _ in listed(aws, uri)):
            raise ConfigError(f"--{flag} {uri}: there is nothing in S3 at this address.")
    except AwsError as exc:
        if exc.is_missing:
            raise ConfigError(f"--{flag} {uri}: there is no bucket {split_uri(uri)[0]}.") from exc
        if not exc.is_denied:
            raise
        log.warning("--%s %s: whether something is there cannot be told (%s)", flag, uri, exc.code)


def ensure_bucket(aws: Aws, project: Project) -> None:
    """Make the project's bucket unless it is there and ours, closed to the public. Raises: LaunchError, AwsError."""
    s3 = aws.client("s3")
    try:
        require_region(aws, project, s3.head_bucket(Bucket=project.bucket, ExpectedBucketOwner=aws.account))
        _close_what_broke_off(aws, project)
        return
    except AwsError as exc:
        if exc.is_denied:
            raise LaunchError(
                f"Bucket {project.bucket} is another account's, or s3:ListBucket is missing; name one with --bucket."
            ) from exc
        if not exc.is_missing:
            raise
    where = {} if aws.region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": aws.region}}
    try:
        s3.create_bucket(Bucket=project.bucket, **where)
    except AwsError as exc:
        if not exc.is_there_already:  # made by another command this moment
            raise
    _close(aws, project)
    log.info("bucket %s is made", project.bucket)


def _close(aws: Aws, project: Project) -> None:
    """Nothing in the bucket can be made public."""
    aws.client("s3").put_public_access_block(
        Bucket=project.bucket,
        PublicAccessBlockConfiguration=dict.fromkeys(
            ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"), True
        ),
    )


def _close_what_broke_off(aws: Aws, project: Project) -> None:
    """Close a bucket that a command made which broke off before that: it is empty, and nobody has said how public it
    may be. AWS closes new buckets by itself since April 2023. Raises: AwsError.
    """
    s3 = aws.client("s3")
    try:
        s3.get_public_access_block(Bucket=project.bucket)
    except AwsError as exc:
        if exc.is_denied:  # who may not look has not made it either
            return
        if exc.code != "NoSuchPublicAccessBlockConfiguration":
            raise
        if not s3.list_objects_v2(Bucket=project.bucket, MaxKeys=1).get("KeyCount"):
            _close(aws, project)
            log.info("bucket %s is closed to the public", project.bucket)


def require_region(aws: Aws, project: Project, found: Mapping[str, Any]) -> None:
    """Raises: LaunchError where the project's bucket, `found` by HeadBucket, is in another region than jobs run in."""
    region = found.get("BucketRegion") or aws.region
    if region != aws.region:
        raise LaunchError(
            f"Bucket {project.bucket} is in {region}, and jobs in {aws.region} take no other region's: name one there "
            f"with --bucket, or give --region {region}."
        )


def fetch(aws: Aws, uri: str, target: Path) -> Path:
    """Bring one object home; whole or not at all. Raises: AwsError, LaunchError."""
    bucket, key = split_uri(uri)
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aws.client("s3").download_file(bucket, key, str(part))
        part.replace(target)
    except AwsError as exc:
        if exc.is_missing:
            raise LaunchError(f"{uri} is not there; did the job that writes it end well?") from exc
        raise
    except (BotoCoreError, Boto3Error) as exc:  # its body broke off, again and again; some are OSErrors too
        raise unreachable("s3", "GetObject", exc) from exc
    except OSError as exc:
        raise LaunchError(f"{target} cannot be written: {exc.strerror or exc}.") from exc
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return target


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Key and path of what the training reads: of CIFAR-100 its files, else the images in the class folders, which may
    be links to folders elsewhere. Raises: DataError.
    """
    if folder.name == CIFAR100:
        folder = folder.parent
    inner = folder / CIFAR100
    for path in sorted(_of_cifar100(inner) if inner.is_dir() else images_below(folder)):
        yield _key(path, path.relative_to(folder)), path


def _of_cifar100(inner: Path) -> list[Path]:
    from training.data import cifar100  # torchvision, which takes seconds and which folders do without

    return [inner / name for name in (*cifar100.FILES, cifar100.SAMPLE_CHECKSUMS) if (inner / name).is_file()]


def _key(path: Path, relative: Path) -> str:
    """What the file is called in S3, whose keys are UTF-8; names of files may be any bytes. Raises: DataError."""
    key = relative.as_posix()
    try:
        key.encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"{str(path)!a}: its name is no UTF-8, as names in S3 are; rename it.") from exc
    return key


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}.") from exc


def _hashed(channel: Channel) -> dict[str, str]:
    def one(key: str, path: Path) -> tuple[str, str]:
        try:
            with path.open("rb") as file:
                return key, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as exc:
            raise DataError(f"{path} cannot be read: {exc.strerror}.") from exc

    found = progress(_in_threads(one, list(channel.files)), f"reading {channel.name}", total=len(channel.files))
    return dict(sorted(found))


def _in_threads(work: Any, files: list[tuple[str, Path]]) -> Iterator[Any]:
    """Results as they come; the first error ends it, and what has not begun is dropped."""
    with ThreadPoolExecutor(THREADS) as threads:
        futures = [threads.submit(work, key, path) for key, path in files]
        try:
            for future in as_completed(futures):
                yield future.result()
        except KeyboardInterrupt:
            log.info("it stops when the files under way are through, so that none is left half")
            raise
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
