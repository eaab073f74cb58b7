"""What is taken from an environment before it is copied into an image, on a small tree; the images: test_images.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from container.build import ROOT
from container.slim import EVERYWHERE, KEPT, SERVING

STAYS = {
    "numpy/_core/tests/_natype.py", "numpy/_core/tests/__pycache__/_natype.cpython-311.pyc",
    "scipy/stats/_bws_test.py", "scipy/stats/__pycache__/_bws_test.cpython-311.pyc",
    "torch/testing/_internal/common_utils.py", "torch/testing/__pycache__/_utils.cpython-311.pyc",
    "package/contest.py", "package/latest.py", "package/testing.py", "package/protest_.py",
    "package-1.0.dist-info/licenses/tests/LICENSE",
}  # fmt: skip
GOES = {
    "numpy/_core/tests/test_api.py", "numpy/_core/tests/__pycache__/test_api.cpython-311.pyc",
    "annotated_types/test_cases.py", "annotated_types/__pycache__/test_cases.cpython-311.pyc",
    "torch/testing/_internal/rpc_test.py", "torch/testing/_internal/__pycache__/rpc_test.cpython-311.pyc",
    "package/conftest.py", "package/__pycache__/conftest.cpython-311.pyc", "package/test/data.bin",
    "package/include/header.h", "package/lib.a",
}  # fmt: skip
OF_SERVING = {"openvino/libs/libopenvino_onnx_frontend.so.2630", "torch/bin/protoc"}


@pytest.mark.parametrize("flags", [[], ["--training"]])
def test_tests_go_with_their_bytecode_and_what_only_looks_like_one_stays(flags: list[str], tmp_path: Path) -> None:
    for name in STAYS | GOES | OF_SERVING:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    command = [sys.executable, str(ROOT / "container" / "slim.py"), str(tmp_path), *flags]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    left = {str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*") if each.is_file()}
    assert left == STAYS | (OF_SERVING if flags else set())
    assert not (tmp_path / "package" / "test").exists(), "no empty folder stays"
    assert said.count("\n") == len(EVERYWHERE) + (0 if flags else len(SERVING)) + 1


def test_what_is_kept_is_still_there_under_that_name() -> None:
    """Each by its reason: what is gone from its package need not be kept."""
    site_packages = Path(pytest.__file__).parent.parent
    for name in KEPT:
        if (site_packages / name.partition("/")[0]).is_dir():
            assert (site_packages / name).is_file(), f"{name} is gone: take it from KEPT"
