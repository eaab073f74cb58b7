"""The README's promises from start to end, on real processes. Minutes long: `make test-slow`."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from service.model.artifact import Artifact, open_artifact

ROOT = Path(__file__).parent.parent
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10-train-jpeg.tar.gz"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def say(*lines: str) -> None:
    """Print: these figures are read in CI's log (make test-slow runs pytest with -s)."""
    print(*lines, sep="\n", flush=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def post(port: int, artifact: Artifact) -> Any:
    headers = {"Content-Type": artifact.manifest.example.media_type}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/invocations", artifact.read("example"), headers)
        return json.loads(connection.getresponse().read())


def test_make_serve_from_a_fresh_clone_classifies_a_held_out_image(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    log = tmp_path / "log"
    port = free_port()
    with log.open("w") as out:
        make = subprocess.Popen(
            ["make", "serve", f"PORT={port}"], cwd=clone, stdout=out, stderr=out, start_new_session=True
        )
    try:
        started_s = time.monotonic()
        while "to try: curl" not in log.read_text():
            assert make.poll() is None, log.read_text()
            assert time.monotonic() - started_s < 2000, log.read_text()
            time.sleep(1)
        artifact = open_artifact(clone / "artifacts" / "model")
        answer = post(port, artifact)
        assert answer["predictions"][0]["label"] == artifact.manifest.example.label
        accuracy = artifact.manifest.metrics["validation"]["accuracy"]
        took = re.findall(r"the starter model took (\d+) s", log.read_text())
        name = artifact.manifest.dataset["name"]
        say(f"starter model on {name}: validation accuracy {accuracy:.4f} in {took[0]} s")
        if name == "generated-sample":
            assert accuracy >= 0.90
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(make.pid, signal.SIGTERM)
        make.wait(60)


@pytest.mark.skipif(not CIFAR10.is_file(), reason="needs ../shared/data (CIFAR-10 as JPEG files)")
def test_real_pictures_reach_60_percent_and_http_gives_the_accuracy_of_the_manifest(
    tmp_path: Path, start_server: Any
) -> None:
    subprocess.run(["tar", "xzf", str(CIFAR10), "-C", str(tmp_path)], check=True)
    data = tmp_path / "pictures"
    (tmp_path / "train").rename(data)  # ten class folders, no split given
    flags = "--weights none --freeze none --side 32 --epochs 3 --batch-size 128 --optimizer adamw --learning-rate 0.001"
    flags += " --weight-decay 0.01 --schedule one-cycle --augment flip-crop --precision auto --model-name cifar10"
    output = tmp_path / "model"
    started_s = time.monotonic()
    command = [sys.executable, "-m", "training.train_model", "--data", str(data), "--output", str(output)]
    subprocess.run([*command, *flags.split(" ")], cwd=ROOT, check=True)
    accuracy = open_artifact(output).manifest.metrics["validation"]["accuracy"]
    say(f"CIFAR-10 JPEG files: validation accuracy {accuracy:.4f} in {time.monotonic() - started_s:.0f} s: {flags}")
    assert accuracy >= 0.60
    with start_server(output) as server:
        url = f"http://127.0.0.1:{server.port}"
        command = [sys.executable, "-m", "training.evaluate_endpoint", "--data", str(data), "--model", str(output)]
        subprocess.run([*command, "--url", url], cwd=ROOT, check=True)  # exits 1 when they differ by over 0.2 points
