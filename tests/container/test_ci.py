""".ci/run: the tests of the images run where an engine can be had, and else it says why they do not."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from container.build import ROOT

STARTS = "#!/bin/sh\necho 'export DOCKER_HOST=unix:///of/its/own.sock'\n"
FAILS = "#!/bin/sh\necho 'docker-up: ERROR: needs root' >&2\nexit 1\n"


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("docker_answers", "docker_up", "said"),
    [
        (True, None, "make test-container\n"),
        (False, STARTS, "make test-container BASE_IMAGE=local/base:bookworm unix:///of/its/own.sock\n"),
        (False, None, "container tests skipped: no docker engine answers, and there is no ../shared/tools/docker-up"),
        (False, FAILS, "container tests skipped: ../shared/tools/docker-up could not start an engine"),
    ],
)
def test_the_images_are_tested_or_the_reason_is_said(
    docker_answers: bool, docker_up: str | None, said: str, tmp_path: Path
) -> None:
    source = ROOT / ".ci" / "run"
    if not source.is_file():
        pytest.skip("this tree has no .ci/run")
    (tmp_path / "main" / ".ci").mkdir(parents=True)
    shutil.copy(source, tmp_path / "main" / ".ci")
    program(tmp_path / "bin" / "make", '#!/bin/sh\necho make "$@" $DOCKER_HOST\n')
    program(tmp_path / "bin" / "docker", f"#!/bin/sh\nexit {0 if docker_answers else 1}\n")
    if docker_up is not None:
        program(tmp_path / "shared" / "tools" / "docker-up", docker_up)
    kept = {name: value for name, value in os.environ.items() if name not in ("BASE_IMAGE", "DOCKER_HOST")}
    result = subprocess.run(
        [tmp_path / "main" / ".ci" / "run"], env={**kept, "PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("make check\nmake test\nmake test-slow PYTEST_ARGS=-k make_serve\n")
    assert said in result.stdout
    assert result.stdout.count("container") == 1
