"""The demo's chat: its app as a client of the protocol sees it, and its page in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from base64 import b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from importlib.resources import files
from typing import Any

import pytest
from playwright.async_api import Locator, Page, expect
from starlette.testclient import TestClient, WebSocketDenialResponse, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect

from tests.support.demo import PATIENCE_MS, Demo, OpenTab, complaints, go_to, open_tab, running_demo, say, state
from tests.support.programs import needs_browser
from tests.support.servers import eventually
from wsbroadcast.demo import create_app

__all__ = ["complaints", "open_tab"]  # fixtures

Enter = Callable[..., tuple[WebSocketTestSession, dict[str, Any]]]

HELLO = {"type": "hello", "name": "Ada", "channel": "lobby"}

FLOOD = 3000

# It goes through the file of two processes, to several tabs that draw it.
FLOOD_PATIENCE_MS = 3 * PATIENCE_MS

PARTS = {
    "/": "text/html; charset=utf-8",
    "/state": "application/json",
    "/demo.css": "text/css; charset=utf-8",
    "/favicon.svg": "image/svg+xml",
} | {
    f"/{file.name}": "text/javascript; charset=utf-8"
    for file in (files("wsbroadcast.demo") / "static").iterdir()
    if file.name.endswith(".js")
}


# The app.


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app()) as client:
        yield client


@pytest.mark.parametrize(("path", "media_type"), PARTS.items())
def test_app_serves_every_part_under_a_strict_policy(client: TestClient, path: str, media_type: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("path", PARTS)
def test_app_answers_head_like_get(client: TestClient, path: str) -> None:
    got, asked = client.get(path), client.head(path)
    assert asked.status_code == 200
    for name in ("content-type", "content-length", "content-security-policy"):
        assert asked.headers[name] == got.headers[name]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_app_takes_nothing_over_http(client: TestClient, method: str) -> None:
    response = client.request(method, "/")
    assert response.status_code == 405
    assert response.headers["x-content-type-options"] == "nosniff"


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
def test_socket_answers_what_is_no_message_of_the_demo(client: TestClient, frame: str) -> None:
    with client.websocket_connect("/ws") as socket:
        for _ in range(2):
            socket.send_text(frame)
            answer = socket.receive_json()
            assert (answer["type"], answer["code"]) == ("error", "invalid_data")


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


# Two workers.


async def _state_of(demo: Demo) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        with urllib.request.urlopen(f"{demo.url}state", timeout=10) as response:
            found: dict[str, Any] = json.load(response)
            return found

    return await asyncio.to_thread(read)


@asynccontextmanager
async def _crowd(demo: Demo, count: int) -> AsyncIterator[list[ClientConnection]]:
    """So many clients that no worker has all of them, in the lobby."""
    url = demo.url.replace("http://", "ws://")
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(connect(f"{url}ws")) for _ in range(count)]
        for number, socket in enumerate(sockets):
            await socket.send(json.dumps({**HELLO, "name": f"visitor {number}"}))
            await _heard(socket, "welcome")
        yield sockets


async def _heard(socket: ClientConnection, kind: str) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while (message := json.loads(await socket.recv()))["type"] != kind:
            pass
        return dict(message)


async def test_workers_are_one_chat_and_say_the_same_of_it() -> None:
    async def are_two() -> bool:
        return bool((await _state_of(demo))["workers"] == 2)

    async with running_demo() as demo:
        await eventually(are_two, 30)
        async with _crowd(demo, 12) as sockets:
            await _talk(demo, sockets)


async def _talk(demo: Demo, sockets: list[ClientConnection]) -> None:
    async def are_there() -> bool:
        found = await _state_of(demo)
        names = [guest["name"] for guest in found["roster"]]
        are_named = names == [f"visitor {number}" for number in range(12)]  # whichever worker answers
        return are_named and bool((found["workers"], found["stats"]["connections"]) == (2, 12))

    await eventually(are_there, 30)
    await sockets[0].send('{"type":"chat","text":"hello"}')
    for socket in sockets:
        assert (await _heard(socket, "chat"))["text"] == "hello"
    await sockets[1].close()

    async def is_gone() -> bool:
        found = await _state_of(demo)
        return found["visitors"] == 11 and [ended["name"] for ended in found["ended"]] == ["visitor 1"]

    await eventually(is_gone, 30)


async def test_tab_says_with_its_handshake_who_it_is() -> None:
    def encoded(message: object) -> Any:
        return urlsafe_b64encode(json.dumps(message).encode()).decode().rstrip("=")

    async with running_demo() as demo:
        url = demo.url.replace("http://", "ws://") + "ws"
        async with connect(url, subprotocols=["profile", encoded(HELLO | {"name": "\u0160ime"})]) as socket:  # type: ignore[list-item]
            assert socket.subprotocol == "profile"
            assert (await _heard(socket, "welcome"))["name"] == "\u0160ime"
        for nonsense in ("x", "e30", encoded([1])):
            async with connect(url, subprotocols=["profile", nonsense]) as socket:  # type: ignore[list-item]
                await socket.wait_closed()
                assert socket.close_code == 1007


async def test_second_worker_ends_with_the_first_however_that_ends() -> None:
    async with running_demo() as demo:
        await _state_of(demo)
        demo.process.kill()
        await demo.wait()

        async def is_free() -> bool:
            try:
                await _state_of(demo)
            except OSError:
                return True
            return False

        await eventually(is_free, 30)


# Names and texts.


@pytest.fixture
def enter(client: TestClient) -> Iterator[Enter]:
    """Open sockets that have said hello, and close them after the test; with the welcome of each."""
    with ExitStack() as stack:

        def enter(name: str, channel: str = "lobby") -> tuple[WebSocketTestSession, dict[str, Any]]:
            socket = stack.enter_context(client.websocket_connect("/ws"))
            socket.send_json({"type": "hello", "name": name, "channel": channel})
            return socket, socket.receive_json()

        yield enter


@pytest.mark.parametrize(
    "name",
    ["Ada", "ada", "\uff21da", "A d a", "Ada\u200b", "\ufeffAda", "Ada\ufe0f", "A\u034fda", "\u202eAda", "A\u200dda"],
)
def test_visitor_gets_no_name_that_looks_like_anothers(enter: Enter, name: str) -> None:
    _, ada = enter("Ada")
    _, other = enter(name)
    assert ada["name"] == "Ada"
    assert other["name"].endswith(" 2")
    assert other["hue"] != ada["hue"]


def test_visitor_keeps_name_and_colour_when_it_says_hello_again(enter: Enter) -> None:
    enter("Ada")
    socket, before = enter("Ada")
    socket.send_json({"type": "hello", "name": "Ada", "channel": "lobby"})
    assert socket.receive_json() == before
    socket.send_json({"type": "hello", "name": "Grace", "channel": "lobby"})
    assert socket.receive_json() == {**before, "name": "Grace"}


def test_visitor_gets_its_name_when_whoever_had_it_is_gone(client: TestClient, enter: Enter) -> None:
    first, _ = enter("Ada")
    second, welcome = enter("Ada")
    assert welcome["name"] == "Ada 2"
    first.close()
    assert second.receive_json()["event"] == "left"
    second.send_json(HELLO)
    assert second.receive_json()["name"] == "Ada"


def test_long_names_stay_apart_and_within_the_limit(enter: Enter) -> None:
    names = [enter("x" * 24)[1]["name"] for _ in range(11)]
    assert len(set(names)) == 11
    assert all(len(name) <= 24 for name in names)


def test_visitors_have_different_colours_while_there_are_enough(enter: Enter) -> None:
    assert len({enter(f"visitor {number}")[1]["hue"] for number in range(8)}) == 8


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("\u202eevil", "evil"),
        ("a\u202db\u202c", "ab"),
        ("\u2067right\u2069 left", "right left"),
        ("two\nlines\u2028three", "two lines three"),
        ("tab\tand\x00nothing\x9f", "tab and nothing "),
        ("  spaces  stay", "  spaces  stay"),
        (
            "\u05e9\u05dc\u05d5\u05dd, \u0645\u0631\u062d\u0628\u0627",
            "\u05e9\u05dc\u05d5\u05dd, \u0645\u0631\u062d\u0628\u0627",
        ),
        ("\U0001f469\u200d\U0001f4bb \u2764\ufe0f", "\U0001f469\u200d\U0001f4bb \u2764\ufe0f"),
    ],
)
def test_text_cannot_reorder_or_break_the_lines_around_it(enter: Enter, sent: str, shown: str) -> None:
    socket, _ = enter("Ada")
    socket.send_json({"type": "chat", "text": sent})
    assert socket.receive_json()["text"] == shown


def test_names_and_channels_cannot_reorder_lines_either(client: TestClient, enter: Enter) -> None:
    _, welcome = enter("\u202eevil\n\u2066one", "\u202enews\u2069")
    assert (welcome["name"], welcome["channel"]) == ("evil one", "news")
    (guest,) = client.get("/state").json()["roster"]
    assert (guest["name"], guest["channel"]) == ("evil one", "news")


@pytest.mark.parametrize("name", ["\u200b", "\u202e", "\u3164", "\u2800", "\u200d\ufe0f"])
def test_name_that_shows_nothing_is_replaced(enter: Enter, name: str) -> None:
    assert enter(name)[1]["name"] == "Guest"


@pytest.mark.parametrize("text", [" ", "\u202e", "\u200b\n", "\u3164"])
def test_text_that_shows_nothing_is_refused(enter: Enter, text: str) -> None:
    socket, _ = enter("Ada")
    socket.send_json({"type": "chat", "text": text})
    assert socket.receive_json() == {"type": "refused", "text": "This message has nothing that can be shown."}


def test_state_names_a_bounded_number_of_visitors(client: TestClient, enter: Enter) -> None:
    for number in range(52):
        enter(f"visitor {number}", f"channel {number}")
    found = client.get("/state").json()
    assert found["visitors"] == 52
    assert len(found["roster"]) == 50


# The page.


@needs_browser
async def test_page_lets_three_tabs_chat_in_channels(open_tab: OpenTab, complaints: list[str]) -> None:
    ada, grace, linus = tabs = [await open_tab(name) for name in ("Ada", "Grace", "Linus")]
    for tab, own in zip(tabs, ("Ada", "Grace", "Linus"), strict=True):
        others = [name for name in ("Ada", "Grace", "Linus") if name != own]
        await expect(tab.locator("#roster .name")).to_have_text([own, *others])
        await expect(tab.locator("#roster li").first).to_contain_text("this tab")
        await expect(tab.locator("#count-connections")).to_have_text("3")
        await expect(tab.locator("#fast-path")).to_have_text(
            "A message is encoded once; all connections share its bytes."
        )

    markup = "<img src=x onerror=alert(1)>"
    await say(ada, markup)
    for tab in tabs:
        await expect(tab.locator("#log .line:not(.system) .text")).to_have_text([markup])
        assert await tab.locator("#log img").count() == 0

    await go_to(linus, "news")
    await expect(linus.locator("#log")).to_contain_text("You are in #news")
    await expect(ada.locator("#log")).to_contain_text("Linus went to another channel")
    await expect(ada.locator("#roster li", has_text="Linus")).to_contain_text("#news")
    await say(ada, "lobby only")
    await expect(grace.locator("#log")).to_contain_text("lobby only")
    await linus.fill("#channel", "lobby")
    await linus.press("#channel", "Enter")
    await expect(linus.locator('[data-channel="lobby"][aria-pressed]')).to_have_attribute("aria-pressed", "true")
    await say(grace, "welcome back")
    await expect(linus.locator("#log")).to_contain_text("welcome back")
    assert "lobby only" not in (await linus.locator("#log").inner_text())

    await linus.close()
    await expect(ada.locator("#roster .name")).to_have_text(["Ada", "Grace"])
    assert complaints == []


# Presses the button, unless the tab has woken by itself meanwhile: then it would stall again.
WAKE = "document.querySelector('#stall-label').textContent === 'Wake up' && document.querySelector('#stall').click()"


@needs_browser
async def test_stalled_tab_alone_is_evicted_and_comes_back(open_tab: OpenTab, complaints: list[str]) -> None:
    ada, grace, linus = [await open_tab(name) for name in ("Ada", "Grace", "Linus")]
    await linus.click("#stall")
    await expect(linus.locator("#status")).to_have_text("Stalled: reading nothing")
    await expect(ada.locator("#roster li", has_text="Linus")).to_contain_text("stalled")

    await grace.click("#flood")
    await expect(ada.locator("#count-backlog")).not_to_have_text("0 B")
    await say(ada, "still here?")  # in the middle of it
    await expect(grace.locator("#log")).to_contain_text("still here?")
    # Its own page is alive and learns of the eviction while its socket is still blocked.
    await expect(linus.locator("#status")).to_have_text("Evicted, still reading nothing")
    await expect(ada.locator("#log")).to_contain_text("Linus was evicted for reading nothing")
    for tab in (ada, grace):
        await expect(tab.locator(".flood .text")).to_have_text(
            f"Grace's flood: {FLOOD:,} of {FLOOD:,} received, none missed", timeout=FLOOD_PATIENCE_MS
        )

    await linus.evaluate(WAKE)
    await expect(linus.locator("#log")).to_contain_text("The server has evicted this tab")
    await expect(linus.locator("#log")).to_contain_text("Connected again, in #lobby as Linus")
    await say(ada, "welcome back")
    await expect(linus.locator("#log")).to_contain_text("welcome back")

    found = await state(ada)
    assert sum(found["stats"]["evicted"].values()) == 1
    assert found["stats"]["backlog_bytes"] == 0
    assert [(end["name"], end["code"], end["reason"]) for end in found["ended"]] == [("Linus", 1013, "slow consumer")]
    assert [(guest["name"], guest["is_stalled"]) for guest in found["roster"]] == [
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
    await say(ada, "said meanwhile")
    await expect(ada.locator("#log")).to_contain_text("said meanwhile")
    await linus.evaluate(WAKE)
    await expect(linus.locator("#log")).to_contain_text("said meanwhile")
    await expect(ada.locator("#roster li", has_text="Linus")).not_to_contain_text("stalled")
    found = await state(ada)
    assert found["stats"]["evicted"] == {}
    assert found["ended"] == []
    assert complaints == []


@needs_browser
async def test_tabs_that_want_one_name_are_told_apart(open_tab: OpenTab) -> None:
    ada, other = [await open_tab("Ada") for _ in range(2)]
    await expect(other.locator("#log")).to_contain_text("as Ada 2")
    await expect(other.locator("#name")).to_have_value("Ada 2")
    await say(ada, "first")
    await say(other, "second")
    names = ada.locator("#log .line-head .name")
    await expect(names).to_have_text(["Ada", "Ada 2"])
    colours = await names.evaluate_all("(names) => names.map((name) => getComputedStyle(name).color)")
    assert len(set(colours)) == 2


@needs_browser
async def test_log_shows_the_current_channel_only(open_tab: OpenTab, complaints: list[str]) -> None:
    ada, grace = [await open_tab(name) for name in ("Ada", "Grace")]
    await say(grace, "in the lobby")
    await expect(ada.locator("#log")).to_contain_text("in the lobby")
    await go_to(ada, "news")
    await expect(ada.locator("#log .line:visible .text")).to_have_text(["You are in #news as Ada"])
    await go_to(grace, "news")
    await say(grace, "in the news")
    lines = ["You are in #news as Ada", "Grace is here", "in the news"]
    await expect(ada.locator("#log .line:visible .text")).to_have_text(lines)
    assert await ada.locator("#log .line").count() == len(lines)  # and nothing waits there unseen
    assert complaints == []


IS_AT_END = (
    "(log) => log.scrollHeight > log.clientHeight + 99 && log.scrollHeight - log.scrollTop - log.clientHeight < 2"
)


async def _until_at_end(log: Locator) -> None:
    await log.page.wait_for_function(f"() => ({IS_AT_END})(document.querySelector('#log'))")


@needs_browser
async def test_log_follows_after_it_has_changed_its_size(open_tab: OpenTab) -> None:
    page = await open_tab("Ada")
    log = page.locator("#log")
    for number in range(40):
        await say(page, f"line {number}")
    await expect(log).to_contain_text("line 39")
    await _until_at_end(log)
    for width, height in ((1280, 560), (1100, 700), (820, 900), (360, 640), (1280, 720)):
        await page.set_viewport_size({"width": width, "height": height})
        if width < 1024:  # there the chat isn't seen at first; the log has no size then
            await page.click("[data-shows=comparison]")
            await page.click("[data-shows=chat]")
        await _until_at_end(log)
        await say(page, f"at {width}")
        await expect(log).to_contain_text(f"at {width}")
        await _until_at_end(log)

    await log.evaluate("(log) => log.scrollTo(0, 0)")  # whoever reads what was before isn't taken away from it
    await page.wait_for_function("() => document.querySelector('#log').scrollTop === 0")
    await page.set_viewport_size({"width": 1280, "height": 600})
    await say(page, "unseen")
    await expect(log).to_contain_text("unseen")
    assert await log.evaluate("(log) => log.scrollTop") == 0


# The text nodes that show a text, and whether each is alone in an element that isolates its direction.
ISOLATED = """
(text) => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    if (walker.currentNode.data.includes(text)) {
      const { parentElement } = walker.currentNode;
      if (parentElement.closest(".unseen")) continue; // read out, not seen
      const isIsolated = getComputedStyle(parentElement).unicodeBidi.includes("isolate");
      found.push(walker.currentNode.data === text && isIsolated ? "" : parentElement.outerHTML);
    }
  }
  return found;
}
"""


@needs_browser
async def test_page_isolates_the_direction_of_what_others_write(open_tab: OpenTab) -> None:
    ada, other = await open_tab("Ada"), await open_tab("\u05e9\u05dc\u05d5\u05dd")
    name, channel, text = "\u05e9\u05dc\u05d5\u05dd", "\u0639\u0631\u0628\u064a", "\u05d8\u05e7\u05e1\u05d8 123"
    await other.fill("#channel", channel)
    await other.press("#channel", "Enter")
    await expect(other.locator("#log")).to_contain_text(f"You are in #{channel}")
    await ada.fill("#channel", channel)
    await ada.press("#channel", "Enter")
    await expect(ada.locator("#log")).to_contain_text(f"You are in #{channel}")
    await say(other, text)
    await expect(ada.locator("#log")).to_contain_text(text)
    await other.click("#flood")
    await expect(ada.locator(".flood")).to_contain_text(f"{FLOOD:,} of {FLOOD:,}", timeout=FLOOD_PATIENCE_MS)
    await other.close()
    await expect(ada.locator("#ended")).to_contain_text(name)
    for shown, least in ((name, 4), (channel, 3), (text, 1)):
        found = await ada.evaluate(ISOLATED, shown)
        assert len(found) >= least
        assert set(found) == {""}


# How many pixels of a picture aren't like the first.
PIXELS_NOT_BLANK = """
async (picture) => {
  const image = await createImageBitmap(await (await fetch(`data:image/png;base64,${picture}`)).blob());
  const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, image.width, image.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4) count += data[i] !== data[0] || data[i + 1] !== data[1];
  return count;
}
"""


@needs_browser
async def test_accents_upon_accents_stay_in_their_own_line(open_tab: OpenTab) -> None:
    page = await open_tab("Ada")
    await say(page, "short")
    await say(page, "a" + "\u0301" * 300 + " and so much more that it begins far to the left of the line above")
    await expect(page.locator("#log")).to_contain_text("and so much more")
    log, short = [await page.locator(part).bounding_box() for part in ("#log", "#log .own >> nth=0")]
    assert log is not None
    assert short is not None
    x = log["x"] + 8
    beside = {"x": x, "y": short["y"], "width": short["x"] - x - 8, "height": short["height"]}
    picture = await page.screenshot(clip=beside)  # type: ignore[arg-type]
    await page.goto("about:blank")  # where no policy forbids to look at a picture
    assert await page.evaluate(PIXELS_NOT_BLANK, b64encode(picture).decode()) == 0


@needs_browser
async def test_page_says_in_words_how_others_have_left(open_tab: OpenTab) -> None:
    ada, grace = [await open_tab(name) for name in ("Ada", "Grace")]
    await grace.goto("about:blank")
    await expect(ada.locator("#log")).to_contain_text("Grace left the page")
    await expect(ada.locator("#ended")).to_contain_text("left the page")
    seen = await ada.locator("body").inner_text()
    assert "1001" not in seen
    assert "sink" not in seen.lower()


async def _are_in_view(page: Page, *ids: str) -> None:
    size = page.viewport_size
    assert size is not None
    for part in ids:
        box = await page.locator(f"#{part}").bounding_box()
        assert box is not None, f"{part} isn't shown"
        assert box["width"] > 0
        assert box["height"] > 0
        is_within = box["x"] >= 0 and box["x"] + box["width"] <= size["width"]
        assert is_within, f"{part} is beside the screen of {size}: {box}"
        is_within = box["y"] >= 0 and box["y"] + box["height"] <= size["height"]
        assert is_within, f"{part} is above or below the screen of {size}: {box}"


COMPARED = ("stall-client", "handwritten-verdict", "handwritten-plot", "wsbroadcast-verdict", "wsbroadcast-plot")
CHAT = ("name", "roster", "channels", "log", "text", "send", "stall", "flood")


@needs_browser
async def test_essential_parts_are_on_the_first_screen(open_tab: OpenTab) -> None:
    page = await open_tab("Ada")
    await open_tab("Grace")
    await open_tab("Linus")
    await expect(page.locator("#roster .name")).to_have_count(3)
    for width, height in ((1280, 720), (1366, 768), (1920, 1080), (1024, 720)):
        await page.set_viewport_size({"width": width, "height": height})
        await _are_in_view(page, "status", *COMPARED, *CHAT)
    for width, height in ((360, 740), (390, 844), (820, 1100)):
        await page.set_viewport_size({"width": width, "height": height})
        await page.click("[data-shows=comparison]")
        await _are_in_view(page, "status", "view-count", *COMPARED)
        await page.click("[data-shows=chat]")
        await _are_in_view(page, "status", *CHAT)


@needs_browser
async def test_page_fits_a_phone_and_a_keyboard(open_tab: OpenTab, complaints: list[str]) -> None:
    page = await open_tab("Ada")
    for width in (320, 360, 768, 1024, 1280):
        await page.set_viewport_size({"width": width, "height": 740})
        for view in ("comparison", "chat"):
            await page.evaluate(f"document.querySelector('[data-shows={view}]').click()")
            assert await page.evaluate("document.documentElement.scrollWidth") == width
            outside = await page.evaluate(
                "[...document.querySelectorAll('.card *')].filter((part) => !part.closest('.unseen')"
                " && part.getBoundingClientRect().right > part.closest('.card').getBoundingClientRect().right)"
                ".map((part) => part.id || part.tagName)"
            )
            assert outside == [], (width, view)

    await page.evaluate("document.activeElement.blur()")
    await page.mouse.click(1, 1)
    visited = []
    for _ in range(17):
        await page.keyboard.press("Tab")
        visited.append(await page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", visited
    assert visited == [
        *(
            "Skip to the page",
            "Open another tabNew tab",
            "stall-client",
            "FastAPI's tutorial",
            "name",
            "Rename",
            "roster",
        ),
        *("#lobby", "#news", "#random", "channel", "Join", "log", "text", "send", "stall", "flood"),
    ]

    await page.focus('[data-channel="news"]')
    await page.keyboard.press("Enter")
    await expect(page.locator('[data-channel="news"][aria-pressed]')).to_have_attribute("aria-pressed", "true")
    await expect(page.locator('[data-channel="news"][aria-pressed]')).to_be_focused()
    assert complaints == []


@needs_browser
async def test_page_names_every_part_for_a_screen_reader(open_tab: OpenTab) -> None:
    page = await open_tab("Ada")
    for role, name in [
        ("banner", ""),
        ("main", ""),
        ("region", "One client stalls. Who waits?"),
        ("region", "FastAPI's tutorial"),
        ("region", "wsbroadcast"),
        ("img", "Delays of the messages of the last 30 seconds. Every client gets every message at once."),
        ("region", "Chat"),
        ("region", "Here now"),
        ("region", "Break it"),
        ("region", "Counters"),
        ("log", "Messages"),
        ("group", "Channel"),
        ("textbox", "You are"),
        ("textbox", "Another channel"),
        ("textbox", "Message"),
        ("button", "Send"),
        ("button", "Stall one client"),
        ("button", "Stall this tab"),
        ("button", "Flood everyone"),
        ("link", "Open another tab"),
    ]:
        part = page.get_by_role(role, name=re.compile(f"^{re.escape(name)}"))  # type: ignore[arg-type]
        await expect(part).to_have_count(2 if role == "img" else 1)
    unnamed = await page.evaluate(
        "[...document.querySelectorAll('input, button, a, canvas')]"
        ".filter((part) => !part.labels?.length && !part.textContent.trim() && !part.ariaLabel).map((part) => part.id)"
    )
    assert unnamed == []


# Texts whose contrast with what is behind them is below 4.5 (WCAG 2.2, 1.4.3), with the ratio.
LOW_CONTRAST = """
() => {
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const rgba = (text) => text.match(/[0-9.]+/g).map(Number);
  const behind = (part) => {
    for (let at = part; at !== null; at = at.parentElement) {
      const [r, g, b, alpha = 1] = rgba(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  const hues = Array.from({ length: 8 }, (_, hue) => {
    const name = document.createElement("bdi");
    name.className = `name hue-${hue}`;
    name.textContent = `hue ${hue}`;
    document.querySelector("#log").append(name);
    return name;
  });
  for (const part of document.querySelectorAll("body *")) {
    const hasText = [...part.childNodes].some((node) => node.nodeType === 3 && node.data.trim() !== "");
    if (!hasText || !part.checkVisibility() || part.closest("[aria-disabled=true], .unseen, .skip")) continue;
    const [a, b] = [luminance(rgba(getComputedStyle(part).color)), luminance(behind(part))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${part.outerHTML}: ${ratio}`);
  }
  for (const name of hues) name.remove();
  return found;
}
"""


@needs_browser
async def test_page_can_be_read_in_both_themes(open_tab: OpenTab) -> None:
    page = await open_tab("Ada")
    await say(page, "some text")
    await expect(page.locator("#log")).to_contain_text("some text")
    await page.emulate_media(color_scheme="light", reduced_motion="reduce")
    assert await page.evaluate(LOW_CONTRAST) == []
    await page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    assert await page.evaluate(LOW_CONTRAST) == []
