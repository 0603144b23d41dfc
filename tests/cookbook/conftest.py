"""The cookbook's apps in a browser. A test that shows a page takes its picture, too: `scripts/screenshot cookbook`."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, async_playwright

from tests.support.demo import BROWSER_ARGUMENTS
from tests.support.programs import BROWSER
from tests.support.servers import ROOT

RECIPES = ROOT / "examples" / "cookbook"

# What a busy machine may need.
PATIENCE_MS = 30_000

_STYLE = """
body { margin: 0; padding: 20px; display: inline-flex; gap: 20px; background: #e9ecef }
figure { margin: 0; border-radius: 8px; overflow: hidden; background: white; box-shadow: 0 2px 10px #0003 }
figcaption { font: 13px system-ui, sans-serif; padding: 6px 12px; background: #343a40; color: #f8f9fa }
img { display: block }
"""


class Studio:
    """Opens the pages of an app, and takes pictures of them side by side."""

    def __init__(self, browser: Browser, pictures: Path) -> None:
        self._browser = browser
        self._pictures = pictures
        self.errors: list[str] = []
        """What the pages' scripts have thrown."""

    async def open(self, url: str, *, beside: Page | None = None, size: tuple[int, int] = (420, 440)) -> Page:
        """Open a page in a window of its own, or in another tab of a window."""
        width, height = size
        context = await self._browser.new_context(color_scheme="light") if beside is None else beside.context
        context.set_default_timeout(PATIENCE_MS)
        page = await context.new_page()
        await page.set_viewport_size({"width": width, "height": height})
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        await page.goto(url)
        return page

    async def take(self, name: str, pages: dict[str, Page]) -> None:
        """Take a picture of pages, each under its caption."""
        figures = ""
        for caption, page in pages.items():
            shot = base64.b64encode(await page.screenshot(animations="disabled", caret="hide")).decode()
            figures += f"<figure><figcaption>{html.escape(caption)}</figcaption>"
            figures += f'<img src="data:image/png;base64,{shot}"></figure>'
        wall = await self._browser.new_page(viewport={"width": 1600, "height": 900})
        await wall.set_content(f"<!doctype html><style>{_STYLE}</style>{figures}")
        await wall.locator("body").screenshot(path=self._pictures / f"{name}.png")
        await wall.close()


@pytest.fixture
async def studio(tmp_path: Path) -> AsyncIterator[Studio]:
    pictures = Path(os.environ.get("WSBROADCAST_TEST_PICTURES", tmp_path))
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        studio = Studio(browser, pictures)
        yield studio
        await browser.close()
    assert studio.errors == []


@pytest.fixture(autouse=True)
def directory_is_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let what an app writes lie in a directory of its own."""
    monkeypatch.chdir(tmp_path)
