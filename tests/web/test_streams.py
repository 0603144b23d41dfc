"""The router of streams: who may watch, what comes by each transport, and what stays when viewers go."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import Depends, FastAPI, Header
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from tests.support.asgi import turns
from tests.support.rawclient import handshake
from tests.support.servers import eventually, serve_here
from tests.support.sse import Response, request
from wsbroadcast import (
    ClientTiming,
    ConfigurationError,
    ConnectionManager,
    Engine,
    Identity,
    Limits,
    MemoryEngine,
    Run,
    SlowConsumer,
    StreamLimits,
    TokenFrom,
    create_stream_router,
)
from wsbroadcast.engines.contract import Health
from wsbroadcast.publication import Control, Publication
from wsbroadcast.testing import Cluster


def who(x_user: str | None = Header(None)) -> str | None:
    return x_user


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[ConnectionManager, int]]:
    manager = ConnectionManager()
    app = FastAPI()
    app.include_router(create_stream_router(manager, "/runs/{id}", **(options or {"authenticate": who})))
    async with serve_here(app) as port:
        yield manager, port


async def hold(run: Run) -> None:
    """Produce nothing, until it is stopped."""
    await asyncio.Event().wait()


def texts(entries: list[dict[str, Any]]) -> str:
    return "".join(each.get("text", "") for each in entries)


async def until_end(stream: Response) -> list[dict[str, Any]]:
    return [event.json for event in await stream.rest()]


async def test_event_stream_has_what_was_written_and_what_comes() -> None:
    async with serving() as (manager, port):
        run = await manager.start_stream("1", hold, user="ann")
        run.append("Hello, ")
        run.append("world")
        async with request(port, "/runs/1", x_user="ann") as stream:
            assert stream.status == 200
            assert stream.headers["content-type"].startswith("text/event-stream")
            first = await stream.event()
            assert first.json == {"type": "text", "text": "Hello, world", "position": first.id}
            run.append({"tool": "search", "q": ["a", 1, None]})
            data = await stream.event()
            assert data.json["data"] == {"tool": "search", "q": ["a", 1, None]}
            run.append("!")
            assert (await stream.event()).json["text"] == "!"
            await manager.stop_stream("1")
            end = await stream.event()
            assert end.json == {"type": "end", "state": "cancelled", "position": end.id}
            assert await stream.rest() == []
        async with request(port, "/runs/1", x_user="ann", last_event_id=data.id) as stream:
            assert [each["type"] for each in await until_end(stream)] == ["text", "end"]
        async with request(port, "/runs/1", x_user="ann", last_event_id=end.id, connection="close") as stream:
            assert (stream.status, await stream.whole()) == (204, b"")
        async with request(port, f"/runs/1?since={end.id}", x_user="ann") as stream:
            assert stream.status == 204
        async with request(port, "/runs/1", x_user="ann") as stream:
            whole = await until_end(stream)
            assert [each["type"] for each in whole] == ["text", "data", "text", "end"]
            assert texts(whole) == "Hello, world!"


async def test_position_of_another_run_is_reset() -> None:
    async with serving() as (manager, port):
        async with manager.stream("1", user="ann") as run:
            run.append("old")
        async with request(port, "/runs/1", x_user="ann") as stream:
            seen = (await stream.event()).id
        async with manager.stream("1", user="ann") as run:
            run.append("new")
        for since in (seen, "nonsense", "x" * 300, f"{run.run_id}:99"):
            async with request(port, "/runs/1", x_user="ann", last_event_id=since) as stream:
                entries = await until_end(stream)
                assert [each["type"] for each in entries] == ["reset", "text", "end"], since
                assert texts(entries) == "new"


async def test_poll_that_finds_another_run_without_entries_yet_is_told_to_reset() -> None:
    async with serving() as (manager, port):
        async with manager.stream("1", user="ann") as old:
            old.append("old")
        since, entries = f"{old.run_id}:1", list[dict[str, Any]]()
        run = await manager.start_stream("1", hold, user="ann")
        for wait in ("0", "0", "20"):
            if wait == "20":
                run.append("new")
            path = f"/runs/1?since={since}&wait={wait}"
            async with request(port, path, x_user="ann", accept="application/json") as answer:
                told = await answer.json()
            since = told["position"]
            entries += told["entries"]
        assert [(each["type"], each.get("text")) for each in entries] == [("reset", None), ("text", "new")]


@pytest.mark.parametrize("path", ["/runs/1", "/runs/1/status", "/runs/2", "/runs/%00", "/runs/" + "x" * 300])
async def test_stranger_sees_no_more_than_of_a_stream_that_is_not_there(path: str) -> None:
    async with serving() as (manager, port):
        await manager.start_stream("1", hold, user="ann")
        answers = []
        for accept in ("text/event-stream", "application/json"):
            async with request(port, path, x_user="bob", accept=accept) as answer:
                answers.append((answer.status, await answer.whole()))
        async with request(port, "/runs/1/stop", "POST", x_user="bob", content_length="0") as answer:
            answers.append((answer.status, await answer.whole()))
        assert set(answers) == {(404, b"there is no such stream")}
        async with request(port, "/runs/1") as answer:
            assert answer.status == 401
        with pytest.raises(InvalidStatus) as refused:
            async with connect(f"ws://127.0.0.1:{port}/runs/1", additional_headers={"x-user": "bob"}):
                pass
        assert refused.value.response.status_code == 404
        status = await manager.stream_status("1")
        assert status is not None
        assert status.is_running


async def test_stop_and_status() -> None:
    async with serving() as (manager, port):
        run = await manager.start_stream("1", hold, user="ann")
        run.append("a")
        async with request(port, "/runs/1/status", x_user="ann") as answer:
            status = await answer.json()
        assert (status["state"], status["user"], status["id"], status["run"]) == ("running", "ann", "1", run.run_id)
        told = []
        for _ in range(2):
            async with request(port, "/runs/1/stop", "POST", x_user="ann", content_length="0") as answer:
                told.append(await answer.json())
        assert told == [{"stopped": True}, {"stopped": False}]
        async with request(port, "/runs/1/status", x_user="ann") as answer:
            status = await answer.json()
        assert status["state"] == "cancelled"
        assert status["ended_at"] >= status["started_at"]


async def test_long_poll_reads_on() -> None:
    async with serving() as (manager, port):
        run = await manager.start_stream("1", hold, user="ann")

        async def poll(since: str = "", wait: float = 10) -> Any:
            path = f"/runs/1?since={since}&wait={wait}"
            async with request(port, path, x_user="ann", accept="application/json") as answer:
                assert answer.status == 200
                return await answer.json()

        empty = await poll(wait=0)
        assert (empty["state"], empty["entries"]) == ("running", [])
        waiting = asyncio.create_task(poll(empty["position"]))
        run.append("a")
        first = await waiting
        assert texts(first["entries"]) == "a"
        assert first["position"] == first["entries"][-1]["position"]
        await manager.stop_stream("1")
        last = await poll(first["position"])
        assert (last["state"], [each["type"] for each in last["entries"]]) == ("cancelled", ["end"])
        again = await poll(last["position"])
        assert (again["state"], again["entries"]) == ("cancelled", [])
        async with request(port, "/runs/1?wait=x", x_user="ann", accept="application/json") as answer:
            assert answer.status == 422


async def test_web_socket_gets_entries_as_messages() -> None:
    async with serving() as (manager, port):
        run = await manager.start_stream("1", hold, user="ann")
        run.append("a")
        headers = {"x-user": "ann"}
        async with connect(f"ws://127.0.0.1:{port}/runs/1", additional_headers=headers) as socket:
            first = json.loads(await socket.recv())
            run.append({"b": 1})
            await manager.stop_stream("1")
            rest = [json.loads(message) async for message in socket]
            assert [each["type"] for each in rest] == ["data", "end"]
            assert socket.close_code == 1000
        since = first["position"]
        async with connect(f"ws://127.0.0.1:{port}/runs/1?since={since}", additional_headers=headers) as socket:
            assert [json.loads(message) async for message in socket] == rest


def by_token(token: str | None = Depends(TokenFrom(subprotocol="access_token", first_message=True))) -> str | None:
    return token


async def test_web_socket_may_bring_its_token_as_a_subprotocol_or_a_message() -> None:
    async with serving(authenticate=by_token) as (manager, port):
        async with manager.stream("1", user="ann") as run:
            run.append("a")
        url = f"ws://127.0.0.1:{port}/runs/1"
        async with connect(url, subprotocols=[Subprotocol("access_token"), Subprotocol("ann")]) as socket:
            assert texts([json.loads(message) async for message in socket]) == "a"
        async with connect(url) as socket:
            await socket.send("ann")
            assert texts([json.loads(message) async for message in socket]) == "a"
        async with connect(url) as socket:
            await socket.send("bob")
            await socket.wait_closed()
            assert socket.close_code == 4403


async def test_viewer_that_leaves_stops_nothing_and_leaves_nothing_behind() -> None:
    async with serving() as (manager, port):
        run = await manager.start_stream("1", hold, user="ann")
        run.append("a")
        for _ in range(3):
            async with request(port, "/runs/1", x_user="ann") as stream:
                await stream.event()
        async with connect(f"ws://127.0.0.1:{port}/runs/1", additional_headers={"x-user": "ann"}) as socket:
            await socket.recv()

        async def is_left() -> bool:
            tasks = {task.get_name() for task in asyncio.all_tasks()}
            return "wsbroadcast stream viewer" not in tasks

        await eventually(is_left)
        assert run.state == "running"


async def test_viewer_is_sent_away_with_its_user_and_at_a_drain() -> None:
    async with serving() as (manager, port):
        await manager.start_stream("1", hold, user="ann")
        async with request(port, "/runs/1", x_user="ann") as stream:
            await manager.close_user("ann", code=4401, reason="out")
            assert (await stream.named("close")).json == {"type": "close", "code": 4401, "reason": "out"}
            assert await stream.rest() == []
        async with request(port, "/runs/1", x_user="ann") as stream:
            headers = {"x-user": "ann"}
            async with connect(f"ws://127.0.0.1:{port}/runs/1", additional_headers=headers) as socket:
                await manager.drain(over=0)
                assert (await stream.named("close")).json["code"] == 1012
                assert stream.parser.retry is not None
                await socket.wait_closed()
                assert socket.close_code == 1012
        async with request(port, "/runs/1", x_user="ann") as stream:
            assert stream.status == 200  # told when to come back: an EventSource takes a 503 as final
            assert await stream.rest() == []
            assert stream.parser.retry is not None


@pytest.mark.parametrize("path", ["/runs/1", "/runs/1?wait=0", "/runs/1/status", "/runs/1/stop"])
async def test_drain_that_begins_while_somebody_comes_in_answers_once(path: str) -> None:
    draining: list[asyncio.Task[None]] = []
    errors: list[Exception] = []
    manager, app = ConnectionManager(), FastAPI()

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:
            errors.append(error)
            raise

    async def slowly() -> str:
        draining.append(asyncio.create_task(manager.drain(over=0)))
        await turns(10)
        return "ann"

    app.include_router(create_stream_router(manager, "/runs/{id}", authenticate=slowly))
    async with serve_here(watched) as port:
        await manager.start_stream("1", hold, user="ann")
        method = "POST" if path.endswith("stop") else "GET"
        accept = "application/json" if "wait" in path else "*/*"
        async with request(port, path, method, content_length="0", connection="close", accept=accept) as answer:
            await answer.whole()
            assert answer.status == (200 if path == "/runs/1" else 503)  # of an EventSource 503 would be the end
        await asyncio.gather(*draining)
    assert errors == []


async def test_public_router_shows_a_stream_to_everybody_and_lets_its_owner_stop_it() -> None:
    async with serving(public=True) as (manager, port):
        await manager.start_stream("owned", hold, user="ann")
        await manager.start_stream("free", hold)
        for id_, status in (("owned", 404), ("free", 200)):
            async with request(port, f"/runs/{id_}") as stream:
                assert stream.status == 200
            async with request(port, f"/runs/{id_}/status") as answer:
                assert (await answer.json())["state"] == "running"
            async with request(port, f"/runs/{id_}/stop", "POST", content_length="0") as answer:
                assert answer.status == status


async def test_stream_without_an_owner_is_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (manager, port):
        await manager.start_stream("1", hold)
        async with request(port, "/runs/1", x_user="ann") as stream:
            assert stream.status == 404
        assert "the stream '1' has no owner" in caplog.text


async def test_routes_stand_in_the_documentation() -> None:
    async with serving() as (_, port):
        async with request(port, "/openapi.json", connection="close") as answer:
            paths = (await answer.json())["paths"]
        assert {path: sorted(methods) for path, methods in paths.items()} == {
            "/runs/{id}": ["get"],
            "/runs/{id}/stop": ["post"],
            "/runs/{id}/status": ["get"],
        }
        assert {each["name"] for each in paths["/runs/{id}"]["get"]["parameters"]} == {"id", "since", "wait"}


async def test_another_origin_may_not_ask() -> None:
    async with serving() as (manager, port):
        run = await manager.start_stream("1", hold, user="ann")
        for path, method in (("/runs/1", "GET"), ("/runs/1/stop", "POST"), ("/runs/1/status", "GET")):
            async with request(port, path, method, x_user="ann", origin="http://evil", content_length="0") as answer:
                assert answer.status == 403
        assert run.state == "running"
    options = {"authenticate": who, "allowed_origins": ["http://app.example"]}
    async with serving(**options) as (manager, port):
        await manager.start_stream("1", hold, user="ann")
        async with request(port, "/runs/1", x_user="ann", origin="http://app.example") as stream:
            assert stream.headers["access-control-allow-origin"] == "http://app.example"
        async with request(port, "/runs/1", "OPTIONS", origin="http://app.example") as answer:
            assert answer.status == 204


class Plain(Engine):
    """An engine that keeps nothing."""

    name = "plain"

    @classmethod
    def from_url(cls, url: str) -> Plain:
        return cls()

    async def start(self, receiver: object) -> None: ...

    async def aclose(self) -> None: ...

    async def publish(self, publication: Publication | Control) -> None: ...

    def publish_nowait(self, publication: Publication | Control) -> None: ...

    async def health(self) -> Health:
        return Health("plain", True)


async def test_engine_without_history_is_refused_where_it_is_noticed_first() -> None:
    with pytest.raises(ConfigurationError, match="plain engine can't carry streams"):
        create_stream_router(ConnectionManager(Plain()), "/runs/{id}", public=True)
    async with ConnectionManager(Plain()) as manager:
        with pytest.raises(ConfigurationError, match="plain engine can't carry streams"):
            async with manager.stream("1"):
                pass


def test_router_says_what_it_needs() -> None:
    manager = ConnectionManager(MemoryEngine())
    with pytest.raises(ConfigurationError, match="pass authenticate=…"):
        create_stream_router(manager, "/runs/{id}")
    with pytest.raises(ConfigurationError, match="names no stream"):
        create_stream_router(manager, "/runs", public=True)
    with pytest.raises(ConfigurationError, match="begins with a slash"):
        create_stream_router(manager, "runs/{id}", public=True)
    with pytest.raises(ConfigurationError, match="needs its manager first"):
        create_stream_router("/runs/{id}", public=True)  # type: ignore[arg-type]


async def test_viewers_count_as_connections_do() -> None:
    manager = ConnectionManager(limits=Limits(max_connections=1))
    app = FastAPI()
    app.include_router(create_stream_router(manager, "/runs/{id}", authenticate=who))
    async with serve_here(app) as port:
        run = await manager.start_stream("1", hold, user="ann")
        run.append("a")
        async with request(port, "/runs/1", x_user="ann") as stream:
            await stream.event()
            async with request(port, "/runs/1", x_user="ann") as refused:
                assert refused.status == 200  # told when to come back
                assert await refused.rest() == []
                assert refused.parser.retry is not None
            async with request(port, "/runs/1", x_user="ann", accept="application/json") as refused:
                assert refused.status == 503
            with pytest.raises(InvalidStatus) as error:
                async with connect(f"ws://127.0.0.1:{port}/runs/1", additional_headers={"x-user": "ann"}):
                    pass
            assert error.value.response.status_code == 503

        async def has_room() -> bool:
            async with request(port, "/runs/1?wait=0", x_user="ann", accept="application/json") as answer:
                return answer.status == 200

        await eventually(has_room)


async def test_viewer_whose_token_expires_is_sent_away() -> None:
    def briefly() -> Identity:
        return Identity("ann", expires_at=time.time() + 0.3)

    async with serving(authenticate=briefly) as (manager, port):
        await manager.start_stream("1", hold, user="ann")
        async with request(port, "/runs/1") as stream, connect(f"ws://127.0.0.1:{port}/runs/1") as socket:
            assert (await stream.named("close")).json["code"] == 4401
            await socket.wait_closed()
            assert socket.close_code == 4401


async def test_viewer_that_takes_nothing_is_cut_off_and_holds_up_nobody() -> None:
    manager = ConnectionManager(slow_consumer=SlowConsumer(send_timeout=0.3))
    app = FastAPI()
    app.include_router(create_stream_router(manager, "/runs/{id}", authenticate=who))
    async with serve_here(app) as port:
        run = await manager.start_stream("1", hold, user="ann", limits=StreamLimits(max_bytes=16 * 1024 * 1024))
        for _ in range(12):
            run.append("x" * 1024 * 1024)
        async with request(port, "/runs/1", receive_buffer=4096, x_user="ann"):
            async with request(port, "/runs/1", x_user="ann") as quick:
                assert len((await quick.event()).json["text"]) > 0

            async def is_gone() -> bool:
                return "wsbroadcast stream viewer" not in {task.get_name() for task in asyncio.all_tasks()}

            await eventually(is_gone, 5)
        assert run.state == "running"


@pytest.mark.parametrize("implementation", ["websockets-sansio", "wsproto"])
async def test_web_socket_that_takes_nothing_is_cut_off_in_silence(
    implementation: str, capfd: pytest.CaptureFixture[str]
) -> None:
    manager = ConnectionManager(slow_consumer=SlowConsumer(send_timeout=0.3))
    app = FastAPI()
    app.include_router(create_stream_router(manager, "/runs/{id}", public=True))
    async with serve_here(app, ws=implementation) as port:
        run = await manager.start_stream("1", hold, limits=StreamLimits(max_bytes=16 * 1024 * 1024))
        for _ in range(12):
            run.append("x" * 1024 * 1024)
        loop = asyncio.get_running_loop()
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.setblocking(False)
            await loop.sock_connect(stalled, ("127.0.0.1", port))
            await loop.sock_sendall(stalled, handshake(port, "/runs/1"))

            def viewers() -> int:
                return [task.get_name() for task in asyncio.all_tasks()].count("wsbroadcast stream viewer")

            async def has_come() -> bool:
                return viewers() == 1

            async def is_gone() -> bool:
                return viewers() == 0

            await eventually(has_come)
            await eventually(is_gone, 5)
            async with asyncio.timeout(5):
                while await loop.sock_recv(stalled, 2**20):
                    pass  # what was on its way
        assert run.state == "running"
    assert capfd.readouterr().err == ""


async def test_quiet_stream_is_kept_open_by_comments() -> None:
    manager = ConnectionManager(client_timing=ClientTiming(stream_ping_interval=0.1))
    app = FastAPI()
    app.include_router(create_stream_router(manager, "/runs/{id}", authenticate=who))
    async with serve_here(app) as port:
        run = await manager.start_stream("1", hold, user="ann")
        async with request(port, "/runs/1", x_user="ann") as stream:
            while stream.parser.comments < 3:
                stream.events += stream.parser.feed(await stream.piece())
            run.append("a")
            assert (await stream.event()).json["text"] == "a"


async def test_broker_that_is_away_is_503_and_nothing_is_lost() -> None:
    cluster = Cluster(1)
    app = FastAPI()
    app.include_router(create_stream_router(cluster[0], "/runs/{id}", authenticate=who))
    async with cluster, serve_here(app) as port:
        run = await cluster[0].start_stream("1", hold, user="ann")
        run.append("a")
        async with request(port, "/runs/1", x_user="ann") as stream:
            await stream.event()
            cluster.partition(0)
            run.append("b")
            async with request(port, "/runs/1", x_user="ann", accept="application/json") as answer:
                assert answer.status == 503
            async with request(port, "/runs/1/stop", "POST", x_user="ann", content_length="0") as answer:
                assert answer.status == 503
            cluster.heal(0)
            assert (await stream.event()).json["text"] == "b"


@pytest.mark.parametrize("middleware", [GZipMiddleware, CORSMiddleware])
async def test_middleware_stands_around_it(middleware: Any) -> None:
    manager = ConnectionManager()
    app = FastAPI()
    app.add_middleware(middleware)

    @app.middleware("http")
    async def passes(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    app.include_router(create_stream_router(manager, "/runs/{id}", authenticate=who))
    async with serve_here(app) as port:
        run = await manager.start_stream("1", hold, user="ann")
        async with request(port, "/runs/1", x_user="ann") as stream:
            for number in range(3):
                run.append(str(number))
                assert (await stream.event()).json["text"] == str(number)
            await manager.stop_stream("1")
            assert (await stream.event()).json["type"] == "end"


async def test_ids_are_made_of_the_path() -> None:
    manager = ConnectionManager()
    app = FastAPI()
    router = create_stream_router(manager, "/{chat}", stream="{tenant}:{chat}", authenticate=who)
    app.include_router(router, prefix="/of/{tenant}")
    async with serve_here(app) as port:
        async with manager.stream("acme:7", user="ann") as run:
            run.append("a")
        async with request(port, "/of/acme/7", x_user="ann") as stream:
            assert texts(await until_end(stream)) == "a"
        async with request(port, "/of/other/7", x_user="ann") as stream:
            assert stream.status == 404
