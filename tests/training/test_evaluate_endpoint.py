"""The comparison of a running service with its manifest: agreement, difference, and what cannot be compared."""

import hashlib
import json
import shutil
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
    assert f"accuracy over HTTP {claimed:.2f} %, manifest {claimed:.2f} %, n=100: they agree" in caplog.text


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
    text = json.dumps({**fields, "manifest_sha256": "0" * 64}, indent=2)
    (boast / "manifest.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))
    assert compare(sample_root, boast, server.port) == 1
    assert "manifest 90.00 %, n=100: THEY DIFFER" in caplog.text
    text = json.dumps({**fields, "version": "ofthenextone", "manifest_sha256": "0" * 64}, indent=2)
    (boast / "manifest.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))
    assert compare(sample_root, boast, server.port) == 1
    answered = f"the service answers with {fields['name']} version {fields['version']}, and {boast} is "
    assert f"{answered}{fields['name']} version ofthenextone; restart the service" in caplog.text


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "https://127.0.0.1", "127.0.0.1:8080", "http://"])
def test_an_address_that_is_none_is_refused(url: str, artifact: Path, sample_root: Path) -> None:
    assert main(["--data", str(sample_root), "--model", str(artifact), "--url", url]) == 2


def test_no_service_there_is_told_with_what_to_do(
    artifact: Path, sample_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert compare(sample_root, artifact, 9) == 1
    assert "is the service running?" in caplog.text


def test_another_data_set_than_the_models_is_refused(artifact: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        shutil.copy(next(artifact.glob("example.*")), tmp_path / name / "1.png")
        shutil.copy(next(artifact.glob("example.*")), tmp_path / name / "2.png")
    assert compare(tmp_path, artifact, 9) == 1
