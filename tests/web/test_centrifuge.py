"""What the router of the Centrifuge protocol does with the node: one question for all, order, and what is shared."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, WebSocketException

from tests.support.asgi import turns
from tests.support.centrifuge_client import BOTH, PATH, Form, client, served
from wsbroadcast import (
    EVERYONE,
    USERS,
    Access,
    Audience,
    ConfigurationError,
    Connection,
    ConnectionManager,
    Handshake,
    History,
    Identity,
    PermissionDenied,
    Position,
    Presence,
    TokenFrom,
    create_centrifuge_router,
)
from wsbroadcast.delivery.frames import Batch, unframed
from wsbroadcast.engines.memory import MemoryEngine
from wsbroadcast.message import Message
from wsbroadcast.protocols.centrifuge.codec import JSON, PROTOBUF
from wsbroadcast.protocols.centrifuge.speech import Names, Speech
from wsbroadcast.publication import Publication
from wsbroadcast.stats import Counters
from wsbroadcast.testing import Cluster

HERE = Presence(by="connection", grace=0)


# One question for all.


class Asked(MemoryEngine):
    """Counts what it is asked for: audiences, and histories."""

    def __init__(self) -> None:
        super().__init__()
        self.subscribed: list[set[Audience]] = []
        self.most_read_at_once = 0
        self.read_since: list[Position | None] = []
        self._reading = 0

    def subscribe(self, audiences: Iterable[Audience]) -> None:
        audiences = list(audiences)
        new = set(audiences) - set[Audience]().union(*self.subscribed)
        if new:
            self.subscribed.append(new)
        super().subscribe(audiences)

    async def read(self, *arguments: Any) -> Any:
        self._reading += 1
        self.most_read_at_once = max(self._reading, self.most_read_at_once)
        await turns(3)
        self._reading -= 1
        self.read_since.append(arguments[1])
        return await super().read(*arguments)


@BOTH
async def test_first_frame_with_five_subscriptions_asks_the_broker_once(form: Form) -> None:
    engine = Asked()
    manager = ConnectionManager(engine, history={"*": History(), USERS: History()})
    async with served(manager) as app, client(app, form, connects=False) as one:
        subscribes = [{"id": 2 + n, "subscribe": {"channel": f"room:{n}"}} for n in range(5)]
        one.say({"id": 1, "connect": {}}, *subscribes)
        for n in range(5):
            assert (await one.answer(2 + n))["subscribe"]["recoverable"]
        channels = {Audience("channel", f"room:{n}") for n in range(5)}
        assert engine.subscribed == [{EVERYONE, Audience("user", "7"), *channels}]
        assert engine.most_read_at_once == 6
        assert [each["id"] for each in one.told] == [1, 2, 3, 4, 5, 6]
    assert manager.stats().channels == 0


@BOTH
async def test_several_subscriptions_in_a_later_frame_are_one_question(form: Form) -> None:
    engine = Asked()
    async with served(ConnectionManager(engine, history=History())) as app, client(app, form) as one:
        engine.subscribed.clear()
        one.say(*({"id": 10 + n, "subscribe": {"channel": f"room:{n}"}} for n in range(3)))
        await one.answer(12)
        (asked,) = engine.subscribed
        assert {each.name for each in asked} == {"room:0", "room:1", "room:2"}


# What is shared, and joined.


@BOTH
async def test_history_is_read_as_far_as_it_is_asked_for(form: Form) -> None:
    engine = Asked()
    manager = ConnectionManager(engine, history=History())
    async with served(manager) as app, client(app, form) as one:
        await one.result("subscribe", channel="a")
        for n in range(3):
            await manager.broadcast(n, channel="a")
        engine.read_since.clear()
        top = await one.result("history", channel="a")
        assert (top["offset"], top.get("publications")) in [(3, []), (3, None)]
        assert await one.error("history", channel="a", since={"offset": 1, "epoch": "another"}) == 112
        assert engine.read_since == [], "the position alone"
        since = {"offset": 2, "epoch": top["epoch"]}
        some = await one.result("history", channel="a", limit=5, since=since)
        assert [each["offset"] for each in some["publications"]] == [3]
        before = await one.result("history", channel="a", limit=5, since=since, reverse=True)
        assert [each["offset"] for each in before["publications"]] == [1]
        assert engine.read_since == [Position(top["epoch"], 2), None]


@BOTH
async def test_publication_says_who_has_sent_it_on_every_node_and_in_the_history(form: Form) -> None:
    async with Cluster(2, history=History()) as cluster:
        apps = []
        for manager in cluster:
            app = FastAPI()
            app.include_router(
                create_centrifuge_router(
                    manager, PATH, authenticate=lambda: Identity("7"), authorize=lambda who, what, where: True
                )
            )
            apps.append(app)
        async with client(apps[0], form, connects=False) as one, client(apps[1], form) as other:
            mine = await one.result("connect")
            await other.result("subscribe", channel="a")
            await one.result("publish", channel="a", data={"n": 1})
            (pub,) = await other.wait_pushes(1, "a")
            assert pub["info"] == {"client": mine["client"], "user": "7"}
            page = await other.result("history", channel="a", limit=-1)
            assert page["publications"][0]["info"] == pub["info"]
            await cluster[0].broadcast("by the app", channel="a")
            (_, pub) = await other.wait_pushes(2, "a")
            assert "info" not in pub
            assert pub["data"] == "by the app"


# What was missed.


@BOTH
async def test_much_that_was_missed_comes_in_part_with_the_answer_and_then_one_after_the_other(form: Form) -> None:
    manager = ConnectionManager(history={"*": History(messages=1000), USERS: History(messages=1000)})
    async with served(manager) as app:
        async with client(app, form, connects=False) as one:
            mine = (await one.result("connect"))["subs"]["#7"]
            begins = await one.result("subscribe", channel="a")
        for n in range(600):
            await manager.broadcast({"n": n, "text": "x" * 1000}, channel="a")
            await manager.broadcast({"n": n, "text": "x" * 1000}, user="7")
        async with client(app, form, connects=False) as one:
            since = {"recover": True, "epoch": mine["epoch"], "offset": 0}
            subs = (await one.result("connect", subs={"#7": since}))["subs"]
            answer = await one.result("subscribe", channel="a", recover=True, epoch=begins["epoch"], offset=0)
            for channel, result in (("#7", subs["#7"]), ("a", answer)):
                assert result["recovered"]
                head = result["publications"]
                assert 100 < len(head) < 300
                tail = await one.wait_pushes(600 - len(head), channel)
                assert [each["data"]["n"] for each in (*head, *tail)] == list(range(600))
                assert [each["offset"] for each in (*head, *tail)] == list(range(1, 601))
            await manager.broadcast({"n": 600}, channel="a")
            last = await one.wait_pushes(601 - len(answer["publications"]), "a")
            assert last[-1]["offset"] == 601
            assert max(len(each) for each in one.peer.messages) < 1024 * 1024


# Who it is.


async def somebody(token: str = Depends(TokenFrom(query="token"))) -> Identity:
    if token == "later":
        raise HTTPException(503)
    if token == "often":
        raise HTTPException(429)
    if token == "own":
        raise WebSocketException(4999, "gone fishing")
    if token == "forbidden":
        raise HTTPException(403)
    if token == "long":
        return Identity(201 * "x")
    if token != "good":
        raise HTTPException(401)
    return Identity("7")


@BOTH
@pytest.mark.parametrize(
    ("request_", "query", "ends"),
    [
        ({"token": "good"}, "", None),
        ({}, "token=good", None),
        ({"headers": {"Authorization": "Bearer good"}}, "", None),
        ({"token": "bad"}, "token=good", 3500),
        ({}, "", 3507),
        ({"token": "forbidden"}, "", 3507),
        ({"token": "long"}, "", 3507),
        ({"token": "own"}, "", 4999),
        ({"token": "later"}, "", 100),
        ({"token": "often"}, "", 111),
    ],
)
async def test_token_of_connect_is_what_the_dependency_finds(
    form: Form, request_: dict[str, Any], query: str, ends: int | None
) -> None:
    async with (
        served(authenticate=somebody) as app,
        client(app, form, query=query, connects=False) as one,
    ):
        id_ = one.begin("connect", **request_)
        if ends is None:
            assert list((await one.answer(id_))["connect"]["subs"]) == ["#7"]
        elif ends < 3000:
            error = (await one.answer(id_))["error"]
            assert (error["code"], error["temporary"]) == (ends, True)
        else:
            assert await one.closed() == ends


async def test_hook_that_refuses_is_told_by_103_or_closes() -> None:
    manager = ConnectionManager()

    @manager.on_subscribe
    async def check(connection: Connection, channel: str) -> None:
        if channel == "full":
            raise PermissionDenied("full")

    async with served(manager) as app, client(app) as one:
        assert await one.error("subscribe", channel="full") == 103
        await manager.broadcast(1, channel="full")
        await one.result("subscribe", channel="a")
        assert one.pushes("full") == []


async def test_what_a_hook_says_while_a_client_comes_follows_its_answer() -> None:
    manager = ConnectionManager()

    @manager.on_connect
    async def welcome(connection: Connection) -> None:
        await connection.send({"hello": connection.user})

    @manager.on_subscribe
    async def tell(connection: Connection, channel: str) -> None:
        await manager.broadcast({"came": connection.user}, channel=channel)

    async with served(manager) as app, client(app, connects=False) as one:
        one.say({"id": 1, "connect": {}}, {"id": 2, "subscribe": {"channel": "a"}})
        await one.wait_pushes(1, "a")
        kinds = [next(iter(each.keys() - {"id"})) for each in one.told]
        assert kinds == ["connect", "push", "subscribe", "push"]
        assert one.pushes(None, "message") == [{"data": {"hello": "7"}}]
        assert one.pushes("a") == [{"data": {"came": "7"}}]


# Audiences without a channel.


@BOTH
async def test_user_and_everyone_have_channels(form: Form) -> None:
    manager = ConnectionManager(history={USERS: History(), EVERYONE: History()})
    async with served(manager, everyone_channel="all") as app:
        async with client(app, form, connects=False) as one:
            subs = (await one.result("connect"))["subs"]
            assert subs.keys() == {"#7", "all"}
            await manager.broadcast(1, user="7")
            await manager.broadcast(2)
            assert [each["data"] for each in await one.wait_pushes(1, "#7")] == [1]
            assert [each["data"] for each in await one.wait_pushes(1, "all")] == [2]
        await manager.broadcast(3, user="7")
        await manager.broadcast(4)
        async with client(app, form, connects=False) as one:
            since = {name: {"recover": True, "epoch": each["epoch"], "offset": 1} for name, each in subs.items()} | {
                "unknown": {"recover": True, "epoch": "x", "offset": 1}
            }
            again = (await one.result("connect", subs=since))["subs"]
            assert again.keys() == {"#7", "all"}
            for name, value in (("#7", 3), ("all", 4)):
                assert again[name]["recovered"]
                assert again[name]["was_recovering"]
                assert [each["data"] for each in again[name]["publications"]] == [value]
            assert await one.error("publish", channel="#8", data=1) == 103
            history = await one.result("history", channel="all", limit=-1)
            assert [each["data"] for each in history["publications"]] == [2, 4]


@BOTH
async def test_without_channels_for_them_they_are_messages(form: Form) -> None:
    manager = ConnectionManager()
    async with served(manager, user_channel=None) as app, client(app, form) as one:
        await manager.broadcast(1, user="7")
        await manager.broadcast("two")
        assert [each["data"] for each in await one.wait_pushes(2, None, "message")] == [1, "two"]


async def test_who_may_publish_without_authorize() -> None:
    manager = ConnectionManager()
    async with (
        served(manager, authorize=None, everyone_channel="all", channels=["lobby"]) as app,
        client(app, connects=False) as one,
    ):
        assert set((await one.result("connect"))["subs"]) == {"#7", "all", "lobby"}
        await one.result("publish", channel="lobby", data=1)
        await one.result("publish", channel="#7", data=1)
        assert await one.error("publish", channel="all", data=1) == 103
        assert await one.error("publish", channel="other", data=1) == 103
        assert await one.error("subscribe", channel="other") == 103
        assert await one.error("history", channel="other") == 103
        assert await one.error("presence", channel="lobby") == 108


async def test_channels_may_depend_on_who_connects() -> None:
    seen: list[tuple[Any, Any]] = []

    async def channels(handshake: Handshake, data: Any) -> dict[str, Any]:
        seen.append((handshake.user, data))
        return {"lobby": {"topic": "x"}}

    async with served(channels=channels) as app, client(app, connects=False) as one:
        subs = (await one.result("connect", data={"room": 1}))["subs"]
        assert subs["lobby"]["data"] == {"topic": "x"}
        assert seen == [("7", {"room": 1})]


async def test_channels_that_name_another_user_are_error_103() -> None:
    async with served(channels=["#8"]) as app, client(app, connects=False) as one:
        assert await one.error("connect") == 103


# Ends.


async def test_what_is_wrong_with_the_router_is_said_at_once() -> None:
    manager = ConnectionManager()
    with pytest.raises(ConfigurationError, match="manager first"):
        create_centrifuge_router("/connection/websocket")  # type: ignore[arg-type]
    for bad in ("#user", "", "{user}", "{user}{user}", 1):
        with pytest.raises(ConfigurationError, match="user_channel"):
            create_centrifuge_router(manager, user_channel=bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="everyone_channel"):
        create_centrifuge_router(manager, everyone_channel="#all")
    with pytest.raises(ConfigurationError, match="pong_timeout"):
        create_centrifuge_router(manager, pong_timeout=0)
    with pytest.raises(ConfigurationError, match="access"):
        create_centrifuge_router(manager, access=Access(), authorize=lambda who, what, where: True)


async def test_errors_are_counted() -> None:
    manager = ConnectionManager()
    async with served(manager) as app, client(app) as one:
        await one.error("subscribe", channel="no")
        await one.error("rpc", method="none")
        one.say({"id": 0, "rpc": {}})
        await one.closed()
        assert manager.stats().client_errors == {"103": 1, "104": 1, "3501": 1}


async def test_client_whose_pong_waits_behind_a_command_is_not_let_go() -> None:
    async with Cluster(1) as cluster:
        manager, is_asked, may_go_on = cluster[0], asyncio.Event(), asyncio.Event()

        async def slowly(*_: object) -> bool:
            is_asked.set()
            await may_go_on.wait()
            return True

        async with served(manager, authorize=slowly) as app, client(app) as one:
            id_ = one.begin("subscribe", channel="a")
            await is_asked.wait()
            await cluster.advance(60)
            may_go_on.set()
            await one.answer(id_)
            assert one.peer.close is None


@BOTH
async def test_frames_are_joined_on_the_wire(form: Form) -> None:
    # What a batch is on the wire, whatever server writes it.
    counters = Counters()
    codec = PROTOBUF if form == "protobuf" else JSON
    speech = Speech(codec, Names("#{user}", None), counters)
    batch: Batch[Any] = Batch(Publication(Message.of({"n": 0}), Audience("channel", "a")))
    batch.publications += [
        Publication(Message.of(b"\xff"), Audience("channel", "a")),
        Publication(Message.of({"n": 1}), Audience("channel", "a")),
    ]
    wire = batch.wire(unframed(speech))
    assert wire is batch.wire(unframed(speech))
    entries = batch.entries(unframed(speech))
    if form == "json":
        assert [json.loads(line)["push"]["pub"]["data"]["n"] for line in wire.split(b"\n")] == [0, 1]
        assert len(entries) == 2
        assert counters.dropped == {"not_json": 1}
    else:
        assert len(entries) == 3
        assert wire == b"".join(each.data for each in entries)
        assert counters.dropped == {}
    large: Batch[Any] = Batch(Publication(Message.json("x" * 300_000), Audience("channel", "a")))
    large.publications += [Publication(Message.json("y" * 300_000), Audience("channel", "a"))]
    assert len(large.wire(unframed(speech))) > 600_000
    if form == "json":
        assert b"\n" not in large.wire(unframed(speech))  # two messages: together they would be more than is joined
