"""Traces, as a real collector would get them: the service as a process, an OTLP/HTTP receiver that decodes protobuf."""

import gzip
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.model.artifact import open_artifact

ROOT = Path(__file__).parent.parent.parent
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the dependency group `tracing` as locked: beside this environment, whose debugger excludes it."""
    candidates = [os.environ.get("UV"), shutil.which("uv"), str(ROOT / ".uv/bin/uv")]
    uv = next((path for path in candidates if path and Path(path).is_file()), None)
    if uv is None:
        pytest.skip("no uv to install the dependency group `tracing` with; run make test")
    folder = tmp_path_factory.mktemp("tracing")
    wanted = subprocess.run(
        [uv, "export", "--quiet", "--frozen", "--only-group", "tracing", "--no-hashes", "--no-header"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (folder / "requirements.txt").write_text(wanted)
    command = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--target", str(folder / "site")]
    result = subprocess.run([*command, "-r", str(folder / "requirements.txt")], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(
            f"the dependency group `tracing` cannot be installed here: {result.stderr.strip().splitlines()[-1]}"
        )
    return str(folder / "site")


class Collector:
    """A receiver of OTLP over HTTP; spans by name, with their resource's attributes."""

    def __init__(self) -> None:
        self.spans: list[tuple[dict[str, Any], Any]] = []
        self.status = 200
        self.port = 0

    def named(self, name: str) -> list[Any]:
        return [span for _, span in self.spans if span.name == name]


@contextmanager
def collecting() -> Iterator[Collector]:
    service_pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            if collector.status == 200:
                request = service_pb2.ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    attributes = values(resource.resource.attributes)
                    collector.spans += [(attributes, span) for scope in resource.scope_spans for span in scope.spans]
            self.send_response(collector.status)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.port = receiver.server_address[1]
    thread = threading.Thread(target=receiver.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        receiver.shutdown()
        thread.join()
        receiver.server_close()


def values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def until(condition: Callable[[], Any], limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def traced(packages: str, collector: Collector, **more: str) -> dict[str, str]:
    endpoint = f"http://someone:sentinel-password@127.0.0.1:{collector.port}"
    return {
        "PYTHONPATH": packages, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=sentinel-key", **more,
    }  # fmt: skip


def test_a_request_is_a_span_below_the_clients_own_with_a_span_for_each_stage(
    artifact: Path, start_server: Any, packages: str
) -> None:
    body = open_artifact(artifact).read("example")
    with collecting() as collector:
        with start_server(artifact, **traced(packages, collector, OTEL_SERVICE_NAME="pets")) as server:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
            before_ns = time.time_ns()
            assert server.ask("POST", "/invocations", body, headers).status == 200
            after_ns = time.time_ns()
            unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
            assert server.ask("POST", "/invocations", body, unsampled).status == 200
            assert server.ask("POST", "/invocations", b"no image", {"traceparent": "nonsense"}).status == 400
            until(lambda: len(collector.named("POST /invocations")) == 2)
            log = server.log.read_text()
        resource, _ = collector.spans[0]
        assert resource["service.name"] == "pets"
        span, refused = sorted(collector.named("POST /invocations"), key=lambda span: span.start_time_unix_nano)
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
        assert before_ns <= span.start_time_unix_nano < span.end_time_unix_nano <= after_ns + 10**9
        attributes = values(span.attributes)
        assert attributes["request.id"] == "mine"
        assert attributes["http.response.status_code"] == 200
        assert attributes["http.request.body.size"] == len(body)
        assert f"trace_id={TRACE}" in log
        stages = [collector.named(name)[0] for name in ("decode", "queue", "infer")]
        times = [span.start_time_unix_nano]
        for stage in stages:
            assert (stage.trace_id, stage.parent_span_id) == (span.trace_id, span.span_id)
            times += [stage.start_time_unix_nano, stage.end_time_unix_nano]
        assert times == sorted(times)
        assert times[-1] <= span.end_time_unix_nano
        assert refused.trace_id.hex() != TRACE
        assert values(refused.attributes)["classifier.code"] == "unreadable_image"
        assert not [span for _, span in collector.spans if "/ping" in span.name]
    assert f"traces go to 127.0.0.1:{collector.port} as service pets" in log
    assert "sentinel" not in log


def test_what_is_left_is_sent_when_the_service_stops(artifact: Path, start_server: Any, packages: str) -> None:
    with collecting() as collector:
        with start_server(artifact, **traced(packages, collector, OTEL_BSP_SCHEDULE_DELAY="600000")) as server:
            assert server.ask("POST", "/invocations", b"no image").status == 400
        assert server.process.returncode == 0
        assert len(collector.named("POST /invocations")) == 1
        assert collector.spans[0][0]["service.name"] == "resnet34-classifier"


@pytest.mark.parametrize("answers", [False, True])
def test_a_collector_that_fails_disturbs_no_request_and_fills_no_log(
    artifact: Path, start_server: Any, packages: str, answers: bool
) -> None:
    body = open_artifact(artifact).read("example")
    with collecting() as collector:
        collector.status = 500
        environment = traced(packages, collector)
        if not answers:
            environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"  # discard: nobody listens
        with start_server(artifact, **environment) as server:
            for _ in range(20):
                assert server.ask("POST", "/invocations", body).status == 200
                time.sleep(0.1)
            stopping_s = time.monotonic()
        assert time.monotonic() - stopping_s < 25
        assert server.process.returncode == 0
        log = server.log.read_text()
        assert "Traceback" not in log
        assert len([line for line in log.splitlines() if "opentelemetry" in line or "urllib3" in line]) <= 2


def test_without_the_packages_one_line_says_what_to_install(artifact: Path, start_server: Any) -> None:
    code = "import importlib.util as u; print(u.find_spec('opentelemetry.exporter') is not None)"
    if subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() != "False":
        pytest.skip("the dependency group `tracing` is installed here")
    with start_server(artifact, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4318") as server:
        assert server.ask("POST", "/invocations", b"no image").status == 400
        log = server.log.read_text()
    assert log.count("install the dependency group tracing") == 1


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SERVICE_NAME": "pets"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nothing_is_imported_where_no_variable_asks_for_traces(variables: dict[str, str]) -> None:
    code = (
        "import sys\n"
        "from service.tracing import Tracing\n"
        "with Tracing().running():\n"
        "    print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | variables, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
