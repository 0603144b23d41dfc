"""Who gets in, in a real browser: pages of this origin and of others, and the places where a page can put a token."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import HTMLResponse
from playwright.async_api import Page, async_playwright, expect

from tests.support.examples import EXAMPLES, load
from tests.support.programs import BROWSER, needs_browser
from tests.support.servers import serve_here
from wsbroadcast import Connection, ConnectionDep, ConnectionManager, TokenFrom, create_router

BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]

pytestmark = needs_browser

# What a busy machine may need.
PATIENCE_MS = 30_000

# Connect, say something, and tell what came first: a message, or the end.
CONNECT = """
([url, protocols, words]) => new Promise((resolve) => {
  const socket = new WebSocket(url, protocols);
  socket.onopen = () => words.forEach((word) => socket.send(word));
  socket.onmessage = (event) => { resolve(`${event.data} by ${socket.protocol}`); socket.close(); };
  socket.onclose = (event) => resolve(`closed ${event.code}`);
})
"""

token_from = TokenFrom(subprotocol="bearer", cookie="session", first_message=0.5)


async def current_user(token: Annotated[str, Depends(token_from)]) -> str | None:
    return "ada" if token == "secret.of-ada_1" else None


class Site:
    """An app with a page, a router and an endpoint; and what its hook saw."""

    def __init__(self, **options: Any) -> None:
        self.manager = ConnectionManager()
        self.users: list[Any] = []
        self.manager.on_connect(self._remember)
        self.app = FastAPI(lifespan=self.manager.lifespan)
        self.app.include_router(create_router(self.manager, "/ws", **options))
        self.app.include_router(create_router(self.manager, "/member", authenticate=current_user, **options))

        @self.app.get("/")
        async def page() -> HTMLResponse:
            return HTMLResponse("<!doctype html><title>page</title>")

        @self.app.get("/login")
        async def login() -> HTMLResponse:
            response = HTMLResponse("<!doctype html><title>welcome</title>")
            response.set_cookie("session", "secret.of-ada_1", httponly=True, samesite="lax")
            return response

        @self.app.websocket("/dependency")
        async def endpoint(connection: ConnectionDep) -> None:
            async for message in connection:
                await connection.send(message)

    def _remember(self, connection: Connection) -> None:
        self.users.append(connection.user)


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        context = await browser.new_context()
        context.set_default_timeout(PATIENCE_MS)
        yield await context.new_page()
        await browser.close()


async def attempt(page: Page, port: int, path: str, *words: str, protocols: tuple[str, ...] = ()) -> str:
    """Connect from a page, and return what came of it."""
    result: str = await page.evaluate(CONNECT, [f"ws://127.0.0.1:{port}{path}", list(protocols), list(words)])
    return result


@asynccontextmanager
async def two_sites(**options: Any) -> AsyncIterator[tuple[Site, int, int]]:
    """Run a site and another one beside it; yields the site, and both ports."""
    other = Site()
    async with serve_here(other.app) as other_port:
        site = Site(**{key: value.format(other_port) for key, value in options.items()})
        async with serve_here(site.app) as port:
            yield site, port, other_port


@pytest.mark.parametrize("path", ["/ws", "/dependency"])
async def test_a_page_of_this_origin_connects_and_others_can_not(page: Page, path: str) -> None:
    async with two_sites() as (site, port, other_port):
        await page.goto(f"http://127.0.0.1:{port}/")
        assert await attempt(page, port, path, "hello") == "hello by "
        assert len(site.users) == 1
        for elsewhere in (f"http://127.0.0.1:{other_port}/", f"http://localhost:{port}/", "data:text/html,<p>null"):
            await page.goto(elsewhere)
            assert await attempt(page, port, path, "hello") == "closed 1006"
        assert len(site.users) == 1


async def test_a_page_that_is_named_connects_and_no_other(page: Page) -> None:
    async with two_sites(allowed_origins="http://127.0.0.1:{}") as (_, port, other_port):
        await page.goto(f"http://127.0.0.1:{other_port}/")
        assert await attempt(page, port, "/ws", "hello") == "hello by "
        await page.goto(f"http://127.0.0.1:{port}/")
        assert await attempt(page, port, "/ws", "hello") == "closed 1006"


async def test_a_token_works_in_the_subprotocol_and_as_the_first_message(page: Page) -> None:
    async with two_sites() as (site, port, _):
        await page.goto(f"http://127.0.0.1:{port}/")
        offer = ("bearer", "secret.of-ada_1")
        assert await attempt(page, port, "/member", "hello", protocols=offer) == "hello by bearer"
        assert await attempt(page, port, "/member", "secret.of-ada_1", "hello") == "hello by "
        assert site.users == ["ada", "ada"]
        assert await attempt(page, port, "/member", protocols=("bearer", "guessed")) == "closed 1006"
        assert await attempt(page, port, "/member", "guessed", "hello") == "closed 4401"
        assert await attempt(page, port, "/member") == "closed 4401"
        assert site.users == ["ada", "ada"]


async def test_a_session_cookie_works_for_this_origin_alone(page: Page) -> None:
    """Cookies know no ports: the other site's page sends the session along, and is refused for its origin."""
    async with two_sites() as (site, port, other_port):
        await page.goto(f"http://127.0.0.1:{port}/login")
        assert await attempt(page, port, "/member", "hello") == "hello by "
        await page.goto(f"http://127.0.0.1:{other_port}/")
        assert await attempt(page, port, "/member", "hello") == "closed 1006"
        assert site.users == ["ada"]
    open_to_all = Site(allowed_origins="*")
    async with serve_here(open_to_all.app) as port, serve_here(Site().app) as other_port:
        await page.goto(f"http://127.0.0.1:{other_port}/")
        assert await attempt(page, port, "/member", "hello") == "hello by "  # which is what the check is for
        assert open_to_all.users == ["ada"]


async def test_the_example_with_a_login_works_and_shows_markup_as_text(page: Page) -> None:
    async with serve_here(load(EXAMPLES / "10_login.py").app) as port:
        await page.goto(f"http://127.0.0.1:{port}/")
        status = page.get_by_role("status")
        for password, outcome in (("guessed", "wrong name or password"), ("sesame", "Connected")):
            await page.get_by_label("Password").fill(password)
            await page.get_by_role("button", name="Log in").click()
            await expect(status).to_have_text(outcome, timeout=PATIENCE_MS)
        markup = "<img src=x onerror=alert(1)>"
        await page.get_by_label("Message").fill(markup)
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#log")).to_contain_text(f"ada: {markup}", timeout=PATIENCE_MS)
        assert await page.locator("img").count() == 0
        await page.get_by_role("button", name="Log out everywhere").click()
        await expect(status).to_have_text("Log in again", timeout=PATIENCE_MS)


async def test_the_example_with_a_login_comes_back_while_its_session_holds(page: Page) -> None:
    example = load(EXAMPLES / "10_login.py")
    async with serve_here(example.app) as port:
        await page.goto(f"http://127.0.0.1:{port}/")
        status = page.get_by_role("status")
        await page.get_by_label("Password").fill("sesame")
        await page.get_by_role("button", name="Log in").click()
        joined = page.get_by_text("ada has joined")
        for times in (1, 2):
            await expect(joined).to_have_count(times, timeout=PATIENCE_MS)
            if times == 2:
                example.database.sessions.clear()  # it has expired meanwhile
            await example.manager.close(example.manager.connections[0], 1012)
        await expect(status).to_have_text("Log in again", timeout=PATIENCE_MS)
        assert example.manager.stats().connects == 2
