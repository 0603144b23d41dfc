"""The operations router on real servers: four workers behind one port that answer for each other, and its page."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.support.brokers import Endpoint, RedisServer
from tests.support.programs import BROWSER, needs_browser
from tests.support.rawclient import RawClient
from tests.support.servers import UVICORN, Server, eventually

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))

APP = "tests.support.operated:app"

BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]

# What a busy machine may need.
PATIENCE_MS = 30_000


def workers(count: int, engine: str, directory: Path) -> Server:
    flavour = replace(
        UVICORN,
        name=f"uvicorn --workers {count}",
        arguments=(*(("--workers", str(count)) if count > 1 else ()), *UVICORN.arguments),
        environment={"WSBROADCAST_TEST_ENGINE": engine},
    )
    return Server(flavour, directory / "server.log", APP)


def file_of(directory: Path) -> str:
    return f"sqlite:///{directory / 'messages.db'}"


@pytest.fixture(params=["sqlite", "redis", "nats", "postgres"])
def engine(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return file_of(tmp_path)
    endpoint: Endpoint = request.getfixturevalue(f"{request.param}_server")
    return f"{endpoint.url}{'&' if '?' in endpoint.url else '?'}prefix={prefix}"


@asynccontextmanager
async def operator(server: Server) -> AsyncIterator[httpx2.AsyncClient]:
    """An operator's client, which opens a new connection for each request: any worker may take it."""
    async with httpx2.AsyncClient(
        base_url=f"http://127.0.0.1:{server.port}/operations/",
        cookies={"session": "operator"},
        headers={"connection": "close"},
        timeout=30,
    ) as client:
        yield client


async def nodes(client: httpx2.AsyncClient, count: int) -> list[dict[str, Any]]:
    """Wait until as many nodes answer."""
    found: dict[str, Any] = {}

    async def all_answer() -> bool:
        found.update((await client.get("nodes")).json())
        return bool(found["answered"] == found["known"] == count)

    await eventually(all_answer, timeout=20)
    listed: list[dict[str, Any]] = found["nodes"]
    return listed


@asynccontextmanager
async def connected(server: Server, paths: list[str], *, stalls: Callable[[int], bool] = lambda _: False) -> Any:
    clients: list[RawClient] = []
    try:
        for number, path in enumerate(paths):
            buffer = 4096 if stalls(number) else None
            clients.append(await RawClient.connect(server.port, path, receive_buffer=buffer))
        yield clients
    finally:
        for client in clients:
            client.close()


async def test_any_worker_answers_for_all(engine: str, tmp_path: Path) -> None:
    count = 4 if FULL or engine.startswith(("sqlite", "redis")) else 2  # a start takes longest
    with workers(count, engine, tmp_path) as server:
        async with operator(server) as client, connected(server, ["/ws?channel=news&user=ada"] * 40):
            found = await nodes(client, count)
            assert len({each["server"] for each in found}) == 1
            assert sum(each["connections"] for each in found) == 40
            asked: set[str] = set()
            for _ in range(12):
                asked.add((await client.get("nodes")).json()["asked"])
                connections = (await client.get("connections")).json()
                assert (connections["total"], len(connections["connections"]), connections["answered"]) == (
                    40,
                    40,
                    count,
                )
                metrics = (await client.get("metrics")).text
                counts = re.findall(r'^wsbroadcast_connects_total\{node="[^"]+"\} (\d+)$', metrics, re.M)
                assert (len(counts), sum(map(int, counts))) == (count, 40)
            assert len(asked) > 1  # it was not always the same worker
            assert (await client.get("channels")).json()["channels"] == [{"name": "news", "connections": 40}]
            assert len((await client.get("users/ada")).json()["connections"]) == 40
        assert server.complaints() == []


async def test_worker_that_is_stopped_counts_as_silent(tmp_path: Path) -> None:
    with workers(3, file_of(tmp_path), tmp_path) as server:
        async with operator(server) as client:
            pids = [each["pid"] for each in await nodes(client, 3)]
            for each in pids[1:]:
                os.kill(each, signal.SIGSTOP)
            try:
                # The kernel gives some connections to those that are stopped, so not every request is answered.
                async def two_are_silent() -> bool:
                    try:
                        found = (await client.get("nodes", timeout=3)).json()
                    except httpx2.TimeoutException:
                        return False
                    silent = sorted(each["pid"] for each in found["silent"])
                    return (found["answered"], found["known"], silent) == (1, 3, sorted(pids[1:]))

                await eventually(two_are_silent, timeout=30)
            finally:
                for each in pids[1:]:
                    os.kill(each, signal.SIGCONT)
            await nodes(client, 3)


async def test_broker_that_is_away_leaves_each_node_its_own_answer(
    own_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    redis = own_redis()
    with workers(2, redis.url, tmp_path) as server:
        async with operator(server) as client:
            await nodes(client, 2)
            redis.stop()

            async def is_alone() -> bool:
                found = (await client.get("nodes")).json()
                return found["answered"] == 1 and not found["nodes"][0]["engine"]["is_ok"]

            await eventually(is_alone)
            for path in ("connections", "channels", "metrics"):
                assert (await client.get(path)).status_code == 200
            assert (await client.get("ready")).text == "ready"


async def test_drain_reaches_all_workers_of_the_server(tmp_path: Path) -> None:
    with workers(4, file_of(tmp_path), tmp_path) as server:
        async with operator(server) as client:
            await nodes(client, 4)
            async with connected(server, ["/ws"] * 20) as clients:
                response = await client.post("drain", params={"over": 0.5})
                assert (response.status_code, len(response.json()["nodes"])) == (202, 4)
                frames = await asyncio.gather(*(each.receive() for each in clients))
                assert {frame.close_code for frame in frames if frame} == {1012}
                assert len(frames) == 20
            for _ in range(8):
                assert (await client.get("ready")).text == "draining"


# The page.


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        yield browser
        await browser.close()


@asynccontextmanager
async def opened(browser: Browser, server: Server, *, has_clock: bool = False, **options: Any) -> AsyncIterator[Page]:
    """The page as an operator sees it; it must not complain of anything."""
    complaints: list[str] = []
    async with await browser.new_context(**options) as context:
        context.set_default_timeout(PATIENCE_MS)
        base = f"http://127.0.0.1:{server.port}"
        await context.add_cookies([{"name": "session", "value": "operator", "url": base}])
        page = await context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if has_clock:
            await page.clock.install()
        await page.goto(f"{base}/operations/")
        yield page
    assert complaints == []


MARKUP = "<img src=x onerror=alert(1)>"


@needs_browser
async def test_page_shows_a_thousand_connections_quickly(browser: Browser, tmp_path: Path) -> None:
    count = 1000 if FULL else 300
    paths = [f"/ws?channel={quote(MARKUP)}&channel=room:{number}&user=user-{number % 100}" for number in range(count)]
    with workers(1, file_of(tmp_path), tmp_path) as server:
        async with connected(server, paths), opened(browser, server) as page:
            await expect(page.locator("#total-connections")).to_have_text(f"{count:,}")
            await expect(page.locator("#status")).to_have_text("1 of 1 node answered")
            await expect(page.locator("#channels li").first.locator(".name")).to_have_text(MARKUP)
            await expect(page.locator("#connections tbody tr")).to_have_count(25)
            assert await page.locator("main img").count() == 0
            milliseconds = await page.evaluate(
                """async () => {
                  const found = new Promise((resolve) => {
                    const observer = new PerformanceObserver((list) => resolve(list.getEntries()));
                    observer.observe({ type: "longtask" });
                    setTimeout(() => resolve([]), 4000);
                  });
                  return Math.max(0, ...(await found).map((entry) => entry.duration));
                }"""
            )
            assert milliseconds < 500
            first = await page.locator("#connections tbody tr").first.get_attribute("data-key")
            await page.click("#next")
            await expect(page.locator("#first")).to_be_enabled()
            await expect(page.locator("#connections tbody tr").first).not_to_have_attribute("data-key", first or "")
            await page.fill("#by-user", "user-7")
            await expect(page.locator("#connections-count")).to_have_text(f"{count // 100}")
            await page.fill("#prefix", "room:1")
            await expect(page.locator("#channels li").first.locator(".name")).to_have_text(re.compile("^room:1"))
        assert server.complaints() == []


@needs_browser
async def test_user_is_closed_by_keyboard_behind_a_question(browser: Browser, tmp_path: Path) -> None:
    with workers(1, file_of(tmp_path), tmp_path) as server:
        async with connected(server, ["/ws?user=ada", "/ws?user=bob"]) as (ada, bob), opened(browser, server) as page:
            button = page.get_by_role("button", name="Close the user ada")
            await button.focus()
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("dialog", name="Close this user?")).to_be_visible()
            await page.keyboard.press("Escape")
            await expect(page.get_by_role("dialog")).to_be_hidden()
            await expect(page.locator("#connections-count")).to_have_text("2")
            await button.press("Enter")
            await page.keyboard.press("Tab")
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("alert")).to_have_text("Closed 1 connection of ada.")
            frame = await ada.receive()
            assert frame is not None
            assert frame.close_code == 4401
            await expect(page.locator("#connections-count")).to_have_text("1")
            bob.close()
            await expect(page.locator("#connections-count")).to_have_text("0")


@needs_browser
async def test_server_is_drained_by_button(browser: Browser, tmp_path: Path) -> None:
    with workers(2, file_of(tmp_path), tmp_path) as server:
        async with operator(server) as client:
            await nodes(client, 2)
            async with connected(server, ["/ws"] * 4) as clients, opened(browser, server) as page:
                await page.locator("#nodes button").first.click()
                await expect(page.locator("#confirm-text")).to_contain_text("and the 1 other process of its server")
                await page.click("#confirm-yes")
                await expect(page.get_by_role("alert")).to_have_text("2 nodes drain.")
                assert {(await each.receive()).close_code for each in clients} == {1012}
                await expect(page.locator("#nodes .warn")).to_have_text(["draining", "draining"])
                await expect(page.locator("#nodes button")).to_have_count(0)


@needs_browser
async def test_page_asks_only_while_somebody_looks(browser: Browser, tmp_path: Path) -> None:
    def show(is_hidden: str) -> str:
        return (
            f"Object.defineProperty(document, 'hidden', {{ value: {is_hidden}, configurable: true }});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )

    with workers(1, file_of(tmp_path), tmp_path) as server:
        async with opened(browser, server, has_clock=True) as page:
            requests: list[str] = []
            page.on("request", lambda request: requests.append(request.url))
            await expect(page.locator("#status")).to_have_text("1 of 1 node answered")
            async with page.expect_request("**/nodes"):  # without anybody doing anything
                pass
            for stop, go_on in (("pause.click()", "pause.click()"), (show("true"), show("false"))):
                await page.evaluate(stop)
                await page.wait_for_load_state("networkidle")
                requests.clear()
                await page.clock.run_for(60_000)
                assert requests == []
                async with page.expect_request("**/nodes"):
                    await page.evaluate(go_on)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_page_fits_a_phone(browser: Browser, tmp_path: Path, scheme: str) -> None:
    paths = [f"/ws?channel={'long-name-' * 15}&user={'u' * 150}", "/ws?channel=news", "/ws"]
    with workers(1, file_of(tmp_path), tmp_path) as server:
        size = {"width": 375, "height": 700}
        async with connected(server, paths), opened(browser, server, viewport=size, color_scheme=scheme) as page:
            await expect(page.locator("#connections tbody tr")).to_have_count(3)
            assert await page.evaluate("document.documentElement.scrollWidth") <= 375
            boxes = [await each.bounding_box() for each in await page.locator("button:visible, input:visible").all()]
            assert all(box is not None and box["height"] >= 36 for box in boxes)
            background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", background))) > 380) == (scheme == "light")


@needs_browser
async def test_everything_has_a_name(browser: Browser, tmp_path: Path) -> None:
    with workers(1, file_of(tmp_path), tmp_path) as server:
        async with connected(server, ["/ws?user=ada"]), opened(browser, server) as page:
            await expect(page.get_by_role("button", name="Close the user ada")).to_be_visible()
            for name in ("Nodes", "Slow consumers", "Channels", "Connections"):
                await expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
            for name in ("User", "Channel", "Begins with"):
                await expect(page.get_by_role("searchbox", name=name, exact=True)).to_be_visible()
            nameless = await page.evaluate(
                "[...document.querySelectorAll('button, input')].filter((each) => "
                "!(each.getAttribute('aria-label') || each.textContent.trim() || each.labels?.length)"
                " && each.checkVisibility()).length"
            )
            assert nameless == 0


@needs_browser
async def test_who_is_signed_out_is_told_and_asks_no_more(browser: Browser, tmp_path: Path) -> None:
    with workers(1, file_of(tmp_path), tmp_path) as server:
        async with await browser.new_context() as context:
            base = f"http://127.0.0.1:{server.port}"
            await context.add_cookies([{"name": "session", "value": "operator", "url": base}])
            page = await context.new_page()
            await page.goto(f"{base}/operations/")
            await expect(page.locator("#status")).to_have_text("1 of 1 node answered")
            await context.clear_cookies()
            await expect(page.locator("#status")).to_have_text("Signed out")
            await expect(page.get_by_role("alert")).to_contain_text("Sign in")
