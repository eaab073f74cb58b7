"""The four words: with the real artifact, and inside AWS's own inference toolkit."""

import base64
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sagemaker_inference.default_handler_service import DefaultHandlerService

from service.answers import TOP_K
from service.classifier import Classifier, ModelCard, Prediction
from service.engines.fake import FakeEngine
from service.errors import MalformedRequest, NotAcceptable, UnsupportedMediaType
from service.inference import input_fn, model_fn, output_fn, predict_fn
from service.model.artifact import open_artifact
from service.model.errors import ArtifactError, UnreadableImage
from service.model.manifest import Role
from tests.service.served import form, png


@pytest.fixture
def fake_model() -> Classifier:
    return Classifier(ModelCard("fake", "1", tuple(f"grey {k}" for k in range(256))), 32, FakeEngine(256))


@pytest.mark.parametrize(
    "content_type",
    [
        "image/png",
        "image/jpeg; charset=utf-8",
        "IMAGE/PNG",
        "application/x-image",
        "application/octet-stream",
        None,
        "",
    ],
)
def test_raw_bytes_are_decoded_whatever_image_type_they_come_as(content_type: str | None) -> None:
    (image,) = input_fn(png(), content_type)
    assert image.shape == (40, 40, 3)


def test_one_file_of_a_form_is_decoded() -> None:
    (image,) = input_fn(*form(png(99)))
    assert (image == 99).all()


def test_a_form_field_without_a_file_name_is_no_file() -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n--b--\r\n'
    with pytest.raises(MalformedRequest, match="must hold a file, given: 0"):
        input_fn(body, "multipart/form-data; boundary=b")


def test_several_files_are_decoded_in_order_and_a_bad_one_is_its_error() -> None:
    first, bad, last = input_fn(*form(png(1), b"no image", png(3)))
    assert isinstance(bad, UnreadableImage)
    assert [int(np.asarray(image).max()) for image in (first, last)] == [1, 3]


def test_base64_that_is_none_among_several_is_its_error() -> None:
    good = base64.b64encode(png(1)).decode()
    bad, image = input_fn(json.dumps({"images": ["!!", good]}).encode(), "application/json")
    assert isinstance(bad, UnreadableImage)
    assert np.asarray(image).max() == 1
    with pytest.raises(MalformedRequest, match="image is not valid base64"):
        input_fn(b'{"image": "!!"}', "application/json")


def test_a_bad_image_among_several_is_marked_in_the_answer(fake_model: Classifier) -> None:
    body, _ = output_fn(predict_fn(input_fn(*form(png(1), b"no image")), fake_model), None)
    good, bad = json.loads(body)["results"]
    assert good["predictions"][0]["label"] == "grey 1"
    assert bad["error"]["code"] == "unreadable_image"


@pytest.mark.parametrize(("field", "answer"), [("image", "predictions"), ("images", "results")])
def test_a_list_of_one_image_is_answered_with_a_list_as_the_service_does(
    fake_model: Classifier, field: str, answer: str
) -> None:
    image = base64.b64encode(png(1)).decode()
    document = json.dumps({field: image if field == "image" else [image]}).encode()
    body, _ = output_fn(predict_fn(input_fn(document, "application/json"), fake_model), None)
    assert list(json.loads(body)) == ["model", answer]


def test_several_images_of_which_none_can_be_read_are_an_error(fake_model: Classifier) -> None:
    with pytest.raises(UnreadableImage):
        predict_fn(input_fn(*form(b"no image", b"neither")), fake_model)


def test_a_form_of_thousands_of_parts_is_refused() -> None:
    with pytest.raises(MalformedRequest, match="at most 100 parts"):
        input_fn(*form(*[b""] * 5000))


@pytest.mark.parametrize("cut", [3, 10, 60, 120])
def test_a_form_that_ends_too_early_is_refused(cut: int) -> None:
    body, content_type = form(png())
    with pytest.raises((MalformedRequest, UnreadableImage)):
        input_fn(body[:-cut], content_type)


def test_a_form_with_a_wrong_boundary_is_refused() -> None:
    with pytest.raises(MalformedRequest):
        input_fn(form(png())[0], "multipart/form-data; boundary=other")


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary="])
def test_a_boundary_that_is_not_stated_is_read_from_the_form(content_type: str) -> None:
    (image,) = input_fn(form(png(99))[0], content_type)
    assert np.asarray(image).max() == 99
    with pytest.raises(MalformedRequest):
        input_fn(b"preamble\r\n" + form(png())[0], content_type)


@pytest.mark.parametrize("content_type", ["text/csv", "video/mp4", "jpeg"])
def test_other_types_are_refused_naming_what_is_allowed(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType, match=f"image/.*multipart/form-data.*application/json.*{content_type}"):
        input_fn(b"hello", content_type)


def test_predictions_come_in_the_order_of_the_images(fake_model: Classifier) -> None:
    images = [np.full((50, 60, 3), grey, np.uint8) for grey in (200, 3, 77)]
    assert [p.top(1)[0][0] for p in predict_fn(images, fake_model)] == ["grey 200", "grey 3", "grey 77"]


def test_the_answer_ranks_labels_and_names_the_model(fake_model: Classifier) -> None:
    body, content_type = output_fn(predict_fn(input_fn(png(9), "image/png"), fake_model), "application/json")
    answer = json.loads(body)
    assert content_type == "application/json"
    assert answer["model"] == {"name": "fake", "version": "1"}
    assert len(answer["predictions"]) == TOP_K
    assert answer["predictions"][0] | {"probability": 0} == {"label": "grey 9", "index": 9, "probability": 0}
    probabilities = [ranked["probability"] for ranked in answer["predictions"]]
    assert probabilities == sorted(probabilities, reverse=True)


def test_fewer_classes_than_top_k_are_all_ranked() -> None:
    prediction = Prediction(np.array([0.25, 0.75], np.float32), ModelCard("m", "1", ("a", "b")))
    assert [ranked["label"] for ranked in json.loads(output_fn([prediction], None)[0])["predictions"]] == ["b", "a"]


def test_the_answer_comes_in_the_type_that_is_accepted(fake_model: Classifier) -> None:
    outcomes = predict_fn(input_fn(png(), None), fake_model)
    assert [output_fn(outcomes, accept)[1] for accept in (None, "text/csv")] == ["application/json", "text/csv"]
    with pytest.raises(NotAcceptable, match="Accept header excludes"):
        output_fn(outcomes, "image/png")


@pytest.mark.parametrize("wrong", ["shape", "nan"])
def test_an_engine_that_answers_wrongly_is_noticed(wrong: str) -> None:
    class Wrong(FakeEngine):
        def infer(self, batch: Any) -> Any:
            logits = super().infer(batch)
            return logits[:, :-1] if wrong == "shape" else logits * np.nan

    model = Classifier(ModelCard("m", "1", ("a", "b")), 32, Wrong(2))
    with pytest.raises(ValueError, match="engine fake answered"):
        predict_fn([np.zeros((32, 32, 3), np.uint8)], model)


def test_model_fn_loads_a_model_whose_logits_are_the_stored_ones(artifact: Path) -> None:
    model = model_fn(artifact)
    check = open_artifact(artifact).self_check()
    assert model.check(check) <= model.engine.tolerance
    assert np.allclose(model.engine.infer(check.inputs), check.logits, rtol=1e-3, atol=1e-3)


def test_a_batch_gives_what_its_single_images_give(artifact: Path) -> None:
    model = model_fn(artifact)
    images = list(np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8))
    together = np.stack([p.probs for p in predict_fn(images, model)])
    alone = np.stack([predict_fn([image], model)[0].probs for image in images])
    assert np.allclose(together, alone, atol=1e-5)


def test_logits_that_are_not_the_stored_ones_stop_the_start(artifact: Path) -> None:
    model = model_fn(artifact)
    check = open_artifact(artifact).self_check()
    with pytest.raises(ArtifactError, match="self-check failed"):
        model.check(type(check)(check.inputs, check.logits + np.float32(1)))


class ToolkitContext:
    """What AWS's model server passes to a handler: the request's headers in, status and type of the answer out."""

    def __init__(self, model_dir: Path, **headers: str) -> None:
        self.system_properties = {"model_dir": str(model_dir)}
        self.request_processor = [SimpleNamespace(get_request_properties=lambda: headers)]
        self.status = 200
        self.content_type = ""

    def set_response_status(self, code: int, phrase: str) -> None:
        self.status = code

    def set_response_content_type(self, _: int, content_type: str) -> None:
        self.content_type = content_type


@pytest.fixture
def toolkit(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> DefaultHandlerService:
    monkeypatch.setenv("SAGEMAKER_PROGRAM", "service.inference")
    monkeypatch.setenv("PYTHONPATH", "")  # the toolkit changes it
    service = DefaultHandlerService()
    service.initialize(ToolkitContext(artifact))
    return service


@pytest.mark.parametrize("as_form", [False, True])
def test_awss_inference_toolkit_runs_the_module_unchanged(
    toolkit: DefaultHandlerService, artifact: Path, as_form: bool
) -> None:
    opened = open_artifact(artifact)
    payload = opened.read("example")
    body, content_type = form(payload) if as_form else (payload, opened.manifest.example.media_type)
    context = ToolkitContext(artifact, **{"Content-Type": content_type, "Accept": "*/*"})
    (answer,) = toolkit.handle([{"body": body}], context)
    assert (context.status, context.content_type) == (200, "application/json")
    expected, _ = output_fn(predict_fn(input_fn(payload, None), model_fn(artifact)), None)
    assert json.loads(answer)["predictions"][0]["label"] == json.loads(expected)["predictions"][0]["label"]


def test_awss_inference_toolkit_tells_a_broken_image_by_our_sentence(
    toolkit: DefaultHandlerService, artifact: Path
) -> None:
    context = ToolkitContext(artifact, **{"Content-Type": "image/png"})
    (answer,) = toolkit.handle([{"body": b"not an image"}], context)
    assert context.status >= 400
    assert "are not a JPEG, PNG, WEBP, BMP or GIF image" in answer


@pytest.mark.parametrize("role", ["weights", "int8_weights", "example"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_file_refuses_the_model_whether_or_not_its_engine_reads_it(
    int8_artifact: Path, role: Role, cut: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(int8_artifact, tmp_path / "model"))
    path = open_artifact(copy).path(role)
    content = path.read_bytes()
    path.write_bytes(content[:-1] if cut else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=f"{path.name} is damaged: "):
        model_fn(copy)
    assert "is passed over: " + str(copy) not in caplog.text  # no other engine takes what is left


def test_no_file_is_read_twice(int8_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()
    really = Path.open

    def counted(path: Path, *given: Any, **named: Any) -> Any:
        opened[path.name] += 1
        return really(path, *given, **named)

    monkeypatch.setattr(Path, "open", counted)
    model_fn(int8_artifact)
    artifact = open_artifact(int8_artifact)
    files = {artifact.path(role).name for role in artifact.manifest.files}
    assert {name: count for name, count in opened.items() if name in files} == dict.fromkeys(files, 1)
    artifact.verify()
    assert {name: count for name, count in opened.items() if name in files} == dict.fromkeys(files, 2)
