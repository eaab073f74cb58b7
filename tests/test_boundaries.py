"""The import rules of ARCHITECTURE.md, each proved in a fresh interpreter."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def modules_of(package: str) -> list[str]:
    paths = sorted((ROOT / package.replace(".", "/")).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def imported_by(modules: list[str]) -> set[str]:
    code = f"import importlib, json, sys; [importlib.import_module(m) for m in {modules!r}]"
    code += "; print(json.dumps([*sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_service_never_imports_training_nor_anything_of_aws() -> None:
    assert not tops(imported_by(modules_of("service"))) & {"training", "boto3", "botocore", "sagemaker", "smdebug"}


def test_service_model_imports_neither_fastapi_nor_aws() -> None:
    assert not tops(imported_by(modules_of("service.model"))) & {
        "fastapi",
        "starlette",
        "uvicorn",
        "boto3",
        "sagemaker",
    }


def test_training_imports_service_model_and_nothing_else_of_service() -> None:
    ours = {name for name in imported_by(modules_of("training")) if name.startswith("service.")}
    assert ours
    assert {name for name in ours if not name.startswith("service.model")} == set()


def test_the_http_side_imports_without_torch() -> None:
    names = imported_by(["service.app", "service.routes", "service.batcher", "service.inference", "service.runtime"])
    assert "torch" not in names


def test_importing_starts_no_thread_and_opens_no_socket() -> None:
    modules = [name for name in modules_of("service") if "eager" not in name and "network" not in name]
    code = f"import importlib, os, threading; [importlib.import_module(m) for m in {modules!r}]"
    code += "; print(threading.active_count(), [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')"
    code += " if os.path.islink(f'/proc/self/fd/{n}')])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("1 ")
    assert "socket:" not in result.stdout


def test_only_settings_and_environment_read_the_environment() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for package in ("service", "training")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"os\.(environ|getenv)", path.read_text())
    }
    assert readers == {"service/settings.py", "training/environment.py"}
