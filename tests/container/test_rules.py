"""Rules of the contract checker against small servers that keep or break one; whole images: test_contract.py."""

import base64
import hashlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from container import rules
from container.contract import judged, main
from container.registry import OTHERS, SCHEMA_2
from container.rules import CUDA_LABEL, OF_THE_IMAGE, OF_THE_SERVICE, STREAMING_LABEL, TIMED, Subject
from container.running import Running
from container.starts import unusual

SUBJECT = Subject("none", Path(), b"payload", "image/png", {}, 1.0)
ATTRIBUTES = "Custom-Attributes that it sends are at most 1,024 visible characters"
METRICS = "/metrics is text for Prometheus, or 404 (optional)"
ENTRYPOINT = "ENTRYPOINT, if there is one, passes `serve` on (exec form), and is not tini"
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""Of RFC 6455."""
PARAMETERS = "/execution-parameters fits batch transform, or is 404"
STREAMS = "what is labelled bidirectional-streaming takes a WebSocket"
DRAINS = "after SIGTERM what was accepted is answered, and the exit code is 0 (recommended)"
CUDA = "an image for GPUs says its CUDA version in a label (recommended)"


@contextmanager
def answering(status: int, body: bytes = b"", delay_s: float = 0, **headers: str) -> Iterator[Running]:
    """A server that answers everything so, after `delay_s`.

    A header "echo" gives Custom-Attributes back with what it says appended, "accept" accepts a WebSocket so.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            time.sleep(delay_s)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                if name == "echo":
                    name, value = "X-Amzn-SageMaker-Custom-Attributes", self.headers[
                        "X-Amzn-SageMaker-Custom-Attributes"] + value  # fmt: skip
                if name == "accept":
                    digest = hashlib.sha1(f"{self.headers['Sec-WebSocket-Key']}{value}".encode()).digest()
                    name, value = "Sec-WebSocket-Accept", base64.b64encode(digest).decode()
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Running("none", "127.0.0.1", server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("status", "headers", "holds"),
    [
        (200, {}, True),
        (200, {"echo": ""}, True),
        (200, {"echo": "!"}, False),
        (200, {"X_Amzn_SageMaker_Custom_Attributes": "trace=mine; of=2"}, True),
        (200, {"X_Amzn_SageMaker_Custom_Attributes": "trace=\xe9"}, False),
        (500, {"echo": ""}, False),
    ],
)
def test_custom_attributes_are_any_that_sagemaker_passes_on(status: int, headers: dict[str, str], holds: bool) -> None:
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
    ("status", "said", "holds"),
    [
        (404, None, True),
        (200, {"MaxConcurrentTransforms": 4, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 25}, True),
        (200, {"MaxConcurrentTransforms": 1, "BatchStrategy": "MultiRecord", "MaxPayloadInMB": 100}, True),
        (200, {"MaxConcurrentTransforms": 1, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 101}, False),
        (200, {"MaxConcurrentTransforms": 5, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 25}, False),
        (200, {"MaxConcurrentTransforms": 1, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 0}, False),
        (200, {"MaxConcurrentTransforms": 0, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 6}, False),
        (200, {"MaxConcurrentTransforms": 1.0, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 6}, False),
        (200, {"MaxConcurrentTransforms": "1", "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": "6"}, False),
        (200, {"MaxConcurrentTransforms": True, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 6}, False),
        (200, {"MaxConcurrentTransforms": 1, "BatchStrategy": "ONE", "MaxPayloadInMB": 6}, False),
        (200, {"MaxConcurrentTransforms": 1, "MaxPayloadInMB": 6}, False),
        (200, ["MaxConcurrentTransforms", "BatchStrategy", "MaxPayloadInMB"], False),
        (200, None, False),
        (500, {"MaxConcurrentTransforms": 1, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 6}, False),
    ],
)
def test_batch_transform_is_told_what_it_takes(status: int, said: object, holds: bool) -> None:
    with answering(status, json.dumps(said).encode() if said else b"<p>no") as service:
        ok, seen = judged(OF_THE_SERVICE[PARAMETERS], service, SUBJECT)
    assert ok is holds, seen


@pytest.mark.parametrize(
    ("label", "status", "headers", "holds"),
    [
        (None, 404, {}, True),
        ("true", 404, {}, False),
        ("true", 200, {"accept": GUID}, False),
        ("true", 101, {}, False),
        ("true", 101, {"accept": "another"}, False),
        ("true", 101, {"accept": GUID, "Upgrade": "websocket", "Connection": "Upgrade"}, True),
    ],
)
def test_who_says_it_streams_takes_a_websocket(
    label: str | None, status: int, headers: dict[str, str], holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "labels_of", lambda _: {STREAMING_LABEL: label} if label else {})
    with answering(status, **headers) as service:
        ok, seen = judged(OF_THE_SERVICE[STREAMS], service, SUBJECT)
    assert ok is holds, seen


def test_an_answer_that_takes_too_long_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "INVOCATION_LIMIT_S", 2)
    monkeypatch.setattr(rules, "LOAD_S", 0.2)
    for delay_s, holds in ((0, True), (2.2, False)):
        with answering(200, delay_s=delay_s) as service:
            ok, seen = judged(OF_THE_SERVICE["/invocations answers within 60 s under load"], service, SUBJECT)
        assert ok is holds, seen


def test_connections_that_wait_to_be_accepted_fail() -> None:
    """A queue of one, which is full: the kernel takes the second connection when it asks again, a second later."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        service = Running("none", "127.0.0.1", server.getsockname()[1])

        def accept() -> None:
            time.sleep(0.4)
            server.listen(128)
            while True:
                connection, _ = server.accept()
                with connection:
                    if connection.recv(1) == b"e":
                        return

        thread = threading.Thread(target=accept)
        thread.start()
        ok, seen = judged(OF_THE_SERVICE["it accepts connections within 250 ms"], service, SUBJECT)
        with socket.create_connection(("127.0.0.1", service.port)) as last:
            last.send(b"e")
            thread.join()
    assert not ok, seen


@pytest.mark.parametrize(
    ("rule", "image", "holds"),
    [
        ("it is for linux/amd64", {"Os": "linux", "Architecture": "amd64"}, True),
        ("it is for linux/amd64", {"Os": "linux", "Architecture": "arm64"}, False),
        ("it is for linux/amd64", {"Os": "windows", "Architecture": "amd64"}, False),
        ("its manifest is no OCI index", {}, True),
        ("its manifest is no OCI index", {"Descriptor": {"mediaType": SCHEMA_2}}, True),
        ("its manifest is no OCI index", {"Descriptor": {"mediaType": OTHERS[0]}}, False),
        ("its manifest is no OCI index", {"Descriptor": {"mediaType": OTHERS[1]}}, False),
        ("its manifest is no OCI index", {"Descriptor": {"mediaType": OTHERS[2]}}, False),
        ("it runs as root", {"Config": {}}, True),
        ("it runs as root", {"Config": {"User": "0:0"}}, True),
        ("it runs as root", {"Config": {"User": "nobody"}}, False),
        (ENTRYPOINT, {"Config": {}}, True),
        (ENTRYPOINT, {"Config": {"Entrypoint": None}}, True),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["python", "-m", "program"]}}, True),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["python", "-c", "print()"]}}, True),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["bash", "start.sh"]}}, True),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["/usr/bin/env", "A=b", "python", "x.py"]}}, True),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["bash", "-c", 'exec "$@"', "--"]}}, True),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["/bin/sh", "-c", "python x.py"]}}, False),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["bash", "-lc", "python x.py"]}}, False),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["bash", "-l", "-c", "python x.py"]}}, False),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["env", "bash", "-c", "python x.py"]}}, False),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["/usr/bin/tini", "--", "python", "x.py"]}}, False),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["env", "A=b", "tini", "--", "x"]}}, False),
        (ENTRYPOINT, {"Config": {"Entrypoint": ["/usr/bin/env", "-i", "tini", "--"]}}, False),
    ],
)
def test_what_docker_says_of_an_image(rule: str, image: dict[str, object], holds: bool) -> None:
    ok, seen = OF_THE_IMAGE[rule](image)
    assert ok is holds, seen


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--model", "none"], "--model none: there is no such folder"),
     (["--model", ".", "--payload", "none"], "--payload none: there is no such file")],
)  # fmt: skip
def test_what_it_is_to_check_with_must_be_there(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["image", *arguments])
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("2026-11-30T09:00:07.001Z INFO on port 9217\nstarting\n\n", ""),
        ("2026-11-30T09:00:07.001Z INFO on port 9217\nno model\n", "no model"),
        ('{"time":"2026-11-30T09:00:07Z","message":"up"}\n', ""),
        ('{"time":"2026-11-30T09:00:07Z","message":"down"}\n', '{"time":"2026-11-30T09:00:07Z","message":"down"}'),
    ],
)
def test_a_reason_is_what_a_good_start_does_not_say(said: str, why: str) -> None:
    usual = (
        '2026-11-30T08:00:00.000Z INFO on port 8080\nstarting\n{"time":"2026-11-30T08:00:00Z","message":"up"}\nserved\n'
    )
    assert unusual(said, usual) == why


class Told(Running):
    """A service here that ends, with a code, once it is told to; None: it goes on."""

    def __init__(self, service: Running, code: int | None) -> None:
        super().__init__(service.name, service.host, service.port)
        self.signals, self.code = list[str](), code

    def signal(self, name: str) -> None:
        self.signals.append(name)

    def wait_for_exit(self, limit_s: float) -> int | None:
        return self.code


@pytest.mark.parametrize(
    ("status", "code", "ends", "drains"),
    [(200, 0, True, True), (200, 143, True, False), (503, 0, True, False), (200, None, False, False)],
)
def test_that_it_ends_is_demanded_and_how_is_recommended(
    status: int, code: int | None, ends: bool, drains: bool
) -> None:
    """One stop tells both."""
    with answering(status) as service:
        told = Told(service, code)
        assert judged(OF_THE_SERVICE["it ends within 30 s of SIGTERM"], told, SUBJECT)[0] is ends
        assert judged(OF_THE_SERVICE[DRAINS], told, SUBJECT)[0] is drains
    assert told.signals == ["SIGTERM"]


def test_who_does_not_answer_fails_the_rule() -> None:
    with answering(200) as service:
        pass
    ok, seen = judged(OF_THE_SERVICE[METRICS], service, SUBJECT)
    assert not ok
    assert "refused" in seen
