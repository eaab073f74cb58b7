"""Rules of the contract checker against small servers that keep or break one; whole images: test_contract.py."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from container.contract import judged
from container.rules import CUDA_LABEL, OF_THE_IMAGE, OF_THE_SERVICE, TIMED, Subject
from container.running import Running

SUBJECT = Subject("none", Path(), b"payload", "image/png", {}, 1.0)
ATTRIBUTES = "Custom-Attributes come back as they were, or not at all"
METRICS = "/metrics is text for Prometheus, or 404 (optional)"
CUDA = "an image for GPUs says its CUDA version in a label (recommended)"


@contextmanager
def answering(status: int, body: bytes = b"", **headers: str) -> Iterator[Running]:
    """A server that answers everything so; a header "echo" gives Custom-Attributes back with what it says appended."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                if name == "echo":
                    name, value = "X-Amzn-SageMaker-Custom-Attributes", self.headers[
                        "X-Amzn-SageMaker-Custom-Attributes"] + value  # fmt: skip
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Running("none", "127.0.0.1", server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("status", "headers", "holds"),
    [(200, {}, True), (200, {"echo": ""}, True), (200, {"echo": "!"}, False), (500, {"echo": ""}, False)],
)
def test_custom_attributes_come_back_unchanged_or_not_at_all(status: int, headers: dict[str, str], holds: bool) -> None:
    with answering(status, **headers) as service:
        ok, seen = judged(OF_THE_SERVICE[ATTRIBUTES], service, SUBJECT)
    assert ok is holds, seen
    assert seen.startswith(f"{status}, 1,024 characters ")


@pytest.mark.parametrize(
    ("status", "kind", "body", "holds", "said"),
    [
        (404, "text/html", "<p>no", True, "404"),
        (200, "text/plain; version=0.0.4", '# HELP a\na_total{path="/x y",s="200"} 1\nup 1 1700\n', True, "2 samples"),
        (200, "application/openmetrics-text", 'a_bucket{le="+Inf"} 3 # {trace="1"} 0.5\n# EOF\n', True, "1 samples"),
        (200, "text/plain", "", False, "0 samples"),
        (200, "text/plain", "all is well\n", False, "no sample: 'all is well'"),
        (200, "application/json", "{}", False, "200 application/json"),
        (500, "text/plain", "up 1\n", False, "500 text/plain"),
    ],
)  # fmt: skip
def test_metrics_are_prometheus_text_or_absent(status: int, kind: str, body: str, holds: bool, said: str) -> None:
    with answering(status, body.encode(), Content_Type=kind) as service:
        ok, seen = judged(OF_THE_SERVICE[METRICS], service, SUBJECT)
    assert ok is holds
    assert said in seen


@pytest.mark.parametrize(
    ("devices", "label", "holds"),
    [(None, None, True), ("void", None, True), ("all", "13.0", True), ("all", None, False), ("all", "new", False)],
)
def test_an_image_for_gpus_is_known_by_its_variables(devices: str | None, label: str | None, holds: bool) -> None:
    config = {
        "Env": ["PATH=/bin"] + ([f"NVIDIA_VISIBLE_DEVICES={devices}"] if devices else []),
        "Labels": {CUDA_LABEL: label} if label else None,
    }
    assert OF_THE_IMAGE[CUDA]({"Config": config})[0] is holds


def test_what_is_about_time_is_measured_once_more_before_it_fails() -> None:
    assert set(OF_THE_SERVICE) >= TIMED
    slow = iter([(False, "3 s"), (True, "1 s")])
    assert judged(lambda: next(slow), times=2) == (True, "1 s (before that: 3 s)")
    broken = iter([(False, "3 s"), (False, "4 s"), (True, "never asked")])
    assert judged(lambda: next(broken), times=2) == (False, "4 s (before that: 3 s)")


def test_who_does_not_answer_fails_the_rule() -> None:
    with answering(200) as service:
        pass
    ok, seen = judged(OF_THE_SERVICE[METRICS], service, SUBJECT)
    assert not ok
    assert "refused" in seen
