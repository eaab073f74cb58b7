"""Removes from a virtual environment what is never opened: `python slim.py SITE_PACKAGES [--training]`, at build time.

Only whole parts that a package can do without by its own design (plugins and frontends that are looked up by name,
headers, static libraries, tests), so that each goes again with the next version. What a library of the image is
linked against stays, used or not.
"""

import sys
from pathlib import Path

SERVING = {
    # OpenVINO: the service builds its network operator by operator, or reads IR, and compiles it for the processor.
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
}
EVERYWHERE = {
    "openvino/libs/libopenvino_intel_[gn]pu_plugin.so": "GPUs and NPUs of Intel",
    "openvino/libs/cache.json": "kernels for Intel's GPUs",
    "**/include/": "headers",
    "**/tests/": "tests",
    "**/test/": "tests",
    "**/conftest.py": "tests",
    "**/test_*.py": "tests",
    "**/*_test.py": "tests",
    "**/__pycache__/conftest.*.pyc": "tests",
    "**/__pycache__/test_*.pyc": "tests",
    "**/__pycache__/*_test.*.pyc": "tests",
    "**/*.a": "static libraries",
    "**/*.pyx": "sources of compiled modules",
}
KEPT = {
    "numpy/_core/tests/_natype.py": "numpy.testing imports it",
    "opentelemetry/semconv/_incubating/attributes/test_attributes.py": "names of attributes, for everybody's tests",
    "scipy/stats/_bws_test.py": "a statistical test",
    "scipy/stats/_page_trend_test.py": "a statistical test",
    "torch/_inductor/test_operators.py": "torch._dynamo imports it",
}
"""Named like tests, and none; with their bytecode."""


def main() -> int:
    """Remove, and say how much; a pattern that finds nothing is fine, since images differ in what they hold."""
    root, total = Path(sys.argv[1]), 0
    for pattern, what in (EVERYWHERE if "--training" in sys.argv else {**SERVING, **EVERYWHERE}).items():
        found = [path for path in root.glob(pattern.rstrip("/")) if path.is_dir() == pattern.endswith("/")]
        size = sum(_remove(path, root) for path in found if ".dist-info/" not in str(path))  # licences stay
        total += size
        print(f"{size / 1e6:8.1f} MB  {pattern}: {what}")  # noqa: T201
    print(f"{total / 1e6:8.1f} MB  altogether")  # noqa: T201
    return 0


def _remove(path: Path, root: Path) -> int:
    """Remove a file, or all of a folder but what is kept. Returns: its bytes."""
    if not path.exists():  # it lay in one that went before
        return 0
    folder = path.is_dir() and not path.is_symlink()
    files = [each for each in path.rglob("*") if not each.is_dir()] if folder else [path]
    gone = [file for file in files if str(_source(file).relative_to(root)) not in KEPT]
    size = sum(file.lstat().st_size for file in gone)
    for file in gone:
        file.unlink()
    for each in sorted([path, *path.rglob("*")], reverse=True) if folder else ():
        if each.is_dir() and not any(each.iterdir()):
            each.rmdir()
    return size


def _source(file: Path) -> Path:
    """The module that bytecode is of (PEP 3147); any other file itself."""
    return file.parent.parent / f"{file.name.partition('.')[0]}.py" if file.parent.name == "__pycache__" else file


if __name__ == "__main__":
    sys.exit(main())
