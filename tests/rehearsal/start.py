"""Starts the rehearsal's cloud as a process of its own, and says how to reach it."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rehearsal.containers import STOP_S
from tests.rehearsal.control_plane import ACCOUNT, REGION

ROOT = Path(__file__).parents[2]
ASKED_OFTEN = ("--poll-seconds", "0.5")
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/resnet34-sagemaker:rehearsal"


@dataclass(frozen=True)
class Rehearsal:
    """A running cloud."""

    url: str
    log: Path

    @property
    def variables(self) -> dict[str, str]:
        """What boto3 needs in the environment to find it instead of AWS."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "rehearsal", "AWS_SECRET_ACCESS_KEY": "rehearsal",
            "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, and those."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SM_", "CLASSIFIER_"))
        }
        return {**kept, **self.variables}

    def ask(self, path: str, body: object = None) -> Any:
        """One of the cloud's own addresses (see `cloud`)."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=60) as response:
            return json.loads(response.read())

    def order(self, *faults: dict[str, Any]) -> None:
        """Faults to come, in place of those ordered before."""
        self.ask("/rehearsal/faults", list(faults))

    def launch(
        self, *arguments: object, timeout_s: float = 600, folder: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """`python -m training.launch ...` against it, asked often; `folder`: the working directory."""
        return subprocess.run(
            [sys.executable, "-m", "training.launch", *map(str, arguments), *ASKED_OFTEN], cwd=folder,
            env={**self.environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=timeout_s,
            check=False,
        )  # fmt: skip

    def client(self, service: str) -> Any:
        """A boto3 client of it."""
        import boto3

        return boto3.client(
            service, region_name=REGION, endpoint_url=self.url, aws_access_key_id="rehearsal",
            aws_secret_access_key="rehearsal",
        )  # fmt: skip

    def push_image(self) -> None:
        """An image in the registry, as `make push` leaves it; what runs is the engine's own."""
        ecr = self.client("ecr")
        ecr.create_repository(repositoryName="resnet34-sagemaker")
        layer = {
            "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "size": 1,
            "digest": f"sha256:{'1' * 64}",
        }
        manifest = {
            "schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "size": 1,
                       "digest": f"sha256:{'0' * 64}"},
            "layers": [layer],
        }  # fmt: skip
        ecr.put_image(
            repositoryName="resnet34-sagemaker", imageManifest=json.dumps(manifest), imageTag="rehearsal",
            imageManifestMediaType=manifest["mediaType"],
        )  # fmt: skip

    @staticmethod
    def note_images(folder: Path) -> None:
        """`folder`/artifacts/image.json, as three times `make push` leave it."""
        noted = folder / "artifacts" / "image.json"
        noted.parent.mkdir(parents=True, exist_ok=True)
        cuda = {"train": "13.0", "serve": "13.0", "serve-cpu": None}
        noted.write_text(json.dumps({target: {"uri": IMAGE, "cuda": version} for target, version in cuda.items()}))


@contextmanager
def rehearsal(*flags: str) -> Iterator[Rehearsal]:
    """A cloud with an empty account, until the block ends. `flags`: see `cloud.main`."""
    with tempfile.TemporaryDirectory(prefix="rehearsal-", ignore_cleanup_errors=True) as scratch:
        log = Path(scratch) / "cloud.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.rehearsal.cloud", "--bare", "--work", f"{scratch}/work", *flags],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            )  # fmt: skip
            assert process.stdin and process.stdout
            try:
                url = process.stdout.readline().strip()
                if not url:
                    raise RuntimeError(f"the cloud did not start:\n{log.read_text()}")
                yield Rehearsal(url, log)
            finally:
                process.stdin.close()  # it ends what it runs
                try:
                    process.wait(STOP_S["train"] + 60)  # what runs has its time to end; then nothing of it is left
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                process.stdout.close()
