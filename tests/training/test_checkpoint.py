"""Checkpoints: whole or not there; what is damaged or of another run is refused with its name and the way out."""

import hashlib
import io
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training import checkpoint
from training.checkpoint import FILE
from training.config import LOCAL, TrainingConfig
from training.errors import CheckpointError

Settings = Callable[..., TrainingConfig]
FACTS = {"dataset": "shades", "classes": 3, "train": 33, "validation": 9}


def state(fill: float = 1.0) -> dict[str, Any]:
    return {"trainer": {"progress": {"epoch": 2}, "network": {"w": torch.full((1000,), fill)}, "best": {}}}


@pytest.fixture
def config(settings: Settings) -> TrainingConfig:
    return settings()


def test_what_is_saved_is_what_is_loaded(config: TrainingConfig, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "new" / "folder", config, FACTS, state(0.1))
    loaded = checkpoint.load(tmp_path / "new" / "folder", config, FACTS)
    assert loaded is not None
    assert loaded["trainer"]["progress"] == {"epoch": 2}
    assert torch.equal(loaded["trainer"]["network"]["w"], torch.full((1000,), 0.1))
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == [FILE]


def test_where_there_is_none_a_run_starts_anew(config: TrainingConfig, tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "nowhere", config, FACTS) is None
    (tmp_path / f"{FILE}.part").write_bytes(b"half of one")
    assert checkpoint.load(tmp_path, config, FACTS) is None


def test_a_removed_checkpoint_is_gone_and_can_be_removed_again(config: TrainingConfig, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, config, FACTS, state())
    checkpoint.remove(tmp_path)
    checkpoint.remove(tmp_path)
    assert checkpoint.load(tmp_path, config, FACTS) is None


def test_the_old_checkpoint_stays_whole_until_the_new_one_is(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, config, FACTS, state(1))
    moments = []

    def look(self: Path, target: Path) -> Path:
        loaded = checkpoint.load(tmp_path, config, FACTS)
        assert loaded is not None
        moments.append(float(loaded["trainer"]["network"]["w"][0]))
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / FILE).write_bytes(self.read_bytes())  # what is about to take its place
        assert checkpoint.load(tmp_path / "copy", config, FACTS) is not None
        return rename(self, target)

    rename = Path.replace
    monkeypatch.setattr(Path, "replace", look)
    checkpoint.save(tmp_path, config, FACTS, state(2))
    assert moments == [1.0]


def foreign_pickle() -> bytes:
    payload = pickle.dumps({"epoch": 3}, protocol=2)
    return hashlib.sha256(payload).hexdigest().encode() + payload


def other_format() -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": 0}, buffer)
    return hashlib.sha256(buffer.getvalue()).hexdigest().encode() + buffer.getvalue()


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, buffer)
    return buffer.getvalue()


def flipped(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"", lambda whole: whole[:30], lambda whole: whole[:-1], lambda whole: whole + b"x",
        lambda whole: flipped(whole, 0), lambda whole: flipped(whole, len(whole) // 2),
        lambda whole: flipped(whole, -1), lambda whole: b"epoch 3 of 70\n", lambda whole: pickle.dumps([1]),
        lambda whole: foreign_pickle(), lambda whole: other_format(), lambda whole: torch_file(),
    ],
    ids=[
        "empty", "within the digest", "a byte less", "a byte more", "digest flipped", "middle flipped", "end flipped",
        "text", "pickle", "pickle with digest", "other format", "a torch file",
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_refused_naming_it_and_the_way_out(
    config: TrainingConfig, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    checkpoint.save(tmp_path, config, FACTS, state())
    (tmp_path / FILE).write_bytes(damage((tmp_path / FILE).read_bytes()))
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(tmp_path, config, FACTS)
    assert str(tmp_path / FILE) in str(refused.value)
    assert "remove it to start anew, or name another folder with --checkpoints" in str(refused.value)


def test_a_file_that_runs_code_is_not_run(config: TrainingConfig, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    buffer = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "x": Runs()}, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest().encode()
    (tmp_path / FILE).write_bytes(digest + buffer.getvalue())
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path, config, FACTS)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_is_a_folder_is_refused_naming_it(config: TrainingConfig, tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read \(Is a directory\)"):
        checkpoint.load(tmp_path, config, FACTS)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 0.5}, r"learning_rate 0\.01 \(now 0\.5\)"),
        ({"epochs": 3}, r"epochs 2 \(now 3\)"),
        ({"seed": 1}, r"seed 0 \(now 1\)"),
        ({"augment": "none", "side": 64}, r"augment flip \(now none\), side 32 \(now 64\)"),
        ({"freeze": "none"}, r"freeze \['stem', 'layer1', 'layer2', 'layer3'\] \(now \[\]\)"),
    ],
)
def test_other_settings_are_refused_and_each_is_named(
    settings: Settings, tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    checkpoint.save(tmp_path, settings(), FACTS, state())
    with pytest.raises(CheckpointError, match=f"is of an unfinished run with {said}; remove it"):
        checkpoint.load(tmp_path, settings(**changed), FACTS)


@pytest.mark.parametrize("fact", FACTS)
def test_other_data_is_refused_and_shown(config: TrainingConfig, tmp_path: Path, fact: str) -> None:
    checkpoint.save(tmp_path, config, FACTS, state())
    other = {**FACTS, fact: "other"}
    with pytest.raises(CheckpointError, match=rf'"{fact}": "other"'):
        checkpoint.load(tmp_path, config, other)


def test_places_and_the_like_may_change(settings: Settings, tmp_path: Path) -> None:
    elsewhere = {
        "data": "d", "validation": "v", "output": "o", "run_folder": "r", "checkpoints": "c", "checkpoint_every_s": 1,
        "device": "auto", "loader_workers": 3, "model_name": "other", "cache_folder": "f", "report": True,
        "quantize": "on",
    }  # fmt: skip
    assert set(elsewhere) == LOCAL
    checkpoint.save(tmp_path, settings(), FACTS, state())
    assert checkpoint.load(tmp_path, settings(**elsewhere), FACTS) is not None


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_named(config: TrainingConfig, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=rf"cannot be written into {tmp_path / place}: (File exists|Not a dir)"):
        checkpoint.save(tmp_path / place, config, FACTS, state())


def test_a_full_disk_is_an_error_and_the_old_checkpoint_stays(config: TrainingConfig, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, config, FACTS, state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written into"):
            checkpoint.save(tmp_path, config, FACTS, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    loaded = checkpoint.load(tmp_path, config, FACTS)
    assert loaded is not None
    assert float(loaded["trainer"]["network"]["w"][0]) == 1
