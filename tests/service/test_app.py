"""The app over real sockets: uvicorn in a thread, a fake engine where the model does not matter."""

import asyncio
import base64
import gc
import io
import json
import socket
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from service.classifier import Classifier, ExampleFile, ModelCard
from service.engines.base import EngineUnavailable, Logits
from service.engines.fake import FakeEngine
from service.model.resize import PixelBatch
from service.runtime import Runtime
from service.schemas import PredictionResponse
from service.settings import Settings
from tests.service.served import Served, assert_error, jpeg, png, serve


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with serve(FakeEngine(256)) as served:
        yield served


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_ping_answers_200_with_the_state_when_ready(service: Served, method: str) -> None:
    reply = service.ask(method, "/ping")
    assert (reply.status, reply.json) == (200, {"status": "ready"})


@pytest.mark.parametrize(
    ("max_batch", "warm_sizes", "expected"),
    [(8, (), [8]), (8, (1,), [1, 8]), (32, (4, 16, 32), [4, 16, 32]), (6, (4, 16), [4, 6])],
)
def test_the_example_has_run_in_batches_of_each_size_when_the_service_is_ready(
    tmp_path: Path, max_batch: int, warm_sizes: tuple[int, ...], expected: list[int]
) -> None:
    class Seeing(FakeEngine):
        def infer(self, batch: PixelBatch) -> Logits:
            seen.append(float(batch.mean()))
            return super().infer(batch)

    async def start() -> list[int]:
        runtime = Runtime(Settings(max_batch=max_batch), Classifier(card, 32, engine, example))
        await runtime.open()
        while runtime.state != "ready":
            assert runtime.state != "failed"
            await asyncio.sleep(0.01)
        sizes = [*engine.batch_sizes]
        await runtime.close()
        return sizes

    (tmp_path / "example.png").write_bytes(png(77))
    example = ExampleFile(tmp_path / "example.png", "grey 77", "image/png")
    card = ModelCard("fake", "1", tuple(f"grey {k}" for k in range(256)))
    engine, seen = Seeing(256), list[float]()
    engine.warm_sizes = warm_sizes
    assert asyncio.run(start()) == expected
    assert set(seen) == {77.0}


def test_what_lives_until_the_end_is_spared_by_the_garbage_collector() -> None:
    gc.disable()  # as a worker does when it starts
    try:
        with serve(FakeEngine(256)):
            assert gc.get_freeze_count() > 10_000
            assert gc.isenabled()
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0


def test_ping_answers_503_with_the_state_and_invocations_a_sentence_until_ready() -> None:
    with serve(FakeEngine(256, delay_s=1.5), ready=False) as served:
        reply = served.ask("GET", "/ping")
        assert (reply.status, reply.json["status"]) == (503, "warming_up")
        refused = served.ask("POST", "/invocations", png())
        assert "warming_up" in assert_error(refused, 503, "not_ready")
        assert refused.headers["retry-after"] == "1"
        served.until(lambda: served.ask("GET", "/ping").status == 200)
        assert served.ask("POST", "/invocations", png()).status == 200


def test_an_image_gets_its_label(service: Served) -> None:
    reply = service.ask("POST", "/invocations", png(42), Content_Type="image/png")
    assert reply.status == 200
    answer = PredictionResponse.model_validate_json(reply.body)
    assert answer.predictions[0].label == "grey 42"
    assert answer.model.name == "fake"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"", "image/png", 400, "unreadable_image"),
        (b"hello", "image/png", 400, "unreadable_image"),
        (png()[:60], "image/png", 400, "unreadable_image"),
        (b"%PDF-1.7 ...", "application/octet-stream", 400, "unreadable_image"),
        (b"hello", "multipart/form-data", 400, "malformed_request"),
        (b"hello", "text/csv", 415, "unsupported_media_type"),
    ],
)
def test_bad_requests_are_refused_in_one_shape(
    service: Served, body: bytes, content_type: str, status: int, code: str
) -> None:
    assert_error(service.ask("POST", "/invocations", body, Content_Type=content_type), status, code)


@pytest.mark.parametrize("side_px", [9_460, 20_000])
def test_too_many_pixels_are_refused_naming_the_limit(service: Served, side_px: int) -> None:
    buffer = io.BytesIO()
    Image.new("1", (side_px, side_px)).save(buffer, "PNG")
    message = assert_error(service.ask("POST", "/invocations", buffer.getvalue()), 413, "image_too_large")
    assert "89,478,485" in message


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_naming_the_limit(chunked: bool) -> None:
    with serve(FakeEngine(2), max_payload_bytes=1000) as served:
        body = iter([b"x" * 600] * 3) if chunked else b"x" * 1001
        assert "1,000 bytes" in assert_error(served.ask("POST", "/invocations", body), 413, "payload_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/invocations", 405, "method_not_allowed"), ("GET", "/nothing", 404, "not_found")],
)
def test_other_paths_and_methods_are_refused_in_the_same_shape(
    service: Served, method: str, path: str, status: int, code: str
) -> None:
    assert "/invocations" in assert_error(service.ask(method, path), status, code)


def test_a_failing_engine_gives_500_and_a_sentence_and_the_next_request_is_served() -> None:
    engine = FakeEngine(256)
    with serve(engine) as served:
        engine.failure = RuntimeError("secret detail")
        assert "secret" not in assert_error(served.ask("POST", "/invocations", png()), 500, "engine_failure")
        engine.failure = None
        assert served.ask("POST", "/invocations", png()).status == 200


def test_an_unexpected_error_gives_500_in_the_same_shape_and_its_trace_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gc.collect()  # what other tests left is not this one's
    with serve(FakeEngine(256)) as served:
        served.app.state.runtime._predictor.classifier.side_px = "not a number"
        assert_error(served.ask("POST", "/invocations", png()), 500, "internal_error")
    assert "Traceback" in caplog.text
    gc.collect()  # a decoder process that was forgotten over it would warn, which fails the test


@pytest.mark.parametrize("status", [503, 429])
def test_more_requests_than_allowed_are_refused_at_once_and_none_is_lost(status: int) -> None:
    engine = FakeEngine(256)
    with (
        serve(engine, max_images=4, max_batch=2, overload_status=status) as served,
        ThreadPoolExecutor(24) as clients,
    ):
        engine.delay_s = 0.5
        replies = list(clients.map(lambda _: served.ask("POST", "/invocations", png()), range(24)))
        for reply in replies:
            if reply.status != 200:
                assert_error(reply, status, "overloaded")
                assert reply.headers["retry-after"] == "1"
                assert reply.json["error"]["retry_after_s"] == 1
        statuses = [reply.status for reply in replies]
        assert statuses.count(200) >= 4
        assert status in statuses
        engine.delay_s = 0
        assert served.ask("POST", "/invocations", png()).status == 200


def test_a_request_past_its_deadline_gets_504() -> None:
    engine = FakeEngine(256)
    with serve(engine, deadline_s=0.5) as served:
        engine.delay_s = 3
        assert "0.5 s" in assert_error(served.ask("POST", "/invocations", jpeg()), 504, "deadline_exceeded")


def test_ping_is_answered_while_predictions_run() -> None:
    engine = FakeEngine(256)
    with serve(engine, max_batch=1) as served, ThreadPoolExecutor(4) as clients:
        engine.delay_s = 1
        warmed_up = len(engine.batch_sizes)
        busy = [clients.submit(served.ask, "POST", "/invocations", jpeg()) for _ in range(4)]
        served.until(lambda: len(engine.batch_sizes) > warmed_up)
        assert served.ask("GET", "/ping").status == 200
        assert not all(request.done() for request in busy)
        assert [request.result().status for request in busy] == [200] * 4


def test_requests_under_load_are_batched_and_each_gets_its_own_answer() -> None:
    engine = FakeEngine(256, delay_s=0.02)
    with serve(engine) as served, ThreadPoolExecutor(32) as clients:
        warmed_up = len(engine.batch_sizes)
        replies = list(clients.map(lambda grey: served.ask("POST", "/invocations", jpeg(grey)), range(200)))
    assert [reply.json["predictions"][0]["label"] for reply in replies] == [f"grey {grey}" for grey in range(200)]
    assert max(engine.batch_sizes[warmed_up:]) > 1


def test_a_harmless_request_id_is_kept_and_another_is_replaced(service: Served) -> None:
    assert service.ask("GET", "/ping", X_Request_Id="abc-1").headers["x-request-id"] == "abc-1"
    assert service.ask("GET", "/ping", X_Request_Id="a b").headers["x-request-id"] != "a b"


def test_each_request_is_one_line_with_its_stage_times_and_probes_are_silent(
    service: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.requests")
    service.ask("GET", "/ping")
    service.ask("POST", "/invocations", png(), X_Request_Id="good")
    service.ask("POST", "/invocations", b"bad", X_Request_Id="bad")

    def lines() -> list[str]:  # other tests leave other loggers talkative
        return [record.getMessage() for record in caplog.records if record.name == "service.requests"]

    service.until(lambda: len(lines()) >= 2)
    good, bad = lines()
    for name in ("decode_ms", "queue_ms", "infer_ms", "total_ms", "batch_size=1", "bytes_in", "status=200", "code=ok"):
        assert name in good
    assert "status=400 code=unreadable_image" in bad


def test_at_debug_level_a_request_is_told_when_it_arrives(service: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "service.requests")
    service.ask("GET", "/no%0Apage", X_Request_Id="mine")
    service.until(lambda: "status=404" in caplog.text)
    arrival, answer = [each.getMessage() for each in caplog.records if "request_id=mine" in each.getMessage()]
    assert arrival == r"request_id=mine arrived: GET /no\npage"
    assert "status=404" in answer


def test_a_client_that_hangs_up_while_sending_leaves_a_line_and_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "service.requests")
    with serve(FakeEngine(2)) as served:
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        served.until(lambda: "status=0 code=client_gone" in caplog.text)
        assert served.ask("GET", "/ping").status == 200
    assert "Traceback" not in caplog.text


def test_a_client_that_hangs_up_while_its_image_is_decoded_never_reaches_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "service.requests")
    engine = FakeEngine(256)
    with serve(engine) as served:
        assert served.ask("POST", "/invocations", png()).status == 200  # a decoder process is there
        before = len(engine.batch_sizes)
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(png())}\r\n\r\n"
            client.sendall(head.encode() + png())
        served.until(lambda: "status=0 code=client_gone" in caplog.text)
        assert len(engine.batch_sizes) == before


def test_a_client_that_hangs_up_while_waiting_never_reaches_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "service.requests")
    engine = FakeEngine(256)
    with serve(engine, max_batch=1) as served, ThreadPoolExecutor(1) as clients:
        engine.delay_s = 4
        before = len(engine.batch_sizes)
        busy = clients.submit(served.ask, "POST", "/invocations", jpeg())
        served.until(lambda: len(engine.batch_sizes) == before + 1)
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(jpeg())}\r\n\r\n"
            client.sendall(head.encode() + jpeg())
            served.until(lambda: b"\nclassifier_queue_depth_images 1.0\n" in served.ask("GET", "/metrics").body)
        served.until(lambda: "status=0 code=client_gone" in caplog.text)
        served.until(lambda: served.app.state.runtime.admission.under_way == 1)
        assert not busy.done()  # its place is free before the engine could have come to it
        engine.delay_s = 0
        assert busy.result().status == 200
        assert served.ask("POST", "/invocations", png()).status == 200
        assert len(engine.batch_sizes) == before + 2
    assert "Traceback" not in caplog.text


_JUNK = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 2000
_FORM = b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.jpg"\r\n\r\n%s\r\n--b--\r\n'


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (_JUNK, "image/jpeg", 400),
        (_JUNK[1:], "text/plain", 415),
        (_FORM % _JUNK, "multipart/form-data; boundary=b", 400),
        (_FORM % _JUNK + _JUNK, "multipart/form-data; boundary=other", 400),
        (json.dumps({"images": [base64.b64encode(_JUNK).decode()] * 2}).encode(), "application/json", 200),
        (b'{"image": "' + base64.b64encode(_JUNK) + b'!"}', "application/json", 400),
        (png(), "image/png", 200),
    ],
)
def test_what_a_request_held_is_free_when_it_is_answered(body: bytes, content_type: str, status: int) -> None:
    """Not only when garbage is looked for: by then it could be gigabytes."""
    with serve(FakeEngine(256)) as served:
        served.ask("POST", "/invocations", body, Content_Type=content_type)
        gc.collect()
        gc.disable()
        try:
            assert served.ask("POST", "/invocations", body, Content_Type=content_type).status == status
            served.until(lambda: not served.connections())
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            found = [*gc.garbage]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    held = [each for each in gc.get_referents(*found) if isinstance(each, bytes | bytearray) and len(each) > 10_000]
    assert not held
    assert not [each for each in found if isinstance(each, types.FrameType)]


@pytest.mark.parametrize("value", [b"a\r\nx: y", b"a\x01"])
def test_a_header_that_would_not_stay_one_ends_the_connection(value: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of ours can be such; it is what stands behind the checks of what is echoed."""
    monkeypatch.setattr("service.invocations.echoed", lambda _: [(b"x-echo", value)])
    with serve(FakeEngine(256)) as served, socket.create_connection(("127.0.0.1", served.port), 10) as client:
        client.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(png()) + png())
        received = b"".join(iter(lambda: client.recv(65536), b""))
        served.until(lambda: not served.connections())
    assert b"x: y" not in received and b"\x01" not in received


def test_a_head_request_to_ping_is_answered_like_a_get(service: Served) -> None:
    assert service.ask("HEAD", "/ping").status == 200


def test_a_trailing_slash_is_refused_and_not_redirected_by_the_clients_host_header(service: Served) -> None:
    assert_error(service.ask("POST", "/invocations/", png(), Host="evil.example"), 404, "not_found")


@pytest.mark.parametrize("failure", [EngineUnavailable("no room"), MemoryError()])
def test_an_engine_that_cannot_settle_is_told_and_the_service_answers_and_ends(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Unsettled(FakeEngine):
        def settle(self) -> None:
            raise failure

    with serve(Unsettled(256)) as served:
        served.until(lambda: "images that come alone are answered no faster than others" in caplog.text)
        assert served.ask("POST", "/invocations", png()).status == 200
    assert ("Traceback" in caplog.text) == isinstance(failure, MemoryError)


def test_the_warm_up_tells_how_many_may_wait() -> None:
    with serve(FakeEngine(256, delay_s=0.8)) as served:  # for up to 32 images
        assert 60 <= served.app.state.runtime.admission.allowed <= 100  # 1.25 s at half of 0.8 / 32 s each
