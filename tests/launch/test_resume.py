"""A spot job that is stopped goes on as its next attempt, from the checkpoint that was synced to S3."""

import re
import time
from pathlib import Path

import pytest

from tests.launch.telling import told
from tests.launch.test_faults import jobs
from tests.rehearsal.start import IMAGE, Rehearsal
from training.launch.logs import TRAINING, LogTail
from training.launch.session import Aws

EPOCHS, LIMIT_S = 8, 300


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_spot_job_that_is_stopped_goes_on_from_its_checkpoint_as_the_next_attempt(
    cloud: Rehearsal, aws: Aws, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ("train", "--project", "spot", "--data", data, "--image", IMAGE, "--role", "resnet34-sagemaker", "--spot",
               "--output", tmp_path / "model", "--weights", "none", "--quantize", "off", "--augment", "none",
               "--batch-size", 8, "--report", "false", "--epochs", EPOCHS)  # fmt: skip
    told(caplog, *command, "--no-wait")
    (first,) = jobs(cloud, "spot")
    log, lines, deadline_s = LogTail(aws, TRAINING, f"{first}/"), "", time.monotonic() + LIMIT_S
    while f"epoch=2/{EPOCHS}" not in lines:
        assert time.monotonic() < deadline_s, lines
        time.sleep(0.2)
        lines += "\n".join(log.new_lines())
    client = cloud.client("sagemaker")
    client.stop_training_job(TrainingJobName=first)
    said = told(caplog, *command)
    second = f"{first.removesuffix('-1')}-2"
    described = [client.describe_training_job(TrainingJobName=name) for name in (first, second)]
    assert [job["TrainingJobStatus"] for job in described] == ["Stopped", "Completed"]
    assert len({job["CheckpointConfig"]["S3Uri"] for job in described}) == 1
    assert all(job["EnableManagedSpotTraining"] for job in described)
    resumed = re.search(r"resumed from \S+checkpoints: epoch (\d+), step", said)
    assert resumed and int(resumed[1]) >= 3, said
    done = [int(number) for number in re.findall(rf"epoch=(\d+)/{EPOCHS} ", said)]
    assert done[0] == int(resumed[1]) and done[-1] == EPOCHS  # no epoch twice, but the one it was stopped in
    assert (tmp_path / "model" / "manifest.json").is_file()
