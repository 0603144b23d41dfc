"""Who is in a channel, as an app asks for it and is told: over all nodes, over crashes and over deploys."""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.asgi import Peer, eventually, turns
from wsbroadcast import (
    EVERYONE,
    ConfigurationError,
    Connection,
    ConnectionManager,
    InvalidChannel,
    Member,
    PermissionDenied,
    Presence,
    Presences,
)
from wsbroadcast.presence import Roll
from wsbroadcast.testing import Cluster

pytestmark = pytest.mark.skipif(
    os.environ.get("WSBROADCAST_TEST_LOOP") == "uvloop", reason="the clock of uvloop can't be set"
)


class Told:
    """What hooks were told, on all nodes."""

    def __init__(self, cluster: Cluster) -> None:
        self.lines: list[str] = []
        for manager in cluster:
            self.listen(manager)

    def listen(self, manager: ConnectionManager) -> None:
        # Async, because a sync one runs in a thread, which is late when a test sets the clock forward.
        @manager.on_joined
        async def joined(channel: str, user: str) -> None:
            self.lines.append(f"{user} joined {channel}")

        @manager.on_left
        async def left(channel: str, user: str) -> None:
            self.lines.append(f"{user} left {channel}")


@asynccontextmanager
async def nodes(
    count: int = 2, presence: Presences | None = None, **options: Any
) -> AsyncIterator[tuple[Cluster, Told]]:
    cluster = Cluster(count, presence=Presence() if presence is None else presence, **options)
    told = Told(cluster)
    async with cluster:
        yield cluster, told


async def come(manager: ConnectionManager, user: str | None = None, *channels: str, **options: Any) -> Connection:
    return await manager.connect(Peer().websocket, user=user, channels=channels or ("news",), **options)


async def users(manager: ConnectionManager, channel: str = "news") -> list[str | None]:
    await turns(20)  # in which other nodes tell the broker
    return sorted((member.user for member in await manager.presence(channel)), key=str)


async def test_a_user_with_many_tabs_on_many_nodes_is_one_member() -> None:
    async with nodes() as (cluster, told):
        tabs = [await come(manager, "ann") for manager in (*cluster, *cluster)]
        await come(cluster[0])
        for manager in cluster:
            assert await manager.presence("news") == [Member("ann", "ann", None)]
            assert await manager.presence_count("news") == 2
        for tab in tabs[:-1]:
            await tab.close()
        assert await users(cluster[0]) == ["ann"]
        await tabs[-1].close()
        assert await users(cluster[0]) == []
        await eventually(lambda: told.lines == ["ann joined news", "ann left news"])


@pytest.mark.parametrize(
    "user", ["ann", "anna@example.com", "user:5", "a b", "ünï", "x" * 200, "..", "*", "{}", "'\"\\"]
)
async def test_users_with_odd_names(user: str) -> None:
    async with nodes(2, Presence(grace=0)) as (cluster, told):
        channel = f"room:{user}"[:200] if user.isascii() else "room:1"
        connection = await come(cluster[0], user, channel)
        await turns(20)
        assert await cluster[1].presence(channel) == [Member(user, user, None)]
        assert await cluster[1].user_channels(user) == {channel}
        assert await cluster[1].is_online(user)
        await connection.close()
        await turns(20)
        assert not await cluster[1].is_online(user)
        assert told.lines == [f"{user} joined {channel}", f"{user} left {channel}"]


async def test_an_id_that_is_a_number_is_a_text_there() -> None:
    async with nodes() as (cluster, _):
        await cluster[0].connect(Peer().websocket, user=5, channels=["news"])
        assert await users(cluster[1]) == ["5"]
        assert await cluster[1].is_online(5)


LOST = ["disconnect", "lost", "client close", "evicted", "endpoint ended", "aged", "block ended"]
INTENDED = ["close", "unsubscribe", "unsubscribe_user", "close_user", "expired"]


async def lose(manager: ConnectionManager, connection: Connection, how: str) -> None:
    membership = manager._core.life.node.membership
    match how:
        case "disconnect":
            await manager.disconnect(connection)
        case "lost":
            membership.lost(connection, 1006, "")
        case "client close":
            membership.lost(connection, 1000, "bye")
        case "evicted":
            membership.evict(connection, "backlog_full")
        case "endpoint ended":
            await membership.endpoint_ended(connection, None)
        case "aged":
            membership._too_old(connection)
        case "block ended":
            await membership.part(connection)
        case "close":
            await manager.close(connection)
        case "unsubscribe":
            await manager.unsubscribe(connection, "news")
        case "unsubscribe_user":
            await manager.unsubscribe_user("ann", "news")
        case "close_user":
            await manager.close_user("ann")
        case "expired":
            membership.expire(connection)


@pytest.mark.parametrize("how", LOST)
async def test_who_loses_the_connection_stays_for_the_grace(how: str) -> None:
    async with nodes() as (cluster, told):
        connection = await come(cluster[0], "ann")
        assert await users(cluster[1]) == ["ann"]
        await lose(cluster[0], connection, how)
        await cluster.advance(9.5)
        assert await users(cluster[1]) == ["ann"]
        again = await come(cluster[1], "ann")
        await cluster.advance(20)
        assert await users(cluster[0]) == ["ann"]
        assert told.lines == ["ann joined news"]
        await lose(cluster[1], again, how)
        await cluster.advance(10.5)
        assert await users(cluster[0]) == []
        assert not await cluster[0].is_online("ann")
        assert told.lines == ["ann joined news", "ann left news"]


@pytest.mark.parametrize("how", INTENDED)
async def test_who_leaves_by_intention_is_gone_at_once(how: str) -> None:
    async with nodes() as (cluster, told):
        connection = await come(cluster[0], "ann")
        assert await users(cluster[1]) == ["ann"]
        await lose(cluster[0], connection, how)
        assert await users(cluster[0]) == await users(cluster[1]) == []
        assert await cluster[1].is_online("ann") == how.startswith("unsubscribe")
        await eventually(lambda: told.lines == ["ann joined news", "ann left news"])


async def test_nobody_is_told_of_a_deploy_of_all_nodes() -> None:
    async with nodes(3) as (cluster, told):
        names = [f"user {number}" for number in range(20)]
        spare = ConnectionManager(cluster._engines[0].__class__(cluster.hub), presence=Presence())
        told.listen(spare)
        here = {name: await come(cluster[number % 3], name) for number, name in enumerate(names)}
        assert await users(cluster[0]) == sorted(names)
        async with spare:
            for manager in cluster:
                gone = {name: each for name, each in here.items() if each.manager is manager}
                drain = asyncio.ensure_future(manager.drain(over=0.1))
                await cluster.advance(1)
                await drain
                for name in gone:
                    here[name] = await come(spare, name)
                await manager.aclose()
                await cluster.advance(15)
                assert await users(spare) == sorted(names)
            assert Counter(told.lines) == Counter(f"{name} joined news" for name in names)


async def test_users_of_a_node_that_is_killed_are_gone_within_13_seconds_and_told_once() -> None:
    async with nodes(3) as (cluster, told):
        names = [f"user {number}" for number in range(10)]
        for name in names:
            await come(cluster[0], name)
        await come(cluster[1], names[0])
        assert await users(cluster[2]) == names
        await cluster.kill(0)
        await cluster.advance(13)
        assert await users(cluster[2]) == await users(cluster[1]) == names[:1]
        assert Counter(told.lines) == Counter(
            [f"{name} joined news" for name in names] + [f"{name} left news" for name in names[1:]]
        )


async def test_a_broker_that_has_forgotten_everything_is_right_within_one_lease() -> None:
    async with nodes(2) as (cluster, told):
        for number, manager in enumerate(cluster):
            await come(manager, f"user {number}")
        assert len(await users(cluster[0])) == 2
        cluster.hub.roll = type(cluster.hub.roll)()
        cluster.hub.leases.clear()
        await cluster.restart_broker()
        await cluster.advance(5)
        assert await users(cluster[0]) == await users(cluster[1]) == ["user 0", "user 1"]
        assert not [line for line in told.lines if " left " in line]


async def test_by_connection_each_is_a_member_and_is_gone_at_once() -> None:
    presence = Presence(by="connection", grace=0, info=lambda connection: connection.info)
    async with nodes(2, presence) as (cluster, told):
        first, second = await come(cluster[0], "ann", info="phone"), await come(cluster[1], "ann", info="desk")
        nobody = await come(cluster[1])
        await turns(20)
        found = {member.id: member for member in await cluster[0].presence("news")}
        assert found == {
            first.id: Member(first.id, "ann", "phone"),
            second.id: Member(second.id, "ann", "desk"),
            nobody.id: Member(nobody.id, None, None),
        }
        assert await cluster[0].presence_count("news") == 3
        assert await cluster[0].user_channels("ann") == {"news"}
        await cluster[0].disconnect(first)
        await turns(20)
        assert await cluster[1].presence_count("news") == 2
        assert await cluster[0].user_channels("ann") == {"news"}
        await cluster[1].disconnect(second)
        await turns(20)
        assert await cluster[0].user_channels("ann") == frozenset()
        assert not await cluster[0].is_online("ann")
        assert told.lines[-1] == f"{second.id} left news"


async def test_who_is_in_no_channel_is_online() -> None:
    async with nodes(2, {"room:*": Presence()}) as (cluster, told):
        connection = await cluster[0].connect(Peer().websocket, user="ann")
        await turns(20)
        assert await cluster[1].is_online("ann")
        assert await cluster[1].user_channels("ann") == frozenset()
        await connection.close()
        await turns(20)
        assert not await cluster[1].is_online("ann")
        assert told.lines == []


async def test_receipts_tell_how_many_there_are_on_all_nodes() -> None:
    async with nodes(2, {"room:*": Presence()}) as (cluster, _):
        for manager in cluster:
            await come(manager, "ann", "room:1", "news")
        await come(cluster[1], "bob", "room:1")
        await come(cluster[1], None, "room:1")
        assert await cluster[1].presence_count("room:1") == 3
        receipt = await cluster[0].broadcast("hi", channel="room:1")
        assert (receipt.members_here, receipt.members) == (1, 3)
        assert (await cluster[0].broadcast("hi", channel="room:2")).members == 0
        assert (await cluster[0].broadcast("hi", channel="news")).members is None
        assert (await cluster[0].broadcast("hi", user="bob")).members == 1
        assert (await cluster[0].broadcast("hi", user="cid")).members == 0
        assert (await cluster[0].broadcast("hi", to=EVERYONE)).members == 3
        assert (await cluster[0].broadcast("hi", channels=["room:1", "room:2"])).members is None


async def test_who_gets_no_receipt_asks_the_broker_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(1) as (cluster, _):
        peer = Peer()
        await cluster[0].connect(peer.websocket, user="ann", channels=["news"])
        await turns(20)
        asked: list[str] = []
        monkeypatch.setattr(cluster._engines[0], "count", asked.append)
        cluster[0].broadcast_soon("soon", channel="news")
        core = cluster[0]._core
        await core.broadcast(core.publications("of a client", "news"))
        assert sorted(map(str, await peer.wait_messages(2))) == ["of a client", "soon"]
        assert asked == []


async def test_a_hook_that_refuses_keeps_them_out() -> None:
    async with nodes(1) as (cluster, told):
        cluster[0].on_connect(lambda connection: connection._user_key != "mallory")
        cluster[0].on_subscribe(lambda connection, channel: channel != "secret")
        with pytest.raises(PermissionDenied):
            await come(cluster[0], "mallory")
        connection = await come(cluster[0], "ann")
        with pytest.raises(PermissionDenied):
            await connection.subscribe("secret")
        await turns(20)
        assert await cluster[0].presence("secret") == []
        assert await users(cluster[0]) == ["ann"]
        assert told.lines == ["ann joined news"]


async def test_hooks_of_a_channel_run_in_the_order_of_what_happened() -> None:
    async with nodes(1) as (cluster, told):
        go_on = asyncio.Event()

        @cluster[0].on_joined
        async def slow(channel: str, user: str) -> None:
            await go_on.wait()
            told.lines.append("said hello")

        connection = await come(cluster[0], "ann")
        await turns(20)
        await connection.close()
        await come(cluster[0], "bob", "other")
        assert await users(cluster[0]) == []
        await turns(20)
        assert told.lines == ["ann joined news", "bob joined other"]
        go_on.set()
        await eventually(lambda: "ann left news" in told.lines)
        assert told.lines.index("ann left news") > told.lines.index("said hello")


async def test_errors_say_what_to_do() -> None:
    async with ConnectionManager() as manager:
        for asked in (manager.presence("news"), manager.presence_count("news"), manager.is_online("ann")):
            with pytest.raises(ConfigurationError, match=r"presence=Presence\(\)"):
                await asked
    async with nodes(1, {"room:*": Presence()}) as (cluster, _):
        with pytest.raises(ConfigurationError, match="'news' has no presence"):
            await cluster[0].presence("news")
        with pytest.raises(InvalidChannel):
            await cluster[0].presence("\x01online")
        with pytest.raises(ValueError, match="user"):
            await cluster[0].is_online("")


@pytest.mark.parametrize("presence", ["yes", {"room:*": True}, {"": Presence()}, [Presence()], {5: Presence()}])
def test_what_is_no_presence_is_refused(presence: Any) -> None:
    with pytest.raises(ConfigurationError, match="presence is a Presence"):
        ConnectionManager(presence=presence)


def test_who_is_where_is_known_in_bounded_memory() -> None:
    roll = Roll()
    roll.enter("home", "a", {"ann": b""})
    for number in range(20_000):
        for change in (roll.enter(f"room:{number}", "a", {"ann": b""}), roll.leave(f"room:{number}", "a", ["ann"])):
            assert change is not None
    assert len(roll._versions) == len(roll._empty) + 1 < 10_000
    roll.leave("room:0", "a", ["ann"])
    change = roll.enter("room:0", "a", {"ann": b""})
    assert change is not None
    assert change.version > 2  # never that of an earlier change


@pytest.mark.parametrize("grace", [-1, math.nan, math.inf, True, "10"])
def test_grace_is_seconds_or_none_at_all(grace: Any) -> None:
    assert Presence(grace=0).grace == 0
    with pytest.raises(ConfigurationError, match=r"Presence\.grace must be seconds, 0 or more, not"):
        Presence(grace=grace)


def test_info_is_bounded() -> None:
    with pytest.raises(ConfigurationError, match="at most 65536"):
        Presence(max_info_bytes=1_000_000)


async def test_nothing_is_left_of_channels_that_flap() -> None:
    number = 100_000 if os.environ.get("WSBROADCAST_TEST_FULL") else 2_000
    async with nodes(1, Presence(grace=0)) as (cluster, told):
        connection = await come(cluster[0], "ann", "home")
        for each in range(number):
            await connection.subscribe(f"room:{each}")
            await connection.unsubscribe(f"room:{each}")
        assert await cluster[0].user_channels("ann") == {"home"}
        await connection.close()
        assert not await cluster[0].is_online("ann")
        presence = cluster[0]._core.life.node.presence
        assert presence is not None
        await eventually(lambda: not presence._here)
        assert (presence._seated, presence._dirty, presence._graces, presence._unknown) == ({}, {}, [], {})
        assert cluster.hub.roll._holders == {}
        assert (
            Counter(line.split()[1] for line in told.lines)["left"]
            == Counter(line.split()[1] for line in told.lines)["joined"]
        )


CHANCES = {"come": 40, "close": 15, "lose": 20, "wait": 10, "cut": 3, "freeze": 3, "kill": 1}


@pytest.mark.parametrize("seed", range(30 if os.environ.get("WSBROADCAST_TEST_FULL") else 3))
async def test_by_chance(seed: int) -> None:
    chance = random.Random(seed)
    full = bool(os.environ.get("WSBROADCAST_TEST_FULL"))
    crowd = 1000 if full else 30
    async with nodes(3, Presence(grace=2.0)) as (cluster, told):
        here: dict[int, list[Connection]] = {number: [] for number in range(3)}
        alive = [0, 1, 2]
        for step in range(600 if full else 150):
            node = chance.choice(alive)
            what = chance.choices(list(CHANCES), list(CHANCES.values()))[0]
            if what in ("cut", "kill"):
                await turns(50)  # a node that is cut off in the middle of a change may tell nobody of it
            match what:
                case "come":
                    here[node].append(await come(cluster[node], f"user {chance.randrange(crowd)}"))
                case "close" if here[node]:
                    await here[node].pop(chance.randrange(len(here[node]))).close()
                case "lose" if here[node]:
                    await cluster[node].disconnect(here[node].pop(chance.randrange(len(here[node]))))
                case "wait":
                    await cluster.advance(chance.choice([0.2, 1.0, 3.0]))
                case "cut":
                    cluster.partition(node)
                    await cluster.advance(chance.choice([1.0, 14.0]))
                    cluster.heal(node)
                case "freeze":
                    cluster.hub.leases[cluster._engines[node].incarnation] = 0.0
                    await cluster[chance.choice(alive)].presence("news")
                case "kill" if len(alive) > 1 and step > 50:
                    await cluster.kill(node)
                    alive.remove(node)
        await cluster.advance(20)
        wanted = sorted({f"{each._user_key}" for number in alive for each in here[number]})
        for number in alive:
            assert await users(cluster[number]) == wanted
        await eventually(lambda: replayed(told.lines) == set(wanted))


def replayed(lines: list[str]) -> set[str]:
    """Return who is there, as hooks were told; of each user its joining and its leaving take turns."""
    there: set[str] = set()
    for line in lines:
        user, what = line.removesuffix(" news").rsplit(" ", 1)
        if what == "joined":
            assert user not in there, f"{user} joined twice"
            there.add(user)
        else:
            assert user in there, f"{user} left twice"
            there.remove(user)
    return there
