"""The scripts and pages that the docs print, in a real browser: they do what the text says, and reconnect sensibly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import HTMLResponse
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.support.examples import EXAMPLES, load
from tests.support.programs import BROWSER, needs_browser
from tests.support.servers import eventually, serve_here
from tests.test_docs import BLOCKS, blocks_of
from wsbroadcast import create_script_router

BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
pytestmark = needs_browser

# What a busy machine may need.
PATIENCE_MS = 30_000

(TUTORIAL,) = (block.source for block in blocks_of("docs/tutorial.md", "html"))


class Site:
    """Serves the tutorial's page, and an endpoint that answers what it is sent."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.app.include_router(create_script_router())
        self.open: list[WebSocket] = []
        self.app.get("/")(self._page)
        self.app.websocket("/ws{path:path}")(self._endpoint)

    async def _page(self) -> HTMLResponse:
        return HTMLResponse(TUTORIAL)

    async def _endpoint(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self.open.append(websocket)
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    async def has_opened(self, page: Page, count: int) -> None:
        """Wait until so many connections have stayed open, and the page knows of the last."""

        async def has() -> bool:
            return len(self.open) == count

        await eventually(has)
        await expect(page.get_by_role("status")).to_have_text("connected", ignore_case=True, timeout=PATIENCE_MS)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        yield browser
        await browser.close()


# The tutorial, step by step.


class Reader:
    """Somebody who does what the tutorial says."""

    def __init__(self, browser: Browser, address: str) -> None:
        self._browser = browser
        self._address = address

    async def opens(self, path: str, beside: Page | None = None) -> Page:
        """Open a page in a window of its own, or in another tab of a window."""
        window = await self._browser.new_context() if beside is None else beside.context
        page = await window.new_page()
        await page.goto(self._address + path)
        await expect(page.get_by_role("status")).to_have_text("Connected", timeout=PATIENCE_MS)
        return page

    async def types(self, page: Page, text: str) -> None:
        await page.get_by_label("Message").fill(text)
        await page.get_by_label("Message").press("Enter")

    async def sees(self, page: Page, *lines: str) -> None:
        await expect(page.locator("#log li")).to_have_text(lines, timeout=PATIENCE_MS)


@asynccontextmanager
async def step(browser: Browser, name: str) -> AsyncIterator[Reader]:
    """Run the app of a step."""
    (block,) = (block for block in BLOCKS if block.name == f"docs/tutorial.md#{name}")
    async with serve_here(block.run()["app"]) as port:
        yield Reader(browser, f"http://127.0.0.1:{port}")


@pytest.fixture(autouse=True)
def page_is_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(TUTORIAL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


async def test_first_step_is_a_chat(browser: Browser) -> None:
    async with step(browser, "1-a-chat") as reader:
        ada, bob = await reader.opens("/chat/ada"), await reader.opens("/chat/bob")
        await reader.types(ada, "hello")
        await reader.sees(ada, "You wrote: hello", "ada says: hello")
        await reader.sees(bob, "ada says: hello")
        await bob.close()
        await reader.sees(ada, "You wrote: hello", "ada says: hello", "bob left the chat")


async def test_second_step_has_rooms(browser: Browser) -> None:
    async with step(browser, "2-rooms") as reader:
        tea, tea_too = await reader.opens("/rooms/tea"), await reader.opens("/rooms/tea")
        coffee = await reader.opens("/rooms/coffee")
        await reader.types(tea, "milk?")
        await reader.types(coffee, "sugar?")
        await reader.sees(tea, "milk?")
        await reader.sees(tea_too, "milk?")
        await reader.sees(coffee, "sugar?")


async def test_third_step_has_users_with_several_tabs(browser: Browser) -> None:
    async with step(browser, "3-users") as reader:
        one = await reader.opens("/login/ada")
        two = await reader.opens("/login/ada", beside=one)
        bob = await reader.opens("/login/bob")
        await reader.types(one, "bob: are you there?")
        await reader.sees(bob, "from ada: are you there?")
        await reader.types(bob, "ada: yes")
        for tab in (one, two):
            await reader.sees(tab, "to bob: are you there?", "from bob: yes")
        response = await (await browser.new_page()).goto(bob.url)
        assert response is not None
        assert response.status == 401


async def test_fourth_step_has_hooks(browser: Browser) -> None:
    async with step(browser, "4-hooks") as reader:
        ada, bob = await reader.opens("/chat/ada"), await reader.opens("/chat/bob")
        await reader.types(bob, "the password is sesame")
        await reader.sees(bob, "Welcome, bob!", "bob: the password is ******")
        await reader.types(bob, "spam")
        await expect(bob.get_by_role("status")).to_have_text("Closed with 1008: no spam", timeout=PATIENCE_MS)
        await reader.sees(ada, "Welcome, ada!", "bob came, 2 here", "bob: the password is ******", "bob left, 1 here")


async def test_fifth_step_takes_messages_from_a_route(browser: Browser) -> None:
    async with step(browser, "5-messages-from-an-http-route") as reader:
        tabs = [await reader.opens("/news") for _ in range(2)]
        await reader.types(tabs[0], "nobody gets this")
        answer = await tabs[0].evaluate("fetch('/announce?text=hello', { method: 'POST' }).then((it) => it.json())")
        assert answer == {"listeners": 2}
        for tab in tabs:
            await reader.sees(tab, '{"news":"hello"}')


async def test_page_of_the_tutorial_shows_markup_as_text_and_keeps_what_it_can_not_send(browser: Browser) -> None:
    site = Site()
    async with serve_here(site.app) as port:
        reader = Reader(browser, f"http://127.0.0.1:{port}")
        page = await reader.opens("/")
        await site.has_opened(page, 1)
        markup = "<img src=x onerror=alert(1)>"
        await reader.types(page, markup)
        await reader.sees(page, markup)
        assert await page.locator("img").count() == 0
        await site.open[-1].close(1012)
        await site.has_opened(page, 2)
        await site.open[-1].close(1008)
        await expect(page.get_by_role("status")).to_have_text("Closed with 1008", timeout=PATIENCE_MS)
        await reader.types(page, "lost?")
        await expect(page.get_by_label("Message")).to_have_value("lost?", timeout=PATIENCE_MS)
        await page.close()


async def test_page_of_the_snapshot_misses_no_task(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    example = load(EXAMPLES / "12_snapshot.py")

    def save(number: int, title: str, *, is_told: bool = True) -> None:
        with example.Session(example.engine) as session:
            if is_told:
                example.write(number, title, session)
            else:
                session.merge(example.Task(id=number, title=title))
                session.commit()

    async def write(number: int, title: str) -> None:
        await asyncio.to_thread(save, number, title)

    async with serve_here(example.app) as port:
        page = await browser.new_page()
        await write(1, "milk")
        await page.goto(f"http://127.0.0.1:{port}/")
        tasks = partial(expect(page.get_by_role("listitem")).to_have_text, timeout=PATIENCE_MS)
        await tasks(["milk"])
        await write(2, "tea")
        await tasks(["milk", "tea"])
        # What is written while it is away comes over the socket: the snapshot isn't loaded again.
        loads: list[str] = []
        page.on("request", lambda request: loads.append(request.url))
        (connection,) = example.manager.connections
        await connection.close(1012)
        await write(1, "bread")
        await write(3, "jam")
        await tasks(["bread", "tea", "jam"])
        assert not [url for url in loads if url.endswith("/tasks")]
        # What can't be had any more begins with a snapshot.
        save(4, "eggs", is_told=False)
        await example.manager.forget("tasks")
        await tasks(["bread", "tea", "jam", "eggs"])
        await write(2, "coffee")
        await tasks(["bread", "coffee", "jam", "eggs"])
        await page.close()


# The page about Socket.IO: what a page of it becomes. It says and asks something once, when it is connected.

SHOWS = """
function show({ text, renamed }) {
  document.body.append(Object.assign(document.createElement("p"), { innerText: text ?? renamed }))
}
"""
BEGINS = """
const stop = ws.on("status", async (status) => {
  if (status !== "open") return
  stop()
  await say("hello")
  document.title = (await rename("Ada")).name
})
"""


async def test_page_that_was_of_socketio_talks_and_is_answered(browser: Browser) -> None:
    (block,) = (block for block in BLOCKS if block.page == "docs/from-python-socketio.md")
    (script,) = blocks_of("docs/from-python-socketio.md", "js")
    app: FastAPI = block.run()["app"]

    @app.get("/", response_class=HTMLResponse)
    async def home() -> str:
        return f"<!doctype html><body><script type=module>{script.source}{SHOWS}{BEGINS}</script>"

    async with serve_here(app) as port:
        first, second = await browser.new_page(), await browser.new_page()
        for page in (first, second):
            await page.goto(f"http://127.0.0.1:{port}/")
            await expect(page).to_have_title("Ada", timeout=PATIENCE_MS)
        await expect(first.locator("p")).to_have_text(["hello", "hello", "Ada"], timeout=PATIENCE_MS)
        await first.close()
        await second.close()
