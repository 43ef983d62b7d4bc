"""Pages in a real browser: headless Chromium, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

EXECUTABLE = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed (apt install chromium)")


@dataclass
class Seen:
    """What a browser said and asked for while it showed a page; data in the page itself is no request."""

    complaints: list[str] = field(default_factory=list)  # console messages, and exceptions
    requests: list[str] = field(default_factory=list)


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=EXECUTABLE, args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


def show(chromium: Browser, path: Path, width: int, scheme: str) -> tuple[Page, Seen]:
    """Open a file in a window `width` pixels wide; `scheme` is light or dark."""
    page, seen = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), Seen()
    page.on("console", lambda message: seen.complaints.append(message.text))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("data:") else seen.requests.append(request.url))
    page.goto(path.as_uri())
    return page, seen
