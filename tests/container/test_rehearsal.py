"""The rehearsal in containers of the images as they are built, and AWS's own local mode as a second client of them."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.rehearsal import pictures
from tests.rehearsal.__main__ import main
from tests.rehearsal.sdk import serve_by_sdk
from tests.rehearsal.start import rehearsal
from training.launch.jobs import pack

pytestmark = [pytest.mark.container, pytest.mark.timeout(3600)]

Image = Callable[[str], str]


def test_the_local_mode_of_awss_sdk_runs_the_image_and_is_answered(
    image: Image, artifact: Path, tmp_path: Path
) -> None:  # fmt: skip
    if find_spec("sagemaker") is None:
        pytest.skip("the group sagemaker is not installed")
    pack(artifact, tmp_path / "model.tar.gz")
    _, asked = pictures.write(tmp_path / "drawn", train_per_class=1, held_out_per_class=1)
    with rehearsal() as cloud:
        said = serve_by_sdk(cloud, tmp_path / "model", asked, image("serve-cpu"))
    assert f"LocalSession ran `{image('serve-cpu')} serve`" in said


@pytest.mark.slow
def test_the_journey_passes_in_containers(image: Image, tmp_path: Path) -> None:
    """Seven minutes once the images are there: trials, trainings, endpoints and a batch, each a container."""
    train, serve = image("train"), image("serve-cpu")
    report = tmp_path / "report.md"
    assert main(["--train-image", train, "--serve-image", serve, "--report", str(report)]) == 0
    told = report.read_text()
    assert f"containers of {train} and {serve}. Every step passed;" in told
    assert "| sdk local | PASS |" in told and "| nothing is left | PASS |" in told
