"""Front ends with their own clients: the Vercel AI SDK, AG-UI and OpenAI read a run, come back to it, and stop it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.npm import Program, installed, needs_npm, program
from tests.support.servers import eventually, serve_here
from tests.test_docs import BLOCKS, Block
from wsbroadcast import ConnectionManager, Follower, Run, StreamEntry, ui_message_stream

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))

# Of the Vercel AI SDK.
VERSIONS = ["5.0.277", "6.0.326", "7.0.173"] if FULL else ["6.0.326"]


@pytest.fixture(scope="module", params=VERSIONS)
def packages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory, f"ai@{request.param}", "@ag-ui/client@1.0.0")


class Script:
    """A model that says what the test says, when it says it."""

    def __init__(self) -> None:
        self.runs = 0
        self._says: asyncio.Queue[str | dict[str, Any] | Exception | None] = asyncio.Queue()

    def say(self, *what: str | dict[str, Any] | Exception | None) -> None:
        """Say some text, data, an error, or `None`: that is all."""
        for each in what:
            self._says.put_nowait(each)

    async def answer(self, messages: object, run: Run) -> None:
        self.runs += 1
        while (said := await self._says.get()) is not None:
            if isinstance(said, Exception):
                raise said
            run.append(said)


def viewers() -> int:
    """How many requests are written to."""
    return sum(task.get_name() == "wsbroadcast stream viewer" for task in asyncio.all_tasks())


def text_of(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def block_of(heading: str) -> Block:
    (block,) = (block for block in BLOCKS if block.name == f"docs/streams.md#{heading}")
    return block


@asynccontextmanager
async def recipe(heading: str, **others: object) -> AsyncIterator[tuple[ConnectionManager, Script, str]]:
    """Serve a recipe of the documentation, with a model of ours and others of its names."""
    names, model = block_of(heading).run(), Script()
    names |= {"answer": model.answer, **others}
    async with serve_here(names["app"]) as port:
        yield names["manager"], model, f"http://127.0.0.1:{port}"


class Tabs:
    """Pages of one user, in one program."""

    def __init__(self, node: Program, **options: Any) -> None:
        self._node = node
        self._options = options

    async def open(self, tab: str, **options: Any) -> None:
        await self._node.ask("open", tab, **{"headers": {"x-user": "ann"}, **self._options, **options})

    async def __call__(self, do: str, tab: str, **options: Any) -> Any:
        return await self._node.ask(do, tab, **options)

    async def until(self, tab: str, is_so: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Wait for what a page shows."""
        found: dict[str, Any] = {}

        async def looked() -> bool:
            found.update(await self("look", tab))
            return bool(is_so(found))

        try:
            await eventually(looked)
        except TimeoutError:
            pytest.fail(f"it never came: {found}")
        return found

    async def shows(self, tab: str, text: str, status: str = "streaming") -> dict[str, Any]:
        """Wait until the last message is this."""
        return await self.until(
            tab, lambda page: page["messages"] and text_of(page["messages"][-1]) == text and page["status"] == status
        )


# The Vercel AI SDK.


@asynccontextmanager
async def chatting(packages: Path, **others: object) -> AsyncIterator[tuple[ConnectionManager, Script, Tabs]]:
    async with recipe("vercel-ai-sdk", **others) as (manager, model, url), program(packages, "ai.mjs") as node:
        yield manager, model, Tabs(node, id="1", api=f"{url}/api/chat")


@needs_npm
async def test_ai_sdk_shows_a_whole_answer_with_its_tools(packages: Path) -> None:
    async with chatting(packages) as (_, model, tabs):
        await tabs.open("a")
        await tabs("send", "a", text="hello")
        model.say({"type": "reasoning", "text": "Look "}, {"type": "reasoning", "text": "it up."}, "One ", "moment.")
        model.say({"type": "tool_call", "id": "t1", "name": "search", "input": {"q": "tea"}})
        page = await tabs.until("a", lambda page: len(page["messages"][-1]["parts"]) == 3)
        assert page["messages"][-1]["parts"][2]["state"] == "input-available"
        model.say({"type": "tool_result", "id": "t1", "output": ["green"]})
        model.say({"type": "tool_call", "id": "t2", "name": "brew", "input": None})
        model.say({"type": "tool_result", "id": "t2", "error": "no water"})
        model.say({"type": "tool_result", "id": "t3", "output": "nobody has asked"})
        model.say({"type": "weather", "city": "Oslo"}, {"strange": True}, "Gr\u00fcn\u2028\U0001f375", None)
        page = await tabs.until("a", lambda page: page["status"] == "ready")
        question, answer = page["messages"]
        assert question["role"] == "user"
        assert [part["type"] for part in answer["parts"]] == [
            "reasoning",
            "text",
            "dynamic-tool",
            "dynamic-tool",
            "data-tool_result",
            "data-weather",
            "data-entry",
            "text",
        ]
        reasoning, text, search, brew, stray, weather, strange, last = answer["parts"]
        assert (reasoning["text"], text["text"], last["text"]) == (
            "Look it up.",
            "One moment.",
            "Gr\u00fcn\u2028\U0001f375",
        )
        assert (search["state"], search["input"], search["output"]) == ("output-available", {"q": "tea"}, ["green"])
        assert (brew["state"], brew["errorText"]) == ("output-error", "no water")
        assert stray["data"]["output"] == "nobody has asked"
        assert (weather["data"], strange["data"]) == ({"type": "weather", "city": "Oslo"}, {"strange": True})
        assert (page["errors"], page["finished"]) == (
            [],
            {"isAbort": False, "isDisconnect": False, "isError": False},
        )


@needs_npm
async def test_ai_sdk_resumes_in_the_middle(packages: Path) -> None:
    async with chatting(packages) as (_, model, tabs):
        await tabs.open("a")
        await tabs("send", "a", text="hello")
        model.say("One ", "two ")
        first = await tabs.shows("a", "One two ")
        for tab in ("reloaded", "other"):
            await tabs.open(tab, messages=first["messages"][:1])
            await tabs("resume", tab)
            page = await tabs.shows(tab, "One two ")
            assert page["messages"][-1]["id"] == first["messages"][-1]["id"]
        await tabs("stop", "a")  # which is no more than that it goes away

        async def is_gone() -> bool:
            return viewers() == 2

        await eventually(is_gone)
        model.say("three ")
        await tabs.shows("reloaded", "One two three ")
        await tabs.until("a", lambda page: page["status"] == "ready")
        assert text_of((await tabs("look", "a"))["messages"][-1]) == "One two "
        await tabs("resume", "a")  # what it has already is replaced
        page = await tabs.shows("a", "One two three ")
        assert len(page["messages"]) == 2
        model.say("four", None)
        pages = [await tabs.shows(tab, "One two three four", "ready") for tab in ("a", "reloaded", "other")]
        assert len({page["messages"][-1]["id"] for page in pages}) == 1
        assert model.runs == 1
        await tabs.open("late", messages=first["messages"][:1])
        await tabs("resume", "late")
        page = await tabs.until("late", lambda page: page["status"] == "ready")
        assert len(page["messages"]) == 1  # 204: it is kept by the app, if at all


@needs_npm
async def test_ai_sdk_shows_what_was_stopped_and_what_has_failed(packages: Path) -> None:
    async with chatting(packages) as (manager, model, tabs):
        await tabs.open("a")
        await tabs.open("b", messages=[{"id": "q", "role": "user", "parts": []}])
        await tabs("send", "a", text="hello")
        model.say("part of ")
        await tabs.shows("a", "part of ")
        await tabs("resume", "b")
        await tabs.shows("b", "part of ")
        assert await manager.stop_stream("chat:ann:1")
        for tab in ("a", "b"):
            page = await tabs.shows(tab, "part of ", "ready")
            assert page["errors"] == []
            assert page["messages"][-1]["parts"][0]["state"] == "done"
        await tabs("send", "a", text="again")
        model.say("half", RuntimeError("a secret"))
        page = await tabs.shows("a", "half", "error")
        assert page["error"] == "the producer failed (RuntimeError)"
        assert page["finished"]["isError"]
        assert len(page["messages"]) == 4


@needs_npm
async def test_ai_sdk_shows_what_was_stopped_after_a_reload(packages: Path) -> None:
    later = partial(ui_message_stream, ended=True)
    async with chatting(packages, ui_message_stream=later) as (manager, model, tabs):
        await tabs.open("a")
        await tabs("send", "a", text="hello")
        model.say("part of ")
        await tabs.shows("a", "part of ")
        assert await manager.stop_stream("chat:ann:1")
        page = await tabs.shows("a", "part of ", "ready")
        for tab, messages in (("unsaved", page["messages"][:1]), ("saved", page["messages"])):
            await tabs.open(tab, messages=messages)
            await tabs("resume", tab)
            await tabs.until(tab, lambda page: page["finished"])
            found = await tabs.shows(tab, "part of ", "ready")
            assert [each["id"] for each in found["messages"]] == [each["id"] for each in page["messages"]]


@needs_npm
async def test_ai_sdk_learns_that_it_was_sent_away(packages: Path) -> None:
    async with chatting(packages) as (manager, model, tabs):
        await tabs.open("a")
        await tabs("send", "a", text="hello")
        model.say("part of ")
        await tabs.shows("a", "part of ")
        await manager.drain(over=0)
        page = await tabs.until("a", lambda page: page["status"] == "error")
        assert "resume" in page["error"]
        assert text_of(page["messages"][-1]) == "part of "


@needs_npm
async def test_ai_sdk_of_a_stranger_finds_nothing_to_resume(packages: Path) -> None:
    async with chatting(packages) as (_, model, tabs):
        await tabs.open("a")
        await tabs("send", "a", text="hello")
        model.say("a secret")
        await tabs.shows("a", "a secret")
        await tabs.open("stranger", headers={"x-user": "bob"})
        await tabs("resume", "stranger")
        page = await tabs.until("stranger", lambda page: page["status"] == "ready")
        assert (page["messages"], page["errors"]) == ([], [])
        model.say(None)
        await tabs.until("a", lambda page: page["status"] == "ready")


# AG-UI.


def agent_text(page: dict[str, Any]) -> str:
    return "".join(each.get("content") or "" for each in page["messages"] if each["role"] == "assistant")


@asynccontextmanager
async def asking(packages: Path) -> AsyncIterator[tuple[ConnectionManager, Script, Tabs]]:
    async with recipe("ag-ui") as (manager, model, url), program(packages, "ag_ui.mjs") as node:
        yield manager, model, Tabs(node, url=f"{url}/agent", threadId="thread")


@needs_npm
async def test_ag_ui_shows_a_whole_answer_with_its_tools(packages: Path) -> None:
    async with asking(packages) as (_, model, tabs):
        await tabs.open("a")
        await tabs("run", "a", runId="1")
        model.say("One ", "moment.", {"type": "tool_call", "id": "t1", "name": "search", "input": {"q": "tea"}})
        model.say({"type": "tool_result", "id": "t1", "output": ["green"]}, {"type": "weather", "city": "Oslo"})
        model.say("Gr\u00fcn\u2028\U0001f375", None)
        page = await tabs.until("a", lambda page: page["state"] == "done")
        assert (page["custom"], page["ends"], page["error"]) == ([{"type": "weather", "city": "Oslo"}], [None], None)
        assert [(each["role"], each.get("content")) for each in page["messages"] if each.get("content")] == [
            ("assistant", "One moment."),
            ("tool", '["green"]'),
            ("assistant", "Gr\u00fcn\u2028\U0001f375"),
        ]
        (call,) = [call for each in page["messages"] for call in each.get("toolCalls", [])]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("search", {"q": "tea"})


@needs_npm
async def test_ag_ui_resumes_in_the_middle_and_afterwards(packages: Path) -> None:
    async with asking(packages) as (_, model, tabs):
        for tab in ("a", "reloaded", "late", "stranger"):
            await tabs.open(tab)
        await tabs.open("stranger", headers={"x-user": "bob"})
        await tabs("run", "a", runId="1")
        model.say("One ", "two ")
        await tabs.until("a", lambda page: agent_text(page) == "One two ")
        await tabs("run", "reloaded", runId="1")
        await tabs.until("reloaded", lambda page: agent_text(page) == "One two ")
        await tabs("abort", "a")
        model.say("three", None)
        page = await tabs.until("reloaded", lambda page: page["state"] == "done")
        assert agent_text(page) == "One two three"
        await tabs("run", "late", runId="1")
        late = await tabs.until("late", lambda page: page["state"] == "done")
        assert late["messages"] == page["messages"]
        assert model.runs == 1
        model.say("another", None)
        await tabs("run", "stranger", runId="1")
        assert agent_text(await tabs.until("stranger", lambda page: page["state"] == "done")) == "another"


@needs_npm
async def test_ag_ui_shows_what_was_stopped_and_what_has_failed(packages: Path) -> None:
    async with asking(packages) as (manager, model, tabs):
        for tab in ("stopped", "failed", "cut off"):
            await tabs.open(tab)
        await tabs("run", "stopped", runId="1")
        model.say("part of ")
        await tabs.until("stopped", lambda page: agent_text(page) == "part of ")
        assert await manager.stop_stream("agent:ann:1")
        page = await tabs.until("stopped", lambda page: page["state"] == "done")
        assert (agent_text(page), page["ends"]) == ("part of ", ["cancelled"])
        await tabs("run", "failed", runId="2")
        model.say("half", RuntimeError("a secret"))
        page = await tabs.until("failed", lambda page: page["error"])
        assert (agent_text(page), page["error"]) == ("half", "the producer failed (RuntimeError)")
        await tabs("run", "cut off", runId="3")
        model.say("part of ")
        await tabs.until("cut off", lambda page: agent_text(page) == "part of ")
        await manager.drain(over=0)
        page = await tabs.until("cut off", lambda page: page["error"])
        assert page["error"] == "the stream was cut off"


# OpenAI.

KEYS = ("sk-ann", "sk-bob")


@asynccontextmanager
async def completing() -> AsyncIterator[tuple[ConnectionManager, Script, list[Any]]]:
    openai = pytest.importorskip("openai")
    async with recipe("openai-chunks") as (manager, model, url), AsyncExitStack() as stack:
        clients = [openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in KEYS]
        yield manager, model, [await stack.enter_async_context(client) for client in clients]


async def begin(client: Any) -> Any:
    return await client.chat.completions.create(model="any", messages=[{"role": "user", "content": "hi"}], stream=True)


async def resume(client: Any, id_: str) -> Any:
    import openai
    from openai.types.chat import ChatCompletionChunk

    path, stream = f"/chat/completions/{id_}/stream", openai.AsyncStream[ChatCompletionChunk]
    return await client.get(path, cast_to=ChatCompletionChunk, stream=True, stream_cls=stream)


class Reader:
    """Reads chunks as they come."""

    def __init__(self, chunks: Any) -> None:
        self._chunks = chunks
        self.text = self.id = ""
        self.finish: str | None = None

    async def until(self, text: str) -> None:
        while self.text != text:
            self._take(await asyncio.wait_for(anext(self._chunks), 10))

    async def rest(self) -> None:
        async for chunk in self._chunks:
            self._take(chunk)

    def _take(self, chunk: Any) -> None:
        (choice,) = chunk.choices
        self.id = chunk.id
        self.text += choice.delta.content or ""
        self.finish = choice.finish_reason or self.finish


async def test_openai_reads_a_whole_answer_and_resumes() -> None:
    async with completing() as (_, model, (ann, bob)):
        import openai

        first = Reader(await begin(ann))
        model.say("One ", "two ")
        await first.until("One two ")
        second = Reader(await resume(ann, first.id))
        await second.until("One two ")
        with pytest.raises(openai.NotFoundError):
            await resume(bob, first.id)
        model.say({"type": "weather"}, "three", None)
        for reader in (first, second, Reader(await resume(ann, first.id))):
            await reader.rest()
            assert (reader.text, reader.finish, reader.id) == ("One two three", "stop", first.id)
        assert model.runs == 1


async def test_openai_reads_what_was_stopped_and_what_has_failed() -> None:
    async with completing() as (manager, model, (ann, bob)):
        import openai

        stopped = Reader(await begin(ann))
        model.say("part of ")
        await stopped.until("part of ")
        path = f"/chat/completions/{stopped.id}/stop"
        with pytest.raises(openai.NotFoundError):
            await bob.post(path, cast_to=bool)
        await ann.post(path, cast_to=object)
        await stopped.rest()
        assert (stopped.text, stopped.finish) == ("part of ", None)
        failed = Reader(await begin(ann))
        model.say("half", RuntimeError("a secret"))
        with pytest.raises(openai.APIError, match=r"the producer failed \(RuntimeError\)"):
            await failed.rest()
        assert failed.text == "half"
        cut = Reader(await begin(ann))
        model.say("part of ")
        await cut.until("part of ")
        await manager.drain(over=0)
        with pytest.raises(openai.APIError, match="cut off"):
            await cut.rest()


# Agents.


async def test_agent_tells_of_its_tools_and_a_stop_cancels_them() -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    agent, started, cancelled = pydantic_ai.Agent("test"), asyncio.Event(), asyncio.Event()

    @agent.tool_plain  # type: ignore[untyped-decorator, unused-ignore]
    async def weather(city: str) -> dict[str, str]:
        return {city: "rain"}

    answer = block_of("agents").run()["answer"]
    async with ConnectionManager() as manager:
        await manager.start_stream("x", partial(answer, agent, "hello"))
        async with manager.follow_stream("x") as entries:
            call, result, *texts, end = [entry async for entry in entries]
        assert (call.data["type"], call.data["name"], call.data["input"]) == ("tool_call", "weather", {"city": "a"})
        assert result.data == {"type": "tool_result", "id": call.data["id"], "output": {"a": "rain"}}
        assert "rain" in "".join(text.text for text in texts)
        assert end.state == "done"

        @agent.tool_plain  # type: ignore[untyped-decorator, unused-ignore]
        async def wait() -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        await manager.start_stream("x", partial(answer, agent, "hello"))
        await asyncio.wait_for(started.wait(), 10)
        assert await manager.stop_stream("x")
        await asyncio.wait_for(cancelled.wait(), 10)


# What a proxy would close.


@pytest.mark.parametrize("heading", ["ag-ui", "openai-chunks"])
async def test_recipe_says_something_while_nothing_comes(heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Follower.take

    async def sooner(follower: Follower, seconds: float | None = None) -> list[StreamEntry]:
        assert seconds == 15
        return await take(follower, 0.05)

    monkeypatch.setattr(Follower, "take", sooner)
    names, model = block_of(heading).run(), Script()
    async with names["manager"] as manager:
        await manager.start_stream("x", partial(model.answer, []))
        if heading == "ag-ui":
            asked = names["Asked"](threadId="t", runId="r", messages=[])
            events, quiet = names["ag_ui"]("x", asked), ": ping\n\n"
        else:
            events, quiet = names["openai"]("x", "any"), '"delta": {}'
        await anext(events)
        assert [quiet in await anext(events) for _ in range(3)] == [True] * 3
        model.say("said", None)
        assert "said" in "".join([event async for event in events])
