"""What broadcasts return, whom several audiences reach, and `broadcast_soon`."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi import FastAPI

from tests.support.asgi import Peer, connected, eventually, lifespan, visit
from tests.support.fake_broker import FakeBroker, FakeEngine
from wsbroadcast import (
    EVERYONE,
    HOLD_BACK,
    Audience,
    ConnectionDep,
    ConnectionManager,
    Control,
    Delivery,
    EncodeError,
    EngineUnavailable,
    InvalidChannel,
    LifecycleError,
    MemoryEngine,
    Message,
    Publication,
    Publisher,
    Receipt,
    create_router,
)
from wsbroadcast.message import JSONDefault
from wsbroadcast.node.lanes import Outbox
from wsbroadcast.node.node import OnceEach
from wsbroadcast.publication import Position, Publications


@pytest.fixture
async def manager() -> AsyncIterator[ConnectionManager]:
    async with ConnectionManager() as manager:
        yield manager


# Receipts.


async def test_receipt_counts_members_here(manager: ConnectionManager) -> None:
    [(_, ada)] = await connected(manager, 1, user="ada", channels=["a"])
    pairs = await connected(manager, 2, user="bob", channels=["a", "b"])
    for receipt, expected in (
        (await manager.broadcast("x"), 3),
        (await manager.broadcast("x", channel="a"), 3),
        (await manager.broadcast("x", channel="b"), 2),
        (await manager.broadcast("x", channel="c"), 0),
        (await manager.broadcast("x", user="ada"), 1),
        (await manager.broadcast("x", channel="a", exclude=ada), 2),
        (await manager.broadcast("x", channel="b", exclude=ada), 2),
        (await manager.broadcast("x", exclude=[ada, pairs[0][1].websocket]), 1),
        (await manager.broadcast("x", exclude_users="bob"), 1),
        (await manager.broadcast("x", exclude_users=["ada", "bob", "carl"]), 0),
        (await manager.broadcast("x", channel="a", exclude=pairs[0][1], exclude_users=["bob"]), 1),
        (await manager.broadcast("x", channels=["a", "b"]), 3),
        (await manager.broadcast("x", channels=["a", "b"], exclude_users=["ada"]), 2),
        (await manager.broadcast("x", channels=[]), 0),
        (await manager.broadcast("x", to=[Audience.user("ada"), Audience.channel("b")]), 3),
        (await manager.broadcast_local("x", channel="b"), 2),
        (manager.broadcast_nowait("x", channel="b"), 2),
        (await asyncio.to_thread(manager.broadcast_threadsafe, "x", channel="b"), 2),
        (await manager.unsubscribe_user("bob", "b"), 2),
        (await manager.close_user("bob"), 2),
    ):
        assert receipt == Receipt(expected)
    assert receipt.position is None


async def test_receipt_tells_what_was_held_back(manager: ConnectionManager) -> None:
    await connected(manager, 1, channels=["a", "b"])

    @manager.on_broadcast
    def guard(message: Message, audience: Audience) -> object:
        return HOLD_BACK if audience.name == "a" else None

    assert await manager.broadcast("x", channel="a") == Receipt(1, is_held_back=True)
    assert await manager.broadcast_local("x", channel="a") == Receipt(1, is_held_back=True)
    assert manager.broadcast_nowait("x", channel="a") == Receipt(1, is_held_back=True)
    assert await manager.broadcast("x", channels=["a", "c"]) == Receipt(1)
    assert await manager.broadcast("x", channels=["a"]) == Receipt(1, is_held_back=True)
    assert await manager.broadcast("x", channels=[]) == Receipt(0)


def test_position_is_that_of_one_audience() -> None:
    one, two = Position("epoch", 1), Position("epoch", 2)
    assert Receipt(1, {EVERYONE: one}).position is one
    assert Receipt(1, {EVERYONE: one, Audience.channel("a"): two}).position is None


# Several audiences.


async def test_each_connection_gets_it_once(manager: ConnectionManager) -> None:
    both, one, none = [
        (await connected(manager, 1, user=user, channels=channels))[0][0]
        for user, channels in (("ada", ["a", "b"]), ("bob", ["b"]), ("carl", ["c"]))
    ]
    await manager.broadcast("channels", channels=["a", "b", "a"])
    await manager.broadcast("user", to=[Audience.channel("a"), Audience.user("ada"), Audience.user("bob")])
    await manager.broadcast("everyone", to=[Audience.channel("a"), EVERYONE])
    await manager.broadcast("one", to=Audience.channel("b"))
    await manager.broadcast_local("local", channels=["a", "b"])
    manager.broadcast_nowait("now", channels=["a", "b"])
    assert await both.wait_messages(6) == ["channels", "user", "everyone", "one", "local", "now"]
    assert await one.wait_messages(6) == ["channels", "user", "everyone", "one", "local", "now"]
    assert await none.wait_messages(1) == ["everyone"]


@pytest.mark.parametrize("is_async", [True, False])
async def test_each_gets_it_once_through_hooks(manager: ConnectionManager, is_async: bool) -> None:
    [(peer, _)] = await connected(manager, 1, channels=["a", "b"])
    seen: list[tuple[str, int]] = []

    @manager.on_deliver
    async def watch(delivery: Delivery) -> None:
        seen.append((delivery.audience.name, len(delivery.recipients)))
        if is_async:
            await asyncio.sleep(0)
        if delivery.audience.name == "a" and delivery.message.data == "not by a":
            delivery.recipients = []

    await manager.broadcast("by a", channels=["a", "b"])
    await manager.broadcast("not by a", channels=["a", "b"])
    assert seen == [("a", 1), ("b", 0), ("a", 1), ("b", 1)]
    assert await peer.wait_messages(2) == ["by a", "not by a"]


@pytest.mark.parametrize("is_local", [True, False])
async def test_hook_that_fails_for_one_audience_costs_the_others_nothing(
    manager: ConnectionManager, is_local: bool
) -> None:
    [(peer, _)] = await connected(manager, 1, channels=["b"])

    @manager.on_deliver
    async def fail(delivery: Delivery) -> None:
        if delivery.audience.name != "b":
            raise KeyError(delivery.audience.name)

    broadcast: Any = manager.broadcast_local if is_local else manager.broadcast
    with pytest.raises(KeyError, match="a"):
        await broadcast("x", channels=["a", "b", "c"])
    assert await peer.wait_messages(1) == ["x"]


async def test_hook_makes_of_each_audience_what_it_wants(manager: ConnectionManager) -> None:
    pairs = [(await connected(manager, 1, channels=[name]))[0][0] for name in "abc"]

    @manager.on_broadcast
    def name_it(message: Message, audience: Audience) -> object:
        return HOLD_BACK if audience.name == "b" else f"{message.data!s} {audience.name}"

    await manager.broadcast("to", channels=["a", "b", "c"])
    await manager.broadcast("end", channels=["a", "c"])
    assert [await peer.wait_messages(2) for peer in (pairs[0], pairs[2])] == [["to a", "end a"], ["to c", "end c"]]
    assert pairs[1].messages == []


async def test_who_leaves_between_two_audiences_is_not_forgotten(manager: ConnectionManager) -> None:
    # The first audience waits for a hook; before it, the connection moves from the one to the other.
    [(peer, connection)] = await connected(manager, 1, channels=["a"])
    begun, go = asyncio.Event(), asyncio.Event()

    @manager.on_deliver
    async def wait(delivery: Delivery) -> None:
        if delivery.audience.name == "a":
            begun.set()
            await go.wait()

    broadcast = asyncio.create_task(manager.broadcast("x", channels=["a", "b"]))
    await begun.wait()
    await connection.subscribe("b")
    await connection.unsubscribe("a")
    go.set()
    await broadcast
    assert await peer.wait_messages(1) == ["x"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"channels": None}, ValueError),
        ({"channels": ["a", None]}, InvalidChannel),
        ({"channels": ["a"], "channel": "b"}, ValueError),
        ({"channels": ["a"], "user": "b"}, ValueError),
        ({"channels": ["a"], "to": EVERYONE}, ValueError),
        ({"to": None}, ValueError),
        ({"to": "a"}, ValueError),
        ({"to": [EVERYONE, "a"]}, ValueError),
        ({"to": Audience("connection", "x")}, ValueError),
        ({"to": Audience("channel", "")}, InvalidChannel),
        ({"to": Audience("user", "")}, ValueError),
        ({"channels": [str(number) for number in range(1001)]}, ValueError),
        ({"exclude_users": None}, ValueError),
        ({"exclude_users": ["a", None]}, ValueError),
    ],
)
async def test_audiences_that_make_no_sense_are_refused(
    manager: ConnectionManager, arguments: dict[str, Any], error: type[Exception]
) -> None:
    publisher = Publisher(FakeEngine(FakeBroker()))
    for broadcast in (manager.broadcast, manager.broadcast_local, publisher.broadcast):
        with pytest.raises(error):
            await broadcast("x", **arguments)
    for now in (manager.broadcast_nowait, manager.broadcast_soon, publisher.broadcast_nowait):
        with pytest.raises(error):
            now("x", **arguments)


def test_who_got_it_is_forgotten_in_time_and_when_it_is_too_much() -> None:
    class Member:
        def __init__(self, name: str) -> None:
            self.id = name

    now = 0.0
    once = OnceEach(lambda: now, max_remembered=3)
    members: Any = [Member(name) for name in "abcd"]
    once.note("one", members[:1])
    assert once.left("one", members[:2]) == members[1:2]
    assert once.left("two", members[:2]) == members[:2]
    now = 9.0
    once.note("two", members[:2])
    now = 10.5
    once.note("two", members[2:3])
    assert once.left("one", members) == members  # 10 s have passed
    assert once.left("two", members) == members[3:]
    once.note("three", members[:1])
    assert once.left("two", members) == members  # there were too many
    assert once.left("three", members) == members[1:]


async def test_engine_error_of_several_says_which_were_sent() -> None:
    broker = FakeBroker()
    broker.refusal = PermissionError("no")
    async with ConnectionManager(FakeEngine(broker)) as manager:
        await eventually(lambda: bool(broker.links))
        broker.forbidden.add("wsbroadcast:channel:b")
        with pytest.raises(EngineUnavailable) as caught:
            await manager.broadcast("x", channels=["a", "b", "c"])
    assert caught.value.positions == {Audience.channel("a"): None, Audience.channel("c"): None}
    assert not caught.value.may_have_been_sent


async def test_error_says_whether_anything_may_have_been_sent() -> None:
    broker = FakeBroker()
    async with ConnectionManager(FakeEngine(broker)) as manager:
        await eventually(lambda: bool(broker.links))
        broker.is_hung.set()
        with pytest.raises(EngineUnavailable, match="isn't known") as caught:
            await manager.broadcast("x")
        assert caught.value.may_have_been_sent
        with pytest.raises(EngineUnavailable, match="nothing was sent") as caught:
            await manager.broadcast("x")
        assert not caught.value.may_have_been_sent


async def test_error_without_waiting_says_which_were_sent() -> None:
    broker = FakeBroker()
    engine = FakeEngine(broker)
    async with ConnectionManager(engine) as manager:
        await eventually(lambda: bool(broker.links))
        taken: list[Publication] = []

        def publish_nowait(publication: Publication) -> None:
            if len(taken) == 2:
                raise EngineUnavailable("too much waits; nothing was sent")
            taken.append(publication)

        engine.publish_nowait = publish_nowait  # type: ignore[method-assign, assignment]
        with pytest.raises(EngineUnavailable) as caught:
            manager.broadcast_nowait("x", channels=["a", "b", "c"])
    assert caught.value.positions == {Audience.channel("a"): None, Audience.channel("b"): None}


async def test_one_of_several_that_is_not_known_is_not_hidden_by_one_that_is() -> None:
    class Broken(MemoryEngine):
        links_nodes = True

        async def publish(self, publication: Publication | Control) -> None:
            is_known = publication.audience.name == "a"
            raise EngineUnavailable("no", may_have_been_sent=not is_known)

    async with ConnectionManager(Broken()) as manager:
        for channels, is_unknown in ((["a", "b"], True), (["b", "a"], True), (["a"], False)):
            with pytest.raises(EngineUnavailable) as caught:
                await manager.broadcast("x", channels=channels)
            assert caught.value.may_have_been_sent is is_unknown


# Objects that JSON doesn't know.


class Array:
    def tolist(self) -> list[int]:
        return [1, 2]


@pytest.mark.parametrize("json_default", [lambda value: value.tolist(), Array.tolist])
async def test_json_default_writes_what_json_does_not_know(json_default: JSONDefault) -> None:
    broker = FakeBroker()
    async with ConnectionManager(FakeEngine(broker), json_default=json_default) as manager:
        [(peer, connection)] = await connected(manager, 1)

        @manager.on_broadcast
        def wrap(message: Message, audience: Audience) -> object:
            return {"wrapped": Array()} if message.data == "wrap" else None

        @manager.on_deliver
        def replace(delivery: Delivery) -> None:
            if delivery.message.data == "replace":
                delivery.replace(delivery.recipients[0], {"replaced": Array()})

        await connection.send({"sent": Array()})
        await manager.broadcast({"a": [Array()]})
        await manager.broadcast("wrap")
        await manager.broadcast("replace")
        async with Publisher(FakeEngine(broker), json_default=json_default) as publisher:
            await publisher.broadcast({"published": Array()})
        await eventually(lambda: len(peer.messages) == 5)
        assert sorted(map(str, peer.messages)) == [
            '{"a":[[1,2]]}',
            '{"published":[1,2]}',
            '{"replaced":[1,2]}',
            '{"sent":[1,2]}',
            '{"wrapped":[1,2]}',
        ]


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": {"b": [1, Array()]}}, r"Array at a\.b\[1\]"),
        ([Array()], r"Array at \[0\]"),
        (Array(), "Array can't"),
        ({"odd key!": Array()}, r"Array at \['odd key!'\]"),
    ],
)
async def test_error_names_the_place(manager: ConnectionManager, value: object, place: str) -> None:
    with pytest.raises(EncodeError, match=f"^{place}.*json_default="):
        await manager.broadcast(value)


async def test_json_default_that_fails_is_an_encode_error() -> None:
    async with ConnectionManager(json_default=lambda value: value.missing) as manager:
        with pytest.raises(EncodeError, match=r"^Array at a can't be written as JSON: .*missing"):
            await manager.broadcast({"a": Array()})


# `broadcast_soon`.


async def test_soon_works_in_the_loop_and_in_threads(manager: ConnectionManager) -> None:
    [(peer, _)] = await connected(manager, 1, channels=["a"])
    manager.broadcast_soon("loop", channel="a")
    assert peer.messages == []
    await asyncio.to_thread(manager.broadcast_soon, "thread", channel="a")
    assert await peer.wait_messages(2) == ["loop", "thread"]


async def test_soon_keeps_the_order_of_each_thread(manager: ConnectionManager) -> None:
    [(peer, _)] = await connected(manager, 1)

    def say(name: str) -> None:
        for number in range(100):
            manager.broadcast_soon(f"{name} {number}")

    @manager.on_broadcast
    async def ponder(message: Message, audience: Audience) -> None:
        await asyncio.sleep(0)

    threads = [threading.Thread(target=say, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    say("loop")
    for thread in threads:
        await asyncio.to_thread(thread.join)
    messages = [str(message) for message in await peer.wait_messages(300)]
    for name in ("a", "b", "loop"):
        assert [each for each in messages if each.startswith(f"{name} ")] == [f"{name} {n}" for n in range(100)]


async def test_soon_encodes_at_once(manager: ConnectionManager) -> None:
    [(peer, _)] = await connected(manager, 1)
    row = {"id": 1}
    manager.broadcast_soon(row)
    row.clear()
    assert await peer.wait_messages(1) == ['{"id":1}']
    with pytest.raises(EncodeError):
        manager.broadcast_soon(object())


async def test_aclose_sends_what_waits() -> None:
    manager = ConnectionManager()
    await manager.start()
    [(peer, _)] = await connected(manager, 1)
    for number in range(5):
        manager.broadcast_soon(str(number))
    await manager.aclose()
    assert peer.messages == ["0", "1", "2", "3", "4"]
    with pytest.raises(LifecycleError, match="isn't running"):
        manager.broadcast_soon("late")


async def test_aclose_from_a_hook_of_soon_ends() -> None:
    manager = ConnectionManager()
    await manager.start()

    @manager.on_broadcast
    async def end(message: Message, audience: Audience) -> None:
        await manager.aclose()

    manager.broadcast_soon("x")
    await eventually(lambda: manager._core.life.loop is None)


async def test_what_fails_is_logged_and_the_next_is_sent(
    manager: ConnectionManager, caplog: pytest.LogCaptureFixture
) -> None:
    [(peer, _)] = await connected(manager, 1)

    @manager.on_broadcast
    def guard(message: Message, audience: Audience) -> None:
        if message.data == "bad":
            raise KeyError("no")

    for text in ("bad", "bad", "good"):
        manager.broadcast_soon(text)
    assert await peer.wait_messages(1) == ["good"]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in errors] == ["broadcast_soon: not sent so far: 1"]


async def test_soon_is_bounded() -> None:
    sent: list[Publications] = []

    async def publish(publications: Publications) -> None:
        sent.append(publications)

    begun: list[None] = []
    outbox, manager = Outbox(publish, max_bytes=10), ConnectionManager()

    def put(text: str) -> None:
        outbox.put(manager._core.publications(text), lambda: begun.append(None))

    put("x" * 20)  # one is taken, whatever its size
    with pytest.raises(EngineUnavailable, match="20 bytes wait") as caught:
        put("y")
    assert not caught.value.may_have_been_sent
    assert len(begun) == 1
    await outbox.send_all()
    put("y")
    assert len(begun) == 2
    await outbox.send_all()
    await outbox.aclose()
    assert [publications[0].size for publications in sent] == [20, 1]
    with pytest.raises(LifecycleError):
        put("z")


@pytest.mark.parametrize("call", [ConnectionManager.broadcast_soon, ConnectionManager.broadcast_threadsafe])
def test_manager_that_does_not_run_says_so(call: Callable[[ConnectionManager, str], object]) -> None:
    manager = ConnectionManager()
    with pytest.raises(LifecycleError, match=r"isn't running.*manager\.lifespan"):
        call(manager, "x")

    async def use() -> None:
        await manager.broadcast("x")

    asyncio.run(use())
    with pytest.raises(LifecycleError, match=r"isn't running"):
        call(manager, "x")


# What an app has overridden isn't called.


class Overridden(ConnectionManager):
    """What people make of the tutorial's class."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[str] = []

    async def connect(self, websocket: Any, client_id: int) -> None:  # type: ignore[override]
        self.rooms.append(str(client_id))
        await super().connect(websocket, user=client_id)

    def disconnect(self, client_id: int) -> None:  # type: ignore[override]
        raise AssertionError

    async def broadcast(self, message: str) -> None:  # type: ignore[override]
        raise AssertionError

    async def send(self, message: str) -> None:  # type: ignore[override]
        raise AssertionError

    async def close(self) -> None:  # type: ignore[override]
        raise AssertionError

    async def subscribe(self, channel: str) -> None:  # type: ignore[override]
        raise AssertionError

    async def unsubscribe(self) -> None:  # type: ignore[override]
        raise AssertionError


async def test_connections_and_threads_don_t_call_what_is_overridden() -> None:
    async with Overridden() as manager:
        peer = Peer()
        await manager.connect(peer.websocket, 5)
        connection = manager.connections[0]
        await connection.subscribe("a")
        await asyncio.to_thread(manager.broadcast_threadsafe, "thread", channel="a")
        manager.broadcast_soon("soon", channel="a")
        await peer.wait_messages(2)
        await connection.send("sent")
        await connection.unsubscribe("a")
        assert await peer.wait_messages(3) == ["thread", "soon", "sent"]
        await connection.close()
        assert peer.close_code == 1000


@pytest.mark.parametrize("path", ["/router", "/commands", "/dependency"])
async def test_routers_and_dependencies_don_t_call_what_is_overridden(path: str) -> None:
    manager = Overridden()
    app = FastAPI(lifespan=manager.lifespan)
    app.include_router(create_router(manager, "/router"))
    app.include_router(create_router(manager, "/commands", inbound="commands"))

    @app.websocket("/dependency")
    async def endpoint(connection: ConnectionDep) -> None:
        async for message in connection:
            await connection.send(message)

    async with lifespan(app), visit(app, path) as peer:
        peer.say('{"type": "unsubscribe", "channel": "a"}')
        assert await peer.next()
    assert manager.rooms == []
