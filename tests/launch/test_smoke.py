"""The smoke test's verdicts: a real model here, and an endpoint that says what each test has it say."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.model.artifact import open_artifact
from training.launch import smoke
from training.launch.client import Reply
from training.launch.errors import LaunchError

Answer = dict[str, Any]


class Says:
    """An endpoint with this answer to everything."""

    name = "endpoint e"

    def __init__(self, answer: object, status: int = 200) -> None:
        self._reply = Reply(status, {}, json.dumps(answer).encode())

    def ask(
        self, body: bytes, media_type: str, accept: str = "application/json", stop: threading.Event | None = None
    ) -> Reply:
        return self._reply

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def truth(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """What the service says of the model's example: all classes, the likeliest first."""
    opened = open_artifact(artifact)
    picture = smoke._example(artifact, tmp_path_factory.mktemp("example"))
    (probs,) = smoke.local_probabilities(artifact, [picture])
    classes = opened.manifest.classes
    predictions = [
        {"label": classes[index], "index": int(index), "probability": float(probs[index])}
        for index in probs.argsort()[::-1]
    ]
    return {"model": {"name": "m", "version": opened.manifest.version}, "predictions": predictions}


def test_an_endpoint_that_predicts_as_the_model_does_passes(artifact: Path, truth: Answer) -> None:
    assert smoke.compare(Says(truth), artifact) == 1


def another_version(truth: Answer) -> Answer:
    return {**truth, "model": {"version": "0.0-old"}}


def another_probability(truth: Answer) -> Answer:
    first, *others = truth["predictions"]
    shift = -0.3 if first["probability"] > 0.5 else 0.3
    return {**truth, "predictions": [{**first, "probability": first["probability"] + shift}, *others]}


def another_class(truth: Answer) -> Answer:
    return {**truth, "predictions": truth["predictions"][::-1]}


@pytest.mark.parametrize(
    ("wrong", "tolerance", "said"),
    [
        (another_version, 0.1, r"^endpoint e serves version 0\.0-old, not \S+\.$"),
        (
            another_probability,
            0.1,
            r"^endpoint e gives example\.\w+ as .* with 0\.\d+, here it is 0\.\d+: more than 0\.1",
        ),
        # One epoch on a hundred classes is sure of nothing, so the least and the most likely are near each other.
        (another_class, 1e-5, r"^endpoint e takes example\.\w+ for .*, here it is .*\.$"),
    ],
)
def test_what_disagrees_is_named(
    artifact: Path, truth: Answer, wrong: Callable[[Answer], Answer], tolerance: float, said: str
) -> None:
    with pytest.raises(LaunchError, match=said):
        smoke.compare(Says(wrong(truth)), artifact, tolerance=tolerance)


def test_what_does_not_answer_is_named(artifact: Path) -> None:
    refused = {"error": {"code": "unreadable_image", "message": "a sentence"}}
    with pytest.raises(LaunchError, match=r"^endpoint e does not answer example\.\w+: unreadable_image: a sentence$"):
        smoke.compare(Says(refused, 400), artifact)
