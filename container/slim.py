"""Removes from a virtual environment what serving never opens: `python slim.py SITE_PACKAGES`, at build time.

Only whole parts that a package can do without by its own design (plugins and frontends that are looked up by name,
headers, static libraries, tests), so that each goes again with the next version. What a library of the image is
linked against stays, used or not.
"""

import shutil
import sys
from pathlib import Path

UNUSED = {
    # OpenVINO: the service builds its network operator by operator, or reads IR, and compiles it for the processor.
    "openvino/libs/libopenvino_intel_[gn]pu_plugin.so": "GPUs and NPUs of Intel",
    "openvino/libs/cache.json": "kernels for Intel's GPUs",
    "openvino/libs/libopenvino_[!i]*_frontend.so*": "frontends for other frameworks' files; IR's stays",
    "openvino/frontend/[jopt]*/": "their Python side: jax, onnx, paddle, pytorch, tensorflow",
    "openvino/torch/": "a backend for torch.compile",
    "openvino/tools/": "command-line converters",
    # torch: nothing is compiled at run time.
    "torch/bin/protoc*": "a compiler of protocol buffers",
    "torch/share/": "files for CMake",
    "nvidia/cu13/lib/libcusolverMg.so*": "solvers over several GPUs; nothing in torch is linked against it",
    "nvidia/cu13/lib/libnvrtc*.alt.so*": "the run-time compiler once more, for other callers",
    "nvidia/cu13/lib/libnvblas.so*": "a drop-in for other BLAS libraries",
    "nvidia/cu13/lib/libcufftw.so*": "a drop-in for FFTW",
    "nvidia/nvshmem/lib/*.bc": "for linking device code",
    # Everywhere.
    "**/include/": "headers",
    "**/tests/": "tests",
    "**/*.a": "static libraries",
    "**/*.pyx": "sources of compiled modules",
}
KEPT = ("numpy/_core/tests",)
"""numpy.testing, which is for everybody, imports from there."""


def main() -> int:
    """Remove, and say how much; a pattern that finds nothing is fine, since images differ in what they hold."""
    root, total = Path(sys.argv[1]), 0
    for pattern, what in UNUSED.items():
        found = [path for path in root.glob(pattern.rstrip("/")) if path.is_dir() == pattern.endswith("/")]
        found = [path for path in found if str(path.relative_to(root)) not in KEPT]
        size = sum(_bytes(path) for path in found)
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)  # it may lie in one that went before
            else:
                path.unlink(missing_ok=True)
        total += size
        print(f"{size / 1e6:8.1f} MB  {pattern}: {what}")  # noqa: T201
    print(f"{total / 1e6:8.1f} MB  altogether")  # noqa: T201
    return 0


def _bytes(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size if path.exists() else 0
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
