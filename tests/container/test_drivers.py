"""Driver against CUDA: what fits, what forward compatibility bridges, what to change where nothing does."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from container import drivers, entry
from container.drivers import driver_version, fit, torch_cuda
from tests.conftest import ROOT, environment

PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
    "GCC version:  gcc version 7.3.1 20180712 (Red Hat 7.3.1-17) (GCC)\n"
)
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22-I3)\n"
    "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n"
)


@pytest.mark.parametrize(("text", "version"), [(PROPRIETARY, "535.183.01"), (OPEN, "580.95.05")])
def test_the_kernel_module_names_the_driver(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version


def test_without_a_driver_the_processor_computes() -> None:
    found = fit(None)
    assert found.usable
    assert "no NVIDIA GPU" in found.sentence


@pytest.mark.parametrize("version", ["580.95.05", "610.43.02"])
def test_a_driver_of_this_cuda_or_later_fits(version: str) -> None:
    found = fit(version)
    assert found.usable
    assert found.library_path is None
    assert f"driver {version} fits CUDA 13.0" in found.sentence


def test_the_default_driver_of_g4dn_and_g5_is_refused_with_what_to_change() -> None:
    found = fit("470.57.02")
    assert not found.usable
    assert "InferenceAmiVersion=al2023-ami-sagemaker-inference-gpu-4-1" in found.sentence
    assert "TransformAmiVersion=al2-ami-sagemaker-batch-gpu-535" in found.sentence
    assert "serve-cpu" in found.sentence
    assert "a newer driver helps, or CUDA_VISIBLE_DEVICES=" in found.sentence


def test_without_the_compatibility_libraries_a_535_driver_is_refused(tmp_path: Path) -> None:
    found = fit("535.183.01", compat=tmp_path)
    assert not found.usable
    assert f"{tmp_path / 'libcuda.so.1'} is not in this image" in found.sentence


@pytest.fixture
def compat(tmp_path: Path) -> Path:
    """The source of a library whose cuInit gives the status it is compiled with."""
    source = tmp_path / "cuda.c"
    source.write_text("int cuInit(unsigned flags) { return CUDA_STATUS; }")
    return source


@pytest.mark.parametrize(("status", "usable"), [(0, True), (803, False)])
def test_forward_compatibility_is_used_where_it_initialises(compat: Path, status: int, usable: bool) -> None:
    """A stand-in for NVIDIA's libcuda, as no machine here has an old driver; compiled, so that it is really loaded."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to make the stand-in with")
    folder = compat.parent / str(status)
    folder.mkdir()
    command = ["cc", "-shared", "-fPIC", f"-DCUDA_STATUS={status}", "-o", str(folder / "libcuda.so.1"), str(compat)]
    subprocess.run(command, check=True)
    found = fit("535.183.01", compat=folder)
    assert found.usable is usable
    assert found.library_path == (str(folder) if usable else None)
    if not usable:
        assert "cuInit gave error 803" in found.sentence


def test_nvml_is_asked_where_there_is_no_kernel_module(tmp_path: Path) -> None:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        assert driver_version(tmp_path / "none") is None
    else:
        assert driver_version(tmp_path / "none")


def test_the_table_is_the_one_deployment_uses() -> None:
    amis = pytest.importorskip("training.launch.amis", reason="this tree has no training/launch")
    assert [(host.ami, host.driver) for host in drivers.ENDPOINT_HOSTS] == [(ami.name, ami.driver) for ami in amis.AMIS]
    assert amis.ami_for("ml.g5.xlarge") == drivers.INFERENCE_AMI


def test_the_image_is_built_for_the_cuda_that_the_table_is_about() -> None:
    site_packages = Path(torch.__file__).parent.parent
    assert torch_cuda(site_packages) in (drivers.CUDA, None)  # None: macOS has wheels without CUDA
    dockerfile = Path(entry.__file__).with_name("Dockerfile").read_text()
    assert f"ARG CUDA_BASE_IMAGE=nvidia/cuda:{drivers.CUDA}." in dockerfile
    assert f'verified_versions="{drivers.CUDA}"' in dockerfile


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with a torch for CUDA, on a host whose driver is too old for it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    monkeypatch.setattr(entry, "driver_version", lambda: "470.57.02")
    return tmp_path


@pytest.mark.parametrize("names", [(), ("nvidiactl", "nvidia-uvm", "nvidia-modeset"), ("null", "dri")])
def test_the_hosts_driver_does_not_count_in_a_container_without_a_gpu(
    names: tuple[str, ...], site_packages: Path, tmp_path: Path
) -> None:
    """`docker run IMAGE serve` without --gpus: the kernel shows its driver, there is no device."""
    devices = tmp_path / "dev"
    devices.mkdir()
    for name in names:
        (devices / name).touch()
    found = entry.look(site_packages, devices)
    assert found.usable
    assert found.sentence.startswith("no NVIDIA GPU; CUDA 13.0 of this image is not used")


@pytest.mark.parametrize("name", ["nvidia0", "nvidia7", "nvidia12", "dxg"])
def test_the_driver_counts_where_a_gpu_is_given(name: str, site_packages: Path, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / name).touch()
    assert not entry.look(site_packages, tmp_path / "dev").usable


def test_an_old_driver_without_a_visible_gpu_leaves_the_processor(tmp_path: Path) -> None:
    """What the sentence advises: torch and the service find no GPU, and go on; the driver is a stand-in."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to make the stand-in with")
    (tmp_path / "cuda.c").write_text(
        "int cuInit(unsigned flags) { return 100; }"
        "int cuDriverGetVersion(int *version) { *version = 11040; return 0; }"
        "int cuDeviceGetCount(int *count) { *count = 0; return 100; }"
        "int cuGetProcAddress(const char *name, void **found, int version, long flags) { *found = 0; return 500; }"
    )
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(tmp_path / "cuda.c")]
    subprocess.run(command, check=True)
    code = "import torch; from service.model.machine import gpus; print(torch.cuda.is_available(), gpus())"
    env = environment(LD_LIBRARY_PATH=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert result.stdout == "False 0\n"
    if torch_cuda(Path(torch.__file__).parent.parent) is not None:  # else a macOS wheel
        assert "driver on your system is too old (found version 11040)" in result.stderr


def test_an_image_without_torch_says_that_it_computes_on_the_processor(tmp_path: Path) -> None:
    (tmp_path / "openvino").mkdir()
    assert entry.look(tmp_path).sentence == "image without CUDA, engines: OpenVINO."
