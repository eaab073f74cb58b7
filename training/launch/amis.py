"""Which driver a SageMaker host has, and which CUDA an image may therefore bring.

The table of host images is `container.drivers`, which the image itself reads at its start. Without InferenceAmiVersion
g4dn and g5 hosts have driver 470, which is too old for CUDA 13: our image says so and ends, others may leave no log.
"""

from dataclasses import dataclass

from container import drivers
from training.errors import ConfigError


@dataclass(frozen=True)
class Ami:
    """A host image for endpoints, or for batch transform."""

    name: str
    driver: int
    cuda: tuple[int, int]
    """The newest CUDA whose images start on it."""


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


AMIS = tuple(Ami(host.ami, host.driver, _version(host.cuda)) for host in drivers.ENDPOINT_HOSTS)

BATCH_AMI = next(
    Ami(host.ami, host.driver, _version(host.cuda)) for host in drivers.BATCH_HOSTS if host.ami == drivers.TRANSFORM_AMI
)
"""Of batch transform on a GPU (TransformAmiVersion): the first on which CUDA 13 can run, by forward compatibility."""

IMAGE_CUDA = _version(drivers.CUDA)
"""Of the image that container/ builds for GPUs."""

UNUSED = "{} has a GPU, and the image, which has no CUDA, leaves it unused"


def family(instance: str) -> str:
    """`ml.g5.xlarge` -> `g5`."""
    parts = instance.split(".")
    if len(parts) != 3 or parts[0] != "ml":
        raise ConfigError(f"--instance {instance}: SageMaker's instance types look like ml.g5.xlarge or ml.c6i.xlarge.")
    return parts[1]


def shown(cuda: tuple[int, int]) -> str:
    """`(13, 0)` -> `13.0`."""
    return "{}.{}".format(*cuda)


def has_gpu(instance: str) -> bool:
    """Whether the instance type brings an NVIDIA GPU."""
    return family(instance).startswith(("g", "p"))


def require_gpu(instance: str, cuda: tuple[int, int] = IMAGE_CUDA) -> None:
    """Raises: ConfigError where the instance type's GPU is too old for an image with `cuda`."""
    if family(instance) in ("p2", "p3", "p3dn") and cuda >= (13, 0):
        raise ConfigError(f"--instance {instance}: CUDA 13 dropped its GPU; take ml.g4dn, ml.g5 or ml.g6.")


def ami_for(instance: str, cuda: tuple[int, int] = IMAGE_CUDA) -> str | None:
    """The host image on which a container with `cuda` starts; None where none need be asked for (no GPU).

    Raises: ConfigError where there is none, or the GPU is too old for it.
    """
    require_gpu(instance, cuda)
    if not has_gpu(instance):
        return None
    for ami in AMIS:
        # Of two with the same driver, the later edition.
        if cuda <= ami.cuda and (cuda >= (13, 0) or ami.name.endswith("-1")):
            return ami.name
    newest = AMIS[-1].cuda
    raise ConfigError(
        f"No inference AMI runs CUDA {cuda[0]}.{cuda[1]}; the newest has {newest[0]}.{newest[1]}. Build an older image."
    )
