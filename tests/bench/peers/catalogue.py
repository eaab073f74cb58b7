"""The peers: what each needs, how it is started, how it is asked. The servers themselves are in the folders beside.

Each peer has an environment of its own below the cache folder, made by uv from its requirements.txt (which
`uv pip compile requirements.in --python-version 3.11 --no-header --no-annotate -o requirements.txt` pins).
"""

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
MODELS = ("torch", "openvino-int8")
INSTALL_LIMIT_S = 1800


class Skipped(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass(frozen=True)
class Site:
    """Where and how one server of a peer is to run."""

    bin: Path
    """The `bin` folder of the peer's environment."""
    folder: Path
    """The peer's folder of servers."""
    model_dir: Path
    which: str
    port: int
    """This and the next four ports are free."""
    threads: int
    """Of one worker."""
    workers: int
    scratch: Path
    """An empty folder of this server's own."""


@dataclass(frozen=True)
class Launch:
    """A server's command; `prepare` are commands that run before, outside the time of starting up."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    prepare: list[list[str]] = field(default_factory=list)


def raw(payload: bytes) -> tuple[bytes, str]:
    """The JPEG file as the body."""
    return payload, "image/jpeg"


def form(name: str) -> Callable[[bytes], tuple[bytes, str]]:
    """The JPEG file as the one file of a form."""

    def make(payload: bytes) -> tuple[bytes, str]:
        edge = b"resnet34-bench-edge"
        disposition = f'Content-Disposition: form-data; name="{name}"; filename="photo.jpg"'.encode()
        head = b"--%b\r\n%b\r\nContent-Type: image/jpeg\r\n\r\n" % (edge, disposition)
        return head + payload + b"\r\n--%b--\r\n" % edge, f"multipart/form-data; boundary={edge.decode()}"

    return make


def base64_row(payload: bytes) -> tuple[bytes, str]:
    """A data frame of one column and one row, as MLflow's scoring server reads it."""
    row = {"columns": ["image"], "data": [[base64.b64encode(payload).decode()]]}
    return json.dumps({"dataframe_split": row}).encode(), "application/json"


@dataclass(frozen=True)
class Peer:
    """One serving framework."""

    name: str
    package: str
    """Whose version is the peer's."""
    start: Callable[[Site], Launch]
    path: str
    ready_path: str
    make_request: Callable[[bytes], tuple[bytes, str]] = raw
    headers: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Programs that no wheel brings."""

    @property
    def folder(self) -> Path:
        return HERE / self.name

    @property
    def requirements(self) -> Path:
        return self.folder / "requirements.txt"

    @property
    def version(self) -> str:
        found = re.search(rf"^{re.escape(self.package)}==(\S+)", self.requirements.read_text(), re.MULTILINE)
        assert found, f"{self.requirements} does not pin {self.package}"
        return found[1]

    def install(self, cache: Path) -> Path:
        """Make its environment unless it is there; returns the `bin` folder. Raises: Skipped."""
        for program in self.needs:
            if shutil.which(program) is None:
                raise Skipped(f"needs {program}, which is not on this machine")
        home = cache / "peers" / self.name
        done = home / "installed.txt"
        wanted = self.requirements.read_text()
        if not (done.is_file() and done.read_text() == wanted):
            home.mkdir(parents=True, exist_ok=True)
            done.unlink(missing_ok=True)
            python = home / ".venv" / "bin" / "python"
            for command in (
                ["venv", "--quiet", "--clear", "--python", "3.11", str(home / ".venv")],
                ["pip", "sync", "--quiet", "--python", str(python), str(self.requirements)],
            ):
                _run([uv(), *command], {}, "cannot be installed", INSTALL_LIMIT_S)
            done.write_text(wanted)
        return home / ".venv" / "bin"

    def launch(self, site: Site) -> tuple[list[str], dict[str, str]]:
        """The command and environment of its server, what it needs prepared. Raises: Skipped."""
        launch = self.start(site)
        environment = {
            "PATH": f"{site.bin}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(HERE / "shared"),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(site.threads),
            "BENCH_MODEL_DIR": str(site.model_dir),
            "BENCH_MODEL": site.which,
            "BENCH_PORT": str(site.port),
            "BENCH_THREADS": str(site.threads),
            "BENCH_WORKERS": str(site.workers),
            **launch.environment,
        }
        for command in launch.prepare:
            _run(command, environment, "cannot be prepared", 300)
        return launch.command, environment


def uv() -> str:
    """The uv that `make` uses. Raises: Skipped."""
    for candidate in (os.environ.get("UV"), shutil.which("uv"), str(ROOT / ".uv" / "bin" / "uv")):
        if candidate and shutil.which(candidate):
            return candidate
    raise Skipped("needs uv, which was not found: run `make bench`, or set UV")


def _run(command: list[str], environment: Mapping[str, str], what: str, limit_s: float) -> None:
    try:
        subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=limit_s
        )
    except subprocess.CalledProcessError as exc:
        raise Skipped(f"{what}: {' '.join((exc.stderr or exc.stdout).split())[-500:]}") from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Skipped(f"{what}: {exc}") from exc


def _script(site: Site) -> Launch:
    return Launch([str(site.bin / "python"), str(site.folder / "server.py")])


def _fastapi(site: Site) -> Launch:
    flags = ["--host", "127.0.0.1", "--port", str(site.port), "--workers", str(site.workers)]
    flags += ["--app-dir", str(site.folder)]
    return Launch([str(site.bin / "uvicorn"), "server:app", *flags, "--no-access-log", "--log-level", "warning"])


def _bentoml(site: Site) -> Launch:
    flags = ["--working-dir", str(site.folder), "--host", "127.0.0.1", "--port", str(site.port)]
    environment = {"BENTOML_HOME": str(site.scratch), "BENTOML_DO_NOT_TRACK": "True"}
    return Launch([str(site.bin / "bentoml"), "serve", "server:Classifier", *flags], environment)


def _mlflow(site: Site) -> Launch:
    saved = str(site.scratch / "model")
    flags = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(site.port), "--workers", str(site.workers)]
    return Launch(
        [str(site.bin / "mlflow"), "models", "serve", "--model-uri", saved, *flags],
        {"MLFLOW_TRACKING_URI": f"sqlite:///{site.scratch}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"},
        [[str(site.bin / "python"), str(site.folder / "save.py"), saved]],
    )


def _sagemaker(site: Site) -> Launch:
    model = site.scratch / "model"
    shutil.copytree(site.model_dir, model, ignore=shutil.ignore_patterns("artifact"))
    (model / "code").mkdir()
    shutil.copy(site.folder / "inference.py", model / "code" / "inference.py")
    environment = {
        "SAGEMAKER_BASE_DIR": str(site.scratch),
        "SAGEMAKER_BIND_TO_PORT": str(site.port),
        "SAGEMAKER_MODEL_SERVER_WORKERS": str(site.workers),
        "SAGEMAKER_CONTAINER_LOG_LEVEL": "30",
        "AWS_DEFAULT_REGION": "us-east-1",
        "TMPDIR": str(site.scratch),  # its process id file
        "TEMP": str(site.scratch),  # Java's: its sockets
    }
    return Launch([str(site.bin / "python"), str(site.folder / "server.py")], environment)


def _ray(site: Site) -> Launch:
    return Launch(
        [str(site.bin / "python"), str(site.folder / "server.py")],
        {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(site.scratch)},
    )


def _pytriton(site: Site) -> Launch:
    # Triton's Python stub links libpython: it must be that of this interpreter, not the system's of like name
    # (https://triton-inference-server.github.io/pytriton/latest/installation/, on pyenv).
    libraries = (site.bin / "python").resolve().parents[1] / "lib"
    return Launch(_script(site).command, {"LD_LIBRARY_PATH": str(libraries), "TMPDIR": str(site.scratch)})


def _torchserve(site: Site) -> Launch:
    handler = "torch_handler.py" if site.which == "torch" else "openvino_handler.py"
    parts = ["--handler", str(site.folder / handler), "--version", "1.0", "--export-path", str(site.scratch)]
    if site.which == "torch":
        extra = ["facts.json"]
        parts += ["--model-file", str(site.folder / "model.py"), "--serialized-file", str(site.model_dir / "model.pt")]
    else:
        extra = ["facts.json", "int8.xml", "int8.bin"]
    parts += ["--extra-files", ",".join(str(site.model_dir / name) for name in extra)]
    archiver = [str(site.bin / "torch-model-archiver"), "--model-name", "classifier", *parts]
    # Batches of 8 as in https://pytorch.org/serve/batch_inference_with_ts.html, with a delay that suits milliseconds.
    model = {
        "classifier": {
            "1.0": {
                "defaultVersion": True, "marName": "classifier.mar", "minWorkers": site.workers,
                "maxWorkers": site.workers, "batchSize": 8, "maxBatchDelay": 5, "responseTimeout": 120,
            }
        }
    }  # fmt: skip
    names = ("inference", "management", "metrics")
    lines = [f"{name}_address=http://127.0.0.1:{site.port + i}" for i, name in enumerate(names)]
    lines += [f"grpc_inference_port={site.port + 3}", f"grpc_management_port={site.port + 4}"]
    lines += [f"model_store={site.scratch}", "load_models=classifier.mar", f"models={json.dumps(model)}"]
    lines += ["enable_metrics_api=false", "disable_token_authorization=true"]
    config = site.scratch / "config.properties"
    config.write_text("\n".join(lines) + "\n")
    flags = ["--foreground", "--start", "--ncs", "--ts-config", str(config), "--model-store", str(site.scratch)]
    environment = {"TMPDIR": str(site.scratch), "TEMP": str(site.scratch), "LOG_LOCATION": str(site.scratch / "logs")}
    environment["METRICS_LOCATION"] = environment["LOG_LOCATION"]
    return Launch([str(site.bin / "torchserve"), *flags, "--disable-token-auth"], environment, [archiver])


TRITON_RAW = {"Inference-Header-Content-Length": "0"}
"""Marks Triton's raw binary request: the whole body is the one input."""

PEERS = {
    peer.name: peer
    for peer in (
        Peer("litserve", "litserve", _script, "/predict", "/health", form("request")),
        Peer("fastapi", "fastapi", _fastapi, "/predict", "/health"),
        Peer("bentoml", "bentoml", _bentoml, "/predict", "/readyz", form("images")),
        Peer("sagemaker_inference", "sagemaker-inference", _sagemaker, "/invocations", "/ping", needs=("java",)),
        Peer("mlflow", "mlflow", _mlflow, "/invocations", "/ping", base64_row),
        Peer("ray_serve", "ray", _ray, "/predict", "/-/healthz"),
        Peer(
            "pytriton", "nvidia-pytriton", _pytriton, "/v2/models/Classifier/infer", "/v2/models/Classifier/ready",
            raw, TRITON_RAW,
        ),
        Peer("torchserve", "torchserve", _torchserve, "/predictions/classifier", "/ping", needs=("java",)),
    )
}  # fmt: skip
