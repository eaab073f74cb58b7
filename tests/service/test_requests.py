"""What a request may look like and what its answer then looks like, over real sockets."""

import base64
import contextlib
import csv
import io
import json
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from service.engines.base import Logits
from service.engines.fake import FakeEngine
from service.errors import HTTP_ERRORS, MalformedRequest, NotAcceptable, RequestError
from service.media import ANSWERS, CSV, JSON, JSON_LINES, negotiate
from service.model.errors import UnreadableImage
from service.model.resize import PixelBatch
from service.options import top_k_of
from service.payloads import MAX_IMAGES, payloads_of
from service.schemas import PredictionResponse, SeveralPredictionsResponse
from tests.service.served import Served, assert_error, form, jpeg, png, serve


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with serve(FakeEngine(256)) as served:
        yield served


def b64(payload: bytes) -> str:
    return base64.b64encode(payload).decode()


# One image.


@pytest.mark.parametrize(
    "content_type",
    ["image/png", "image/jpeg; q=1", "application/x-image", "application/octet-stream", "text/csv; charset=utf-8",
     "application/json", "multipart/form-data", "", "nonsense"],
)  # fmt: skip
def test_an_image_is_recognised_under_any_type(service: Served, content_type: str) -> None:
    reply = service.ask("POST", "/invocations", png(42), Content_Type=content_type)
    assert reply.status == 200
    assert PredictionResponse.model_validate_json(reply.body).predictions[0].label == "grey 42"


def test_an_image_without_a_type_is_answered(service: Served) -> None:
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(png())}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
        client.sendall(head.encode() + png(9))
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"grey 9"' in answer


@pytest.mark.parametrize("body", [png().translate(None, b"\0\r\n"), jpeg().translate(None, b"\0\r\n"), b"photo.jpg"])
def test_what_curl_d_makes_of_an_image_is_told_as_such(service: Served, body: bytes) -> None:
    reply = service.ask("POST", "/invocations", body, Content_Type="application/x-www-form-urlencoded")
    assert_error(reply, 400, "malformed_request")
    assert "curl --data-binary @photo.jpg" in reply.json["error"]["message"]


@pytest.mark.parametrize("image", [png(9), jpeg()])
def test_what_curl_sends_with_data_binary_is_answered(service: Served, image: bytes) -> None:
    reply = service.ask("POST", "/invocations", image, Content_Type="application/x-www-form-urlencoded")
    assert reply.status == 200


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "", "application/x-www-form-urlencoded"]
)
def test_json_with_one_image_gets_the_answer_of_one(service: Served, prefix: str, content_type: str) -> None:
    body = json.dumps({"image": prefix + b64(png(17))})
    reply = service.ask("POST", "/invocations", body, Content_Type=content_type)
    assert PredictionResponse.model_validate_json(reply.body).predictions[0].label == "grey 17"


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b" \r\n", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("content_type", ["text/plain; charset=utf-8", "image/png", "text/csv", "", JSON, "nonsense"])
def test_json_is_recognised_under_any_type_but_a_forms(service: Served, before: bytes, content_type: str) -> None:
    body = before + json.dumps({"image": b64(jpeg(17))}).encode()
    reply = service.ask("POST", "/invocations", body, Content_Type=content_type)
    assert reply.status == 200, reply.body
    assert reply.json["predictions"][0]["label"] == "grey 17"
    refused = service.ask("POST", "/invocations", body, Content_Type="multipart/form-data; boundary=xYz")
    assert_error(refused, 400, "malformed_request")


@pytest.mark.parametrize(
    "content_type",
    ["", "application/octet-stream", "text/plain", JSON, "image/jpeg", "application/x-www-form-urlencoded"],
)
def test_a_form_is_recognised_under_any_type(service: Served, content_type: str) -> None:
    body, _ = form(jpeg(17), boundary="----WebKitFormBoundary7MA4")
    reply = service.ask("POST", "/invocations", body, Content_Type=content_type)
    assert reply.status == 200, reply.body
    assert reply.json["predictions"][0]["label"] == "grey 17"
    other = body.replace(b"Content-Disposition", b"Content-Type: image/jpeg\r\ncontent-disposition")
    assert service.ask("POST", "/invocations", other, Content_Type=content_type).json == reply.json


@pytest.mark.parametrize(
    "body", [b"--", b"--b\r\n", b"--b\r\nX: y\r\n\r\n", b"-- \r\nContent-Disposition: x\r\n\r\n", b"x{}"]
)
def test_what_is_no_form_and_no_json_is_not_taken_for_one(service: Served, body: bytes) -> None:
    assert_error(service.ask("POST", "/invocations", body, Content_Type="text/plain"), 415, "unsupported_media_type")


def test_a_form_of_one_file_gets_the_answer_of_one(service: Served) -> None:
    body, content_type = form(png(17))
    reply = service.ask("POST", "/invocations", body, Content_Type=content_type)
    assert reply.status == 200
    assert PredictionResponse.model_validate_json(reply.body).predictions[0].label == "grey 17"


def test_base64_may_have_line_breaks(service: Served) -> None:
    body = json.dumps({"image": base64.encodebytes(png(5)).decode()})
    reply = service.ask("POST", "/invocations", body, Content_Type="application/json")
    assert reply.json["predictions"][0]["label"] == "grey 5"


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"{", "not valid JSON"),
        (b"[1, 2]", "given: a list"),
        (b"{}", "given: an object with no members"),
        (b'{"imgs": []}', "given: an object with 'imgs'"),
        (b'{"image": "AA==", "images": []}', "image or images alone"),
        (b'{"image": 5}', "image must be a string with an image in base64, given: a number"),
        (b'{"image": null}', "given: null"),
        (b'{"image": "!!"}', "image is not valid base64"),
        (b'{"image": "https://example.com/cat.png"}', "image is a URL, which is not fetched; send the image's bytes"),
        (b'{"images": "AA=="}', "must be a list of 1 to 100 images, given: a string"),
        (b'{"images": []}', "given: 0"),
        (b'{"image": true}', "given: true or false"),
        (b'{"images": [true]}', r"images[0] must be a string"),
        (b'{"images": ["AA==", null]}', r"images[1] must be a string"),
        (json.dumps({"images": ["AA=="] * 101}).encode(), "given: 101"),
        (b'{"image": "\xff"}', "not valid JSON"),
        (b'{"image": ' + b"[" * 100_000, "more parts than 100 images can need"),
        (b'{"images": [' + b'"",' * 500 + b'""]}', "more parts than 100 images can need"),
        (b'{"image": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_other_json_is_refused_by_a_sentence(service: Served, document: bytes, said: str) -> None:
    reply = service.ask("POST", "/invocations", document, Content_Type="application/json")
    assert said in assert_error(reply, 400, "malformed_request")


@pytest.mark.parametrize("content_type", ["image/png", "application/x-www-form-urlencoded"])
def test_no_body_at_all_is_refused_with_why_curl_may_have_sent_none(service: Served, content_type: str) -> None:
    reply = service.ask("POST", "/invocations", b"", Content_Type=content_type)
    message = assert_error(reply, 400, "unreadable_image")
    assert message.startswith(
        "The body is empty (0 bytes); send the bytes of a JPEG, PNG, WEBP, BMP or GIF file. Does "
    )


def test_a_compressed_body_is_refused(service: Served) -> None:
    reply = service.ask("POST", "/invocations", png(), Content_Encoding="gzip")
    assert "Content-Encoding gzip" in assert_error(reply, 415, "unsupported_media_type")


# Each kind of image.


class Corner(FakeEngine):
    """Judges the upper left quarter alone: a picture that lies otherwise, or another frame, has another class."""

    def infer(self, batch: PixelBatch) -> Logits:
        edge = batch.shape[1] // 2 - 2
        return super().infer(batch[:, :edge, :edge])


@pytest.fixture(scope="module")
def corner() -> Iterator[Served]:
    with serve(Corner(256)) as served:
        yield served


def quarters() -> Image.Image:
    """Grey 40 in the upper left, 90, 140 and 190 elsewhere."""
    return Image.fromarray(np.kron(np.array([[40, 90], [140, 190]], np.uint8), np.ones((32, 32), np.uint8)))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: Image.Exif, transpose: Image.Transpose) -> bytes:
    return encoded(quarters().transpose(transpose).convert("RGB"), "JPEG", quality=100, exif=orientation)


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif


def thin(width: int, height: int) -> Image.Image:
    """Grey 40 in the middle, 200 beyond."""
    image = Image.new("L", (width, height), 200)
    image.paste(40, (max(0, width // 2 - 2), max(0, height // 2 - 2), width // 2 + 2, height // 2 + 2))
    return image


FRAMES: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", (64, 64), "white")]}
KINDS = {
    "animated GIF": encoded(quarters(), "GIF", **FRAMES),
    "animated WebP": encoded(quarters().convert("RGB"), "WEBP", lossless=True, **FRAMES),
    "animated PNG": encoded(quarters().convert("RGB"), "PNG", **FRAMES),
    "multi-page JPEG": encoded(quarters().convert("RGB"), "MPO", quality=100, **FRAMES),
    "CMYK JPEG": encoded(quarters().convert("CMYK"), "JPEG", quality=100),
    "16-bit PNG": encoded(Image.fromarray(np.asarray(quarters()).astype(np.uint16) * 257), "PNG"),
    "palette PNG": encoded(quarters().convert("P"), "PNG"),
    "palette BMP": encoded(quarters().convert("P"), "BMP"),
    "alpha PNG": encoded(Image.merge("LA", (Image.new("L", (64, 64), 0), ImageOps.invert(quarters()))), "PNG"),
    "alpha WebP": encoded(
        Image.merge("RGBA", (*[Image.new("L", (64, 64), 0)] * 3, ImageOps.invert(quarters()))), "WEBP", lossless=True
    ),
    "grayscale PNG": encoded(quarters(), "PNG"),
    "grayscale JPEG": encoded(quarters(), "JPEG", quality=100),
    "EXIF-rotated JPEG, 6": turned(orientation(6), Image.Transpose.ROTATE_90),
    "EXIF-rotated JPEG, 3": turned(orientation(3), Image.Transpose.ROTATE_180),
    "EXIF-rotated JPEG, 2": turned(orientation(2), Image.Transpose.FLIP_LEFT_RIGHT),
    "progressive JPEG": encoded(quarters().convert("RGB"), "JPEG", quality=100, progressive=True),
    "1 x 1": encoded(Image.new("RGB", (1, 1), (40, 40, 40)), "PNG"),
    "10000 x 1": encoded(thin(10_000, 1), "PNG"),
    "1 x 10000": encoded(thin(1, 10_000), "JPEG", quality=100),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_image_gets_its_right_answer(corner: Served, kind: str) -> None:
    reply = corner.ask("POST", "/invocations", KINDS[kind])
    assert reply.status == 200, reply.body
    assert reply.json["predictions"][0]["index"] == pytest.approx(40, abs=1)


# Several images.


def several(service: Served, way: str, *payloads: bytes) -> Any:
    if way == "form":
        body, content_type = form(*payloads)
    else:
        body, content_type = json.dumps({"images": [b64(payload) for payload in payloads]}).encode(), JSON
    reply = service.ask("POST", "/invocations", body, Content_Type=content_type)
    assert reply.status == 200, reply.body
    SeveralPredictionsResponse.model_validate_json(reply.body)
    return reply.json


@pytest.mark.parametrize("way", ["form", "json"])
@pytest.mark.parametrize("count", [2, 40, 100])
def test_several_images_are_answered_in_order(service: Served, way: str, count: int) -> None:
    answer = several(service, way, *[png(grey) for grey in range(count)])
    assert [result["predictions"][0]["label"] for result in answer["results"]] == [f"grey {k}" for k in range(count)]
    assert answer["model"] == {"name": "fake", "version": "1"}


@pytest.mark.parametrize("way", ["form", "json"])
def test_a_bad_image_among_several_is_marked_and_the_others_are_answered(service: Served, way: str) -> None:
    first, bad, empty, last = several(service, way, png(1), b"no image", b"", png(4))["results"]
    assert (first["predictions"][0]["label"], last["predictions"][0]["label"]) == ("grey 1", "grey 4")
    assert bad["error"]["code"] == "unreadable_image"
    assert "are not a JPEG" in bad["error"]["message"]
    assert empty["error"]["code"] == "unreadable_image"


def test_base64_that_is_none_is_marked_among_several_and_the_others_are_answered(service: Served) -> None:
    images = [b64(png(1)), "!!", b64(png(4)), b64(b"no image")]
    reply = service.ask("POST", "/invocations", json.dumps({"images": images}), Content_Type=JSON)
    assert reply.status == 200
    results = SeveralPredictionsResponse.model_validate_json(reply.body) and reply.json["results"]
    assert [results[k]["predictions"][0]["label"] for k in (0, 2)] == ["grey 1", "grey 4"]
    assert [results[k]["error"]["code"] for k in (1, 3)] == ["unreadable_image"] * 2
    assert results[1]["error"]["message"].startswith("images[1] is not valid base64")
    lines = service.ask("POST", "/invocations", b'{"images": ["!!", "?"]}', Content_Type=JSON, Accept=JSON_LINES)
    assert [json.loads(line)["error"]["code"] for line in lines.body.splitlines()] == ["unreadable_image"] * 2


def test_a_list_of_one_is_answered_as_a_list(service: Served) -> None:
    (result,) = several(service, "json", png(3))["results"]
    assert result["predictions"][0]["label"] == "grey 3"


def test_a_form_with_too_many_files_is_refused(service: Served) -> None:
    body, content_type = form(*[b""] * (MAX_IMAGES + 1))
    reply = service.ask("POST", "/invocations", body, Content_Type=content_type)
    assert "at most 100 parts" in assert_error(reply, 400, "malformed_request")


def test_several_images_share_the_places_there_are() -> None:
    engine = FakeEngine(256)
    with serve(engine, max_images=3) as served:
        warmed_up = len(engine.batch_sizes)
        answer = several(served, "json", *[png(grey) for grey in range(20)])
        assert [r["predictions"][0]["index"] for r in answer["results"]] == list(range(20))
        assert max(engine.batch_sizes[warmed_up:]) <= 3
        assert served.app.state.runtime.admission.under_way == 0


def test_a_failing_engine_fails_the_whole_request() -> None:
    engine = FakeEngine(256)
    with serve(engine) as served:
        engine.failure = RuntimeError("broken")
        body = json.dumps({"images": [b64(png())] * 5})
        assert_error(served.ask("POST", "/invocations", body, Content_Type=JSON), 500, "engine_failure")
        assert served.app.state.runtime.admission.under_way == 0


# What the answer is written in.


def test_the_csv_has_a_line_for_each_class_and_for_each_error(service: Served) -> None:
    body, content_type = form(png(7), b'bad, "quoted"', png(9))
    reply = service.ask("POST", "/invocations?top_k=2", body, Content_Type=content_type, Accept="text/csv")
    assert reply.headers["content-type"] == "text/csv"
    rows = list(csv.DictReader(io.StringIO(reply.body.decode())))
    assert [(row["image"], row["rank"], row["label"]) for row in rows] == [
        ("0", "1", "grey 7"), ("0", "2", "grey 6"), ("1", "", ""), ("2", "1", "grey 9"), ("2", "2", "grey 8")
    ]  # fmt: skip
    assert rows[2]["error_code"] == "unreadable_image"
    assert 0 < float(rows[0]["probability"]) <= 1


def test_json_lines_have_a_line_for_each_image(service: Served) -> None:
    body, content_type = form(png(7), b"bad")
    reply = service.ask("POST", "/invocations", body, Content_Type=content_type, Accept=JSON_LINES)
    assert reply.headers["content-type"] == JSON_LINES
    good, bad = [json.loads(line) for line in reply.body.splitlines()]
    assert good["model"]["name"] == "fake"
    assert good["predictions"][0]["label"] == "grey 7"
    assert bad["error"]["code"] == "unreadable_image"


@pytest.mark.parametrize(
    ("accept", "given_type"),
    [
        (None, JSON), ("", JSON), ("*/*", JSON), ("text/csv", CSV), ("text/*", CSV), ("TEXT/CSV", CSV),
        ("application/jsonlines", JSON_LINES), ("application/json;q=0.5, text/csv", CSV),
        ("text/csv;q=0.2, application/*;q=0.9", JSON), ("application/json;q=0, */*", JSON_LINES),
        ("text/html, */*;q=0.1", JSON), ("text/csv;q=0, */*", JSON), ("application/json; charset=utf-8", JSON),
        ("*/*;q=0.5, application/jsonlines", JSON_LINES), ("application/json;q=oops", JSON), (", ,", JSON),
    ],
)  # fmt: skip
def test_the_type_liked_best_is_given(accept: str | None, given_type: str) -> None:
    assert negotiate(accept) == given_type


@pytest.mark.parametrize(
    "accept", ["image/png", "text/html", "application/json;q=0", "*/*;q=0", "application/xml, text/html"]
)
def test_an_accept_that_excludes_all_answers_is_refused(service: Served, accept: str) -> None:
    message = assert_error(service.ask("POST", "/invocations", png(), Accept=accept), 406, "not_acceptable")
    assert all(answer in message for answer in ANSWERS)


@given(st.text(max_size=200))
def test_no_accept_header_breaks_the_negotiation(accept: str) -> None:
    with contextlib.suppress(NotAcceptable):
        assert negotiate(accept) in ANSWERS


@given(st.binary(max_size=400), st.text(max_size=60))
def test_no_body_breaks_the_reading(body: bytes, content_type: str) -> None:
    try:
        read = payloads_of(body, content_type)
        assert read.images or read.unreadable
    except (RequestError, UnreadableImage) as exc:
        assert type(exc) in HTTP_ERRORS


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["image", "images", "x"]), inner, max_size=2)
        ),
    )
)
def test_no_json_breaks_the_reading(document: Any) -> None:
    try:
        read = payloads_of(json.dumps(document).encode(), JSON)
        assert read.images or read.unreadable
    except MalformedRequest as exc:
        assert str(exc).endswith(".")


# Options and headers.


def test_top_k_says_how_many_classes_are_ranked(service: Served) -> None:
    for query, count in (("", 5), ("?top_k=1", 1), ("?top_k=7", 7), ("?top_k=1000", 256)):
        assert len(service.ask("POST", f"/invocations{query}", png()).json["predictions"]) == count


@pytest.mark.parametrize(
    "query", ["top_k=0", "top_k=1001", "top_k=-1", "top_k=x", "top_k=", "top_k=1&top_k=2", "top_k=1.0", "top_k=%D9%A3"]
)
def test_another_top_k_is_refused(service: Served, query: str) -> None:
    message = assert_error(service.ask("POST", f"/invocations?{query}", png()), 400, "malformed_request")
    assert "top_k must be one whole number from 1 to 1000, given: " in message


@pytest.mark.parametrize("query", ["topk=3", "k", "top_k=3&x=1", "%FF=1"])
def test_an_unknown_option_is_refused_naming_the_known(service: Served, query: str) -> None:
    assert "allowed is top_k" in assert_error(
        service.ask("POST", f"/invocations?{query}", png()), 400, "malformed_request"
    )


def test_behind_an_endpoint_top_k_comes_in_the_custom_attributes_which_are_echoed(service: Served) -> None:
    attributes = "trace_id=abc; top_k=2"
    reply = service.ask("POST", "/invocations", png(), X_Amzn_SageMaker_Custom_Attributes=attributes)
    assert len(reply.json["predictions"]) == 2
    assert reply.headers["X-Amzn-SageMaker-Custom-Attributes"] == attributes
    refused = service.ask("POST", "/invocations", b"bad", X_Amzn_SageMaker_Custom_Attributes="x")
    assert refused.headers["X-Amzn-SageMaker-Custom-Attributes"] == "x"
    assert top_k_of(b"top_k=3", attributes) == 3
    assert top_k_of(b"", "stop_k=9, other") == 5


@pytest.mark.parametrize("attributes", ["x" * 1025, "caf\xe9", "a\tb"])
def test_custom_attributes_that_are_not_as_sagemaker_allows_are_not_echoed(service: Served, attributes: str) -> None:
    reply = service.ask("POST", "/invocations", png(), X_Amzn_SageMaker_Custom_Attributes=attributes)
    assert reply.status == 200
    assert "X-Amzn-SageMaker-Custom-Attributes" not in reply.headers


def test_headers_nobody_knows_are_ignored(service: Served) -> None:
    headers = {"X-Amzn-SageMaker-Inference-Id": "1", "X-Amzn-SageMaker-Target-Model": "m", "Expect": "", "Foo": "bar"}
    assert service.ask("POST", "/invocations", png(), **headers).status == 200


def test_a_batch_transform_is_told_what_suits_the_service(service: Served) -> None:
    reply = service.ask("GET", "/execution-parameters")
    assert reply.json == {"MaxConcurrentTransforms": 4, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 25}
    with serve(FakeEngine(2), max_payload_bytes=6 * 2**20) as served:
        parameters = served.ask("GET", "/execution-parameters").json
        assert (parameters["MaxPayloadInMB"], parameters["MaxConcurrentTransforms"]) == (6, 16)
