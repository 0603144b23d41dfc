"""The page of an example, in a real browser, on several workers: two tabs, a reload in the middle, and a stop."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from playwright.async_api import Page, expect

from tests.integration.test_browser_client import browsing
from tests.support.brokers import Endpoint
from tests.support.programs import needs_browser
from tests.support.servers import UVICORN, Server, eventually, serve_here

pytest.importorskip("openai")
pytestmark = needs_browser

# A start takes longest.
WORKERS = 4 if os.environ.get("WSBROADCAST_TEST_FULL") else 2

# What a busy machine may need.
PATIENCE_MS = 30_000


class Model:
    """Speaks like OpenAI, and says what the test says."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self._complete)
        self.asked: list[str] = []
        self.hung_up = 0
        """How many requests were given up by who asked."""
        self._says: asyncio.Queue[str | None] = asyncio.Queue()

    def say(self, *tokens: str | None) -> None:
        """Say some tokens, or `None`: that is all."""
        for token in tokens:
            self._says.put_nowait(token)

    async def _complete(self, request: Request) -> StreamingResponse:
        body = await request.json()
        self.asked.append(body["messages"][-1]["content"])
        return StreamingResponse(self._chunks(), media_type="text/event-stream")

    async def _chunks(self) -> AsyncIterator[str]:
        try:
            while (token := await self._says.get()) is not None:
                choice = {"index": 0, "delta": {"content": token}, "finish_reason": None}
                chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.hung_up += 1
            raise


@pytest.fixture(params=["sqlite", "redis"])
def broker(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/answers.db"
    redis: Endpoint = request.getfixturevalue("redis_server")
    return f"{redis.url}?prefix={prefix}"


@asynccontextmanager
async def answering(broker: str, log: Path) -> AsyncIterator[tuple[Model, Server]]:
    model = Model()
    async with serve_here(model.app) as port:
        environment = {
            "BROKER_URL": broker,
            "OPENAI_API_KEY": "sk-of-nobody",
            "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1",
        }
        # Workers that import the client of OpenAI at the same time aren't dead.
        arguments = ("--workers", str(WORKERS), "--timeout-worker-healthcheck", "60", *UVICORN.arguments)
        flavour = replace(UVICORN, name=f"uvicorn --workers {WORKERS}", arguments=arguments, environment=environment)
        server = Server(flavour, log / "server.log", "tests.support.answered:app")
        await asyncio.to_thread(server.__enter__)
        try:
            yield model, server
        finally:
            await asyncio.to_thread(server.__exit__, None, None, None)


async def shows(page: Page, text: str, status: str = "running") -> None:
    await expect(page.locator("#answer")).to_have_text(text, timeout=PATIENCE_MS)
    await expect(page.get_by_role("status")).to_have_text(status, timeout=PATIENCE_MS)


async def ask(page: Page, question: str) -> None:
    await page.get_by_label("Question").fill(question)
    await page.get_by_label("Question").press("Enter")


async def test_two_tabs_show_one_answer_over_a_reload_and_a_stop(broker: str, tmp_path: Path) -> None:
    words = [f"word {number}, " for number in range(300)]
    async with answering(broker, tmp_path) as (model, server), browsing() as browser:
        window = await browser.new_context()
        first, second = await window.new_page(), await window.new_page()
        url = f"http://127.0.0.1:{server.port}/"
        await first.goto(url)
        await ask(first, "count")
        model.say(*words[:100])
        await shows(first, "".join(words[:100]).strip())
        await second.goto(first.url)
        await shows(second, "".join(words[:100]).strip())
        await expect(second.get_by_role("heading", level=2)).to_have_text("count")
        model.say(*words[100:150])
        await first.reload()
        model.say(*words[150:200])
        for page in (first, second):
            await shows(page, "".join(words[:200]).strip())
        await first.screenshot(path=tmp_path / "running.png")
        model.say(*words[200:], None)
        for page in (first, second):
            await shows(page, "".join(words).strip(), "done")
        await second.reload()  # it is kept for an hour
        await shows(second, "".join(words).strip(), "done")
        assert await first.evaluate("answer.textContent") == "".join(words)
        assert model.asked == ["count"]

        await ask(first, "again")
        model.say("part of ")
        await shows(first, "part of")
        await second.goto(first.url)
        await shows(second, "part of")
        await second.get_by_role("button", name="Stop").click()
        for page in (first, second):
            await shows(page, "part of", "cancelled")

        async def hung_up() -> bool:
            return model.hung_up == 1  # the request to the model has ended, too

        await eventually(hung_up)
        await second.go_back()
        await shows(second, "".join(words).strip(), "done")
        stranger = await (await browser.new_context()).new_page()
        await stranger.goto(url)
        await stranger.goto(first.url)
        await stranger.reload()
        await shows(stranger, "", "there is no such answer")
        assert server.complaints() == []
