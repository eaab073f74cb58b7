"""The page at / in a headless Chromium, where there is one, against a real service with a real model."""

import base64
import io
import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from service.model.artifact import open_artifact
from tests.chromium import chromium
from tests.service.artifacts import changed

Open = Callable[..., AbstractContextManager[Page]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser: Browser) -> Open:
    """`with visit(server) as page:` opens the page; it must then ask nobody else, and say no error of its own."""

    @contextmanager
    def opened(server: Any, path: str = "/", **options: Any) -> Iterator[Page]:
        context = browser.new_context(**{"reduced_motion": "reduce", **options})
        page = context.new_page()
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        asked: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        here = f"http://127.0.0.1:{server.port}"
        try:
            page.goto(here + path)
            yield page
            # Chromium itself reports answers of 4xx and 5xx, and connections that fail: no errors of the page.
            assert [text for text in complaints if not text.startswith("Failed to load resource")] == []
            assert [url for url in asked if not url.startswith((here, "blob:" + here, "data:"))] == []
        finally:
            context.close()

    return opened


def picture(seed: int = 0, size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image = Image.effect_noise(size, 10 + seed).convert("RGB")
    image.paste((200, (40 * seed) % 256, 60), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    image.save(buffer, kind)
    return buffer.getvalue()


def file(name: str, content: bytes, media_type: str = "image/png") -> Any:
    return {"name": name, "mimeType": media_type, "buffer": content}


def ready(page: Page) -> None:
    expect(page.locator("#state")).to_have_attribute("data-state", "ready")


def test_the_page_loads_and_finds_the_service_ready(server: Any, visit: Open) -> None:
    with visit(server) as page:
        ready(page)
        expect(page.get_by_role("status")).to_have_text("Ready")
        expect(page.get_by_role("heading", name="Image classifier")).to_be_visible()
        expect(page.get_by_role("note")).to_contain_text("Model tiny · version")
        expect(page.get_by_role("note")).to_contain_text("100 classesThis model was trained on a generated sample")
        page.get_by_role("link", name="API reference").click()
        expect(page.get_by_role("heading", name="API reference")).to_be_visible()


def test_a_chosen_file_gets_five_bars_the_times_the_model_and_a_command(server: Any, visit: Open) -> None:
    content = picture(1)
    expected = server.ask("POST", "/invocations", content, {"Content-Type": "image/png"})
    with visit(server) as page:
        page.set_input_files("#files", [file("my photo.png", content)])
        card = page.get_by_role("article", name="my photo.png")
        rows = card.get_by_role("listitem")
        expect(rows).to_have_count(5)
        for row, ranked in zip(rows.all(), expected.json["predictions"], strict=True):
            expect(row).to_contain_text(ranked["label"])
            share = float((row.locator(".share").text_content() or "").strip("< %"))
            assert share == pytest.approx(100 * ranked["probability"], abs=0.06)
            bar = row.locator(".fill").evaluate("e => e.offsetWidth / e.parentElement.offsetWidth")
            assert bar == pytest.approx(ranked["probability"], abs=0.02)
        expect(card).to_contain_text(re.compile("64 . 48 px"))
        expect(card).to_contain_text(f"Model tiny · version {open_model(expected)}")
        expect(card.locator("dt", has_text="round trip")).to_be_visible()
        for stage in re.findall(r"(decode|queue|infer|total);", expected.headers.get("server-timing", "")):
            expect(card.locator("dt", has_text={"infer": "engine"}.get(stage, stage))).to_be_visible()
        expect(card.locator("code")).to_have_text(
            f"curl -H 'Content-Type: image/png' --data-binary '@my photo.png' "
            f"'http://127.0.0.1:{server.port}/invocations?top_k=5'"
        )
        expect(page.locator("#live")).to_contain_text(expected.json["predictions"][0]["label"])
        assert page.evaluate("document.getAnimations().length") == 0  # less motion was asked for


def test_the_page_with_an_answer_is_drawn(server: Any, artifact: Path, visit: Open, tmp_path: Path) -> None:
    example = open_artifact(artifact).read("example")
    with visit(server, viewport={"width": 900, "height": 620}) as page:
        page.set_input_files("#files", [file("example.png", example)])
        card = page.get_by_role("article", name="example.png")
        expect(card.get_by_role("listitem")).to_have_count(5)
        drawn = Image.open(io.BytesIO(page.screenshot(path=tmp_path / "page.png"))).convert("RGB")
        box = card.locator("canvas").bounding_box()
        bar = card.locator(".fill").first.bounding_box()
        colour = card.locator(".fill").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert drawn.size == (900, 620)
    assert len(drawn.getcolors(900 * 620) or []) > 100  # a blank one has a single one
    assert box is not None and bar is not None
    shown = drawn.crop((box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]))
    sent = Image.open(io.BytesIO(example)).convert("RGB").resize(shown.size, Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(shown, float) - np.asarray(sent, float)).mean() < 20  # the image that was chosen
    middle = (bar["x"] + bar["width"] / 2, bar["y"] + bar["height"] / 2)
    assert drawn.getpixel((round(middle[0]), round(middle[1]))) == tuple(map(int, re.findall(r"\d+", colour)[:3]))


def open_model(answer: Any) -> str:
    return str(answer.json["model"]["version"])


def test_everything_can_be_done_with_the_keyboard_and_the_focus_is_seen(server: Any, visit: Open) -> None:
    with visit(server, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.on("filechooser", lambda _: None)  # from now on they are caught; expect_file_chooser begins too late
        ready(page)

        def tab_to(what: str) -> None:
            for _ in range(20):
                page.keyboard.press("Tab")
                name = page.evaluate("(e => e.id || e.textContent)(document.activeElement)")
                if name == what:
                    ringed = page.evaluate(
                        "(e => [e, e.nextElementSibling].some(n => n && getComputedStyle(n).outlineStyle == 'solid'))"
                        "(document.activeElement)"
                    )
                    assert ringed, f"{what} has the focus and does not show it"
                    return
            raise AssertionError(f"Tab does not lead to {what}")

        tab_to("files")
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        chooser.value.set_files([file("one.png", picture())])
        expect(page.get_by_role("listitem")).to_have_count(5)
        tab_to("example")
        page.keyboard.press("Enter")
        expect(page.get_by_role("article", name="example.png").get_by_role("listitem")).to_have_count(5)
        tab_to("Copy")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        assert "/example | curl " in page.evaluate("navigator.clipboard.readText()")
        tab_to("Answer as JSON")
        page.keyboard.press("Enter")
        expect(page.locator("pre").first).to_be_visible()
        page.locator("#example").focus()
        tab_to("clear")
        page.keyboard.press("Enter")
        expect(page.get_by_role("article")).to_have_count(0)
        assert page.evaluate("document.activeElement.id") == "files"


def test_a_text_file_shows_the_services_sentence_and_the_request_id_of_the_log(server: Any, visit: Open) -> None:
    with visit(server) as page:
        page.set_input_files("#files", [file("notes.txt", b"hello, I am text", "text/plain")])
        problem = page.locator(".problem")
        expect(problem).to_contain_text("JPEG, PNG")
        expect(problem).to_contain_text("Status 400 · code unreadable_image")
        found = re.search(r"request id (\S+)", problem.text_content() or "")
        assert found
        assert (
            f"request_id={found[1]}" in server.log.read_text()
            or f'"request_id": "{found[1]}"' in server.log.read_text()
        )
        expect(problem.get_by_role("button")).to_have_count(0)  # trying again would not help
        expect(page.locator("#live")).to_contain_text("notes.txt")


def test_several_images_are_answered_each_and_one_that_is_none_does_not_hold_the_others_up(
    server: Any, visit: Open
) -> None:
    with visit(server) as page:
        files = [file(f"{k}.jpg", picture(k, kind="JPEG"), "image/jpeg") for k in range(8)]
        files.insert(3, file("cut.png", picture()[:100]))
        page.set_input_files("#files", files)
        expect(page.get_by_role("article")).to_have_count(9)
        expect(page.locator(".ranks")).to_have_count(8)
        expect(page.locator(".problem")).to_have_count(1)
        names = [card.get_attribute("aria-label") for card in page.get_by_role("article").all()]
        assert names == [given["name"] for given in files]
        page.set_input_files("#files", [file("later.png", picture())])
        expect(page.get_by_role("article").first).to_have_attribute("aria-label", "later.png")


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_images_can_be_dropped_and_pasted(server: Any, visit: Open, how: str) -> None:
    send = """([how, bytes]) => {
        const data = new DataTransfer();
        if (bytes) {
            const content = Uint8Array.from(atob(bytes), c => c.charCodeAt(0));
            data.items.add(new File([content], "given.png", {type: "image/png"}));
        }
        const init = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
        document.body.dispatchEvent(how == "drop" ? new DragEvent(how, init) : new ClipboardEvent(how, init));
    }"""
    with visit(server) as page:
        page.evaluate(send, [how, base64.b64encode(picture()).decode()])
        expect(page.get_by_role("article", name="given.png").get_by_role("listitem")).to_have_count(5)
        page.evaluate(send, [how, None])
        expect(page.get_by_role("alert")).to_contain_text("no file" if how == "drop" else "no image")


def test_a_large_photo_is_shown_small_upright_and_whole(server: Any, visit: Open) -> None:
    photo = Image.new("RGB", (6000, 4000), (20, 90, 160))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", exif=exif)
    with visit(server) as page:
        page.set_input_files("#files", [file("large.jpg", buffer.getvalue(), "image/jpeg")])
        canvas = page.get_by_role("img", name="Preview of large.jpg")
        expect(canvas).to_be_visible()
        assert canvas.evaluate("e => [e.width, e.height]") == [480, 720]
        expect(page.get_by_role("article")).to_contain_text(re.compile("4000 . 6000 px"))
        expect(page.get_by_role("listitem")).to_have_count(5)


@pytest.mark.slow
def test_a_file_that_is_too_large_is_said_to_be_also_where_the_service_hangs_up_on_it(
    artifact: Path, start_server: Any, visit: Open
) -> None:
    with start_server(artifact, CLASSIFIER_MAX_PAYLOAD_BYTES="1048576") as server, visit(server) as page:
        ready(page)
        expect(page.locator("#limit")).to_have_text(", up to 1 MB each")
        page.set_input_files("#files", [file("large.bmp", picture(size=(3000, 3000), kind="BMP"), "image/bmp")])
        expect(page.locator(".problem")).to_contain_text("The file is too large")
        expect(page.get_by_role("button", name="Try again")).to_have_count(0)


def test_stage_times_that_the_service_tells_are_shown_with_what_they_leave_over(server: Any, visit: Open) -> None:
    def timed(route: Route) -> None:
        answer = route.fetch()
        header = "decode;dur=1.5, queue;dur=0.25, infer;dur=4, total;dur=8, other-proxy;desc=x"
        route.fulfill(response=answer, headers={**answer.headers, "server-timing": header})

    with visit(server) as page:
        page.route("**/invocations*", timed)
        page.set_input_files("#files", [file("one.png", picture())])
        times = page.locator(".times")
        for words in ("decode1.5 ms", "queue0.3 ms", "engine4.0 ms", "other2.3 ms", "total8.0 ms", "round trip"):
            expect(times).to_contain_text(words)
        shares = page.locator(".stages span").evaluate_all("all => all.map(e => Number(e.style.flexGrow))")
        assert shares == [1.5, 0.25, 4, 2.25]


def test_class_names_are_text_whatever_they_hold(
    artifact: Path, tmp_path: Path, start_server: Any, visit: Open
) -> None:
    count = len(open_artifact(artifact).manifest.classes)
    names = tuple(f"{k}<img src=x onerror=alert({k})></script><script>alert({k})</script>" for k in range(count))
    example = {"label": names[0], "media_type": "image/png"}
    with (
        start_server(changed(artifact, tmp_path / "model", classes=names, example=example)) as server,
        visit(server) as page,
    ):
        ready(page)
        page.get_by_role("button", name="Try an example").click()
        expect(page.get_by_role("listitem")).to_have_count(5)
        expect(page.get_by_role("listitem").first).to_contain_text("<img src=x onerror=")
        expect(page.get_by_role("article")).to_contain_text("its class: 0<img src=x")
        assert page.locator("article img, article script").count() == 0


def test_a_service_that_stops_is_noticed_and_when_it_is_back_the_image_can_be_tried_again(
    artifact: Path, start_server: Any, visit: Open
) -> None:
    with start_server(artifact) as server, visit(server) as page:
        ready(page)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        page.set_input_files("#files", [file("one.png", picture())])
        expect(page.locator(".problem")).to_contain_text("The connection was lost")
        expect(page.get_by_role("status")).to_contain_text("does not answer")
        page.set_input_files("#files", [file("two.png", picture())])
        expect(page.get_by_role("article", name="two.png")).to_contain_text("Waits until the service is ready")
        with start_server(artifact, "--port", str(server.port), ready=False):
            expect(page.get_by_role("article", name="two.png").get_by_role("listitem")).to_have_count(5)
            ready(page)
            page.get_by_role("button", name="Try again").click()
            expect(page.get_by_role("article", name="one.png").get_by_role("listitem")).to_have_count(5)


# The states below are over in no time or hard to bring about: the answers of the service are put in its place.


def test_a_service_that_is_warming_up_is_waited_for(server: Any, visit: Open) -> None:
    def warming_up(route: Route) -> None:
        route.fulfill(status=503, json={"status": "warming_up"})

    with visit(server, "/docs") as page:
        page.route("**/ping", warming_up)
        page.goto(f"http://127.0.0.1:{server.port}/")
        expect(page.get_by_role("status")).to_have_text("Warming up…")
        page.set_input_files("#files", [file("one.png", picture())])
        expect(page.get_by_role("article")).to_contain_text("Waits until the service is ready")
        page.unroute("**/ping")
        expect(page.get_by_role("listitem")).to_have_count(5)


@pytest.mark.parametrize(
    ("status", "body", "headers", "shown", "again"),
    [
        (503, {"error": {"code": "overloaded", "message": "256 requests are under way.", "request_id": "r1"}},
         {"Retry-After": "7"}, ["The service is busy", "256 requests", "try again in 7 s", "request id r1"], True),
        (504, {"error": {"code": "deadline_exceeded", "message": "Not within 55 s.", "request_id": "r2"}},
         {}, ["No answer in time", "Not within 55 s.", "request id r2"], True),
        (413, {"error": {"code": "image_too_large", "message": "89 million pixels.", "request_id": "r3"}},
         {}, ["The image is too large", "89 million pixels."], False),
        (502, "<h1>Bad <b>gateway</b></h1>", {}, ["The service failed", "<h1>Bad <b>gateway</b></h1>"], True),
        (200, "<p>Please log in</p>", {}, ["The answer was not understood", "<p>Please log in</p>"], False),
    ],
)  # fmt: skip
def test_each_error_is_shown_in_words_and_can_be_tried_again_where_that_may_help(
    server: Any, visit: Open, status: int, body: Any, headers: dict[str, str], shown: list[str], again: bool
) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    with visit(server) as page:
        page.route("**/invocations*", lambda route: route.fulfill(status=status, body=text, headers=headers))
        page.set_input_files("#files", [file("one.png", picture())])
        for words in shown:
            expect(page.locator(".problem")).to_contain_text(words)
        page.unroute("**/invocations*")
        expect(page.get_by_role("button", name="Try again")).to_have_count(1 if again else 0)
        if again:
            page.get_by_role("button", name="Try again").click()
            expect(page.get_by_role("listitem")).to_have_count(5)
