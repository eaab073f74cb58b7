"""The report of 100 classes in a headless Chromium, where there is one: it opens from the disk, and can be read."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.chromium import chromium
from tests.training.reports import write_hundred
from training.data import sample
from training.report.write import PAIRS

LEGIBLE_PX = 8
"""Letters of this size can be read on a common screen."""
NARROW = {"width": 360, "height": 780}

Open = Callable[..., AbstractContextManager[Page]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hundred(tmp_path_factory.mktemp("run"), per_class=20) / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser: Browser, report: Path) -> Open:
    """`with visit() as page:` opens the report; it must then ask nobody for anything, and complain of nothing."""

    @contextmanager
    def opened(**options: Any) -> Iterator[Page]:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        page = context.new_page()
        page.set_default_timeout(60_000)
        asked: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        try:
            page.goto(report.as_uri())
            yield page
            assert complaints == []
            assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
        finally:
            context.close()

    return opened


def overlapping(page: Page, selector: str) -> list[list[str]]:
    """Pairs of texts whose boxes cover each other by more than a pixel in both directions."""
    found: list[list[str]] = page.eval_on_selector_all(
        selector,
        """texts => {
          const boxes = texts.map(t => [t.getBoundingClientRect(), t.textContent]).filter(([b]) => b.width);
          const pairs = [];
          boxes.forEach(([a, one], i) => boxes.slice(i + 1).forEach(([b, other]) => {
            const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
            const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
            if (across > 1 && down > 1) pairs.push([one, other]);
          }));
          return pairs;
        }""",
    )
    return found


def test_every_section_is_shown_and_nothing_is_cut_off(visit: Open) -> None:
    with visit() as page:
        for link in page.locator("nav a").all():
            link.click()
            expect(page.locator(str(link.get_attribute("href")))).to_be_in_viewport()
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 1280
        broken = page.eval_on_selector_all("img", "all => all.filter(e => !e.naturalWidth).length")
        assert broken == 0
        for svg in page.locator(".charts svg").all():
            spilled = svg.evaluate(
                """svg => { const frame = svg.getBoundingClientRect();
                return [...svg.querySelectorAll("text")].filter(t => { const box = t.getBoundingClientRect();
                  return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
                }).map(t => t.textContent); }"""
            )
            assert spilled == []
        assert overlapping(page, ".charts figure:first-child svg text") == []
        steps = page.locator("figure", has_text="Batch loss").locator('text[text-anchor="middle"]').all_text_contents()
        assert [text for text in steps if text != "step" and not text.isdigit()] == []
        cut = "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"
        assert page.eval_on_selector_all("#classes .bars .row > span:first-child", cut) == []


def test_confused_pairs_and_mistakes_are_shown_as_pictures(visit: Open) -> None:
    with visit() as page:
        loaded = "(all, inside) => all.map(e => [...e.querySelectorAll(inside)].filter(i => i.naturalWidth > 0).length)"
        pairs = page.eval_on_selector_all("#mistakes .pair", loaded, "img")
        assert len(pairs) == PAIRS
        assert min(pairs) >= 1
        mistakes = page.eval_on_selector_all("#mistakes .shots", loaded, ".shot img")
        assert len(mistakes) == 2  # the most surprising, the worst
        assert min(mistakes) >= 6


def test_the_names_of_100_classes_can_be_read_at_the_matrix(visit: Open) -> None:
    with visit() as page:
        matrix = page.locator(".matrix").first
        labels = matrix.locator("svg text:not(.axis)")
        expect(labels).to_have_count(200)
        assert {text.strip() for text in labels.all_text_contents()} == set(sample.CLASSES)
        size = "e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a"
        assert float(labels.first.evaluate(size)) >= LEGIBLE_PX
        assert overlapping(page, ".matrix:first-of-type svg text:not(.axis)") == []
        matrix.get_by_role("button", name="Enlarge").click()
        assert float(labels.first.evaluate(size)) >= 1.2 * LEGIBLE_PX
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280  # it scrolls in its own frame
        matrix.get_by_role("button", name="Fit to the page").click()


def test_a_cell_that_is_pointed_at_is_told_in_words(visit: Open) -> None:
    with visit() as page:
        matrix = page.locator(".matrix").first
        matrix.scroll_into_view_if_needed()
        frame = matrix.locator("rect.frame")
        box = frame.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 200, box["y"] + box["height"] / 200)
        expect(matrix.locator(".told")).to_have_text(re.compile(r"black plain \w+ \(.+\): \d+ of 20 right \("))
        page.mouse.move(box["x"] + box["width"] * 0.995, box["y"] + box["height"] / 200)
        expect(matrix.locator(".told")).to_have_text(re.compile("true black plain .*, predicted .*: \\d+ of 20"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_narrow_screen_the_page_does_not_scroll_sideways(visit: Open, scheme: str) -> None:
    with visit(viewport=NARROW, color_scheme=scheme, has_touch=True, is_mobile=True) as page:
        too_wide = page.evaluate(
            """() => [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll")
              && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className)"""
        )
        assert too_wide == []
        assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
        matrix = page.locator(".matrix").first
        matrix.get_by_role("button", name="Enlarge").tap()
        size = "e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a"
        assert float(matrix.locator("svg text:not(.axis)").first.evaluate(size)) >= LEGIBLE_PX
