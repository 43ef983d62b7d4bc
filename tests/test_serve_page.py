"""The page of train.serve in a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.ranks import ProgramRanks
from tests.runs import DrawingRun
from tests.test_serve import GIVEN, TOKEN, Server
from train import serve

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM.exists(), reason="needs an installed Chromium")]
# Collects the pictures that an element shows, one after the other.
WATCH = """list => {
  window.shown = [];
  new MutationObserver(() => list.querySelectorAll('img').forEach(image => window.shown.push(image.src)))
    .observe(list, {subtree: true, childList: true, attributes: true, attributeFilter: ['src']});
}"""
# Drops a picture of one pixel onto the page, as a file manager would.
DROP = """name => {
  const pixel = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==';
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(pixel), c => c.charCodeAt(0))], name, {type: 'image/png'}));
  document.dispatchEvent(new DragEvent('dragover', {dataTransfer: data, cancelable: true}));
  document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, cancelable: true}));
}"""


@pytest.fixture
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("size", "scheme"), [((1200, 850), "light"), ((360, 740), "dark")])
def test_a_person_draws_cancels_repeats_and_has_a_picture_described(
    drawn: DrawingRun, tmp_path: Path, browser, size: tuple[int, int], scheme: str
) -> None:
    """By keyboard; on a wide and on a narrow screen, without a word in the console."""
    argv = [f"checkpoint={drawn.run_dir}", "device=cpu", "port=0", "sampler=ddim", "steps=40", "max_new_tokens=8"]
    given = tmp_path / "a picture's name.png"
    given.write_bytes(GIVEN)
    with ProgramRanks(serve.main, argv, None, tmp_path / "log") as program:
        server = Server(program)
        viewport = {"width": size[0], "height": size[1]}
        page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
        words: list[str] = []
        page.on("console", lambda message: words.append(message.text))
        page.on("pageerror", lambda error: words.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.locator("#model", has_text="step 6").wait_for()
        assert page.get_by_text("not for production").is_visible()
        page.locator("#history").evaluate(WATCH)

        page.keyboard.type("a large red circle <b>")  # the prompt has the focus
        page.keyboard.press("Enter")
        done = page.locator("article.ended")
        done.wait_for()
        shown = page.evaluate("() => window.shown")
        assert len({uri for uri in shown if uri.startswith("data:image/webp")}) >= 4, "it changes"
        ended = [image.get_attribute("src") for image in done.locator("a[download] img").all()]
        assert len(ended) == 4 and all(uri.startswith("data:image/png") for uri in ended)
        assert done.locator("h2").inner_text() == "a large red circle <b>"
        assert '"prompt":"a large red circle <b>"' in done.locator("pre").text_content()
        done.get_by_role("button", name="Repeat").click()
        page.locator("article.ended").nth(1).wait_for()
        assert [image.get_attribute("src") for image in done.first.locator("a img").all()] == ended

        page.get_by_text("Settings").click()
        page.get_by_label("Steps").fill("1000")
        page.get_by_label("Pictures").fill("40")
        page.get_by_role("button", name="Draw").click()
        page.locator("article:not(.ended) .status", has_text="Step").wait_for()
        page.keyboard.press("Escape")
        page.locator("article .status", has_text="Cancelled.").wait_for()
        assert page.get_by_role("button", name="Cancel").count() == 0

        page.set_input_files("#file", str(given))
        text = page.locator("article.ended blockquote:not([hidden])")
        text.wait_for()
        assert text.inner_text()
        page.evaluate(DROP, "dropped.png")
        page.locator("article.ended h2", has_text="dropped.png").wait_for()
        _changes_and_asks(page, given, tmp_path)
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
        assert words == []
        page.get_by_label("Steps").fill("0")
        page.get_by_role("button", name="Draw").click()
        page.locator("article.failed .status", has_text="steps=0: expected at least 1").wait_for()
        page.set_input_files("#add", str(given))
        page.get_by_label("Say what to change, or ask.").fill(" ")
        page.get_by_role("button", name="Change").click()
        page.locator("article.failed .status", has_text="expected words, what to make of the pictures").wait_for()


def _changes_and_asks(page, given: Path, tmp_path: Path) -> None:
    """Pictures are chosen, removed, changed, shown beside what became of them, and asked about."""
    other = tmp_path / "other.png"
    other.write_bytes(GIVEN)
    page.get_by_label("Steps").fill("4")
    page.get_by_label("Pictures").fill("2")
    page.set_input_files("#add", [str(given), str(other)])
    page.get_by_role("button", name="Remove other.png").click()
    page.get_by_label("Picture guidance").fill("1.5")
    page.get_by_label("Say what to change, or ask.").fill("blue")
    page.keyboard.press("Enter")
    changed = page.locator("article", has_text="picture guidance 1.5")
    page.locator("article.ended", has_text="picture guidance 1.5").wait_for()
    assert changed.get_by_role("figure").filter(has_text="Before").locator("img").count() == 1
    assert changed.get_by_role("figure").filter(has_text="After").locator("a[download] img").count() == 2
    shell = changed.locator("pre").text_content()
    assert "'a picture'\\''s name.png'" in shell and '"image_guidance":1.5' in shell and len(shell) < 1000
    words = page.locator("article.ended blockquote:not([hidden])")
    count = words.count()
    page.get_by_role("button", name="Ask").click()
    words.nth(count).wait_for()
    asked = page.locator("article.ended").first
    assert asked.locator("h2").inner_text() == "blue" and asked.locator("img").count() == 1
    page.get_by_role("button", name="Remove a picture's name.png").click()


def test_a_page_asks_for_the_token_and_keeps_it_in_its_tab(drawn: DrawingRun, tmp_path: Path, browser) -> None:
    argv = [f"checkpoint={drawn.run_dir}", "device=cpu", "port=0", "sampler=ddim", "steps=4"]
    with ProgramRanks(serve.main, argv, None, tmp_path / "log", {"TRANSFUSION_TOKEN": TOKEN}) as program:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{Server(program).port}/")
        for token in ("wrong", TOKEN):
            page.get_by_label("This server asks for its token.").fill(token)
            page.keyboard.press("Enter")
            if token == "wrong":
                page.get_by_role("alert").wait_for()
        page.locator("#prompt").fill("a")
        page.keyboard.press("Enter")
        page.locator("article.ended").wait_for()
        assert TOKEN not in page.content() and "$TRANSFUSION_TOKEN" in page.locator("article pre").text_content()
