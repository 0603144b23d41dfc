"""A real browser's `EventSource`: it knows nothing but the URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from playwright.async_api import Page, async_playwright

from tests.support.brokers import free_port
from tests.support.programs import BROWSER, needs_browser
from tests.support.servers import eventually
from wsbroadcast import ConnectionManager, History, Limits, create_sse_router

pytestmark = needs_browser

LISTEN = """
(url) => {
  window.seen = []; window.states = [];
  const source = window.source = new EventSource(url);
  source.onmessage = (event) => seen.push(event.data);
  source.addEventListener("recovered", (event) => states.push(JSON.parse(event.data).recovered ?? null));
}
"""


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield await browser.new_page()
        await browser.close()


@asynccontextmanager
async def serving(port: int, manager: ConnectionManager, **options: Any) -> AsyncIterator[None]:
    """Run an app on a port, which is free again afterwards."""
    app = FastAPI()
    app.include_router(create_sse_router(manager, "/sse/{channel}", **options))

    @app.get("/")
    async def home() -> HTMLResponse:
        return HTMLResponse("<!doctype html><title>page</title>")

    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    running = asyncio.create_task(server.serve())

    async def started() -> bool:
        return server.started

    try:
        await eventually(started)
        yield
    finally:
        for connection in manager.connections:
            await connection.close(1012, "restart")
        server.should_exit = True
        await asyncio.wait_for(running, 10)


async def until(page: Page, condition: str, seconds: float = 20) -> None:
    await page.wait_for_function(condition, timeout=seconds * 1000)


async def test_a_restart_loses_nothing(page: Page, tmp_path: Path) -> None:
    port = free_port()
    url = f"sqlite:///{tmp_path}/log.db"

    def manager() -> ConnectionManager:
        return ConnectionManager(url, history={"news": History(messages=100)})

    expected: list[str] = []

    async def say(manager: ConnectionManager, number: int) -> None:
        for _ in range(number):
            expected.append(f"message {len(expected)}")
            await manager.broadcast(expected[-1], channel="news")

    async with serving(port, first := manager()):
        await page.goto(f"http://127.0.0.1:{port}/")
        await page.evaluate(LISTEN, "/sse/news")
        await until(page, "states.length == 1")
        await say(first, 5)
        await until(page, "seen.length == 5")
    async with manager() as meanwhile:
        await say(meanwhile, 5)
    async with serving(port, second := manager()):
        await say(second, 2)
        await until(page, "states.length == 2")
        await say(second, 3)
        await until(page, "seen.length == 15")
        assert await page.evaluate("seen") == expected
        assert await page.evaluate("states") == [None, True]
        assert await page.evaluate("source.readyState") == 1


async def test_who_is_refused_for_now_comes_back(page: Page) -> None:
    manager = ConnectionManager(limits=Limits(max_connections=1))
    port = free_port()
    async with serving(port, manager):
        await page.goto(f"http://127.0.0.1:{port}/")
        await page.evaluate("window.first = new EventSource('/sse/news')")
        await until(page, "first.readyState == 1")
        await page.evaluate(LISTEN, "/sse/news")

        async def is_refused() -> int:
            return sum(manager.stats().limited.values())

        await eventually(is_refused)
        await until(page, "source.readyState == 0")
        await page.evaluate("first.close()")
        await until(page, "states.length == 1")
        await manager.broadcast("hello", channel="news")
        await until(page, "seen.length == 1")


async def test_who_may_not_come_in_stays_away(page: Page) -> None:
    async def nobody() -> None:
        return None

    port = free_port()
    async with serving(port, ConnectionManager(), authenticate=nobody):
        await page.goto(f"http://127.0.0.1:{port}/")
        await page.evaluate(LISTEN, "/sse/news")
        await until(page, "source.readyState == 2")
