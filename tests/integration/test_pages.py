"""The scripts and pages that the docs print, in a real browser: they do what the text says, and reconnect sensibly."""

from __future__ import annotations

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

BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
pytestmark = needs_browser

# What a busy machine may need.
PATIENCE_MS = 30_000

# Timers fire at once, and the page's clock moves on by what they would have waited: a test sees in a moment what a page
# does in a minute.
FAST_CLOCK = """
  window.clock = { now: 0, attempts: [], waits: [], later: window.setTimeout };
  Date.now = () => clock.now;
  window.setTimeout = (callback, wait) => {
    clock.waits.push(wait);
    return clock.later.call(window, () => { clock.now += wait; callback(); }, 0);
  };
  window.WebSocket = class extends WebSocket {
    constructor(...args) {
      super(...args);
      clock.attempts.push(clock.now);
    }
  };
"""
ALWAYS_HALF = "Math.random = () => 0.5;"

RECIPE = """<!doctype html>
<title>recipe</title>
<p role="status"></p>
<ul></ul>
<script>SCRIPT</script>
<script>
  const options = {
    onMessage: (data) => { document.querySelector("ul").append(data); },
    onStatus: (text) => { document.querySelector("p").textContent = text; },
  };
  // What getToken answers, one after the other.
  if (window.tokens) options.getToken = async () => {
    const token = tokens.shift();
    if (token === "out of reach") throw new TypeError("Failed to fetch");
    return token;
  };
  const chat = stayConnected(location.origin.replace(/^http/, "ws") + "/ws", options);
  window.sentEarly = chat.send("early");
</script>
""".replace("SCRIPT", blocks_of("docs/how-to.md", "javascript")[0].source)
(TUTORIAL,) = (block.source for block in blocks_of("docs/tutorial.md", "html"))

each_page = pytest.mark.parametrize("source", [RECIPE, TUTORIAL], ids=["recipe", "tutorial"])


class Site:
    """Serves a page, and does to the WebSockets that it opens what a test wants.

    Args:
        source: The page.
        ends: The codes that its connections are closed with, one after the other, and the last one from then on. 403
            refuses a handshake; a connection without a code stays open.
    """

    def __init__(self, source: str, *ends: int | None) -> None:
        self.app = FastAPI()
        self.source = source
        self.ends = list(ends)
        self.tokens: list[str] = []
        self.received: list[str] = []
        self.open: list[WebSocket] = []
        self.app.get("/")(self._page)
        self.app.websocket("/ws{path:path}")(self._endpoint)

    async def _page(self) -> HTMLResponse:
        return HTMLResponse(self.source)

    async def _endpoint(self, websocket: WebSocket) -> None:
        end = self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]
        offered = websocket.scope["subprotocols"]
        self.tokens += offered[1:]
        if end == 403:
            await websocket.close()
            return
        await websocket.accept("bearer" if offered else None)
        if end is not None:
            await websocket.close(end, "as the test wants")
            return
        self.open.append(websocket)
        async for text in websocket.iter_text():
            self.received.append(text)
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


@asynccontextmanager
async def opened(browser: Browser, site: Site, *scripts: str) -> AsyncIterator[Page]:
    """Serve a site, and open its page in fast time."""
    async with serve_here(site.app) as port:
        page = await browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        await page.add_init_script("\n".join((FAST_CLOCK, *scripts)))
        await page.goto(f"http://127.0.0.1:{port}/")
        yield page
        await page.close()


async def has_given_up(page: Page, status: str, attempts: int) -> None:
    """Wait until the page says that it has ended; nothing is to come after that."""
    await expect(page.get_by_role("status")).to_have_text(status, timeout=PATIENCE_MS)
    before = await page.evaluate("[clock.attempts.length, clock.waits.length]")
    await page.evaluate("new Promise((resolve) => clock.later.call(window, resolve, 50))")
    assert await page.evaluate("[clock.attempts.length, clock.waits.length]") == before
    assert before[0] == attempts


# When a page comes back, and when it doesn't.


@each_page
async def test_page_comes_back_with_patience(browser: Browser, source: str) -> None:
    for end in (1001, 1011, 1012, 1013, 4013, 403):
        async with opened(browser, Site(source, end)) as page:
            await page.wait_for_function("clock.now > 20_000")
            attempts = await page.evaluate("clock.attempts.filter((at) => at <= 20_000).length")
        # Five waits are 15.5 s at most, so there are six attempts or more. That there are sixteen is one run in 10^7.
        assert 6 <= attempts <= 15, end


@each_page
async def test_waits_double_and_end_at_thirty_seconds(browser: Browser, source: str) -> None:
    async with opened(browser, Site(source, 1011), ALWAYS_HALF) as page:
        await page.wait_for_function("clock.waits.length >= 9")
        waits = await page.evaluate("clock.waits.slice(0, 9)")
    assert waits == [250, 500, 1000, 2000, 4000, 8000, 15000, 15000, 15000]


@each_page
async def test_waits_begin_anew_only_after_a_connection_that_lasted(browser: Browser, source: str) -> None:
    site = Site(source, 1011, 1011, None)
    async with opened(browser, site, ALWAYS_HALF) as page:
        for count, seconds in enumerate((9, 11), 1):
            await site.has_opened(page, count)
            await page.evaluate("seconds => { clock.now += 1000 * seconds; }", seconds)
            await site.open[-1].close(1011)
        await site.has_opened(page, 3)
        assert await page.evaluate("clock.waits") == [250, 500, 1000, 250]


@each_page
async def test_page_stays_away_where_the_answer_would_be_the_same(browser: Browser, source: str) -> None:
    status = "ended: {} as the test wants" if source == RECIPE else "Closed with {}: as the test wants"
    for end in (1000, 1003, 1007, 1008, 1009, 4123, 4401, 4403):
        async with opened(browser, Site(source, end)) as page:
            await has_given_up(page, status.format(end), attempts=1)


# The recipe's tokens and its handle.


async def test_recipe_brings_a_new_token_after_4401(browser: Browser) -> None:
    site = Site(RECIPE, 4401, None)
    async with opened(browser, site, "window.tokens = ['old', 'new', 'newer'];") as page:
        await site.has_opened(page, 1)
        await page.evaluate("clock.now += 11_000")
        await site.open[-1].close(4401)  # it has expired, an hour later
        await site.has_opened(page, 2)
    assert site.tokens == ["old", "new", "newer"]


async def test_recipe_gives_up_when_the_new_token_is_refused_too(browser: Browser) -> None:
    site = Site(RECIPE, 4401)
    async with opened(browser, site, "window.tokens = ['old', 'no-better', 'never asked for'];") as page:
        await has_given_up(page, "ended: 4401 as the test wants", attempts=2)
    assert site.tokens == ["old", "no-better"]


async def test_recipe_gives_up_when_there_is_no_token_any_more(browser: Browser) -> None:
    site = Site(RECIPE, 403)  # an expired token, as a browser sees it: code 1006
    async with opened(browser, site, "window.tokens = ['expired', 'expired', null];") as page:
        await has_given_up(page, "ended: log in again", attempts=2)


async def test_recipe_waits_while_tokens_are_out_of_reach(browser: Browser) -> None:
    site = Site(RECIPE, None)
    tokens = "window.tokens = ['out of reach', 'out of reach', ''];"
    async with opened(browser, site, tokens, ALWAYS_HALF) as page:
        await site.has_opened(page, 1)
        assert await page.evaluate("[clock.attempts.length, ...clock.waits]") == [1, 250, 500]
    assert site.tokens == []


async def test_recipe_sends_and_tells_what_it_could_not_send(browser: Browser) -> None:
    site = Site(RECIPE, None)
    async with opened(browser, site) as page:
        await site.has_opened(page, 1)
        assert await page.evaluate("[sentEarly, chat.send('hello')]") == [False, True]
        await expect(page.locator("ul")).to_have_text("hello", timeout=PATIENCE_MS)
        await page.evaluate("chat.close()")
        assert await page.evaluate("chat.send('late')") is False
        await has_given_up(page, "ended: closed by this page", attempts=1)
    assert site.received == ["hello"]


async def test_recipe_that_is_closed_while_it_waits_stays_away(browser: Browser) -> None:
    async with opened(browser, Site(RECIPE, 1011)) as page:
        await page.wait_for_function("clock.attempts.length > 3")
        await page.evaluate("chat.close()")
        await has_given_up(page, "ended: closed by this page", attempts=await page.evaluate("clock.attempts.length"))


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
    site = Site(TUTORIAL, None, 1008)
    async with opened(browser, site) as page:
        await site.has_opened(page, 1)
        markup = "<img src=x onerror=alert(1)>"
        reader = Reader(browser, "")
        await reader.types(page, markup)
        await reader.sees(page, markup)
        assert await page.locator("img").count() == 0
        await site.open[-1].close(1008)
        await has_given_up(page, "Closed with 1008", attempts=1)
        await reader.types(page, "lost?")
        await expect(page.get_by_label("Message")).to_have_value("lost?", timeout=PATIENCE_MS)


async def test_page_of_the_snapshot_misses_no_task(browser: Browser) -> None:
    example = load(EXAMPLES / "12_snapshot.py")
    async with serve_here(example.app) as port:
        page = await browser.new_page()
        await page.add_init_script(FAST_CLOCK)
        await example.write(1, "milk")
        await page.goto(f"http://127.0.0.1:{port}/")
        tasks = partial(expect(page.get_by_role("listitem")).to_have_text, timeout=PATIENCE_MS)
        await tasks(["milk"])
        await example.write(2, "tea")
        await tasks(["milk", "tea"])
        # What is written while it is away comes over the socket: the snapshot isn't loaded again.
        loads: list[str] = []
        page.on("request", lambda request: loads.append(request.url))
        (connection,) = example.manager.connections
        await connection.close(1012)
        await example.write(1, "bread")
        await example.write(3, "jam")
        await tasks(["bread", "tea", "jam"])
        assert not [url for url in loads if url.endswith("/tasks")]
        # What can't be had any more begins with a snapshot.
        example.tasks[4] = "eggs"
        await example.manager.forget("tasks")
        await tasks(["bread", "tea", "jam", "eggs"])
        await example.write(2, "coffee")
        await tasks(["bread", "coffee", "jam", "eggs"])
        await page.close()
