"""Clients of a router that speak events: they know where they are, and say it when they come back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI

from tests.support.asgi import Peer, eventually, turns
from wsbroadcast import EVERYONE, USERS, ConnectionManager, EngineUnavailable, Gap, History, SlowConsumer, create_router
from wsbroadcast.options import Policy
from wsbroadcast.protocols.events import SUBPROTOCOL
from wsbroadcast.testing import Cluster

KEPT = {"room:*": History(messages=20)}

Answer = dict[str, Any]


class EventPeer(Peer):
    """A peer that reads JSON."""

    @property
    def events(self) -> list[Answer]:
        return [json.loads(message) for message in self.messages]

    async def wait_events(self, count: int) -> list[Answer]:
        await self.wait_messages(count)
        return self.events

    def ask(self, **command: object) -> None:
        self.say(json.dumps(command))

    def of(self, kind: str) -> list[Answer]:
        return [event for event in self.events if event["type"] == kind]


@asynccontextmanager
async def serving(
    manager: ConnectionManager, cluster: Cluster | None = None, **options: Any
) -> AsyncIterator[Callable[..., EventPeer]]:
    """Run an app with a router; yield what makes a client of it."""
    app = FastAPI()
    app.include_router(create_router(manager, "/ws/{channel}", **options))
    tasks = []

    def client(channel: str, since: object = None, subprotocols: tuple[str, ...] = (SUBPROTOCOL,)) -> EventPeer:
        peer = EventPeer(path=f"/ws/{channel}", subprotocols=subprotocols)
        peer.scope["query_string"] = b"" if since is None else f"since={since}".encode()
        tasks.append(asyncio.create_task(app(peer.scope, peer.receive, peer.send)))
        return peer

    async with cluster or manager:
        yield client
    for task in tasks:
        await task


async def test_client_is_told_who_and_where_it_is() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        peer = client("room:1")
        hello, subscribed = await peer.wait_events(2)
        assert peer.subprotocol == SUBPROTOCOL
        assert hello == {
            "type": "hello",
            "id": manager.connections[0].id,
            "version": 1,
            "ping": 25.0,
            "reconnect": {"min": 0.5, "max": 20.0},
        }
        at = await manager.position("room:1")
        assert subscribed == {"type": "subscribed", "channel": "room:1", "position": str(at)}
        receipts = [await manager.broadcast(data, channel="room:1") for data in ("text", b"\xff\0", {"a": "ü"})]
        positions = [str(receipt.position) for receipt in receipts]
        await manager.broadcast("all")
        await manager.connections[0].send([1])
        assert (await peer.wait_events(7))[2:] == [
            {"type": "message", "channel": "room:1", "data": "text", "position": positions[0]},
            {"type": "message", "channel": "room:1", "data": "/wA=", "encoding": "base64", "position": positions[1]},
            {"type": "message", "channel": "room:1", "data": {"a": "ü"}, "position": positions[2]},
            {"type": "message", "to": "everyone", "data": "all"},
            {"type": "message", "to": "connection", "data": [1]},
        ]


async def test_client_that_comes_back_goes_on_where_it_was() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        receipts = [await manager.broadcast(number, channel="room:1") for number in range(6)]
        since = receipts[2].position
        peer = client("room:1", since)
        _, subscribed, *messages = await peer.wait_events(5)
        assert subscribed == {
            "type": "subscribed",
            "channel": "room:1",
            "position": str(since),
            "recovered": True,
        }
        assert [message["data"] for message in messages] == [3, 4, 5]
        assert messages[-1]["position"] == str(receipts[-1].position)


@pytest.mark.parametrize("since", ["+", "x", "%00", "epoch:1", "epoch:999999999999999999999", "x" * 10_000])
async def test_client_whose_position_is_none_is_told(since: str) -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        receipt = await manager.broadcast("old", channel="room:1")
        peer = client("room:1", since)
        _, subscribed = await peer.wait_events(2)
        assert subscribed == {
            "type": "subscribed",
            "channel": "room:1",
            "position": str(receipt.position),
            "recovered": False,
            "reason": "epoch",
        }
        await manager.broadcast("live", channel="room:1")
        assert [event["data"] for event in (await peer.wait_events(3))[2:]] == ["live"]


@pytest.mark.parametrize("since", [None, "epoch:1"])
async def test_client_that_came_in_an_outage_is_told_that_it_has_missed_something(since: str | None) -> None:
    cluster = Cluster(2, history=KEPT)
    gaps: list[Gap] = []
    cluster[0].on_gap(gaps.append)
    async with serving(cluster[0], cluster) as client:
        cluster.partition(0)
        peer = client("room:1", since)
        _, subscribed = await peer.wait_events(2)
        refused = {} if since is None else {"recovered": False, "reason": "unavailable"}
        assert subscribed == {"type": "subscribed", "channel": "room:1", **refused}
        await cluster[1].broadcast("missed", channel="room:1")
        at = await cluster[1].position("room:1")
        cluster.heal(0)
        await peer.wait_events(3)
        receipt = await cluster[1].broadcast("next", channel="room:1")
        assert (await peer.wait_events(4))[2:] == [
            {"type": "gap", "channel": "room:1", "reason": "unavailable", "position": str(at)},
            {"type": "message", "channel": "room:1", "data": "next", "position": str(receipt.position)},
        ]
        await eventually(lambda: gaps)
    assert [gap.seconds < 60 for gap in gaps] == [True]


async def test_client_may_go_back_in_a_channel_that_it_is_in() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        peer = client("room:1")
        await peer.wait_events(2)
        receipts = [await manager.broadcast(number, channel="room:1") for number in range(3)]
        await peer.wait_events(5)
        since = str(receipts[0].position)
        peer.ask(type="subscribe", channel="room:1", since=since, id=7)
        assert (await peer.wait_events(6))[5] == {
            "type": "subscribed",
            "channel": "room:1",
            "position": since,
            "recovered": True,
            "id": 7,
        }
        await manager.broadcast(3, channel="room:1")
        assert [event["data"] for event in (await peer.wait_events(9))[6:]] == [1, 2, 3]


async def test_client_that_was_nowhere_yet_says_so_by_an_empty_position() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager, inbound="commands", authorize=lambda connection, action, channel: True) as client:
        receipt = await manager.broadcast("old", channel="room:1")
        peer = client("room:1", "")
        here = {"type": "subscribed", "channel": "room:1", "position": str(receipt.position)}
        assert (await peer.wait_events(2))[1] == here
        peer.ask(type="subscribe", channel="room:2", since="")
        elsewhere = {"type": "subscribed", "channel": "room:2", "position": str(await manager.position("room:2"))}
        assert (await peer.wait_events(3))[2] == elsewhere
        await manager.broadcast("live", channel="room:1")
        assert [event["data"] for event in (await peer.wait_events(4))[3:]] == ["live"]
        assert manager.stats().refused_recoveries == {}


async def test_channel_that_is_not_kept_says_so() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager, inbound="commands", authorize=lambda connection, action, channel: True) as client:
        peer = client("plain", "epoch:1")
        refused = {"type": "subscribed", "recovered": False, "reason": "not_kept"}
        assert (await peer.wait_events(2))[1] == refused | {"channel": "plain"}
        peer.ask(type="subscribe", channel="other", since="epoch:1")
        assert (await peer.wait_events(3))[2] == refused | {"channel": "other"}
        assert manager.stats().refused_recoveries == {"not_kept": 2}


@pytest.mark.parametrize("channel", ["room:1", "unkept"])
async def test_what_comes_while_hooks_or_rights_are_asked_is_not_lost(channel: str) -> None:
    manager = ConnectionManager(history=KEPT)
    asked: list[str] = []

    @manager.on_connect
    async def come_late(connection: object) -> None:
        await manager.broadcast("during the hook", channel=channel)

    async def authorize(connection: object, action: str, channel: str) -> bool:
        asked.append(action)
        if len(asked) == 3:  # it subscribes again, to the channel that it is in
            await manager.broadcast("during the question", channel=channel)
        return True

    async with serving(manager, inbound="commands", authorize=authorize) as client:
        peer = client(channel)
        await eventually(lambda: len(peer.of("subscribed")) == 1)
        peer.ask(type="subscribe", channel=channel)
        await eventually(lambda: len(peer.of("subscribed")) == 2)
        await manager.broadcast("after", channel=channel)
        await eventually(lambda: peer.events[-1].get("data") == "after")
        got = [event["data"] for event in peer.of("message")]
        # What is kept begins with the first `subscribed`, which says where that is.
        assert got == [*(["during the hook"] if channel == "unkept" else []), "during the question", "after"]


async def test_plain_clients_of_the_same_router_stay_plain() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        first = await manager.broadcast("1", channel="room:1")
        await manager.broadcast("2", channel="room:1")
        plain, late = client("room:1", subprotocols=()), client("room:1", first.position, subprotocols=())
        await eventually(lambda: len(manager.connections) == 2)
        await manager.broadcast({"a": 1}, channel="room:1")
        assert await plain.wait_messages(1) == ['{"a":1}']
        assert await late.wait_messages(2) == ["2", '{"a":1}']


async def test_subscribing_since() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager, inbound="commands", authorize=lambda connection, action, channel: True) as client:
        receipts = [await manager.broadcast(number, channel="room:2") for number in range(4)]
        peer = client("room:1")
        await peer.wait_events(2)
        peer.ask(type="subscribe", channel="room:2", since=str(receipts[1].position), id=7)
        answer, *messages = (await peer.wait_events(5))[2:]
        position = str(receipts[1].position)
        assert answer == {
            "type": "subscribed",
            "channel": "room:2",
            "position": position,
            "recovered": True,
            "id": 7,
        }
        assert [message["data"] for message in messages] == [2, 3]
        peer.ask(type="subscribe", channel="plain", id="x")
        assert (await peer.wait_events(6))[-1] == {"type": "subscribed", "channel": "plain", "id": "x"}
        peer.ask(type="subscribe", channel="room:3", since="last")
        assert (await peer.wait_events(7))[-1]["recovered"] is True
        peer.ask(type="subscribe", channel="room:4", since={"epoch": "x", "offset": 1})
        error = (await peer.wait_events(8))[-1]
        assert error["code"] == "invalid_command"
        assert '"kX2dh0Qb7a_Z:17"' in error["text"]
        peer.ask(type="unsubscribe", channel="room:2", id=8)
        assert (await peer.wait_events(9))[-1] == {"type": "unsubscribed", "channel": "room:2", "id": 8}
        await manager.broadcast("gone", channel="room:2")
        await turns()
        assert len(peer.events) == 9


async def test_right_that_is_taken_back_while_it_subscribes_sends_nothing() -> None:
    manager = ConnectionManager(history=KEPT)
    asked: list[str] = []

    def authorize(connection: object, action: str, channel: str | None) -> bool:
        asked.append(f"{action} {channel}")
        return asked.count("subscribe room:2") < 2

    async with serving(manager, inbound="commands", authorize=authorize) as client:
        receipts = [await manager.broadcast(number, channel="room:2") for number in range(4)]
        peer = client("room:1")
        await peer.wait_events(2)
        peer.ask(type="subscribe", channel="room:2", since=str(receipts[0].position))
        assert (await peer.wait_events(3))[-1]["code"] == "forbidden"
        await manager.broadcast("secret", channel="room:2")
        await turns()
        assert len(peer.events) == 3


async def test_right_that_nobody_can_tell_of_while_it_subscribes_sends_nothing() -> None:
    manager = ConnectionManager(history=KEPT)
    asked: list[str] = []

    def authorize(connection: object, action: str, channel: str | None) -> bool:
        asked.append(f"{action} {channel}")
        if asked.count("subscribe room:2") == 2:
            raise EngineUnavailable("the rights are at a broker")
        return True

    async with serving(manager, inbound="commands", authorize=authorize) as client:
        receipts = [await manager.broadcast(number, channel="room:2") for number in range(2)]
        peer = client("room:1")
        await peer.wait_events(2)
        peer.ask(type="subscribe", channel="room:2", since=str(receipts[0].position))
        assert (await peer.wait_events(3))[-1]["code"] == "unavailable"
        assert (await manager.broadcast("secret", channel="room:2")).members_here == 0
        peer.ask(type="subscribe", channel="room:2", since=str(receipts[0].position))
        assert [event.get("data") for event in (await peer.wait_events(6))[3:]] == [None, 1, "secret"]


async def test_who_may_subscribe_may_read_what_was_kept_before_it_came() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        for number in range(3):
            await manager.broadcast(number, channel="room:1")
        _, subscribed = await client("room:1").wait_events(2)
        epoch = subscribed["position"].partition(":")[0]
        _, subscribed, *messages = await client("room:1", f"{epoch}:1").wait_events(4)
        assert subscribed["recovered"]
        assert [message["data"] for message in messages] == [1, 2]


@pytest.mark.parametrize("since", ["last", "position"])
async def test_position_is_no_right(since: str) -> None:
    manager = ConnectionManager(history=KEPT)
    asked: list[str | None] = []

    def authorize(connection: object, action: str, channel: str | None) -> bool:
        asked.append(channel)
        return False

    async with serving(manager, authorize=authorize) as client:
        before = (await manager.broadcast("secret", channel="room:1")).position
        await manager.broadcast("secret", channel="room:1")
        peer = client("room:1", before if since == "position" else since)
        await peer.wait_close()
        assert (peer.end, peer.messages, asked) == ((1008, "not allowed"), [], ["room:1"])


@pytest.mark.parametrize("inbound", ["broadcast", "handle", "ignore", "commands"])
async def test_rights_are_those_of_inbound(inbound: str) -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager, inbound=inbound) as client:
        peer, other = client("room:1"), client("room:1")
        await peer.wait_events(2)
        await other.wait_events(2)
        peer.ask(type="publish", channel="room:1", data={"a": 1}, id=1)
        peer.ask(type="publish", channel="room:2", data="x", id=2)
        peer.ask(type="subscribe", channel="room:2", id=3)
        peer.ask(nonsense=1, id=4)
        peer.say("5")
        await eventually(lambda: len(peer.of("error")) >= (4 if inbound != "ignore" else 5))
        codes = {answer.get("id"): answer["code"] for answer in peer.of("error")}
        expected = {2: "forbidden", 3: "forbidden", 4: "invalid_command", None: "invalid_command"}
        assert codes == (expected if inbound != "ignore" else {1: "forbidden", **expected})
        if inbound != "ignore":
            at = str(await manager.position("room:1"))
            assert peer.of("published") == [{"type": "published", "channel": "room:1", "position": at, "id": 1}]
            (message,) = [event for event in (await other.wait_events(3)) if event["type"] == "message"]
            assert message["data"] == {"a": 1}


async def test_broken_json_closes_with_1007() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        peer = client("room:1")
        await peer.wait_events(2)
        peer.say("{")
        assert await peer.wait_close() == 1007


async def test_withheld_message_is_told_by_its_position() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        peer = client("room:1")
        await peer.wait_events(2)
        (connection,) = manager.connections
        one = await manager.broadcast("1", channel="room:1", exclude=connection)
        assert (await peer.wait_events(3))[-1] == {
            "type": "position",
            "channel": "room:1",
            "position": str(one.position),
        }

        @manager.on_deliver
        def withhold(delivery: Any) -> None:
            if delivery.message.data == "3":
                raise RuntimeError("refused")
            delivery.recipients.clear()

        await manager.broadcast("2", channel="room:1")
        with pytest.raises(RuntimeError, match="refused"):
            await manager.broadcast("3", channel="room:1")
        events = await peer.wait_events(5)
        assert [event["type"] for event in events[3:]] == ["position", "position"]
        assert events[-1]["position"] == str(await manager.position("room:1"))


async def test_new_epoch_is_told_to_clients_that_stayed() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        peer = client("room:1")
        await manager.broadcast("1", channel="room:1")
        await peer.wait_events(2)
        await manager.forget("room:1")
        await eventually(lambda: peer.of("gap"))
        at = await manager.position("room:1")
        assert peer.of("gap") == [{"type": "gap", "channel": "room:1", "reason": "epoch", "position": str(at)}]
        receipt = await manager.broadcast("2", channel="room:1")
        await eventually(lambda: peer.events[-1].get("position") == str(receipt.position))


async def test_client_that_came_while_nothing_could_be_read_is_told_where_it_begins() -> None:
    cluster = Cluster(2, history=KEPT)
    there, node = cluster
    async with serving(node, cluster) as client:
        first = await there.broadcast("1", channel="room:1")
        cluster.partition(1)
        peer = client("room:1")
        assert (await peer.wait_events(2))[1] == {"type": "subscribed", "channel": "room:1"}
        is_asked, may_go_on = asyncio.Event(), asyncio.Event()

        @node.on_connect
        async def wait(_: object) -> None:
            is_asked.set()
            await may_go_on.wait()

        late = client("room:1", first.position)
        await is_asked.wait()
        missed = await there.broadcast("2", channel="room:1")
        cluster.heal()
        await eventually(lambda: peer.of("gap"))
        at = str(missed.position)
        assert peer.of("gap") == [{"type": "gap", "channel": "room:1", "reason": "unavailable", "position": at}]
        may_go_on.set()
        await there.broadcast("3", channel="room:1")
        await eventually(lambda: peer.of("message") and len(late.of("message")) == 2)
        assert [event["data"] for event in peer.of("message")] == ["3"]
        assert late.of("gap") == []
        assert late.of("subscribed")[0]["recovered"] is True
        assert [event["data"] for event in late.of("message")] == ["2", "3"]


@pytest.mark.parametrize("policy", ["disconnect", "drop_oldest", "drop_newest", "conflate"])
async def test_slow_client_is_sent_the_rest_when_it_reads_again(policy: Policy) -> None:
    slow = SlowConsumer(policy=policy, max_backlog_messages=16)
    manager = ConnectionManager(history={"room:*": History(messages=1000)}, slow_consumer=slow)
    async with serving(manager) as client:
        peer = client("room:1")
        await peer.wait_events(2)
        peer.stall()
        for number in range(300):
            manager.broadcast_nowait(number, channel="room:1")
            await asyncio.sleep(0)
        await turns()
        assert manager.stats().backlog_messages <= 16
        peer.resume()
        await eventually(lambda: len(peer.of("message")) == 300)
        assert [event["data"] for event in peer.of("message")] == list(range(300))
        assert manager.stats().dropped == manager.stats().evicted == {}


async def test_slow_client_that_misses_more_than_is_kept_is_told() -> None:
    manager = ConnectionManager(history=KEPT, slow_consumer=SlowConsumer(max_backlog_messages=16))
    async with serving(manager) as client:
        peer = client("room:1")
        await peer.wait_events(2)
        peer.stall()
        for number in range(300):
            manager.broadcast_nowait(number, channel="room:1")
            await asyncio.sleep(0)
        peer.resume()
        await eventually(lambda: peer.of("gap"))
        (gap,) = peer.of("gap")
        assert gap["reason"] == "too_many"
        await manager.broadcast("live", channel="room:1")
        await eventually(lambda: peer.events[-1].get("data") == "live")
        assert manager.stats().refused_recoveries == {"too_many": 1}


async def test_client_that_comes_back_gets_what_was_sent_to_its_user_and_to_everyone() -> None:
    manager = ConnectionManager(history={"room:*": History(), USERS: History(), EVERYONE: History()})

    async def user() -> str:
        return "ada"

    async with serving(manager, authenticate=user) as client:
        first = client("room:1")
        await eventually(lambda: len(first.of("subscribed")) == 3)
        at = {event.get("channel") or event["to"]: event["position"] for event in first.of("subscribed")}
        first.leave()
        await eventually(lambda: not manager.connections)
        await manager.broadcast("hers", user="ada")
        await manager.broadcast("all", to=EVERYONE)
        await manager.broadcast("room", channel="room:1")
        back = client("room:1", f"{at['room:1']}&since_user={at['user']}&since_everyone={at['everyone']}")
        await eventually(lambda: len(back.of("message")) == 3)
        assert sorted(event["data"] for event in back.of("message")) == ["all", "hers", "room"]
        assert [event["recovered"] for event in back.of("subscribed")] == [True] * 3


async def test_position_of_a_user_is_nothing_to_who_has_none() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        peer = client("room:1", "&since_user=epoch:1&since_everyone=epoch:1&since_everyone=x")
        events = await peer.wait_events(3)
        assert [event.get("reason") for event in events] == [None, None, "not_kept"]
        assert events[2]["to"] == "everyone"
