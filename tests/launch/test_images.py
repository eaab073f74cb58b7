"""Which image a step uses."""

import json
from pathlib import Path

import pytest

from training.errors import ConfigError
from training.launch.images import Image, hosting_target, image_for, note, require_region

ECRS = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/d:3"


def test_what_make_push_noted_is_taken_and_what_is_given_wins(tmp_path: Path) -> None:
    pushed = tmp_path / "image.json"
    pushed.write_text(
        json.dumps({"serve": {"uri": "a/b:1", "cuda": "13.0"}, "serve-cpu": {"uri": "a/b:2", "cuda": None}})
    )
    assert image_for("serve", None, pushed) == Image("a/b:1", (13, 0))
    assert image_for("serve-cpu", None, pushed) == Image("a/b:2", None)
    assert image_for("serve", ECRS, pushed) == Image(ECRS, (13, 0), known=False)
    pushing = "`make image TARGET=train && make push TARGET=train`"
    for path, said in ((pushed, "has no train"), (tmp_path / "none", "--image is missing")):
        with pytest.raises(ConfigError, match=f"{said}.*{pushing} first"):
            image_for("train", None, path)
    for text in ("[]", '{"train": "a/b:1"}'):
        pushed.write_text(text)
        with pytest.raises(ConfigError, match=f"not as `make push` writes it, .*{pushing}"):
            image_for("train", None, pushed)
    pushed.write_text("no json")
    with pytest.raises(ConfigError, match=f'not as `make push` writes it, .*"uri".*{pushing}'):
        image_for("train", None, pushed)


def test_of_an_image_that_is_given_what_was_noted_of_it_is_taken(tmp_path: Path) -> None:
    pushed = tmp_path / "image.json"
    pushed.write_text(json.dumps({"train": {"uri": ECRS, "cuda": "12.4"}, "serve-cpu": {"uri": f"{ECRS}1"}}))
    assert image_for("serve", ECRS, pushed) == Image(ECRS, (12, 4))
    assert image_for("train", f"{ECRS}1", pushed) == Image(f"{ECRS}1", None)
    for text in ("[]", '{"train": 1}', '{"train": {}}', "no json"):  # what nobody asked for disturbs nobody
        pushed.write_text(text)
        assert image_for("train", ECRS, pushed) == Image(ECRS, (13, 0), known=False)


def test_images_that_others_pushed_can_be_noted_once(tmp_path: Path) -> None:
    pushed = tmp_path / "artifacts" / "image.json"
    note({"train": "a/b:1", "serve": "a/b:2"}, pushed)
    note({"serve": "a/b:3", "serve-cpu": "a/b:4"}, pushed)
    found = [image_for(target, None, pushed) for target in ("train", "serve", "serve-cpu")]  # type: ignore[arg-type]
    assert found == [Image("a/b:1", (13, 0)), Image("a/b:3", (13, 0)), Image("a/b:4", None)]
    with pytest.raises(ConfigError, match="hosting: images are for train, serve, serve-cpu"):
        note({"hosting": "a/b:5"}, pushed)


def test_a_gpu_needs_the_image_with_cuda_and_nothing_else_does() -> None:
    assert hosting_target("realtime", "ml.g5.xlarge") == "serve"
    assert hosting_target("realtime", "ml.c6i.xlarge") == "serve-cpu"
    assert hosting_target("serverless", "ml.g5.xlarge") == "serve-cpu"


@pytest.mark.parametrize("given", ["foo", "docker.io/library/resnet34:1", "123456789012.dkr.ecr.eu.example.com/x"])
def test_an_image_that_sagemaker_cannot_pull_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=f"--image {given} is not in ECR, where SageMaker pulls from"):
        image_for("serve", given)
    require_region(Image(ECRS, None), "eu-central-1")
    with pytest.raises(ConfigError, match="is in eu-central-1, and jobs and endpoints in us-east-1"):
        require_region(Image(ECRS, None), "us-east-1")


def test_who_has_no_docker_is_told_what_does_without(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Without docker: --image URI --send-code"):
        image_for("train", None, tmp_path / "none")
    with pytest.raises(ConfigError) as refused:
        image_for("serve", None, tmp_path / "none")
    assert "Without docker" not in str(refused.value)
