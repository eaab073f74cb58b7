"""The import rules of ARCHITECTURE.md, each proved in a fresh interpreter."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from service.engines.openvino import has_bf16
from service.model.artifact import open_artifact
from service.model.machine import gpus
from tests.conftest import Start

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


def test_only_launch_imports_aws_and_only_its_session_makes_clients() -> None:
    outside = [name for name in modules_of("training") if not name.startswith("training.launch")]
    assert not tops(imported_by(outside)) & {"boto3", "botocore", "sagemaker"}
    makers = [
        path.name
        for path in (ROOT / "training").rglob("*.py")
        if re.search(r"boto3\.(client|Session)\(|\.boto\.client\(", path.read_text())
    ]
    assert makers == ["session.py"]


def test_launch_imports_neither_torch_nor_the_sdk_before_it_needs_them() -> None:
    names = imported_by([name for name in modules_of("training.launch") if not name.endswith("tour")])
    assert not tops(names) & {"torch", "torchvision", "sagemaker"}


def test_training_imports_service_model_and_nothing_else_of_service() -> None:
    ours = {name for name in imported_by(modules_of("training")) if name.startswith("service.")}
    assert ours
    assert {name for name in ours if not name.startswith("service.model")} == set()


def test_the_http_side_imports_without_torch() -> None:
    names = imported_by(["service.app", "service.routes", "service.batcher", "service.inference", "service.runtime"])
    assert "torch" not in names


def test_the_supervisor_imports_little_because_the_workers_wait_for_it() -> None:
    heavy = {"numpy", "openvino", "PIL", "fastapi", "starlette", "uvicorn", "torch", "asyncio", "pydantic_settings"}
    assert not tops(imported_by(["service.__main__"])) & heavy


CLASSIFY_ALL_THE_WAY = """
import asyncio, sys
from pathlib import Path
from service.app import create_app
from service.model.artifact import open_artifact
from service.settings import Settings

async def answer(model):
    app = create_app(Settings(model=model, engine=sys.argv[2]))
    sent, body = [], open_artifact(model).read("example")
    async with app.router.lifespan_context(app):
        while app.state.runtime.state in ("loading", "warming_up"):
            await asyncio.sleep(0.01)
        scope = {"type": "http", "method": "POST", "path": "/invocations", "headers": []}
        messages = iter([{"type": "http.request", "body": body}])
        async def receive():
            return next(messages)
        async def send(message):
            sent.append(message)
        await app(scope, receive, send)
    return sent[0]["status"]

print(asyncio.run(answer(Path(sys.argv[1]))), "torch" in sys.modules)
"""


def skip_what_this_machine_lacks(engine: str) -> None:
    if engine == "auto" and gpus():
        pytest.skip("There is a GPU, on which torch runs.")
    if engine == "openvino-bf16" and not has_bf16():
        pytest.skip("This processor does not compute in bfloat16.")


@pytest.mark.parametrize("engine", ["auto", "openvino-fp32", "openvino-bf16", "openvino-int8", "torch"])
def test_a_service_on_the_processor_answers_without_torch(int8_artifact: Path, engine: str) -> None:
    skip_what_this_machine_lacks(engine)
    command = [sys.executable, "-c", CLASSIFY_ALL_THE_WAY, str(int8_artifact), engine]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == f"200 {engine == 'torch'}"


@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux has /proc.")
@pytest.mark.parametrize("engine", ["auto", "openvino-int8", "torch"])
def test_no_process_of_the_service_maps_torch(int8_artifact: Path, start_server: Start, engine: str) -> None:
    skip_what_this_machine_lacks(engine)
    with start_server(int8_artifact, CLASSIFIER_ENGINE=engine) as server:
        example = open_artifact(int8_artifact).read("example")
        assert server.ask("POST", "/invocations", example).status == 200
        processes = [psutil.Process(server.process.pid)]
        processes += processes[0].children(recursive=True)
        libraries = {mapped.path for process in processes for mapped in process.memory_maps()}
    assert len(processes) >= 2  # the supervisor and a worker; a decoder may come later
    assert any("openvino" in path for path in libraries) == (engine != "torch")
    assert any("libtorch" in path for path in libraries) == (engine == "torch")


def test_openvino_is_imported_without_its_telemetry() -> None:
    names = imported_by(["service.engines.openvino"])
    assert "openvino" in names
    assert "openvino_telemetry" not in names
    importing = re.compile(r"^ *(?:import|from) openvino\b", re.MULTILINE)
    guarded = re.compile(r"with no_telemetry\(\).*:\n +(?:import|from) openvino\b")
    for package in ("service", "training"):
        for path in (ROOT / package).rglob("*.py"):
            assert not importing.search(path.read_text()) or guarded.search(path.read_text()), path


def test_importing_starts_no_thread_and_opens_no_socket() -> None:
    heavy = {"service.engines.cuda", "service.engines.eager", "service.engines.openvino", "service.model.network"}
    modules = [
        name for name in modules_of("service") if name not in heavy
    ]  # their libraries start threads of their own
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
