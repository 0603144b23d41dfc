"""The demo as a process of its own, and tabs of a real browser on its page."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import BrowserContext, ConsoleMessage, Page, async_playwright, expect

from tests.support.programs import BROWSER

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

OpenTab = Callable[[str], Awaitable[Page]]


class Demo:
    """A running demo."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url
        self.errors = ""
        """What it has complained of; known after its end."""

    async def end(self) -> None:
        """Send it SIGTERM, unless it has got another signal, and wait for its end."""
        if self.process.returncode is None:
            self.process.terminate()
        await self.wait()

    async def wait(self) -> None:
        """Wait for its end."""
        async with asyncio.timeout(30):
            _, errors = await self.process.communicate()
        self.errors += errors.decode()


@asynccontextmanager
async def running_demo() -> AsyncIterator[Demo]:
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
        demo = Demo(process, url[0].decode())
        yield demo
        await demo.end()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert "Traceback" not in demo.errors, demo.errors


@pytest.fixture
async def complaints() -> list[str]:
    """What the browser's console had to say, violations of the policy included."""
    return []


@pytest.fixture
async def open_tab(complaints: list[str]) -> AsyncIterator[OpenTab]:
    async with running_demo() as demo, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        context = await browser.new_context(viewport={"width": 1280, "height": 720})
        context.set_default_timeout(PATIENCE_MS)

        async def open_one(name: str) -> Page:
            return await _open_tab(context, demo.url, name, complaints)

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


async def go_to(page: Page, channel: str) -> None:
    # By its button: the list of who is here names channels too.
    await page.click(f"#channels >> text=#{channel}")


async def say(page: Page, text: str) -> None:
    await page.fill("#text", text)
    await page.press("#text", "Enter")


async def state(page: Page) -> dict[str, Any]:
    state: dict[str, Any] = await page.evaluate("fetch('state').then((response) => response.json())")
    return state
