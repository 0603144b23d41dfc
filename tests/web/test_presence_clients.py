"""Clients of events that are told who is in a channel: over a WebSocket, as server-sent events, by long poll."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import HTTPConnection

from tests.support.asgi import Peer, eventually
from tests.support.servers import serve_here
from tests.support.sse import request
from tests.web.test_events import Answer, EventPeer, serving
from wsbroadcast import ConnectionManager, Identity, Limits, Presence, create_router
from wsbroadcast.manager import core_of
from wsbroadcast.node import watching
from wsbroadcast.testing import Cluster

ROOMS = {"room:*": Presence(grace=0.05, info=lambda connection: {"name": connection.user.upper()})}


async def current_user(request: HTTPConnection) -> Identity:
    return Identity(request.query_params.get("user"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fiftieth of the times."""
    monkeypatch.setattr(watching, "_TELL_SECONDS", 0.02)


@asynccontextmanager
async def users(
    manager: ConnectionManager, cluster: Cluster | None = None, **options: Any
) -> AsyncIterator[Callable[..., EventPeer]]:
    """Run an app; yield what makes a client of one of its users."""
    async with serving(manager, cluster, authenticate=current_user, **options) as client:

        def user(name: str, channel: str = "room:1") -> EventPeer:
            peer = client(channel)
            peer.scope["query_string"] = f"user={name}".encode()
            return peer

        yield user


def watched(manager: ConnectionManager) -> int:
    presence = core_of(manager).life.node.presence
    assert presence is not None
    assert not presence.watches._lately or presence.watches._timer is not None
    return len(presence.watches)


async def told(peer: EventPeer, count: int) -> list[Answer]:
    """What a client was told of presence, once that is so much."""
    await eventually(lambda: len(peer.of("presence")) >= count)
    return peer.of("presence")


class Follower:
    """A client that keeps the list as docs/protocol.md says."""

    def __init__(self, peer: EventPeer) -> None:
        self.peer = peer

    @property
    def members(self) -> dict[str, Any] | int:
        """Who is there; where they are too many, how many."""
        members: dict[str, Any] | None = None
        version = None
        for event in self.peer.of("presence"):
            if "previous" in event:
                assert members is not None
                assert event["previous"] == version
                assert not {each["user"] for each in event["joined"]} & {*event["left"]}
                for user in event["left"]:
                    del members[user]
                members |= {each["user"]: each["info"] for each in event["joined"]}
            else:
                members = {each["user"]: each["info"] for each in event["members"]} if "members" in event else None
            version, count = event["version"], event["count"]
            assert members is None or len(members) == count
        return count if members is None else members


async def sees(peer: EventPeer, members: set[str] | int) -> None:
    def is_so() -> bool:
        if not peer.of("presence"):
            return False
        found = Follower(peer).members
        return (found if isinstance(found, int) else set(found)) == members

    await eventually(is_so)


async def test_client_is_told_who_is_there_and_then_what_changes() -> None:
    manager = ConnectionManager(presence=ROOMS)
    async with users(manager) as user:
        ann = user("ann")
        ann.ask(type="presence", channel="room:1", id=7)
        (first,) = await told(ann, 1)
        assert first.pop("version") >= 0
        assert first["id"] == 7
        bob = user("bob")
        await sees(ann, {"ann", "bob"})
        event = ann.of("presence")[-1]
        assert [event["joined"][-1], event["left"]] == [{"user": "bob", "info": {"name": "BOB"}}, []]
        bob.leave()
        await sees(ann, {"ann"})
        assert ann.of("presence")[-1]["left"] == ["bob"]
        ann.leave()
    assert ann.of("error") == []


@pytest.mark.parametrize("command", [{}, {"channel": None}, {"channel": ""}])
async def test_channel_of_the_path_need_not_be_named(command: dict[str, Any]) -> None:
    async with users(ConnectionManager(presence=ROOMS)) as user:
        ann = user("ann")
        ann.ask(type="presence", **command)
        await sees(ann, {"ann"})
        ann.leave()


async def test_client_that_wants_to_know_no_more_is_told_no_more() -> None:
    manager = ConnectionManager(presence=ROOMS)
    async with users(manager) as user:
        ann, eve = user("ann"), user("eve")
        for peer in (ann, eve):
            peer.ask(type="presence")
            await sees(peer, {"ann", "eve"})
        ann.ask(type="presence", watch=False, id=2)
        await eventually(lambda: ann.of("unwatched") == [{"type": "unwatched", "channel": "room:1", "id": 2}])
        before = len(ann.of("presence"))
        bob = user("bob")
        await sees(eve, {"ann", "bob", "eve"})
        assert len(ann.of("presence")) == before
        ann.ask(type="presence", id=3)
        await sees(ann, {"ann", "bob", "eve"})
        for peer in (ann, bob, eve):
            peer.leave()
        await eventually(lambda: watched(manager) == 0)


async def test_over_two_nodes_everybody_sees_the_same_and_a_second_tab_changes_nothing() -> None:
    cluster = Cluster(2, presence=ROOMS)
    async with cluster, users(cluster[0]) as here, users(cluster[1]) as there:
        ann, bob = here("ann"), there("bob")
        for peer in (ann, bob):
            peer.ask(type="presence")
        for peer in (ann, bob):
            await sees(peer, {"ann", "bob"})
        tab = there("ann")
        await tab.wait_messages(1)
        dan = there("dan")
        for peer in (ann, bob):
            await sees(peer, {"ann", "bob", "dan"})
        tab.leave()
        dan.leave()
        for peer in (ann, bob):
            await sees(peer, {"ann", "bob"})
            assert all("ann" not in event.get("left", ()) for event in peer.of("presence"))
        ann.leave()
        bob.leave()


async def test_above_the_bound_clients_are_told_how_many() -> None:
    presence = Presence(grace=0.05, members_up_to=3)
    async with users(ConnectionManager(presence=presence)) as user:
        peers = [user(f"u{number}") for number in range(3)]
        peers[0].ask(type="presence")
        await sees(peers[0], {"u0", "u1", "u2"})
        peers += [user(f"u{number}") for number in range(3, 6)]
        await sees(peers[0], 6)
        assert peers[0].of("presence")[-1].keys() == {"type", "channel", "version", "count"}
        late = user("u6")
        late.ask(type="presence", id="x")
        await sees(late, 7)
        assert late.of("presence")[0]["id"] == "x"
        for peer in (*peers[3:], late):
            peer.leave()
        await sees(peers[0], {"u0", "u1", "u2"})
        for peer in peers[:3]:
            peer.leave()


async def test_connections_that_each_count_have_their_id() -> None:
    async with users(ConnectionManager(presence=Presence(by="connection", grace=0))) as user:
        ann, tab = user("ann"), user("ann")
        ann.ask(type="presence")
        await both(ann, tab)
        ids = [peer.of("hello")[0]["id"] for peer in (ann, tab)]

        def members() -> list[Answer]:
            return [each for event in ann.of("presence") for each in event.get("joined") or event.get("members") or ()]

        await eventually(lambda: {each["id"] for each in members()} == {*ids})
        assert {each["user"] for each in members()} == {"ann"}
        tab.leave()
        await eventually(lambda: ids[1] in (ann.of("presence")[-1].get("left") or ()))
        ann.leave()


async def both(*peers: EventPeer) -> None:
    for peer in peers:
        await peer.wait_messages(1)


# What may not be.


def may(connection: object, action: str, channel: str | None) -> bool:
    return not (action == "presence" and channel == "room:secret") and channel != "room:closed"


@pytest.mark.parametrize(
    ("path", "command", "code"),
    [
        ("room:1", {"channel": "room:2"}, "forbidden"),
        ("room:1", {"channel": "room:closed"}, "forbidden"),
        ("room:1", {"channel": "news"}, "forbidden"),
        ("news", {}, "not_supported"),
        ("news", {"channel": "news"}, "not_supported"),
        ("room:secret", {}, "forbidden"),
        ("room:1", {"channel": 1}, "invalid_command"),
        ("room:1", {"channel": ["room:1"]}, "invalid_command"),
        ("room:1", {"watch": 1}, "invalid_command"),
        ("room:1", {"watch": None}, "invalid_command"),
        ("room:1", {"channel": "\x01online"}, "invalid_channel"),
        ("room:1", {"channel": "\x01users:room:1"}, "invalid_channel"),
        ("room:1", {"channel": "room:\n"}, "invalid_channel"),
        ("room:1", {"channel": "x" * 10_000}, "invalid_channel"),
        ("room:1", {"channel": "__proto__"}, "forbidden"),
    ],
)
async def test_what_may_not_be_is_refused_by_code(path: str, command: dict[str, Any], code: str) -> None:
    manager = ConnectionManager(presence=ROOMS)
    async with users(manager, inbound="commands", authorize=may) as user:
        peer = user("ann", path)
        peer.ask(type="presence", id=1, **command)
        await eventually(lambda: peer.of("error"))
        (error,) = peer.of("error")
        assert (error["code"], error["id"]) == (code, 1)
        assert peer.of("presence") == []
        assert watched(manager) == 0
        peer.ask(type="ping")
        await eventually(lambda: peer.of("pong"))  # it goes on
        peer.leave()


async def test_manager_without_presence_says_so() -> None:
    async with serving(ConnectionManager()) as client:
        peer = client("news")
        peer.ask(type="presence")
        peer.ask(type="presence", watch=False)
        await eventually(lambda: peer.of("unwatched"))
        assert [error["code"] for error in peer.of("error")] == ["not_supported"]
        peer.leave()


async def test_path_without_a_channel_wants_one_to_be_named() -> None:
    app = FastAPI()
    manager = ConnectionManager(presence=ROOMS)
    app.include_router(create_router(manager, "/ws"))
    async with manager:
        peer = EventPeer(path="/ws", subprotocols=("wsbroadcast.v1",))
        task = asyncio.create_task(app(peer.scope, peer.receive, peer.send))
        peer.ask(type="presence")
        await eventually(lambda: peer.of("error"))
        assert peer.of("error")[0]["code"] == "invalid_command"
        peer.leave()
        await task


async def test_authorize_is_asked_about_channels_with_presence_only() -> None:
    asked: list[tuple[str, str | None]] = []

    async def authorize(connection: object, action: str, channel: str | None) -> bool:
        asked.append((action, channel))
        return True

    async with users(ConnectionManager(presence=ROOMS), authorize=authorize) as user:
        for path in ("room:1", "news"):
            peer = user("ann", path)
            for command in ({}, {"channel": "room:2"}, {"watch": False}):
                peer.ask(type="presence", **command)
            await eventually(lambda peer=peer: peer.of("unwatched"))  # type: ignore[misc]
            peer.leave()
    assert asked == [("subscribe", "room:1"), ("presence", "room:1"), ("subscribe", "news")]


async def test_client_that_leaves_while_it_is_asked_about_is_told_nothing() -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def authorize(connection: Any, action: str, channel: str | None) -> bool:
        if action == "presence":
            asked.set()
            await answer.wait()
        return True

    manager = ConnectionManager(presence=ROOMS)
    async with users(manager, authorize=authorize) as user:
        peer = user("ann")
        peer.ask(type="presence", id=1)
        await asked.wait()
        await manager.connections[0].unsubscribe("room:1")
        answer.set()
        await eventually(lambda: peer.of("error"))
        assert peer.of("error")[0]["code"] == "forbidden"
        assert watched(manager) == 0
        peer.leave()


async def test_broker_that_is_away_is_told_by_code_and_asked_once_for_all() -> None:
    cluster = Cluster(1, presence=ROOMS)
    async with users(cluster[0], cluster) as user:
        ann, bob = user("ann"), user("bob")
        await both(ann, bob)
        cluster.partition()
        for peer in (ann, bob):
            peer.ask(type="presence", id=1)
            await eventually(lambda peer=peer: peer.of("error"))  # type: ignore[misc]
            assert peer.of("error")[0]["code"] == "unavailable"
        assert watched(cluster[0]) == 0
        cluster.heal()
        for peer in (ann, bob):
            peer.ask(type="presence")
        for peer in (ann, bob):
            await sees(peer, {"ann", "bob"})
            peer.leave()


# Bounds.


async def test_ten_thousand_commands_are_a_few_lists_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_TELL_SECONDS", 3600)
    limits = Limits(max_router_inbound_rate=None)
    manager = ConnectionManager(presence=ROOMS, limits=limits)
    async with users(manager, inbound="commands", authorize=may) as user:
        peer = user("ann")
        for number in range(2500):  # to leave and to come again, to stop and to begin again
            peer.ask(type="presence")
            peer.ask(type="presence", watch=bool(number % 2))
            peer.ask(type="unsubscribe", channel="room:1")
            peer.ask(type="subscribe", channel="room:1")
        peer.ask(type="ping")
        async with asyncio.timeout(60):
            while peer._messages[-1:] != ['{"type":"pong"}']:  # noqa: ASYNC110  # no event is set for it
                await asyncio.sleep(0.01)
        events = peer.events
        assert len([event for event in events if event["type"] == "presence"]) == watching._LISTS_AT_ONCE
        codes = {event["code"] for event in events if event["type"] == "error"}
        assert codes == {"limit_exceeded"}
        presence = core_of(manager).life.node.presence
        assert presence is not None
        assert presence.watches._lately.total() == watching._LISTS_AT_ONCE
        peer.leave()
        await eventually(lambda: watched(manager) == 0)


@pytest.mark.parametrize("way", ["unsubscribe", "unsubscribe_user", "close_user", "close", "leave"])
async def test_to_watch_ends_with_leaving(way: str) -> None:
    manager = ConnectionManager(presence=ROOMS)
    async with users(manager) as user:
        ann, bob = user("ann"), user("bob")
        ann.ask(type="presence")
        await sees(ann, {"ann", "bob"})
        (connection,) = (each for each in manager.connections if each.user == "ann")
        match way:
            case "unsubscribe":
                ann.ask(type="unsubscribe", channel="room:1")
            case "unsubscribe_user":
                await manager.unsubscribe_user("ann", "room:1")
            case "close_user":
                await manager.close_user("ann")
            case "close":
                await connection.close()
            case "leave":
                ann.leave()
        await eventually(lambda: watched(manager) == 0)
        before = len(ann.of("presence"))
        bob.ask(type="presence")
        await sees(bob, {"bob"})
        assert len(ann.of("presence")) == before
        for peer in (ann, bob):
            peer.leave()


ODD = ["__proto__", "constructor", "", " ", "a b", "ünï", "\u2028", "<b>", '"', "\\", "\x00", "\ud800", "x" * 200, "\n"]


@pytest.mark.parametrize("name", ODD)
async def test_users_with_odd_names_are_seen_as_they_are(name: str) -> None:
    manager = ConnectionManager(presence=Presence(grace=0.05))
    async with manager:
        watcher = EventPeer(path="/ws/room:1", subprotocols=("wsbroadcast.v1",))
        app = FastAPI()
        app.include_router(create_router(manager, "/ws/{channel}"))
        task = asyncio.create_task(app(watcher.scope, watcher.receive, watcher.send))
        watcher.ask(type="presence")
        await told(watcher, 1)
        other = Peer()
        try:
            await manager.connect(other.websocket, user=name, channels=["room:1"])
        except ValueError:  # which is no name of a user
            assert name in ("", "\x00", "\ud800", "\n") or not name.isprintable()
            watcher.leave()
            await task
            return

        def members() -> list[str]:
            return [each["user"] for event in watcher.of("presence") for each in event.get("joined", ())]

        await eventually(lambda: members() == [name])
        watcher.leave()
        await task


async def test_who_comes_back_in_a_mass_costs_few_messages_and_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_TELL_SECONDS", 0.2)
    manager = ConnectionManager(presence=Presence(grace=30.0, members_up_to=50))
    async with users(manager) as user:
        began = time.monotonic()
        peers = []
        for number in range(400):
            peer = user(f"u{number}")
            peer.ask(type="presence")
            peers.append(peer)
            if number % 20 == 0:
                await asyncio.sleep(0)
        for peer in (peers[0], peers[-1]):
            await sees(peer, 400)
        seconds = time.monotonic() - began
        most = max(len(peer.of("presence")) for peer in peers)
        assert most <= 2 + seconds / 0.2
        for peer in peers:
            peer.leave()


# Over HTTP.


@asynccontextmanager
async def over_http(**options: Any) -> AsyncIterator[tuple[ConnectionManager, int]]:
    manager = ConnectionManager(presence=ROOMS)
    app = FastAPI()
    app.include_router(create_router(manager, "/ws/{channel}", http=True, authenticate=current_user, **options))
    async with serve_here(app) as port:
        yield manager, port


async def test_stream_has_an_event_of_its_own() -> None:
    async with (
        over_http() as (_, port),
        request(port, "/ws/room:1?user=ann&presence") as ann,
    ):
        members: set[str] = set()

        async def until(wanted: set[str]) -> None:
            nonlocal members
            async with asyncio.timeout(5):
                while members != wanted:
                    event = await ann.named("presence")
                    said = json.loads(event.data)
                    assert said["channel"] == "room:1"
                    assert event.id == ""
                    members = members - {*said.get("left", ())} if "previous" in said else set()
                    members |= {each["user"] for each in said.get("joined", said.get("members", ()))}

        await until({"ann"})
        async with request(port, "/ws/room:1?user=bob") as bob:
            await bob.named("hello")
            await until({"ann", "bob"})
        await until({"ann"})


async def test_stream_is_told_why_not() -> None:
    path = "/ws/room:secret?user=ann&events=1&channel=room:2&channel=room:closed"
    path += "&presence=&presence=room:2&presence=room:3&presence=%00&presence=&presence=room:2"
    async with over_http(inbound="commands", authorize=may) as (_, port), request(port, path) as stream:
        said: list[tuple[object, ...]] = []
        while len(said) < 5:
            event = await stream.event()
            if event.name in ("refused", "presence"):
                found = json.loads(event.data)
                said.append((found["type"], found.get("channel"), found.get("code"), found.get("id")))
        assert said == [
            ("error", None, "forbidden", "room:closed"),
            ("error", None, "forbidden", None),
            ("presence", "room:2", None, None),
            ("error", "room:3", "forbidden", None),
            ("error", "\x00", "invalid_channel", None),
        ]


async def poll(port: int, query: str) -> Answer:
    async with request(port, f"/ws/room:1?{query}", Accept="application/json") as answer:
        found: Answer = await answer.json()
        return found


async def test_poll_is_answered_with_who_is_there_and_when_that_changes() -> None:
    async with over_http() as (manager, port):
        first = await poll(port, "user=ann&wait=0&presence")
        assert [(each["type"], each["channel"]) for each in first["messages"]] == [("presence", "room:1")]
        await eventually(lambda: watched(manager) == 0)
        waiting = asyncio.create_task(poll(port, "user=ann&wait=20&presence"))
        await eventually(lambda: watched(manager) == 1)
        async with request(port, "/ws/room:1?user=bob") as bob:
            await bob.named("hello")
            answer = await asyncio.wait_for(waiting, 10)
        assert [each["type"] for each in answer["messages"]] == ["presence", "presence"]
        assert "bob" in {each["user"] for each in answer["messages"][-1]["joined"]}


async def test_poll_that_nobody_disturbs_waits_although_it_was_told_who_is_there() -> None:
    async with over_http() as (_, port):
        await poll(port, "user=ann&wait=0")
        began = time.monotonic()
        answer = await poll(port, "user=ann&wait=0.5&presence&presence=room:2")
        assert time.monotonic() - began >= 0.4
        kinds = [(each["type"], each["channel"]) for each in answer["messages"]]
        assert kinds == [("presence", "room:1"), ("error", "room:2")]
