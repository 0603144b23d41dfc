"""The response of a UI message stream: what its routes answer, and to whom."""

# No postponed annotations: FastAPI reads them.

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, FastAPI, Header, Request, Response

from tests.support.servers import eventually, serve_here
from tests.support.sse import request
from tests.test_docs import BLOCKS
from wsbroadcast import (
    ClientTiming,
    ConfigurationError,
    ConnectionManager,
    EngineUnavailable,
    Limits,
    Publisher,
    Run,
    ui_message_stream,
)
from wsbroadcast.manager import core_of

User = Annotated[str | None, Header(alias="x-user")]


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[ConnectionManager, int, list[str]]]:
    manager, did = ConnectionManager(**options), list[str]()
    app = FastAPI(lifespan=manager.lifespan)

    @app.middleware("http")
    async def hold_back(request: Request, call_next: Any) -> Any:  # what many apps have around their routes
        return await call_next(request)

    async def silent(run: Run) -> None:
        await asyncio.Event().wait()

    async def quick(run: Run) -> None:
        run.append("all of it")

    async def hold(run: Run) -> None:
        run.append("a")
        await asyncio.Event().wait()

    @app.post("/{name}")
    async def begin(name: str, tasks: BackgroundTasks, user: User = None) -> Response:
        run = await manager.start_stream(name, {"quick": quick, "silent": silent}.get(name, hold), user=user)
        tasks.add_task(did.append, name)
        response = ui_message_stream(manager, run)
        response.set_cookie("seen", "1")
        return response

    @app.get("/{name}")
    async def resume(name: str, user: User = None, ended: bool = False) -> Response:
        return ui_message_stream(manager, name, user=user, ended=ended)

    async with serve_here(app) as port:
        yield manager, port, did


async def test_post_has_all_of_it_and_what_the_app_adds() -> None:
    async with serving() as (manager, port, did):
        for name in ("quick", "quick"):
            async with request(port, f"/{name}", "POST", content_length="0") as stream:
                assert stream.status == 200
                assert stream.headers["x-vercel-ai-ui-message-stream"] == "v1"
                assert stream.headers["content-type"].startswith("text/event-stream")
                assert stream.headers["set-cookie"].startswith("seen=1")
                assert "content-length" not in stream.headers
                events = await stream.rest()
            status = await manager.stream_status(name)
            assert status is not None
            assert json.loads(events[0].data) == {"type": "start", "messageId": status.run}
            assert [json.loads(event.data).get("delta") for event in events[:-1]] == [
                None,
                None,
                "all of it",
                None,
                None,
            ]
            assert events[-1].data == "[DONE]"

        async def is_done() -> bool:
            return did == ["quick", "quick"]

        await eventually(is_done)


async def test_get_answers_204_where_there_is_nothing_to_resume() -> None:
    async with serving() as (manager, port, _):
        async with manager.stream("free"):
            async with request(port, "/free") as stream:
                assert stream.status == 200
            async with request(port, "/free", x_user="ann") as stream:
                assert stream.status == 204  # it isn't ann's
        async with request(port, "/owned", "POST", x_user="ann", content_length="0") as stream:
            await stream.event()
        async with request(port, "/owned", x_user="ann") as stream:
            assert (await stream.event()).json["type"] == "start"
        await manager.stop_stream("owned")
        for name, user in (("owned", "ann"), ("owned", "bob"), ("none", "ann"), ("%00", "ann"), ("x" * 300, "ann")):
            async with request(port, f"/{name}", x_user=user, connection="close") as stream:
                assert (stream.status, await stream.whole()) == (204, b""), name


async def test_last_run_may_be_shown_after_its_end() -> None:
    async with serving() as (manager, port, _):
        async with request(port, "/x", "POST", x_user="ann", content_length="0") as stream:
            first = await stream.event()
        await manager.stop_stream("x")
        async with request(port, "/x?ended=1", x_user="ann") as stream:
            events = await stream.rest()
        assert events[0] == first
        assert [json.loads(event.data)["type"] for event in events[2:-1]] == ["text-delta", "text-end", "abort"]
        for name, user in (("x", "bob"), ("none", "ann")):
            async with request(port, f"/{name}?ended=1", x_user=user) as stream:
                assert stream.status == 204
        async with manager.stream("short", ttl=0.01):
            pass

        async def is_over() -> bool:
            return await manager.stream_status("short") is None

        await eventually(is_over)
        async with request(port, "/short?ended=1") as stream:
            assert stream.status == 204


async def test_status_stands_for_the_run_that_a_worker_has_begun(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "begun(manager: " in block.source)
    begun = block.run()["begun"]
    url = f"sqlite:///{tmp_path}/streams.db"
    async with ConnectionManager(url) as manager, Publisher(url) as worker:
        app, runs = FastAPI(), list[str]()

        async def answer(text: str) -> None:
            async with worker.stream("x") as run:
                run.append(text)
                runs.append(run.run_id)

        tasks: list[asyncio.Task[None]] = []

        @app.get("/{text}")
        async def ask(text: str) -> Response:
            status = await begun(manager, "x", lambda: tasks.append(asyncio.create_task(answer(text))))
            return ui_message_stream(manager, status)

        async with serve_here(app) as port:
            for text in ("one", "two"):
                async with request(port, f"/{text}") as stream:
                    events = await stream.rest()
                assert [json.loads(event.data).get("delta") for event in events[2:3]] == [text]
                assert events[0].json["messageId"] == runs[-1]
        await asyncio.gather(*tasks)


async def test_client_learns_at_once_that_it_is_there_and_is_kept_while_nothing_comes() -> None:
    timing = ClientTiming(stream_ping_interval=0.05)
    async with (
        serving(client_timing=timing) as (manager, port, _),
        request(port, "/silent", "POST", content_length="0") as stream,
    ):
        assert (await stream.event()).json["type"] == "start"
        while stream.parser.comments < 2:
            assert not stream.parser.feed(await stream.piece())
        await manager.stop_stream("silent")
        assert [event.data for event in await stream.rest()] == ['{"type":"abort"}', "[DONE]"]


async def test_error_in_what_makes_the_chunks_ends_the_viewer_and_nothing_else(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with serving() as (manager, _, _):
        app = FastAPI()

        def parts(data: dict[str, Any]) -> None:
            raise ValueError("not of ours")

        app.add_api_route("/", lambda: ui_message_stream(manager, "x", parts=parts), response_model=None)
        async with manager.stream("x") as run, serve_here(app) as other:
            run.append({"a": 1})
            async with request(other, "/") as stream:
                await stream.rest()
                assert stream.is_cut  # a client takes it for a network that has failed, and for no end
            assert "not of ours" in capfd.readouterr().err
            run.append("goes on")


async def test_run_that_another_has_followed_is_not_shown_as_that() -> None:
    async with serving() as (manager, _, _):
        async with manager.stream("x") as old:
            pass
        app = FastAPI()
        app.add_api_route("/", lambda: ui_message_stream(manager, old), response_model=None)
        async with manager.stream("x") as run, serve_here(app) as other:
            run.append("new")
            async with request(other, "/") as stream:
                assert stream.status == 404


async def test_viewer_that_leaves_stops_nothing_and_leaves_nothing_behind() -> None:
    async with serving() as (manager, port, _):
        async with request(port, "/x", "POST", content_length="0") as stream:
            await stream.event()

        async def is_left() -> bool:
            return "wsbroadcast stream viewer" not in {task.get_name() for task in asyncio.all_tasks()}

        await eventually(is_left)
        status = await manager.stream_status("x")
        assert status is not None
        assert status.is_running


async def test_limits_and_a_drain_are_told_as_a_status() -> None:
    async with serving(limits=Limits(max_connections=1)) as (manager, port, _):
        async with request(port, "/x", "POST", content_length="0") as stream:
            await stream.event()
            async with request(port, "/x") as second:
                assert second.status == 503
        await manager.drain(over=0)
        async with request(port, "/x") as stream:
            assert stream.status == 503


async def test_outage_is_told_as_a_status_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (manager, port, _):
        async with request(port, "/x", "POST", content_length="0") as stream:
            await stream.event()

        async def find(id_: str) -> None:
            raise EngineUnavailable("nobody answers")

        core_of(manager).find_stream = find  # type: ignore[method-assign]
        for _ in range(3):
            async with request(port, "/x") as stream:
                assert stream.status == 503
        assert caplog.text.count("a stream can't be read now: nobody answers") == 1


def test_what_is_no_run_is_told() -> None:
    with pytest.raises(ConfigurationError, match="a run, its status, or the id of a stream"):
        ui_message_stream(ConnectionManager(), 7)  # type: ignore[arg-type]
