"""Which NVIDIA driver the image needs, which SageMaker hosts have it, and what to do where they don't fit.

The one table of hosts: deployment picks from it (`training.launch.amis`), the image says the same at its start
(`container.entry`). Standard library only, since both import it.

Sources: botocore's service model (`ProductionVariantInferenceAmiVersion`, `TransformAmiVersion`),
https://docs.aws.amazon.com/sagemaker/latest/dg/inference-gpu-drivers.html, and for the driver a CUDA version needs
https://docs.nvidia.com/deploy/cuda-compatibility/.
"""

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

CUDA = "13.0"
"""What torch 2.13.0's wheels from PyPI are built for, and the base image holds."""
NEEDED_DRIVER = 580
"""The first driver branch with CUDA 13; every later one runs it too."""
FORWARD_FROM = 535
"""The oldest branch on which the base image's cuda-compat-13-0 can work: R470 is not among those it is made for."""

COMPAT = Path("/usr/local/cuda/compat")
"""NVIDIA's forward-compatibility libraries, part of the base image (package cuda-compat-13-0)."""
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
DEVICES = Path("/dev")


@dataclass(frozen=True)
class Host:
    """What one of SageMaker's machine images brings."""

    ami: str
    """The value of InferenceAmiVersion (endpoints) or TransformAmiVersion (batch transform)."""
    driver: int
    """Branch of the NVIDIA driver."""
    cuda: str
    """What that driver runs without forward compatibility."""


ENDPOINT_HOSTS = (
    Host("al2-ami-sagemaker-inference-gpu-2", 535, "12.2"),
    Host("al2-ami-sagemaker-inference-gpu-2-1", 535, "12.2"),
    Host("al2-ami-sagemaker-inference-gpu-3-1", 550, "12.4"),
    Host("al2023-ami-sagemaker-inference-gpu-4-1", 580, "13.0"),
)
"""Without InferenceAmiVersion, g4dn, g5 and p4d have driver 470, g6 and p5 535: too old for this image."""
BATCH_HOSTS = (
    Host("al2-ami-sagemaker-batch-gpu-470", 470, "11.4"),
    Host("al2-ami-sagemaker-batch-gpu-535", 535, "12.2"),
)

INFERENCE_AMI = next(host.ami for host in ENDPOINT_HOSTS if host.driver >= NEEDED_DRIVER)
"""What an endpoint on a GPU must ask for."""
TRANSFORM_AMI = next(host.ami for host in BATCH_HOSTS if host.driver >= FORWARD_FROM)
"""What batch transform on a GPU must ask for: the image then goes through forward compatibility."""


@dataclass(frozen=True)
class Fit:
    """Whether the GPU can be used, as one sentence, and what the process needs for it."""

    usable: bool
    """Whether CUDA can work; True where there is no driver, and so nothing to be used."""
    sentence: str
    library_path: str | None = None
    """To be put in front of LD_LIBRARY_PATH."""


def fit(driver: str | None, cuda: str = CUDA, compat: Path = COMPAT) -> Fit:
    """How driver version `driver` (None: no GPU, or no driver for it) and this image go together."""
    if driver is None:
        return Fit(True, f"no NVIDIA GPU; CUDA {cuda} of this image is not used, the processor computes")
    branch = int(driver.partition(".")[0])
    if branch >= NEEDED_DRIVER:
        return Fit(True, f"NVIDIA driver {driver} fits CUDA {cuda} of this image (needed: {NEEDED_DRIVER} or later)")
    remedy = (
        f"an endpoint needs InferenceAmiVersion={INFERENCE_AMI} in its production variant, batch transform "
        f"TransformAmiVersion={TRANSFORM_AMI}; or use the image of the target serve-cpu, on an instance without a GPU; "
        "elsewhere a newer driver helps, or CUDA_VISIBLE_DEVICES= to compute on the processor"
    )
    sentence = f"NVIDIA driver {driver} is too old for CUDA {cuda} of this image, which needs {NEEDED_DRIVER} or later"
    if branch < FORWARD_FROM:
        return Fit(False, f"{sentence}: {remedy}.")
    failure = _try_forward_compatibility(compat)
    if failure is not None:
        return Fit(False, f"{sentence}, and forward compatibility does not help ({failure}): {remedy}.")
    return Fit(True, f"{sentence}; forward compatibility ({compat}) bridges that", str(compat))


def has_gpu(devices: Path = DEVICES) -> bool:
    """Whether there is a device of NVIDIA's; a container without one still sees the host's driver by its version."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()  # the second on Windows (WSL 2)


def driver_version(module: Path = KERNEL_MODULE) -> str | None:
    """The NVIDIA driver's version, such as "580.95.05"; None where there is none. From the kernel module, else NVML.

    The kernel's, and so the host's: `has_gpu` says whether it is of use here.
    """
    try:
        text = module.read_text()
    except OSError:
        return _nvml_version()
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  ..."; the open modules say "... for x86_64  580..."
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else _nvml_version()


def torch_cuda(site_packages: Path) -> str | None:
    """The CUDA version that the installed torch is built for; None without torch, or for a torch without CUDA."""
    try:
        text = (site_packages / "torch" / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _nvml_version() -> str | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")  # the driver brings it
    except OSError:
        return None
    version = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version)):
        return None
    return version.value.decode()


def _try_forward_compatibility(compat: Path) -> str | None:
    """Why the libraries in `compat` do not work here; None when they do (CUDA driver API, cuInit)."""
    library = compat / "libcuda.so.1"
    if not library.exists():
        return f"{library} is not in this image, which was built on another base"
    try:
        status = ctypes.CDLL(str(library)).cuInit(0)
    except OSError as exc:
        return str(exc)
    return f"cuInit gave error {status}: the GPU or its driver is not among those it supports" if status else None
