"""Takes the README's picture of the demo: `scripts/screenshot`."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from playwright.async_api import Page, async_playwright, expect
from websockets.asyncio.client import ClientConnection, connect

from tests.support.demo import BROWSER_ARGUMENTS, running_demo, say
from tests.support.programs import BROWSER

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "assets" / "demo.png"

_SIZE = (1280, 720)

# As long as the others have been there before it stalls.
_SECONDS_BEFORE = 15

# As long as the client has been stalled in the picture, of the 15 seconds that it stalls.
_FROZEN_SECONDS = 9

_LINES = [
    ("Grace", "Is the price feed still alive?"),
    ("Linus", "Yes, ten messages a second."),
    ("Ada", "One of my tabs hangs. Do you notice?"),
    ("Grace", "No, nothing. You?"),
]

_IS_CALM = """
(seconds) => document.querySelector("#wsbroadcast-verdict").textContent.startsWith("Every client")
  && performance.now() > 1000 * seconds
"""
_IS_FROZEN = """
(seconds) => {
  const found = document.querySelector("#handwritten-verdict").textContent.match(/anything for ([0-9.]+) s/);
  return found !== null && Number(found[1]) > seconds;
}
"""


async def _enter(url: str, name: str) -> ClientConnection:
    # Somebody else in the chat. No tab: it would draw plots, too, and disturb what is measured.
    socket = await connect(url.replace("http://", "ws://") + "ws")
    await socket.send(json.dumps({"type": "hello", "name": name, "channel": "lobby"}))
    return socket


async def _chat(page: Page, others: dict[str, ClientConnection]) -> None:
    for name, text in _LINES:
        if name in others:
            await others[name].send(json.dumps({"type": "chat", "text": text}))
        else:
            await say(page, text)
        await expect(page.locator("#log")).to_contain_text(text)


async def take(picture: Path) -> None:
    """Run the demo, stall a client, and take the picture while the others wait or don't."""
    width, height = _SIZE
    async with running_demo() as demo, async_playwright() as playwright, AsyncExitStack() as stack:
        others = {name: await stack.enter_async_context(await _enter(demo.url, name)) for name in ("Grace", "Linus")}
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        page = await browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        await page.goto(demo.url)
        await page.fill("#name", "Ada")
        await expect(page.locator("#status")).to_have_text("Connected")
        await page.press("#name", "Enter")
        await expect(page.locator("#log")).to_contain_text("as Ada")
        await _chat(page, others)
        await page.wait_for_function(_IS_CALM, arg=_SECONDS_BEFORE, polling=100)
        await page.click("#stall-client")
        await page.evaluate("document.activeElement.blur()")
        await page.mouse.move(1, height - 1)
        await page.wait_for_function(_IS_FROZEN, arg=_FROZEN_SECONDS, polling=100)
        await page.screenshot(path=picture, animations="disabled")
        await browser.close()


def main() -> int:
    if BROWSER is None:
        print("scripts/screenshot needs chromium-headless-shell or chromium on the PATH", file=sys.stderr)
        return 1
    picture = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    asyncio.run(take(picture))
    print(f"{picture}: {picture.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
