"""The site of the docs: it is built without a warning, has every public name, and works as files, without a network."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from playwright.async_api import Page, async_playwright, expect

import wsbroadcast
import wsbroadcast.testing
from tests.support import pictures
from tests.support import site as builder
from tests.support.programs import BROWSER, needs_browser

BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]

# What a busy machine may need.
PATIENCE_MS = 60_000


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, which one of the workers of a test run builds for all."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "docs"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        problems = shared / "problems"
        if not problems.exists():
            problems.write_text(builder.build(shared / "build"))
        assert problems.read_text() == ""
    return shared / "build" / "site"


class Document(HTMLParser):
    """What a page links to, what it loads, and where it can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif tag == "a" and name == "href" and value:
                self.links.append(value)
            elif name in ("src", "srcset", "href", "data", "poster") and value:
                self.loads.append(value)


@pytest.fixture(scope="module")
def documents(site: Path) -> dict[Path, Document]:
    return {path: Document(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_links_and_pictures_are_there(documents: dict[Path, Document]) -> None:
    assert len(documents) > 60
    lost = []
    for path, document in documents.items():
        for link in [*document.links, *document.loads]:
            if re.match(r"(https?|mailto|data):", link):
                continue
            file, _, anchor = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            there = documents.get(target)
            if not target.is_file() or (anchor and there and anchor not in there.anchors):
                lost.append(f"{path.name}: {link}")
    assert lost == []


def test_nothing_is_loaded_from_elsewhere(site: Path, documents: dict[Path, Document]) -> None:
    for path, document in documents.items():
        assert [load for load in document.loads if re.match(r"(\w+:)?//", load)] == [], path
    for style in site.rglob("*.css"):
        assert re.findall(r"url\([\"']?(?:\w+:)?//[^)]*\)|@import[^;]*", style.read_text(encoding="utf-8")) == [], style


def test_every_public_name_is_in_the_reference(documents: dict[Path, Document]) -> None:
    reference = {
        anchor for path, document in documents.items() if path.parent.name == "api" for anchor in document.anchors
    }
    names = [f"wsbroadcast.{name}" for name in wsbroadcast.__all__]
    names += [f"wsbroadcast.testing.{name}" for name in wsbroadcast.testing.__all__]
    names += [f"wsbroadcast.{name}" for name in builder.public_names()]
    assert {name for name in names if name not in reference} == set()
    methods = {name for name in dir(wsbroadcast.ConnectionManager) if not name.startswith("_")}
    assert {name for name in methods if f"wsbroadcast.ConnectionManager.{name}" not in reference} == set()


def test_every_page_is_in_the_navigation(site: Path) -> None:
    sections = builder.navigation(site.parent / "pages")
    sections += [below for section in sections for below in section.below]
    pages = [page.path for section in sections for page in section.pages]
    assert set(builder.sources()) - {"README.md", "docs/README.md"} <= set(pages)
    assert len(pages) == len(set(pages))


def test_index_for_language_models_names_pages_that_are_there(site: Path) -> None:
    index = (site / "llms.txt").read_text(encoding="utf-8")
    assert index.startswith("# wsbroadcast\n\n> WebSocket broadcasting")
    paths = re.findall(r"^- \[[^\]]+\]\((\S+)\): \S", index, re.MULTILINE)
    assert len(paths) == index.count("\n- ") > 60
    assert [path for path in paths if not (site / path).is_file()] == []


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_picture_is_what_the_script_draws_and_is_shown(name: str) -> None:
    assert (pictures.PLACE / f"{name}.svg").read_text(encoding="utf-8") == pictures.PICTURES[name]()
    pages = [path.read_text(encoding="utf-8") for path in builder.ROOT.glob("docs/*.md")]
    assert sum(f"](assets/{name}.svg)" in page for page in pages) == 1


def test_link_that_leads_nowhere_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "one page"\n')
    page = tmp_path / "docs" / "index.md"
    page.parent.mkdir()
    page.write_text("# Here\n\n[There](#here)\n")
    assert builder.problems(tmp_path) == ""
    page.write_text("# Here\n\n[There](#there), [nowhere](nowhere.md)\n")
    problems = builder.problems(tmp_path)
    assert "anchor does not exist" in problems
    assert "page does not exist" in problems


# In a browser, from files, as somebody reads it who has the directory and no network.


@pytest.fixture
async def page(site: Path) -> AsyncIterator[Page]:
    complaints: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        context = await browser.new_context(color_scheme="dark", viewport={"width": 375, "height": 800}, offline=True)
        context.set_default_timeout(PATIENCE_MS)
        page = await context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))  # all that the network would serve
        await page.goto((site / "index.html").as_uri())
        yield page
        await browser.close()
    assert complaints == []


@needs_browser
async def test_search_finds_a_page_and_leads_to_it(page: Page) -> None:
    await page.keyboard.press("Control+k")
    query = page.get_by_placeholder("Search").last
    await query.press_sequentially("should_reconnect")
    await expect(query).to_have_value("should_reconnect")
    await page.locator("a", has_text="Close codes").first.click()
    await expect(page.locator("#close-codes")).to_be_visible(timeout=PATIENCE_MS)
    assert "/docs/reference.html" in page.url


@needs_browser
async def test_phone_shows_a_page_without_moving_it_sideways(page: Page, site: Path) -> None:
    for name in ("index.html", "docs/reference.html", "docs/api/manager.html", "docs/comparison.html"):
        await page.goto((site / name).as_uri())
        await expect(page.get_by_role("heading").first).to_be_visible(timeout=PATIENCE_MS)
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name


@needs_browser
async def test_page_is_dark_for_who_wants_it_dark(page: Page) -> None:
    assert await page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
    await expect(page.locator("body")).to_have_attribute("data-md-color-scheme", "slate", timeout=PATIENCE_MS)


@needs_browser
async def test_code_has_a_button_that_copies_it(page: Page) -> None:
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await page.locator(".md-code__button, .md-clipboard, [data-clipboard-target]").first.click()
    assert "ConnectionManager" in await page.evaluate("navigator.clipboard.readText()")
