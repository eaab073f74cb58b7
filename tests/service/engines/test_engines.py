"""Every engine gives the stored logits within its tolerance, the same for a batch as for its images one by one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch

from service.classifier import Classifier
from service.engines.base import Engine, EngineUnavailable
from service.engines.choose import Layout, create
from service.engines.cuda import require_gpu
from service.engines.names import EngineName
from service.model.artifact import Artifact, open_artifact
from service.model.errors import ArtifactError
from service.model.machine import gpus
from service.model.openvino_graph import has_bf16
from service.model.preprocess import Preprocessing
from tests.service.artifacts import changed

ON_CPU: tuple[EngineName, ...] = ("torch", "openvino-fp32", "openvino-bf16", "openvino-int8")
Make = Callable[[EngineName], Engine]

BATCH_TOLERANCE = {
    "torch": 1e-3, "openvino-fp32": 1e-3, "openvino-bf16": 1e-2, "openvino-int8": 1e-2, "torch-cuda": 2e-2,
}  # fmt: skip
"""Of the largest logit, between a batch and its images one by one; the engines' own tolerances are against float32.

Measured with AMX, OpenVINO 2026.4, this network and the bench's of 32 and 224 px, noise, 24 batches of 2 to 33 images
each: 0 in float32 and int8; in bfloat16 0.0027 in one batch of 33 at 32 px, else 0. The rest is for other kernels.
"""


@pytest.fixture(scope="module")
def model(int8_artifact: Path) -> Artifact:
    return open_artifact(int8_artifact)


@pytest.fixture(scope="module")
def engine(model: Artifact) -> Make:
    made: dict[EngineName, Engine] = {}

    def make(name: EngineName) -> Engine:
        if name == "torch-cuda" and not torch.cuda.is_available():
            pytest.skip("There is no GPU on this machine.")
        if name == "openvino-bf16" and not has_bf16():
            pytest.skip("This processor does not compute in bfloat16.")
        if name not in made:
            made[name] = create(model, name, Layout(threads=2, max_batch=8))
        return made[name]

    return make


@pytest.mark.parametrize("name", [*ON_CPU, "torch-cuda"])
def test_the_self_check_holds(model: Artifact, engine: Make, name: EngineName) -> None:
    made = engine(name)
    assert made.name == name
    assert Classifier.of(model, made).check(model.self_check()) <= made.tolerance


@pytest.mark.parametrize("name", [*ON_CPU, "torch-cuda"])
def test_a_batch_gives_what_its_images_give_one_by_one(model: Artifact, engine: Make, name: EngineName) -> None:
    made = engine(name)
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    together = made.infer(images)
    assert (together.shape, together.dtype) == ((7, len(model.manifest.classes)), np.float32)
    alone = np.concatenate([made.infer(image[None]) for image in images])
    assert_close(together, alone, name)
    one_after_the_other = made.infer(images)
    np.testing.assert_array_equal(together, one_after_the_other)


def test_batches_take_no_memory_of_a_gpu_that_the_first_did_not(engine: Make) -> None:
    made = engine("torch-cuda")
    images = np.random.default_rng(4).integers(0, 256, (20, 32, 32, 3), np.uint8)  # some in pieces of the largest batch

    def taken() -> tuple[int, int]:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    made.infer(images[:1])
    first = taken()
    assert first[0] > 0
    for k in range(500):
        made.infer(images[: 1 + k % len(images)])
    assert taken() == first


@pytest.mark.parametrize("name", ["openvino-fp32", "openvino-bf16", "openvino-int8"])
@pytest.mark.parametrize("n", [2, 4, 5, 15, 16, 17, 33])
def test_padding_a_batch_changes_nothing(engine: Make, name: EngineName, n: int) -> None:
    made = engine(name)
    images = np.random.default_rng(3).integers(0, 256, (n, 32, 32, 3), np.uint8)
    expected = np.concatenate([made.infer(image[None]) for image in images])
    found = made.infer(images)
    assert found.shape == expected.shape
    assert_close(found, expected, name)


def assert_close(batch: np.ndarray, singles: np.ndarray, name: EngineName) -> None:
    np.testing.assert_allclose(batch, singles, rtol=0, atol=BATCH_TOLERANCE[name] * np.abs(singles).max())


@pytest.mark.parametrize("name", ON_CPU)
def test_images_need_not_lie_in_one_piece(engine: Make, name: EngineName) -> None:
    wide = np.random.default_rng(1).integers(0, 256, (3, 32, 64, 3), np.uint8)
    np.testing.assert_array_equal(engine(name).infer(wide[:, :, ::2]), engine(name).infer(wide[:, :, ::2].copy()))


@pytest.mark.parametrize("name", ["openvino-fp32", "openvino-bf16", "openvino-int8"])
def test_lanes_do_not_mix_their_batches_up(engine: Make, name: EngineName) -> None:
    made = engine(name)
    assert made.lanes == 2
    images = np.random.default_rng(2).integers(0, 256, (64, 32, 32, 3), np.uint8)
    expected = np.concatenate([made.infer(images[i : i + 2]) for i in range(0, 64, 2)])
    with ThreadPoolExecutor(made.lanes) as threads:
        found = [*threads.map(lambda i: made.infer(images[i : i + 2]), range(0, 64, 2))]
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_each_engine_names_the_sizes_to_be_warmed_up(engine: Make, artifact: Path, tmp_path: Path) -> None:
    assert [tuple(engine(name).warm_sizes) for name in ("torch", "openvino-fp32")] == [(1,), (4, 16, 32)]
    larger = changed(artifact, tmp_path / "model", preprocessing=Preprocessing(side_px=64))
    made = create(open_artifact(larger), "openvino-fp32", Layout(threads=1))
    assert (made.best_batch, tuple(made.warm_sizes)) == (98, ())


def test_an_engine_that_settles_later_answers_meanwhile(model: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    made = create(model, "openvino-fp32", Layout(threads=2, settles=True))
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    lanes, lane = list[int](), made._request  # type: ignore[attr-defined]
    monkeypatch.setattr(made, "_request", lambda: lanes.append(1) or lane())
    before = made.infer(images)
    assert lanes == [1]
    made.settle()
    made.settle()
    np.testing.assert_allclose(made.infer(images), before, rtol=1e-4, atol=1e-4 * np.abs(before).max())
    assert lanes == [1]  # the second had the network for images that come alone
    at_once = create(model, "openvino-fp32", Layout(threads=2))
    monkeypatch.setattr(at_once, "_request", lambda: pytest.fail("it was not settled"))
    at_once.infer(images)


def test_a_graph_that_openvino_refuses_to_rewrite_makes_the_engine_unavailable(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: openvino.Model) -> None:
        raise RuntimeError("Check 'shapes' failed\nat node.cpp:1")

    monkeypatch.setattr(openvino.Model, "validate_nodes_and_infer_types", refuse)
    with pytest.raises(EngineUnavailable, match=r"cannot compile the network .*Check 'shapes' failed"):
        create(open_artifact(artifact), "openvino-fp32", Layout(threads=1))


def test_an_int8_engine_needs_an_int8_network(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no int8 network; 'python -m training.quantize' adds one"):
        create(open_artifact(artifact), "openvino-int8", Layout(threads=1))


def test_a_gpu_that_is_not_there_is_told_in_a_sentence(model: Artifact) -> None:
    if torch.cuda.is_available():
        with pytest.raises(EngineUnavailable, match="There is no GPU number 99"):
            create(model, "torch-cuda", Layout(threads=1, device=99))
    else:
        assert gpus() == 0
        with pytest.raises(EngineUnavailable, match=r"GPU cannot be used by torch .* CLASSIFIER_ENGINE=openvino-fp32"):
            require_gpu(0)
