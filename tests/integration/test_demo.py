"""The demo: its app as a client of the protocol sees it, and its page in a real browser."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import BrowserContext, ConsoleMessage, Page, async_playwright, expect
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from tests.support.programs import BROWSER, needs_browser
from wsbroadcast.demo import create_app

HELLO = {"type": "hello", "name": "Ada", "channel": "lobby"}

BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]

# What a busy machine may need.
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)

FLOOD = 3000


# The app.


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app()) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/demo.css", "text/css; charset=utf-8"),
        ("/demo.js", "text/javascript; charset=utf-8"),
        ("/worker.js", "text/javascript; charset=utf-8"),
        ("/favicon.svg", "image/svg+xml"),
        ("/state", "application/json"),
    ],
)
def test_app_serves_every_part_under_a_strict_policy(client: TestClient, path: str, media_type: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("path", ["/app.py", "/static", "/..%2fapp.py", "/%2e%2e", "/docs", "/openapi.json"])
def test_app_serves_nothing_else(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("origin", ["http://testserver", "HTTP://TestServer", None])
def test_socket_takes_its_own_page_and_programs(client: TestClient, origin: str | None) -> None:
    with client.websocket_connect("/ws", headers={} if origin is None else {"origin": origin}) as socket:
        socket.send_json(HELLO)
        assert socket.receive_json()["type"] == "welcome"


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://testserver.evil.example", "http://testserver:81", "null", ""]
)
def test_socket_refuses_pages_of_other_sites(client: TestClient, origin: str) -> None:
    with (
        pytest.raises(WebSocketDenialResponse) as refused,
        client.websocket_connect("/ws", headers={"origin": origin}),
    ):
        pass
    assert refused.value.status_code == 403
    assert client.get("/state").json()["stats"]["connects"] == 0


@pytest.mark.parametrize(
    "frame",
    [
        "no JSON",
        "[" * 60_000,
        "{}",
        '{"type":"shout"}',
        '{"type":"hello","name":"  ","channel":"lobby"}',
        '{"type":"hello","name":"\\ud800","channel":"lobby"}',
        '{"type":"hello","name":"Ada","channel":"lobby","is_admin":true}',
        '{"type":"chat","text":""}',
        '{"type":"chat","text":' + '"' + "x" * 2001 + '"}',
    ],
)
def test_socket_closes_on_what_is_no_message_of_the_demo(client: TestClient, frame: str) -> None:
    with client.websocket_connect("/ws") as socket:
        socket.send_text(frame)
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
    assert closed.value.code == 1007


def test_socket_wants_a_hello_first(client: TestClient) -> None:
    with client.websocket_connect("/ws") as socket:
        socket.send_json({"type": "chat", "text": "who, me?"})
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
    assert (closed.value.code, closed.value.reason) == (1008, "say hello first")


def test_connection_stays_in_its_channel_when_the_new_one_is_invalid(client: TestClient) -> None:
    with client.websocket_connect("/ws") as socket:
        socket.send_json(HELLO)
        socket.receive_json()
        socket.send_json({**HELLO, "channel": ""})
        assert socket.receive_json() == {"type": "refused", "text": "invalid channel '': it is empty"}
        assert [guest["channel"] for guest in client.get("/state").json()["roster"]] == ["lobby"]


def test_connection_leaves_the_channel_it_was_in(client: TestClient) -> None:
    with client.websocket_connect("/ws") as ada, client.websocket_connect("/ws") as grace:
        ada.send_json(HELLO)
        ada.receive_json()
        grace.send_json({**HELLO, "name": "Grace"})
        grace.receive_json()
        assert ada.receive_json()["event"] == "joined"
        grace.send_json({"type": "hello", "name": "Grace", "channel": "news"})
        left = ada.receive_json()
        assert (left["event"], left["name"], left["channel"], left["code"]) == ("left", "Grace", "lobby", None)
        grace.receive_json()
        grace.send_json({"type": "chat", "text": "to the news"})
        assert grace.receive_json()["channel"] == "news"
        ada.send_json({"type": "chat", "text": "to the lobby"})
        assert ada.receive_json()["text"] == "to the lobby"  # and nothing of the news before it


def test_state_tells_who_is_stalled_until_it_says_hello_again(client: TestClient) -> None:
    with client.websocket_connect("/ws") as socket:

        def stalled() -> list[bool]:
            socket.send_json({"type": "chat", "text": "what was sent before has been read when this comes back"})
            socket.receive_json()
            return [guest["is_stalled"] for guest in client.get("/state").json()["roster"]]

        socket.send_json(HELLO)
        socket.receive_json()
        assert stalled() == [False]
        socket.send_json({"type": "stall"})
        assert stalled() == [True]
        socket.send_json(HELLO)
        socket.receive_json()
        assert stalled() == [False]


# The page.


@asynccontextmanager
async def _running_demo() -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "wsbroadcast", "demo", "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        url = re.search(rb"http://\S+", line)
        assert url is not None, line
        yield url[0].decode()
    finally:
        process.terminate()
        async with asyncio.timeout(30):
            _, errors = await process.communicate()
    assert b"Traceback" not in errors, errors.decode()


OpenTab = Callable[[str], Awaitable[Page]]


@pytest.fixture
async def complaints() -> list[str]:
    """What the browser's console had to say, violations of the policy included."""
    return []


@pytest.fixture
async def open_tab(complaints: list[str]) -> AsyncIterator[OpenTab]:
    async with _running_demo() as url, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        context = await browser.new_context(viewport={"width": 1280, "height": 860})
        context.set_default_timeout(PATIENCE_MS)

        async def open_one(name: str) -> Page:
            return await _open_tab(context, url, name, complaints)

        yield open_one
        await browser.close()


async def _open_tab(context: BrowserContext, url: str, name: str, complaints: list[str]) -> Page:
    page = await context.new_page()

    def on_console(message: ConsoleMessage) -> None:
        complaints.append(f"{name}: {message.type}: {message.text}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: complaints.append(f"{name}: {error}"))
    page.on("requestfailed", lambda request: complaints.append(f"{name}: {request.url} failed"))
    page.on("dialog", lambda dialog: complaints.append(f"{name}: dialog {dialog.message}"))
    await page.goto(url)
    await expect(page.locator("#status")).to_have_text("Connected")
    await page.fill("#name", name)
    await page.press("#name", "Enter")
    await expect(page.locator("#log")).to_contain_text(f"as {name}")
    return page


async def _say(page: Page, text: str) -> None:
    await page.fill("#text", text)
    await page.press("#text", "Enter")


async def _state(page: Page) -> dict[str, Any]:
    state: dict[str, Any] = await page.evaluate("fetch('state').then((response) => response.json())")
    return state


@needs_browser
async def test_page_lets_three_tabs_chat_in_channels(open_tab: OpenTab, complaints: list[str]) -> None:
    ada, grace, linus = tabs = [await open_tab(name) for name in ("Ada", "Grace", "Linus")]
    for tab in tabs:
        await expect(tab.locator("#roster .name")).to_have_text(["Ada", "Grace", "Linus"])
        await expect(tab.locator("#count-connections")).to_have_text("3")
        await expect(tab.locator("#count-sinks")).to_have_text("3 uvicorn")
    await expect(grace.locator("#roster li", has_text="this tab").locator(".name")).to_have_text("Grace")

    markup = "<img src=x onerror=alert(1)>"
    await _say(ada, markup)
    for tab in tabs:
        await expect(tab.locator("#log .line:not(.system) .text")).to_have_text([markup])
        assert await tab.locator("#log img").count() == 0

    await linus.click("text=#news")
    await expect(linus.locator("#log")).to_contain_text("You are in #news")
    await expect(ada.locator("#log")).to_contain_text("Linus left #lobby")
    await expect(ada.locator("#roster li", has_text="Linus")).to_contain_text("#news")
    await _say(ada, "lobby only")
    await expect(grace.locator("#log")).to_contain_text("lobby only")
    await linus.fill("#channel", "lobby")
    await linus.press("#channel", "Enter")
    await expect(linus.locator('[data-channel="lobby"]')).to_have_attribute("aria-pressed", "true")
    await _say(grace, "welcome back")
    await expect(linus.locator("#log")).to_contain_text("welcome back")
    assert "lobby only" not in (await linus.locator("#log").inner_text())

    await linus.close()
    await expect(ada.locator("#roster .name")).to_have_text(["Ada", "Grace"])
    assert complaints == []


@needs_browser
async def test_stalled_tab_alone_is_evicted_and_comes_back(open_tab: OpenTab, complaints: list[str]) -> None:
    ada, grace, linus = [await open_tab(name) for name in ("Ada", "Grace", "Linus")]
    await linus.click("#stall")
    await expect(linus.locator("#status")).to_have_text("Stalled: reading nothing")
    await expect(ada.locator("#roster li", has_text="Linus")).to_contain_text("stalled")

    await grace.click("#flood")
    await expect(ada.locator("#count-backlog")).not_to_have_text("0 B")
    await _say(ada, "still here?")  # in the middle of it
    await expect(grace.locator("#log")).to_contain_text("still here?")
    # Its own page is alive and learns of the eviction while its socket is still blocked.
    await expect(linus.locator("#status")).to_have_text("Evicted with 1013, still stalled")
    await expect(ada.locator("#log")).to_contain_text("Linus left #lobby: closed with 1013, slow consumer")
    for tab in (ada, grace):
        await expect(tab.locator(".flood .text")).to_have_text(
            f"Grace's flood: {FLOOD:,} of {FLOOD:,} received, none missed"
        )

    await linus.click("#stall")  # it says "Wake up" now
    await expect(linus.locator("#log")).to_contain_text("Connected again, in #lobby")
    await expect(linus.locator("#log")).to_contain_text("Closed with 1006; back in")
    await _say(ada, "welcome back")
    await expect(linus.locator("#log")).to_contain_text("welcome back")

    state = await _state(ada)
    assert sum(state["stats"]["evicted"].values()) == 1
    assert state["stats"]["backlog_bytes"] == 0
    assert [(end["name"], end["code"], end["reason"]) for end in state["ended"]] == [("Linus", 1013, "slow consumer")]
    assert [(guest["name"], guest["is_stalled"]) for guest in state["roster"]] == [
        ("Ada", False),
        ("Grace", False),
        ("Linus", False),
    ]
    assert complaints == []


@needs_browser
async def test_tab_that_wakes_in_time_stays(open_tab: OpenTab, complaints: list[str]) -> None:
    ada, linus = [await open_tab(name) for name in ("Ada", "Linus")]
    await linus.click("#stall")
    await expect(linus.locator("#status")).to_have_text("Stalled: reading nothing")
    await _say(ada, "said meanwhile")
    await expect(ada.locator("#log")).to_contain_text("said meanwhile")
    await linus.click("#stall")
    await expect(linus.locator("#log")).to_contain_text("said meanwhile")
    await expect(ada.locator("#roster li", has_text="Linus")).not_to_contain_text("stalled")
    state = await _state(ada)
    assert state["stats"]["evicted"] == {}
    assert state["ended"] == []
    assert complaints == []


@needs_browser
async def test_page_fits_a_phone_and_a_keyboard(open_tab: OpenTab, complaints: list[str]) -> None:
    page = await open_tab("Ada")
    for width in (320, 360, 768, 1280):
        await page.set_viewport_size({"width": width, "height": 740})
        assert await page.evaluate("document.documentElement.scrollWidth") == width
        if width >= 360:  # the message field is on the first screen
            assert await page.evaluate("document.querySelector('#compose').getBoundingClientRect().bottom") <= 740
        outside = await page.evaluate(
            "[...document.querySelectorAll('.card *')].filter((part) => !part.closest('.unseen')"
            " && part.getBoundingClientRect().right > part.closest('.card').getBoundingClientRect().right)"
            ".map((part) => part.id || part.tagName)"
        )
        assert outside == []

    await page.evaluate("document.activeElement.blur()")
    await page.mouse.click(1, 1)
    visited = []
    for _ in range(14):
        await page.keyboard.press("Tab")
        visited.append(await page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", visited
    assert visited == [
        *("Skip to the chat", "Open another tab", "name", "Rename", "#lobby", "#news", "#random"),
        *("channel", "Join", "log", "text", "send", "stall", "flood"),
    ]

    await page.focus('[data-channel="news"]')
    await page.keyboard.press("Enter")
    await expect(page.locator('[data-channel="news"]')).to_have_attribute("aria-pressed", "true")
    await expect(page.locator('[data-channel="news"]')).to_be_focused()
    assert complaints == []


@needs_browser
async def test_page_names_every_part_for_a_screen_reader(open_tab: OpenTab) -> None:
    page = await open_tab("Ada")
    for role, name in [
        ("banner", ""),
        ("main", ""),
        ("region", "Chat"),
        ("region", "Break it"),
        ("region", "Counters"),
        ("region", "Connected"),
        ("log", "Messages"),
        ("group", "Channel"),
        ("textbox", "You are"),
        ("textbox", "Another channel"),
        ("textbox", "Message"),
        ("button", "Send"),
        ("button", "Stall this tab"),
        ("button", "Flood everyone"),
        ("link", "Open another tab"),
    ]:
        part = page.get_by_role(role, name=name) if name else page.get_by_role(role)  # type: ignore[arg-type]
        await expect(part).to_have_count(1)
    unnamed = await page.evaluate(
        "[...document.querySelectorAll('input, button, a')]"
        ".filter((part) => !part.labels?.length && !part.textContent.trim()).map((part) => part.id)"
    )
    assert unnamed == []
