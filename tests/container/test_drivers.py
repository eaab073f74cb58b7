"""Driver against CUDA: what fits, what forward compatibility bridges, what to change where nothing does."""

import ctypes
from pathlib import Path

import pytest

from container import drivers, entry
from container.drivers import driver_version, fit, torch_cuda

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
    assert "no NVIDIA driver" in found.sentence


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
    from shutil import which
    from subprocess import run

    if which("cc") is None:
        pytest.skip("no C compiler to make the stand-in with")
    folder = compat.parent / str(status)
    folder.mkdir()
    command = ["cc", "-shared", "-fPIC", f"-DCUDA_STATUS={status}", "-o", str(folder / "libcuda.so.1"), str(compat)]
    run(command, check=True)
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
    import torch

    site_packages = Path(torch.__file__).parent.parent
    assert torch_cuda(site_packages) in (drivers.CUDA, None)  # None: macOS has wheels without CUDA
    dockerfile = Path(entry.__file__).with_name("Dockerfile").read_text()
    assert f"ARG CUDA_BASE_IMAGE=nvidia/cuda:{drivers.CUDA}." in dockerfile
    assert f'verified_versions="{drivers.CUDA}"' in dockerfile


def test_an_image_without_torch_says_that_it_computes_on_the_processor(tmp_path: Path) -> None:
    (tmp_path / "openvino").mkdir()
    assert entry.look(tmp_path).sentence == "image without CUDA, engines: OpenVINO."
