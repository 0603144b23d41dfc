"""The demo's comparison: the class of FastAPI's tutorial beside ours, at the sockets and in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import Page, expect
from starlette.testclient import TestClient, WebSocketDenialResponse, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.support.demo import Demo, OpenTab, complaints, open_tab, running_demo
from tests.support.programs import needs_browser
from tests.support.servers import eventually
from wsbroadcast.demo import comparison, create_app
from wsbroadcast.demo.messages import Tick

__all__ = ["complaints", "open_tab"]  # fixtures

FEEDS = ["/feed/handwritten", "/feed/wsbroadcast"]


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app()) as client:
        yield client


@pytest.mark.parametrize("path", FEEDS)
@pytest.mark.parametrize("origin", ["http://evil.example", "http://testserver:81", "null", ""])
def test_feed_refuses_pages_of_other_sites(client: TestClient, path: str, origin: str) -> None:
    with (
        pytest.raises((WebSocketDenialResponse, WebSocketDisconnect)),
        client.websocket_connect(path, headers={"origin": origin}),
    ):
        pass


@pytest.mark.parametrize("path", FEEDS)
@pytest.mark.parametrize("headers", [{}, {"origin": "http://testserver"}, {"origin": "HTTP://TestServer"}])
def test_feed_takes_its_own_page_and_programs(client: TestClient, path: str, headers: dict[str, str]) -> None:
    with client.websocket_connect(path, headers=headers) as socket:
        while socket.receive_json()["type"] != "tick":
            pass


def _end_of(socket: WebSocketTestSession) -> WebSocketDisconnect:
    """Read until the server closes, and return how."""
    while True:
        try:
            socket.receive_json()
        except WebSocketDisconnect as closed:
            return closed


@pytest.mark.parametrize("path", FEEDS)
def test_feed_has_room_for_a_bounded_number_of_clients(
    client: TestClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "MAX_CLIENTS", 1)
    with client.websocket_connect(path) as first, client.websocket_connect(path) as second:
        closed = _end_of(second)
        first.receive_json()
    assert (closed.code, closed.reason) == (1013, "enough tabs compare already")


@pytest.mark.parametrize("frame", ["no JSON", "{}", '{"type":"flood"}', '{"type":"stall","for":99}'])
def test_feed_answers_what_is_no_command(client: TestClient, frame: str) -> None:
    with client.websocket_connect("/feed/wsbroadcast") as socket:
        socket.send_text(frame)
        while (answer := socket.receive_json())["type"] in ("stall", "tick"):
            pass
    assert (answer["type"], answer["code"]) == ("error", "invalid_data")


def test_feed_is_silent_while_nobody_listens(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "TICK_SECONDS", 0)
    for _ in range(20):
        client.get("/state")  # in the same event loop, which would have made many ticks by now
    with client.websocket_connect("/feed/handwritten") as socket:
        assert socket.receive_json()["number"] == 1


def test_feed_says_why_nobody_can_be_stalled(client: TestClient) -> None:
    with client.websocket_connect("/feed/wsbroadcast") as socket:
        socket.send_json({"type": "stall"})  # this server has no address that a socket could connect to
        while not (message := socket.receive_json()).get("problem"):
            pass
    assert message["phase"] == "idle"
    assert message["problem"].startswith("no client could be stalled: ")


async def test_feed_gives_up_the_oldest_when_too_much_waits() -> None:
    got: list[int] = []

    async def take(tick: Tick) -> None:
        got.append(tick.number)

    feed = comparison.Feed(take)
    for number in range(700):
        feed.put(Tick(number=number, at=0.0))
    running = asyncio.create_task(feed.run())
    await feed.caught_up()
    running.cancel()
    assert got == list(range(100, 700))


async def test_feed_goes_on_after_a_broadcast_that_failed() -> None:
    got: list[int] = []

    async def take(tick: Tick) -> None:
        if tick.number == 1:
            raise RuntimeError("somebody has left")
        got.append(tick.number)

    feed = comparison.Feed(take)
    for number in range(3):
        feed.put(Tick(number=number, at=0.0))
    running = asyncio.create_task(feed.run())
    await feed.caught_up()
    running.cancel()
    assert got == [0, 2]


# With the stalled client, on real sockets.


class Client:
    """A healthy client: keeps what it gets, and can wait for something."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.numbers: list[int] = []
        self.states: list[dict[str, Any]] = []
        self._changed = asyncio.Event()

    async def read(self) -> None:
        async for frame in self.socket:
            self.take(frame)

    def take(self, frame: str | bytes) -> None:
        message = json.loads(frame)
        if message["type"] == "tick":
            self.numbers.append(message["number"])
        else:
            self.states.append(message)
        self._changed.set()

    async def until(self, holds: Callable[[Client], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds(self):
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def compared(url: str) -> AsyncIterator[Client]:
    """A client of the worker that compares: another one closes it, and then it is tried again, as the page does."""
    while True:
        async with connect(url) as socket:
            client = Client(socket)
            try:
                client.take(await socket.recv())
            except ConnectionClosed as closed:
                if closed.rcvd is None or closed.rcvd.code != comparison.OTHER_WORKER:
                    raise
                continue
            reading = asyncio.create_task(client.read())
            yield client
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            return


@asynccontextmanager
async def watching(demo: Demo) -> AsyncIterator[tuple[Client, Client]]:
    """A client of the tutorial's class and one of ours, both of which get ticks already."""
    url = demo.url.replace("http://", "ws://")
    async with compared(f"{url}feed/handwritten") as one, compared(f"{url}feed/wsbroadcast") as other:
        for client in (one, other):
            await client.until(lambda client: bool(client.numbers))
        yield one, other


def _is_complete(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


async def test_stalled_client_freezes_the_tutorials_class_and_not_ours() -> None:
    async with running_demo() as demo, watching(demo) as (theirs, ours):
        await ours.socket.send('{"type":"stall"}')
        await ours.until(lambda ours: ours.states[-1]["code"] is not None)
        stalled = ours.states[-1]
        assert (stalled["phase"], stalled["code"], stalled["reason"]) == ("stalled", 1013, "slow consumer")
        assert max(state["waiting_bytes"] for state in ours.states) > 64 * 1024

        frozen_at = theirs.numbers[-1]
        assert frozen_at < ours.numbers[-1] - 10
        seen = len(ours.numbers)
        await ours.until(lambda ours: len(ours.numbers) > seen + 20)
        assert theirs.numbers[-1] == frozen_at

        await ours.socket.send('{"type":"wake"}')
        await ours.until(lambda ours: ours.states[-1]["phase"] == "idle")
        newest = ours.numbers[-1]
        await theirs.until(lambda theirs: theirs.numbers[-1] > newest)
        assert _is_complete(theirs.numbers)
        assert _is_complete(ours.numbers)


async def test_client_that_reads_again_soon_is_not_evicted() -> None:
    async with running_demo() as demo, watching(demo) as (theirs, ours):
        await ours.socket.send('{"type":"stall"}')
        await ours.until(lambda ours: ours.states[-1]["phase"] == "stalled")
        await ours.socket.send('{"type":"stall"}')  # there is one already
        await ours.socket.send('{"type":"wake"}')
        await ours.until(lambda ours: ours.states[-1]["phase"] == "idle")
        assert ours.states[-1]["code"] is None
        newest = ours.numbers[-1]
        await theirs.until(lambda theirs: theirs.numbers[-1] > newest)


async def test_demo_ends_at_once_while_a_client_is_stalled() -> None:
    async with running_demo() as demo, watching(demo) as (theirs, ours):
        await ours.socket.send('{"type":"stall"}')
        await ours.until(lambda ours: ours.states[-1]["waiting_bytes"] > 0)
        seen = theirs.numbers[-1]
        await ours.until(lambda ours: ours.numbers[-1] > seen + 10)
        demo.process.send_signal(signal.SIGINT)
        await demo.wait()
    assert demo.process.returncode == 0
    assert demo.errors == ""  # and so the time that uvicorn gives connections to end has not run out


# The page.


def _milliseconds(text: str) -> float:
    match = re.fullmatch(r"(under )?([0-9.]+) (ms|s)", text)
    assert match is not None, text
    return float(match[2]) * (1000 if match[3] == "s" else 1)


async def _figure(page: Page, part: str) -> float:
    return _milliseconds(await page.locator(f"#{part}").inner_text())


# How many pixels of a plot have a colour of the style sheet.
PIXELS = """
([id, property]) => {
  const canvas = document.getElementById(id);
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = getComputedStyle(canvas).getPropertyValue(property);
  probe.fillRect(0, 0, 1, 1);
  const [r, g, b] = probe.getImageData(0, 0, 1, 1).data;
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4) count += data[i] === r && data[i + 1] === g && data[i + 2] === b;
  return count;
}
"""


# Keeps every text that the verdicts have: some are there for two seconds only.
KEEP_VERDICTS = """
() => {
  self.verdicts = { handwritten: [], wsbroadcast: [] };
  for (const [manager, texts] of Object.entries(self.verdicts)) {
    const verdict = document.getElementById(`${manager}-verdict`);
    new MutationObserver(() => texts.push(verdict.textContent)).observe(verdict, { childList: true });
  }
}
"""


@needs_browser
async def test_page_shows_who_waits_for_a_stalled_client(open_tab: OpenTab, complaints: list[str]) -> None:
    page = await open_tab("Ada")
    theirs, ours = page.locator("#handwritten-verdict"), page.locator("#wsbroadcast-verdict")
    for verdict in (theirs, ours):
        await expect(verdict).to_have_text("Every client gets every message at once.")
    await page.evaluate(KEEP_VERDICTS)
    await page.click("#stall-client")
    await expect(page.locator("#stall-client")).to_contain_text("Let it read again")
    await expect(ours).to_contain_text(
        re.compile(r"The stalled client was evicted after \d+\.\d s, with close code 1013")
    )
    await expect(theirs).to_contain_text("the loop awaits the stalled client")
    assert await _figure(page, "handwritten-p99") > 1000
    assert await _figure(page, "wsbroadcast-p99") < await _figure(page, "handwritten-p99")
    assert await page.evaluate(PIXELS, ["handwritten-plot", "--bad"]) > 50
    assert await page.evaluate(PIXELS, ["wsbroadcast-plot", "--accent"]) > 50
    label = await page.locator("#handwritten-plot").get_attribute("aria-label")
    assert label is not None
    assert "the loop awaits the stalled client" in label

    await page.click("#stall-client")
    await expect(theirs).to_contain_text("The client reads again, and the loop goes on.")
    await expect(page.locator("#stall-client")).to_have_text("Stall one client")
    await expect(page.locator("#stall-client")).to_have_attribute("aria-disabled", "false")
    verdicts = await page.evaluate("self.verdicts")
    assert any("wait for the stalled client, in a backlog of its own" in text for text in verdicts["wsbroadcast"])
    assert not any("Nobody has received anything" in text for text in verdicts["wsbroadcast"])
    assert complaints == []


@needs_browser
async def test_page_that_nobody_sees_is_no_client(open_tab: OpenTab) -> None:
    page = await open_tab("Ada")
    verdict = page.locator("#wsbroadcast-verdict")
    await expect(verdict).to_have_text("Every client gets every message at once.")
    (worker,) = [worker for worker in page.workers if worker.url.endswith("feed-worker.js")]

    async def clients() -> int:
        count: int = await worker.evaluate("sockets.filter((socket) => socket.readyState === WebSocket.OPEN).length")
        return count

    async def is_alone() -> bool:
        return await clients() == 0

    async def is_back() -> bool:
        return await clients() == 6

    await eventually(is_back)
    for is_hidden, holds in (("true", is_alone), ("false", is_back)):
        await page.evaluate(f"Object.defineProperty(document, 'hidden', {{ value: {is_hidden}, configurable: true }})")
        await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        await eventually(holds)
    await expect(verdict).to_have_text("Every client gets every message at once.")
