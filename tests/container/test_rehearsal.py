"""The rehearsal in containers of the images as they are built, and AWS's own local mode as a second client of them."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from container.engine import docker
from tests.rehearsal import pictures
from tests.rehearsal.__main__ import main
from tests.rehearsal.containers import has_compose
from tests.rehearsal.sdk import serve_by_sdk, train_here_by_sdk
from tests.rehearsal.start import rehearsal

pytestmark = [pytest.mark.container, pytest.mark.timeout(3600)]

Image = Callable[[str], str]


def test_the_local_mode_of_awss_sdk_trains_with_our_image_and_serves_what_comes_of_it(
    image: Image, tmp_path: Path
) -> None:  # fmt: skip
    """Both its halves: ModelTrainer in LOCAL_CONTAINER mode, which docker compose runs, and LocalSession."""
    if find_spec("sagemaker") is None:
        pytest.skip("the group sagemaker is not installed")
    if not has_compose():
        pytest.skip("the SDK's local mode needs docker compose")
    data, asked = pictures.write(tmp_path / "drawn", train_per_class=6, held_out_per_class=1)
    with rehearsal() as cloud:
        archive = train_here_by_sdk(cloud, data, tmp_path, image("train"))
        said = serve_by_sdk(cloud, archive, asked, image("serve-cpu"))
    assert f"LocalSession ran `{image('serve-cpu')} serve`" in said
    assert not archive.with_name("trained-by-sdk").exists()
    listed = docker("ps", "--all", "--format", "{{.Names}} {{.Labels}}")
    assert "trained-by-sdk" not in listed, "its container is left"


@pytest.mark.slow
def test_the_journey_passes_in_containers(image: Image, tmp_path: Path) -> None:
    """Seven minutes once the images are there: trials, trainings, endpoints and a batch, each a container."""
    train, serve = image("train"), image("serve-cpu")
    report = tmp_path / "report.md"
    assert main(["--train-image", train, "--serve-image", serve, "--report", str(report)]) == 0
    told = report.read_text()
    assert f"containers of {train} and {serve}. Every step passed;" in told
    assert "| sdk local | PASS |" in told and "| nothing is left | PASS |" in told
