"""The report in a browser: no complaints, no requests, narrow and wide windows, both scales."""

import re
from pathlib import Path

import pytest

from tests.browser import browser, needs_browser, show
from tests.logged_runs import logged_run
from tests.pages import Page
from tests.runs import DrawingRun
from tests.test_report import whole  # noqa: F401 (a fixture)
from train.report import main

pytestmark = [pytest.mark.slow, needs_browser]
# What sticks out of the window, unless an element around it scrolls.
OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(element =>
    element.getBoundingClientRect().right > innerWidth + 1 && !element.closest('.scroll, pre, svg')
).map(element => element.outerHTML.slice(0, 200))"""
# Small print below 9 CSS pixels, wherever it is: an SVG's text shrinks with its drawing.
TINY = """() => [...document.querySelectorAll('svg text')].filter(text => text.getClientRects().length &&
    parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a < 9).map(text => text.outerHTML)"""


@pytest.fixture(scope="module")
def pages(whole, drawn: DrawingRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """A run with all sections and hostile names, two long runs side by side, and a run that was really trained."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [logged_run(folder / name, 1000, seed=i) for i, name in enumerate(("first", "second"))]
    main([f"run={runs[0]}", f"run={runs[1]}", f"output={folder / 'several.html'}"])
    main([f"run={drawn.run_dir}", f"output={folder / 'trained.html'}"])
    return {"whole": whole[1] / "report.html", "several": folder / "several.html", "trained": folder / "trained.html"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
@pytest.mark.parametrize("name", ["whole", "several", "trained"])
def test_a_page_is_quiet_and_fits_its_window(pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    with browser() as chromium:
        page, seen = show(chromium, pages[name], width, scheme)
        page.evaluate("Promise.all([...document.images].map(image => (image.loading = 'eager', image.decode())))")
        assert seen.complaints == [] and seen.requests == [pages[name].as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OVERFLOWING) == [] and page.evaluate(TINY) == []


def test_a_run_that_was_trained_tells_its_start_and_its_end(pages: dict[str, Path]) -> None:
    page = Page(pages["trained"].read_text())
    assert re.search(r"start.*from scratch.*stop.*done", page.section("timeline").text)
    assert "Finished: step 6" in page.section("health").text and page.classes()["chart map"] > 0


def test_scales_switch_without_a_script(pages: dict[str, Path]) -> None:
    with browser() as chromium:
        page, _ = show(chromium, pages["several"], 1440, "light")
        shown = {kind: page.locator(f".chart.{kind}:visible").count() for kind in ("log", "linear")}
        assert shown["log"] > 10 and shown["linear"] == 0
        page.get_by_text("linear", exact=True).click()
        after = {kind: page.locator(f".chart.{kind}:visible").count() for kind in ("log", "linear")}
        assert after == {"log": 0, "linear": shown["log"]}
        page.keyboard.press("ArrowLeft")
        assert page.locator(".chart.log:visible").count() == shown["log"]


def test_a_page_that_runs_or_asks_for_something_is_noticed(pages: dict[str, Path], tmp_path: Path) -> None:
    """So the quiet of the other pages means something; the policy stops what would slip into one."""
    html = pages["trained"].read_text().replace("</body>", '<script>1</script><img src="http://127.0.0.1:9/x"></body>')
    (tmp_path / "hostile.html").write_text(html)
    with browser() as chromium:
        page, seen = show(chromium, tmp_path / "hostile.html", 400, "light")
        page.wait_for_timeout(200)
        assert len([words for words in seen.complaints if "Content Security Policy" in words]) == 2
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
