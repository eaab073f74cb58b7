"""The comparison of a running service with its manifest: agreement, difference, and what cannot be compared."""

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from training.evaluate_endpoint import main


def compare(data: Path, model: Path, port: int) -> int:
    return main(["--data", str(data), "--model", str(model), "--url", f"http://127.0.0.1:{port}"])


def test_a_service_agrees_with_its_own_manifest(
    server: Any, artifact: Path, sample_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert compare(sample_root, artifact, server.port) == 0
    claimed = 100 * json.loads((artifact / "manifest.json").read_text())["metrics"]["validation"]["accuracy"]
    agreement = rf"accuracy over HTTP \(openvino-\w+\) {claimed:.2f} %, manifest {claimed:.2f} %, n=100: they agree"
    assert re.search(agreement, caplog.text)


def test_the_int8_network_is_compared_with_what_the_manifest_says_of_it(
    start_server: Any, int8_artifact: Path, sample_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with start_server(int8_artifact, CLASSIFIER_ENGINE="openvino-int8") as served:
        assert compare(sample_root, int8_artifact, served.port) == 0
        other = tmp_path / "model"
        shutil.copytree(int8_artifact, other)
        fields = json.loads((other / "manifest.json").read_text())
        claimed = 100 * fields["quantization"]["accuracy"]
        assert f"(openvino-int8) {claimed:.2f} %, manifest, int8, {claimed:.2f} %, n=100: they agree" in caplog.text
        for change, agrees in ((0.02, True), (0.03, False)):  # of 100 images, two or three
            changed = {**fields, "quantization": {**fields["quantization"], "accuracy": claimed / 100 + change}}
            signed(other, changed)
            assert compare(sample_root, other, served.port) == int(not agrees)


def test_images_that_a_busy_service_refuses_are_asked_for_again(
    start_server: Any, artifact: Path, sample_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with start_server(artifact, CLASSIFIER_MAX_IMAGES="1", CLASSIFIER_WORKERS="1") as busy:
        assert compare(sample_root, artifact, busy.port) == 0
        assert " status=503 " in busy.log.read_text()  # eight connections ask, and one image has a place
    assert "n=100: they agree" in caplog.text


def test_a_service_whose_model_is_another_is_told_apart(
    server: Any, artifact: Path, sample_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    boast = tmp_path / "model"
    shutil.copytree(artifact, boast)
    fields = json.loads((boast / "manifest.json").read_text())
    fields["metrics"]["validation"]["accuracy"] = 0.9
    signed(boast, fields)
    assert compare(sample_root, boast, server.port) == 1
    assert "manifest 90.00 %, n=100: THEY DIFFER" in caplog.text
    signed(boast, {**fields, "version": "ofthenextone"})
    assert compare(sample_root, boast, server.port) == 1
    answered = f"the service answers with {fields['name']} version {fields['version']}, and {boast} is "
    assert f"{answered}{fields['name']} version ofthenextone; restart the service" in caplog.text


def signed(model: Path, fields: dict[str, Any]) -> None:
    """Write a manifest with the hash that belongs to it."""
    text = json.dumps({**fields, "manifest_sha256": "0" * 64}, indent=2)
    (model / "manifest.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:99999", "http://127.0.0.1:0", "https://127.0.0.1", "127.0.0.1:8080", "http://", "http://a..b",
     "http://127.0.0.1:9/é", "http://a b:80"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(url: str, artifact: Path, sample_root: Path) -> None:
    assert main(["--data", str(sample_root), "--model", str(artifact), "--url", url]) == 2


@pytest.mark.parametrize("tolerance", ["nan", "inf", "-1", "x", "101"])
def test_a_tolerance_that_is_none_is_refused(tolerance: str, artifact: Path, sample_root: Path) -> None:
    assert main(["--data", str(sample_root), "--model", str(artifact), "--tolerance", tolerance]) == 2


@pytest.mark.parametrize(
    "answer", [b"hello", b"[]", b'{"predictions": []}', b'{"predictions": [{"label": "x"}]}', b"[" * 100_000]
)
def test_what_another_program_answers_is_told_as_that(
    answer: bytes, artifact: Path, sample_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # http.server's name
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: object) -> None:
            """Into no log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        assert compare(sample_root, artifact, other.server_port) == 1
        other.shutdown()
    assert "is not this service: it answered b" in caplog.text
    assert "Traceback" not in caplog.text


def test_no_service_there_is_told_with_what_to_do(
    artifact: Path, sample_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert compare(sample_root, artifact, 9) == 1
    assert "is the service running there?" in caplog.text


def test_another_data_set_than_the_models_is_refused(artifact: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        shutil.copy(next(artifact.glob("example.*")), tmp_path / name / "1.png")
        shutil.copy(next(artifact.glob("example.*")), tmp_path / name / "2.png")
    assert compare(tmp_path, artifact, 9) == 1
