"""What tests of the journey share: a rehearsed account, small data, a model that was trained."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import in_process
from tests.rehearsal import pictures
from tests.rehearsal.start import REGION, Rehearsal, rehearsal
from training.launch.jobs import pack
from training.launch.session import Aws, connect

RUN = ("--weights", "none", "--quantize", "off", "--epochs", "1", "--batch-size", "8", "--report", "false")


@pytest.fixture(scope="session")
def account() -> Iterator[Rehearsal]:
    """An account with a role and an image, in which jobs and endpoints are processes."""
    with rehearsal() as cloud:
        cloud.push_image()
        assert cloud.launch("iam-role").returncode == 0
        yield cloud


@pytest.fixture
def cloud(account: Rehearsal) -> Iterator[Rehearsal]:
    """The account; faults that a test orders end with it."""
    yield account
    account.order()


@pytest.fixture
def aws(cloud: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> Aws:
    """The account, for functions called in this process."""
    for name, value in cloud.variables.items():
        monkeypatch.setenv(name, value)
    return connect(REGION)


@pytest.fixture(scope="session")
def packed(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.tar.gz of the artifact: to pack it takes seconds, which every command else takes that is given a folder."""
    return pack(artifact, tmp_path_factory.mktemp("packed") / "model.tar.gz")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Class folders of 30 images, and 5 pictures to classify."""
    return pictures.write(tmp_path_factory.mktemp("drawn"), train_per_class=6, held_out_per_class=1)


@pytest.fixture(scope="session")
def data(drawn: tuple[Path, Path]) -> Path:
    return drawn[0]


@pytest.fixture(scope="session")
def asked(drawn: tuple[Path, Path]) -> Path:
    return drawn[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[in_process.Account]:
    """The account in this process, empty but for what other tests left under other names."""
    with in_process.account(tmp_path / "cloud", monkeypatch.setenv) as found:
        yield found
