"""Regions as they are typed, against boto3's own list, which asks nobody."""

import difflib
import logging
import re

import boto3
from botocore.exceptions import BotoCoreError

from training.errors import ConfigError

log = logging.getLogger("training")

_DIRECTIONS = "north|south|east|west|central|northeast|northwest|southeast|southwest"


class RegionError(ConfigError):
    """No region is named, or none that AWS can have."""


def look_at(session: boto3.Session, region: str) -> None:
    """Raises: RegionError where AWS can have no region of this name. Warns of one that boto3 does not list and whose
    name is made as AWS makes them: it may be newer than boto3."""
    known = [
        name
        for partition in session.get_available_partitions()
        for name in session.get_available_regions("sagemaker", partition)
    ]
    if region in known:
        return
    close = difflib.get_close_matches(region, known, 1)
    meant = f" Did you mean {close[0]}?" if close else ""
    if not _may_be(session, region):
        raise RegionError(f"Region {region}: regions look like eu-central-1, and AWS has none of this name.{meant}")
    log.warning(
        "boto3 %s lists no SageMaker in region %s; if it is newer than that, all is well.%s",
        boto3.__version__, region, meant,
    )  # fmt: skip


def _may_be(session: boto3.Session, region: str) -> bool:
    """Whether its area is one of AWS's and its direction is one."""
    try:
        session.get_partition_for_region(region)
    except BotoCoreError:
        return False
    return re.fullmatch(rf".+-({_DIRECTIONS})-\d", region) is not None
