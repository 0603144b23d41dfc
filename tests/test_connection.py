"""One connection: what it receives, and how everybody learns of its end."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

import pytest
from starlette.websockets import WebSocket, WebSocketDisconnect

from tests.support.asgi import Peer, connected, eventually, turns
from wsbroadcast import (
    Connection,
    ConnectionClosed,
    ConnectionManager,
    ConnectionState,
    Limits,
    PermissionDenied,
)
from wsbroadcast.types import Manager

Reader = Callable[[Connection], Awaitable[Any]]


async def _iterate(connection: Connection) -> list[str | bytes]:
    return [message async for message in connection]


async def _iterate_text(connection: Connection) -> list[str]:
    return [message async for message in connection.websocket.iter_text()]


async def _raw(connection: Connection) -> Any:
    event = await connection.websocket.receive()
    if event["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(event["code"], event["reason"])
    return event


READERS: dict[str, Reader] = {
    "websocket.receive": _raw,
    "websocket.receive_text": lambda connection: connection.websocket.receive_text(),
    "websocket.receive_bytes": lambda connection: connection.websocket.receive_bytes(),
    "websocket.receive_json": lambda connection: connection.websocket.receive_json(),
    "receive": lambda connection: connection.receive(),
    "receive_text": lambda connection: connection.receive_text(),
    "receive_bytes": lambda connection: connection.receive_bytes(),
    "receive_json": lambda connection: connection.receive_json(),
}
"""Every way to read that tells of the end by `WebSocketDisconnect`."""

ENDERS: dict[str, Reader] = {
    "iter_text": _iterate_text,
    "async for": _iterate,
    "wait_closed": lambda connection: connection.wait_closed(),
}
"""Every way to read that just ends."""


def _expect_end(result: Any) -> None:
    assert isinstance(result, WebSocketDisconnect), result


async def _outcome(reader: Reader, connection: Connection) -> Any:
    """Return what the reader returns, or the exception that an endpoint's `except WebSocketDisconnect` catches."""
    try:
        return await asyncio.wait_for(reader(connection), 5)
    except WebSocketDisconnect as error:
        return error


# Receiving.


@pytest.mark.parametrize("has_both_keys", [False, True])
async def test_receive_returns_text_and_bytes(manager: ConnectionManager, has_both_keys: bool) -> None:
    peer = Peer(has_both_keys=has_both_keys)
    connection = await manager.connect(peer.websocket)
    for data in ("text", "", b"bytes", b""):
        peer.say(data)
        assert await connection.receive() == data
    peer.say("t")
    peer.say(b"b")
    assert await connection.receive_text() == "t"
    assert await connection.receive_bytes() == b"b"


@pytest.mark.parametrize("has_both_keys", [False, True])
@pytest.mark.parametrize(
    ("method", "data", "code"),
    [
        ("receive_text", b"bytes", 1003),
        ("receive_text", b"", 1003),
        ("receive_bytes", "text", 1003),
        ("receive_bytes", "", 1003),
        ("receive_json", "{", 1007),
        ("receive_json", "", 1007),
        ("receive_json", "[Infinity]", 1007),
    ],
)
async def test_a_message_of_the_wrong_kind_closes_that_connection_alone(
    manager: ConnectionManager, method: str, data: str | bytes, code: int, has_both_keys: bool
) -> None:
    [(healthy, _)] = await connected(manager, 1)
    peer = Peer(has_both_keys=has_both_keys)
    connection = await manager.connect(peer.websocket)
    peer.say(data)
    with pytest.raises(ConnectionClosed) as caught:
        await getattr(connection, method)()
    assert caught.value.code == code
    assert caught.value.reason
    assert peer.close_code == code
    assert connection.close_code == code
    await manager.broadcast("still here")
    assert await healthy.next() == "still here"


@pytest.mark.parametrize("has_both_keys", [False, True])
@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("receive_text", b"bytes", 1003),
        ("receive_text", b"", 1003),
        ("receive_bytes", "text", 1003),
        ("receive_bytes", "", 1003),
        ("receive_json", b"{}", 1003),
        ("receive_json", "{", 1007),
        ("receive_json", "", 1007),
        ("receive_json", "[" * 60_000, 1007),
        ("receive_json binary", "{}", 1003),
        ("receive_json binary", b"{", 1007),
        ("receive_json binary", b"\xff", 1007),
        ("iter_text", b"bytes", 1003),
        ("iter_bytes", "text", 1003),
        ("iter_json", "{", 1007),
    ],
)
async def test_starlettes_readers_close_that_connection_too(
    manager: ConnectionManager, name: str, data: str | bytes, code: int, has_both_keys: bool
) -> None:
    [(healthy, _)] = await connected(manager, 1)
    peer = Peer(has_both_keys=has_both_keys)
    connection = await manager.connect(peer.websocket)
    method, _, mode = name.partition(" ")
    reader = getattr(peer.websocket, method)
    peer.say(data)
    if method.startswith("iter"):
        assert [each async for each in reader()] == []
    else:
        with pytest.raises(WebSocketDisconnect) as caught:  # which every endpoint catches
            await (reader(mode=mode) if mode else reader())
        assert (caught.value.code, bool(caught.value.reason)) == (code, True)
    assert (peer.close_code, connection.close_code) == (code, code)
    assert [each.websocket for each in manager.connections] == [healthy.websocket]


async def test_starlettes_readers_read_what_they_should(manager: ConnectionManager) -> None:
    [(peer, _)] = await connected(manager, 1)
    websocket = peer.websocket
    for data in ("text", b"bytes", '{"a": NaN}', b"[1]"):
        peer.say(data)
    assert await websocket.receive_text() == "text"
    assert await websocket.receive_bytes() == b"bytes"
    assert str(await websocket.receive_json()) == "{'a': nan}"  # the standard library's reader, as Starlette has it
    assert await websocket.receive_json(mode="binary") == [1]
    with pytest.raises(RuntimeError, match="mode"):
        await websocket.receive_json(mode="yaml")


async def test_an_apps_own_readers_stay(manager: ConnectionManager) -> None:
    class Shouting(WebSocket):
        async def receive_text(self) -> str:
            return (await super().receive_text()).upper()

    peer = Peer()
    websocket = Shouting(peer.scope, peer.receive, peer.send)
    connection = await manager.connect(websocket)
    peer.say("hello")
    assert await websocket.receive_text() == "HELLO"
    assert isinstance(websocket, Shouting)
    peer.say("hello")
    assert await connection.receive_text() == "hello"


@pytest.mark.parametrize(("name", "said"), [("receive_text", b"x"), ("receive_bytes", "x"), ("receive_json", "{")])
async def test_readers_below_an_apps_own_close_the_connection_too(
    manager: ConnectionManager, name: str, said: str | bytes
) -> None:
    class Counting(WebSocket):
        reads = 0

        async def receive_text(self) -> str:
            self.reads += 1
            return await super().receive_text()

        async def receive_bytes(self) -> bytes:
            self.reads += 1
            return await super().receive_bytes()

        async def receive_json(self, mode: str = "text") -> Any:
            self.reads += 1
            return await super().receive_json(mode)

    class Last(Counting):
        pass

    peer = Peer()
    websocket = Last(peer.scope, peer.receive, peer.send)
    await manager.connect(websocket)
    peer.say(said)
    with pytest.raises(WebSocketDisconnect):
        await getattr(websocket, name)()
    assert peer.close_code == (1007 if name == "receive_json" else 1003)
    assert websocket.reads == (2 if name == "receive_json" else 1)


async def test_class_of_the_apps_own_may_want_to_know_what_is_below_it(manager: ConnectionManager) -> None:
    seen: list[str] = []

    class Registered(WebSocket):
        def __init_subclass__(cls, *, topic: str) -> None:
            seen.append(topic)

    class Named(Registered, topic="news"):
        pass

    peer = Peer()
    connection = await manager.connect(Named(peer.scope, peer.receive, peer.send))
    await connection.send("hello")
    assert await peer.next() == "hello"
    assert isinstance(connection.websocket, Named)
    assert type(connection.websocket).__name__ == "Named"
    assert seen == ["news"]


# Reads that are cancelled.


@pytest.mark.parametrize("name", [*READERS, "async for", "wait_closed first"])
async def test_cancelled_read_loses_no_message_to_a_slow_hook(manager: ConnectionManager, name: str) -> None:
    seen: list[str | bytes] = []
    releases: list[asyncio.Event] = []

    @manager.on_message
    async def slow(connection: Connection, message: str | bytes) -> None:
        releases.append(asyncio.Event())
        await releases[-1].wait()
        seen.append(message)

    [(peer, connection)] = await connected(manager, 1)
    first = {"async for": connection.__anext__, "wait_closed first": connection.wait_closed}.get(
        name, lambda: READERS[name](connection)
    )
    again = READERS.get(name, READERS["receive"])
    for number in range(5):
        data: str | bytes = b"%d" % number if name.endswith("bytes") else str(number)
        peer.say(data)
        for _ in range(3):  # cancelled again and again, the hook runs on
            reading = asyncio.ensure_future(first())
            await eventually(lambda number=number: len(releases) == number + 1)  # type: ignore[misc]
            await turns()
            reading.cancel()
            await asyncio.wait({reading})
            assert reading.cancelled()
        releases[-1].set()
        result = await again(connection)
        assert data == (result.get("text", result.get("bytes")) if isinstance(result, dict) else type(data)(result))
    assert len(seen) == len(releases) == 5


async def test_cancelled_read_loses_no_message_to_a_plain_hook_that_returns_an_awaitable(
    manager: ConnectionManager,
) -> None:
    release = asyncio.Event()
    seen: list[str | bytes] = []

    async def slow(message: str | bytes) -> None:
        await release.wait()
        seen.append(message)

    manager.on_message(lambda connection, message: slow(message))
    [(peer, connection)] = await connected(manager, 1)
    for text in ("hello", "again"):
        release.clear()
        peer.say(text)
        for _ in range(3):
            reading = asyncio.ensure_future(connection.receive())
            await turns()
            reading.cancel()
            await asyncio.wait({reading})
        release.set()
        assert await asyncio.wait_for(connection.receive(), 5) == text
    assert seen == ["hello", "again"]


async def test_message_whose_read_was_cancelled_is_counted_once() -> None:
    release = asyncio.Event()
    async with ConnectionManager(limits=Limits(max_inbound_rate=0.001, inbound_burst=2)) as manager:
        manager.on_message(lambda connection, message: release.wait())
        [(peer, connection)] = await connected(manager, 1)
        for text in ("first", "second"):
            release.clear()
            peer.say(text)
            for _ in range(5):
                reading = asyncio.ensure_future(connection.receive())
                await turns()
                reading.cancel()
                await asyncio.wait({reading})
            release.set()
            assert await asyncio.wait_for(connection.receive(), 5) == text
        assert manager.stats().limited == {}
        peer.say("one too many")
        with pytest.raises(ConnectionClosed):
            await connection.receive()


@pytest.mark.parametrize("rest", [(), (0,)], ids=["once", "and the first one again"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
async def test_messages_whose_reads_were_cancelled_keep_their_order(
    manager: ConnectionManager, order: tuple[int, ...], rest: tuple[int, ...]
) -> None:
    release = asyncio.Event()

    @manager.on_message
    async def slow(connection: Connection, message: str | bytes) -> None:
        await release.wait()

    [(peer, connection)] = await connected(manager, 1)
    for number in range(3):
        peer.say(str(number))
    for cancelled in (order, rest):
        readings = []
        for _ in cancelled:
            readings.append(asyncio.ensure_future(connection.receive()))
            await turns()
        for index in cancelled:
            readings[index].cancel()
            await asyncio.wait({readings[index]})
    release.set()
    assert [await connection.receive() for _ in order] == ["0", "1", "2"]


async def test_message_whose_read_was_cancelled_is_refused_by_its_hook_all_the_same(
    manager: ConnectionManager,
) -> None:
    release = asyncio.Event()

    @manager.on_message
    async def refuse(connection: Connection, message: str | bytes) -> None:
        await release.wait()
        raise PermissionDenied("no")

    [(peer, connection)] = await connected(manager, 1)
    peer.say("hello")
    reading = asyncio.ensure_future(connection.receive())
    await turns()
    reading.cancel()
    await asyncio.wait({reading})
    release.set()
    await turns()
    with pytest.raises(PermissionDenied):
        await connection.receive()
    assert connection.is_open


# The end.


@pytest.mark.parametrize("name", READERS)
async def test_every_reader_learns_of_the_peers_end(manager: ConnectionManager, name: str) -> None:
    ended: list[Connection] = []
    manager.on_disconnect(ended.append)
    [(peer, connection)] = await connected(manager, 1)
    reading = asyncio.ensure_future(_outcome(READERS[name], connection))
    await turns()
    peer.leave(4321, "bye")
    error = await reading
    _expect_end(error)
    assert (error.code, error.reason) == (4321, "bye")
    assert (connection.close_code, connection.close_reason) == (4321, "bye")
    assert connection.state is ConnectionState.CLOSED
    assert manager.connections == []
    # Asked again, it says the same again, where Starlette and the servers raise RuntimeError.
    again = await _outcome(READERS[name], connection)
    _expect_end(again)
    assert again.code == 4321
    manager.disconnect(connection)
    await eventually(lambda: bool(ended))
    await turns()
    assert ended == [connection]


@pytest.mark.parametrize("way", ["leave", "close"])
@pytest.mark.parametrize("name", ENDERS)
async def test_every_loop_ends_with_the_connection(manager: ConnectionManager, name: str, way: str) -> None:
    [(peer, connection)] = await connected(manager, 1)
    reading = asyncio.ensure_future(ENDERS[name](connection))
    await turns()
    assert not reading.done()
    if way == "leave":
        peer.leave(4321)
    else:
        await connection.close(4321)
    await asyncio.wait_for(reading, 5)
    assert connection.close_code == 4321
    assert manager.connections == []
    assert not await asyncio.wait_for(ENDERS[name](connection), 5)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("already received"), ConnectionResetError()])
async def test_every_reader_takes_a_servers_error_for_the_end(
    manager: ConnectionManager, name: str, error: Exception
) -> None:
    [(peer, connection)] = await connected(manager, 1)
    peer.error_on_receive = error
    result = await _outcome(READERS[name], connection)
    _expect_end(result)
    assert result.code == 1006
    assert manager.connections == []


@pytest.mark.parametrize("name", READERS)
async def test_every_reader_is_interrupted_when_the_connection_is_closed_from_elsewhere(
    manager: ConnectionManager, name: str
) -> None:
    [(peer, connection)] = await connected(manager, 1)
    reading = asyncio.ensure_future(_outcome(READERS[name], connection))
    await turns()
    await manager.close(connection, 4000, "enough")
    error = await reading
    _expect_end(error)
    assert (error.code, error.reason) == (4000, "enough")
    assert reading.cancelling() == 0
    assert peer.close_code == 4000
    again = await _outcome(READERS[name], connection)
    _expect_end(again)
    assert again.code == 4000


@pytest.mark.parametrize("name", [*READERS, *ENDERS])
async def test_every_reader_learns_that_a_send_found_the_peer_gone(manager: ConnectionManager, name: str) -> None:
    [(peer, connection)] = await connected(manager, 1)
    reading = asyncio.ensure_future(_outcome((READERS | ENDERS)[name], connection))
    await turns()
    peer.vanish()
    await manager.broadcast("finds out")
    result = await reading
    if name in READERS:
        _expect_end(result)
        assert result.code == 1006
    assert manager.connections == []


@pytest.mark.parametrize("name", [*READERS, *ENDERS])
async def test_cancellation_from_outside_passes_through(manager: ConnectionManager, name: str) -> None:
    [(peer, connection)] = await connected(manager, 1)
    reading = asyncio.ensure_future((READERS | ENDERS)[name](connection))
    await turns()
    reading.cancel()
    await asyncio.wait({reading}, timeout=5)
    assert reading.cancelled()
    assert connection.is_open
    peer.say("later")
    assert await connection.receive() == "later"


@pytest.mark.parametrize("close_first", [True, False])
async def test_cancellation_from_outside_passes_through_a_close_of_the_same_turn(
    manager: ConnectionManager, close_first: bool
) -> None:
    [(_, connection)] = await connected(manager, 1)
    reading = asyncio.ensure_future(connection.websocket.receive_text())
    await turns()
    if close_first:
        closing = asyncio.ensure_future(connection.close())
        await asyncio.sleep(0)
        reading.cancel()
    else:
        reading.cancel()
        closing = asyncio.ensure_future(connection.close())
    await asyncio.wait({reading, closing}, timeout=5)
    # Either the cancellation got through, or the reader had ended of the close before it came.
    assert reading.cancelled() or (close_first and isinstance(reading.exception(), WebSocketDisconnect))
    assert not closing.cancelled()


async def test_a_task_may_close_the_connection_it_reads(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    peer.say("close me")

    async def endpoint() -> int:
        async for _ in connection:
            await connection.close(4000)
        return 1

    assert await asyncio.wait_for(endpoint(), 5) == 1
    assert peer.close_code == 4000


async def test_the_end_is_told_once_whichever_ways_it_is_noticed(manager: ConnectionManager) -> None:
    ended: list[Connection] = []
    manager.on_disconnect(ended.append)
    [(peer, connection)] = await connected(manager, 1)
    reading = asyncio.ensure_future(_outcome(READERS["websocket.receive_text"], connection))
    waiting = asyncio.ensure_future(connection.wait_closed())
    await turns()
    await manager.broadcast("one")
    peer.leave()
    await manager.broadcast("two")
    manager.disconnect(connection)
    closing = asyncio.ensure_future(connection.close())
    await asyncio.wait({reading, waiting, closing}, timeout=5)
    with pytest.raises(ConnectionClosed):
        await connection.send("late")
    await eventually(lambda: bool(ended))
    await turns(20)
    assert ended == [connection]
    assert manager.stats().disconnects == 1


# wait_closed.


@pytest.mark.parametrize("reader_first", [True, False])
async def test_wait_closed_leaves_the_messages_to_a_reader(manager: ConnectionManager, reader_first: bool) -> None:
    [(peer, connection)] = await connected(manager, 1)
    tasks: dict[str, asyncio.Future[Any]] = {}
    for name in ("async for", "wait_closed") if reader_first else ("wait_closed", "async for"):
        tasks[name] = asyncio.ensure_future(ENDERS[name](connection))
        await turns()
    for number in range(10):
        peer.say(str(number))
        await turns()
    assert not tasks["wait_closed"].done()
    assert connection.is_open
    peer.leave(4321)
    await asyncio.wait_for(tasks["wait_closed"], 5)
    assert await tasks["async for"] == [str(number) for number in range(10)]
    assert connection.close_code == 4321


async def test_wait_closed_returns_at_once_after_the_end(manager: ConnectionManager) -> None:
    [(_, connection)] = await connected(manager, 1)
    manager.disconnect(connection)
    await asyncio.wait_for(connection.wait_closed(), 5)


async def test_wait_closed_returns_only_when_the_close_is_done(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    peer.stall()
    await manager.broadcast("held")
    waiting = asyncio.ensure_future(connection.wait_closed())
    closing = asyncio.ensure_future(connection.close())
    await turns(20)
    assert not waiting.done()
    peer.resume()
    await asyncio.wait({waiting, closing}, timeout=5)
    assert waiting.done()
    assert peer.close_code == 1000


@pytest.mark.parametrize("way", ["close", "disconnect", "peer"])
async def test_every_one_of_several_readers_learns_of_the_end(manager: ConnectionManager, way: str) -> None:
    [(peer, connection)] = await connected(manager, 1)
    names = ["wait_closed", "websocket.receive_text", "receive", "receive_json", "async for", "wait_closed"]
    reading = []
    for name in names:
        reading.append(asyncio.ensure_future(_outcome((READERS | ENDERS)[name], connection)))
        await turns()
    if way == "peer":
        peer.leave()
    elif way == "close":
        await connection.close()
    else:
        manager.disconnect(connection)
    _, pending = await asyncio.wait(reading, timeout=5)
    assert pending == set()
    assert not connection._transport.is_read


async def test_wait_closed_by_several_tasks(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    waiting = [asyncio.ensure_future(connection.wait_closed()) for _ in range(3)]
    await turns()
    peer.say("thrown away")
    await turns()
    assert not any(task.done() for task in waiting)
    peer.leave()
    _, pending = await asyncio.wait(waiting, timeout=5)
    assert pending == set()


# on_message.


@pytest.mark.parametrize("name", ["websocket.receive", "websocket.receive_text", "receive", "receive_text"])
async def test_on_message_runs_before_the_endpoint_gets_it_however_it_reads(
    manager: ConnectionManager, name: str
) -> None:
    seen: list[tuple[Connection, str | bytes]] = []

    @manager.on_message
    async def on_message(connection: Connection, message: str | bytes) -> None:
        await asyncio.sleep(0)
        seen.append((connection, message))

    [(peer, connection)] = await connected(manager, 1)
    peer.say("hello")
    await READERS[name](connection)
    assert seen == [(connection, "hello")]


@pytest.mark.parametrize("name", ENDERS)
async def test_on_message_runs_in_every_loop(manager: ConnectionManager, name: str) -> None:
    seen: list[str | bytes] = []
    manager.on_message(lambda connection, message: seen.append(message))
    [(peer, connection)] = await connected(manager, 1)
    peer.say("a")
    peer.say("b")
    peer.leave()
    await asyncio.wait_for(ENDERS[name](connection), 5)
    assert seen == ["a", "b"]


@pytest.mark.parametrize("name", ["websocket.receive_text", "receive", "async for", "wait_closed"])
async def test_on_message_that_refuses_is_raised_where_the_endpoint_reads(
    manager: ConnectionManager, name: str
) -> None:
    def refuse(connection: Connection, message: str | bytes) -> None:
        raise PermissionDenied("no")

    manager.on_message(refuse)
    [(peer, connection)] = await connected(manager, 1)
    peer.say("hello")
    with pytest.raises(PermissionDenied):
        await (READERS | ENDERS)[name](connection)


async def test_repr_tells_id_and_state_only(manager: ConnectionManager) -> None:
    connection = await manager.connect(Peer().websocket, user="secret", info={"token": "secret"})
    assert repr(connection) == f"<Connection {connection.id} open>"


async def test_a_state_that_cannot_follow_is_refused(manager: ConnectionManager) -> None:
    [(_, connection)] = await connected(manager, 1)
    manager.disconnect(connection)
    with pytest.raises(RuntimeError, match="from closed to open"):
        connection._enter(ConnectionState.OPEN, 1000)


async def test_websocket_of_a_subclass_that_has_a_send_of_its_own_is_not_passed_by() -> None:
    class Redacting(WebSocket):
        async def send(self, message: MutableMapping[str, Any]) -> None:
            if message["type"] == "websocket.send":
                message = {**message, "text": message["text"].replace("secret", "******")}
            await super().send(message)

    peer = Peer()
    manager = ConnectionManager()
    connection = await manager.connect(Redacting(peer.scope, peer.receive, peer.send))
    assert connection._transport.fast_path_refused == "send is taken over"
    await manager.broadcast("a secret")
    await connection.websocket.send_text("the app's secret")
    assert await peer.wait_messages(2) == ["a ******", "the app's ******"]
    manager.disconnect(connection)
    connection = await manager.connect(connection.websocket)  # anew
    await manager.broadcast("another secret")
    assert await peer.wait_messages(3) == ["a ******", "the app's ******", "another ******"]
    await connection.close(4000)
    assert peer.close_code == 4000
    await manager.aclose()


# What is reached through it.


def test_type_of_its_manager_has_everything_public_that_the_class_has() -> None:
    def members(kind: type) -> dict[str, object]:
        return {name: value for name, value in inspect.getmembers(kind) if not name.startswith("_")}

    of_protocol, of_class = members(Manager), members(ConnectionManager)
    assert {*of_protocol, *Manager.__annotations__} == {*of_class, "hooks"}
    for name, function in of_protocol.items():
        # Of what is overloaded nothing is left to look at when it runs; type checkers compare that.
        if inspect.isfunction(function) and function.__name__ == name:
            mine, its = inspect.signature(function), inspect.signature(cast(Any, of_class[name]))
            assert [*mine.parameters] == [*its.parameters], name
