"""schemathesis sends a real service what follows from its OpenAPI document, allowed and not, and checks every answer.

https://schemathesis.readthedocs.io: no 5xx, only documented statuses, types, headers and bodies; what the document
allows is accepted, what it does not allow is refused; other methods get 405.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
CASES = 60
"""Of each operation, besides those that schemathesis derives one by one: 10 s for both tests on two quiet cores."""


@pytest.mark.parametrize(
    ("images", "left_out"),
    [
        ("valid", "use_after_free"),  # there is nothing to create or delete
        ("broken", "positive_data_acceptance"),  # whether bytes are an image is nothing a schema can say
    ],
)
def test_the_service_keeps_to_its_document(server: Any, tmp_path: Path, images: str, left_out: str) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "run"]
    command += [f"http://127.0.0.1:{server.port}/openapi.json", "--checks", "all", "--exclude-checks", left_out]
    command += ["--max-examples", str(CASES), "--request-timeout", "60"]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SCHEMATHESIS_HOOKS": "tests.service.schemathesis_images",
        "CHECKED_IMAGES": images,
    }
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
    assert " passed" in result.stdout
    assert "Traceback" not in server.log.read_text()
