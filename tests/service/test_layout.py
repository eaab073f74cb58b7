"""How many workers serve a model: by its side, the cores, GPUs and memory; whatever lies where its manifest should."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from service import layout
from service.engines.names import Wanted
from service.model.architecture import Architecture
from service.model.artifact import SelfCheck, write_artifact
from service.model.preprocess import Preprocessing


def written(folder: Path, side_px: int) -> None:
    """An artifact of that side; nobody will run its network."""
    pixels, logits = np.zeros((1, side_px, side_px, 3), np.uint8), np.zeros((1, 2), np.float32)
    facts = {
        "name": "m", "architecture": Architecture(num_classes=2), "classes": ("a", "b"),
        "preprocessing": Preprocessing(side_px=side_px), "example": {"label": "a", "media_type": "image/png"},
        "hyperparameters": {}, "dataset": {}, "metrics": {}, "packages": {},
    }  # fmt: skip
    write_artifact(folder, facts, {"w": logits}, SelfCheck(pixels, logits), (".png", b""))


@pytest.mark.parametrize(
    ("side_px", "cores", "gpus", "gib", "engine", "expected"),
    [(32, 2, 0, 64, "auto", 2), (64, 24, 0, 64, "auto", 16), (65, 8, 0, 64, "auto", 6), (96, 8, 0, 64, "auto", 4),
     (128, 8, 0, 64, "auto", 3), (224, 2, 0, 64, "auto", 1), (224, 9, 0, 64, "auto", 2), (224, 16, 0, 64, "auto", 4),
     (1, 2, 0, 64, "auto", 2), (1024, 32, 0, 64, "auto", 1),
     (32, 8, 4, 64, "auto", 4), (32, 8, 4, 64, "torch-cuda", 4), (32, 8, 4, 64, "openvino-int8", 8),
     (None, 16, 0, 64, "auto", 4), (32, 16, 0, 4, "auto", 5), (32, 4, 0, 0.5, "auto", 1)],
)  # fmt: skip
def test_workers_follow_from_the_side_the_cores_the_gpus_and_the_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side_px: int | None,
    cores: int,
    gpus: int,
    gib: float,
    engine: Wanted,
    expected: int,
) -> None:
    if side_px is not None:
        written(tmp_path / "model", side_px)
    monkeypatch.setattr(layout, "cores", lambda: cores)
    monkeypatch.setattr(layout, "count_gpus", lambda: gpus)
    monkeypatch.setattr(layout, "memory_bytes", lambda: int(gib * 2**30))
    assert layout.choose_count(tmp_path / "model", engine) == expected


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "endless", "huge"])
def test_a_manifest_that_is_no_small_file_does_not_hold_up_the_supervisor(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "manifest.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 60 * 2**30)  # sparse
    assert layout._side_px(tmp_path) == layout.PHOTO_PX


def test_a_side_that_no_model_has_is_left_to_the_workers_to_refuse(tmp_path: Path) -> None:
    for side in (0, -32, 1025, 10**400, "32"):
        (tmp_path / "manifest.json").write_text(json.dumps({"preprocessing": {"side_px": side}}))
        assert layout._side_px(tmp_path) == layout.PHOTO_PX
