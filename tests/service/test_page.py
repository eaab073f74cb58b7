"""The page at /: over HTTP, and in a headless Chromium where there is one, against a real service with a real model."""

import base64
import hashlib
import io
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from service.model.artifact import open_artifact
from service.model.manifest import sealed
from service.page import STATIC

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

Open = Callable[..., AbstractContextManager[Page]]


# --- over HTTP --------------------------------------------------------------------------------------------------------


def changed(artifact: Path, to: Path, **facts: Any) -> Path:
    """A copy of the artifact whose manifest says something else."""
    shutil.copytree(artifact, to)
    manifest = open_artifact(to).manifest
    (to / "manifest.json").write_bytes(sealed(type(manifest).model_validate({**dict(manifest), **facts})))
    return to


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_is_one_response_whose_policy_allows_its_own_style_and_script_and_nothing_else(
    server: Any, path: str
) -> None:
    answer = server.ask("GET", path)
    html = answer.body.decode()
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["x-content-type-options"] == "nosniff"
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert (
            policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        )
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert not re.search(r"<[^>]+\s(on\w+|style|src)=", html)
    assert not re.search(r"href=\"(https?:)?//", html)
    assert server.ask("HEAD", path).status == 200


def test_no_script_makes_markup_of_strings() -> None:
    for script in STATIC.glob("*.js"):
        markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function"
        assert not re.search(markup, script.read_text()), script


def test_without_the_page_its_addresses_are_404_and_the_reference_stays(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, CLASSIFIER_PAGE="false") as server:
        for path in ("/", "/example"):
            answer = server.ask("GET", path)
            assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")
        assert server.ask("GET", "/docs").status == 200
        assert "/example" not in server.ask("GET", "/docs").body.decode()


def test_the_example_is_the_artifacts_with_its_type_and_class(server: Any, artifact: Path) -> None:
    answer = server.ask("GET", "/example")
    example = open_artifact(artifact)
    assert answer.body == example.read("example")
    assert answer.headers["content-type"] == example.manifest.example.media_type
    assert answer.headers["x-example-label"] == example.manifest.example.label.replace(" ", "%20")


def test_an_example_that_is_gone_is_a_404_and_one_that_says_it_could_run_script_does_not(
    artifact: Path, tmp_path: Path, start_server: Any
) -> None:
    label = open_artifact(artifact).manifest.example.label
    model = changed(artifact, tmp_path / "model", example={"label": label, "media_type": "image/svg+xml"})
    with start_server(model) as server:
        answer = server.ask("GET", "/example")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert "sandbox" in answer.headers["content-security-policy"]
        open_artifact(model).path("example").unlink()
        answer = server.ask("GET", "/example")
        assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")
        assert "example image is gone" in answer.json["error"]["message"]


def test_before_the_model_is_loaded_there_is_a_page_and_no_example_yet(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, ready=False) as server:
        while True:
            try:
                answer = server.ask("GET", "/example")
            except OSError:
                assert server.process.poll() is None, server.log.read_text()
                continue
            break
        if answer.status != 200:  # else it was quicker than we
            assert (answer.status, answer.json["error"]["code"]) == (503, "not_ready")
            assert answer.headers["retry-after"]
        assert server.ask("GET", "/").status == 200


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_background_as_wcag_asks(dark: bool) -> None:
    """Contrast of at least 4.5 to 1 (WCAG 2.2, 1.4.3, level AA)."""
    light, _, darker = (STATIC / "page.css").read_text().partition("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", darker if dark else light))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [(text, back) for text in ("text", "muted", "accent", "bad") for back in ("back", "card")]
    pairs += [("on-accent", "accent"), ("text", "track"), ("muted", "track"), ("text", "bad-back"), ("bad", "bad-back")]
    for text, back in pairs:
        low, high = sorted((luminance(colours[text]), luminance(colours[back])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, back)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (looked for chromium, chromium-browser, google-chrome)")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


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
