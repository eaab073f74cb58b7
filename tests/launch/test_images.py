"""Which image a step uses."""

import json
from pathlib import Path

import pytest

from training.errors import ConfigError
from training.launch.images import Image, hosting_target, image_for


def test_what_make_push_noted_is_taken_and_what_is_given_wins(tmp_path: Path) -> None:
    pushed = tmp_path / "image.json"
    pushed.write_text(
        json.dumps({"serve": {"uri": "a/b:1", "cuda": "13.0"}, "serve-cpu": {"uri": "a/b:2", "cuda": None}})
    )
    assert image_for("serve", None, pushed) == Image("a/b:1", (13, 0))
    assert image_for("serve-cpu", None, pushed) == Image("a/b:2", None)
    assert image_for("serve", "c/d:3", pushed) == Image("c/d:3", (13, 0))
    pushing = "`make image TARGET=train && make push TARGET=train`"
    for path, said in ((pushed, "has no train"), (tmp_path / "none", "--image is missing")):
        with pytest.raises(ConfigError, match=f"{said}.*{pushing} first"):
            image_for("train", None, path)
    pushed.write_text("no json")
    with pytest.raises(ConfigError, match=f"cannot be read.*{pushing}"):
        image_for("train", None, pushed)


def test_a_gpu_needs_the_image_with_cuda_and_nothing_else_does() -> None:
    assert hosting_target("realtime", "ml.g5.xlarge") == "serve"
    assert hosting_target("realtime", "ml.c6i.xlarge") == "serve-cpu"
    assert hosting_target("serverless", "ml.g5.xlarge") == "serve-cpu"
