"""A client of the Centrifuge protocol sees each message once, and no hole that it isn't told of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Any

import pytest
from fastapi import FastAPI

from tests.support.asgi import eventually, turns
from tests.support.centrifuge_client import BOTH, PATH, Client, Form, Told, client
from wsbroadcast import (
    Connection,
    ConnectionManager,
    EngineUnavailable,
    History,
    Identity,
    create_centrifuge_router,
)
from wsbroadcast.protocols.centrifuge import session
from wsbroadcast.testing import Cluster

CHANNEL = "news"


async def somebody() -> Identity:
    return Identity("7")


async def everything(_connection: object, _action: str, _channel: str | None) -> bool:
    return True


def app_of(manager: ConnectionManager, **options: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(
        create_centrifuge_router(manager, PATH, **{"authenticate": somebody, "authorize": everything, **options})
    )
    return app


class Follower:
    """Applies the SDKs' rule to what a client is told of a channel, and keeps what the app would see.

    An SDK stores the epoch and the offset of a reply, then the offset of each publication, and looks at nothing else.
    """

    def __init__(self) -> None:
        self.epoch = ""
        self.offset = 0
        self.was_subscribed = False
        self.seen: list[tuple[str, int, int]] = []
        """Epoch, offset and what the message was."""
        self.resets: list[int] = []
        """How much it had seen each time it was told that there may be a hole."""
        self.one: Client | None = None
        self.is_subscribed = False
        self._at = 0
        self._asked: dict[int, bool] = {}
        self.insufficient = 0

    def use(self, one: Client) -> None:
        """Go on with another connection."""
        self.one, self._at, self._asked, self.is_subscribed = one, 0, {}, False
        self.subscribe()

    def subscribe(self) -> None:
        """Ask for what comes, and for what was missed."""
        assert self.one is not None
        request: dict[str, Any] = {"channel": CHANNEL, "flag": 1}
        if self.was_subscribed:
            request |= {"recover": True, "epoch": self.epoch, "offset": self.offset}
        self._asked[self.one.begin("subscribe", **request)] = self.was_subscribed

    async def subscribed(self) -> None:
        """Wait until it is subscribed, as a client that stays for a moment."""

        def is_subscribed() -> bool:
            self.read()
            return self.is_subscribed

        await eventually(is_subscribed)

    def read(self) -> None:
        """Take what has come."""
        assert self.one is not None
        told = self.one.told
        while self._at < len(told):
            each = told[self._at]
            self._at += 1
            if each.get("id") in self._asked:
                self._replied(each, self._asked[each["id"]])
            elif "push" in each:
                self._pushed(each["push"])

    def _replied(self, reply: Told, is_recovery: bool) -> None:
        if "error" in reply:
            assert reply["error"].get("temporary"), reply
            self.subscribe()
            return
        result = reply["subscribe"]
        assert result["recoverable"] is True
        assert bool(result.get("was_recovering")) is is_recovery
        self.epoch = result["epoch"]
        if result.get("recovered"):
            assert is_recovery
            assert result.get("offset", 0) == self.offset
            for pub in result.get("publications", ()):
                self._take(pub)
        else:
            assert not result.get("publications")
            self.offset = result.get("offset", 0)
            self.resets.append(len(self.seen))
        self.is_subscribed = self.was_subscribed = True

    def _pushed(self, push: Told) -> None:
        assert push["channel"] == CHANNEL
        if "pub" in push:
            assert self.is_subscribed, "a push came before its subscription"
            self._take(push["pub"])
        elif "unsubscribe" in push:
            assert push["unsubscribe"]["code"] >= 2500, push
            assert push["unsubscribe"]["reason"]
            self.insufficient += 1
            self.is_subscribed = False
            self.subscribe()

    def _take(self, pub: Told) -> None:
        self.offset = pub["offset"]
        self.seen.append((self.epoch, pub["offset"], pub["data"]["n"]))

    def check(self, published: dict[tuple[str, int], int]) -> None:
        """Each message at most once, in order, as it was published, and no hole but where a reset was told."""
        for index, (epoch, offset, number) in enumerate(self.seen):
            assert published.get((epoch, offset), number) == number
            if index and index not in self.resets:
                before = self.seen[index - 1]
                assert (epoch, offset) == (before[0], before[1] + 1), (before, self.seen[index])
        numbers = [number for _, _, number in self.seen]
        assert len(set(numbers)) == len(numbers)


class World:
    """Nodes, a client that comes and goes, and what was published."""

    def __init__(self, cluster: Cluster, form: Form, random: Random) -> None:
        self.cluster = cluster
        self.random = random
        self.published: dict[tuple[str, int], int] = {}
        self.follower = Follower()
        self._form = form
        self._apps = [app_of(manager) for manager in cluster]
        self._socket: AsyncExitStack | None = None
        self._count = 0

    async def publish(self, count: int = 1) -> None:
        for _ in range(count):
            self._count += 1
            number = self._count
            try:
                receipt = await self.random.choice(self.cluster.managers).broadcast({"n": number}, channel=CHANNEL)
            except EngineUnavailable:
                continue
            assert receipt.position is not None
            self.published[receipt.position.epoch, receipt.position.offset] = number

    async def come(self, node: int) -> None:
        await self.leave()
        self._socket = AsyncExitStack()
        one = await self._socket.enter_async_context(client(self._apps[node], self._form))
        self.follower.use(one)

    async def leave(self) -> None:
        if self._socket is not None:
            self.follower.read()
            await self._socket.aclose()
            self._socket = None

    async def step(self) -> None:
        what = self.random.random()
        if what < 0.45:
            await self.publish(self.random.randrange(1, 5))
        elif what < 0.5:
            await self.publish(25)  # more than is kept
        elif what < 0.65:
            await self.come(self.random.randrange(len(self.cluster)))
        elif what < 0.75:
            await self.leave()
        elif what < 0.8:
            self.cluster.partition(self.random.randrange(len(self.cluster)))
        elif what < 0.9:
            self.cluster.heal()
        elif what < 0.94:
            await self.cluster.restart_broker(keeps=self.random.random() < 0.5)
        elif what < 0.96:
            self.cluster.delay(self.random.choice([0, 0.001, 0.01]))
        else:
            await turns(self.random.randrange(20))
        if self._socket is not None:
            if self.follower.one is not None and self.follower.one.peer.close is not None:
                await self.come(self.random.randrange(len(self.cluster)))
            self.follower.read()

    async def settle(self) -> None:
        """Heal everything, and wait until the client has seen the newest message."""
        self.cluster.hub.lost = self.cluster.hub.doubled = 0.0
        self.cluster.delay(0)
        self.cluster.heal()
        if self._socket is None:
            await self.come(0)
        async with asyncio.timeout(30):
            while True:
                await self.publish()
                for _ in range(20):
                    await asyncio.sleep(0.005)
                    self.follower.read()
                    if self.follower.seen and self.follower.seen[-1][2] == self._count:
                        return
                if self.follower.one is not None and self.follower.one.peer.close is not None:
                    await self.come(0)


@asynccontextmanager
async def world(form: Form, seed: int, **hub: float) -> AsyncIterator[World]:
    async with Cluster(2, seed=seed, history=History(messages=20)) as cluster:
        for name, value in hub.items():
            setattr(cluster.hub, name, value)
        made = World(cluster, form, Random(seed))
        try:
            yield made
        finally:
            await made.leave()


@pytest.mark.parametrize("seed", range(12))
@BOTH
async def test_no_message_twice_and_no_hole_without_a_word(form: Form, seed: int) -> None:
    async with world(form, seed) as all_:
        await all_.come(0)
        for _ in range(60):
            await all_.step()
        await all_.settle()
        all_.follower.check(all_.published)
        assert all_.follower.seen


@pytest.mark.parametrize("seed", range(6))
@BOTH
async def test_lost_and_doubled_live_messages_are_noticed(form: Form, seed: int) -> None:
    async with world(form, 100 + seed, lost=0.1, doubled=0.1) as all_:
        await all_.come(0)
        for _ in range(60):
            await all_.step()
        await all_.settle()
        all_.follower.check(all_.published)


@pytest.mark.parametrize("seed", range(4))
async def test_a_client_that_never_leaves_misses_nothing(seed: int) -> None:
    async with world("json", 200 + seed, lost=0.05, doubled=0.05) as all_:
        await all_.come(1)
        for _ in range(40):
            await all_.publish(2)
            await turns(all_.random.randrange(10))
            all_.follower.read()
        await all_.settle()
        all_.follower.check(all_.published)
        assert len(all_.follower.resets) == 1  # the first subscription
        assert len(all_.follower.seen) >= 70


@pytest.mark.parametrize("seed", range(6))
@BOTH
async def test_who_comes_back_in_time_misses_nothing(form: Form, seed: int) -> None:
    async with world(form, 300 + seed) as all_:
        await all_.come(0)
        await all_.follower.subscribed()
        for _ in range(30):
            await all_.publish(all_.random.randrange(4))
            if all_.random.random() < 0.5:
                await all_.leave()
            await all_.publish(all_.random.randrange(9))
            await all_.come(all_.random.randrange(2))
            await all_.publish(all_.random.randrange(4))
            await all_.follower.subscribed()
        await all_.settle()
        all_.follower.check(all_.published)
        assert all_.follower.resets == [0]  # the first subscription
        assert len(all_.follower.seen) == len(all_.published)


# One by one.


@BOTH
async def test_who_comes_back_gets_what_it_missed(form: Form) -> None:
    async with ConnectionManager(history=History(messages=5)) as manager:
        app = app_of(manager)
        async with client(app, form) as one:
            first = await one.result("subscribe", channel=CHANNEL)
            assert "was_recovering" not in first or first["was_recovering"] is False
            assert not first.get("publications")
            assert first["recoverable"] is True
            assert first["positioned"] is True
        for n in range(1, 4):
            await manager.broadcast({"n": n}, channel=CHANNEL)

        async def since(offset: int, epoch: str = first["epoch"], **more: Any) -> Told:
            async with client(app, form) as other:
                return await other.ask("subscribe", channel=CHANNEL, recover=True, offset=offset, epoch=epoch, **more)

        def offsets(reply: Told) -> list[int]:
            return [pub["offset"] for pub in reply["subscribe"].get("publications", ())]

        for offset, missed in [(0, [1, 2, 3]), (1, [2, 3]), (3, [])]:
            reply = await since(offset)
            assert offsets(reply) == missed
            assert reply["subscribe"]["recovered"] is True
            assert reply["subscribe"]["was_recovering"] is True
            assert reply["subscribe"].get("offset", 0) == offset
        for offset, epoch in [(4, first["epoch"]), (2, "other"), (2**64 - 1, first["epoch"])]:
            reply = await since(offset, epoch)
            assert offsets(reply) == []
            assert not reply["subscribe"].get("recovered")
            assert reply["subscribe"]["was_recovering"] is True
            assert (reply["subscribe"]["offset"], reply["subscribe"]["epoch"]) == (3, first["epoch"])
            refused = await since(offset, epoch, flag=2)
            assert refused["error"]["code"] == 112
            assert not refused["error"].get("temporary")
        assert offsets(await since(1, "")) == [2, 3]  # an empty epoch is any
        for n in range(4, 10):
            await manager.broadcast({"n": n}, channel=CHANNEL)
        assert not (await since(3))["subscribe"].get("recovered")
        assert (await since(3, flag=3))["error"]["code"] == 112
        assert offsets(await since(4)) == [5, 6, 7, 8, 9]


def frame_sizes(one: Client) -> list[int]:
    return [len(each if isinstance(each, bytes) else each.encode()) for each in one.peer.messages]


@BOTH
async def test_no_frame_is_larger_than_clients_take(form: Form) -> None:
    # Some close the connection at 1 MiB, and would come back for the same.
    async with ConnectionManager(history=History(messages=200)) as manager:
        app = app_of(manager)
        async with client(app, form) as one:
            first = await one.result("subscribe", channel=CHANNEL)
            for n in range(1, 61):
                manager.broadcast_nowait({"n": n, "text": "x" * 40_000}, channel=CHANNEL)
            await one.wait_pushes(60, CHANNEL)
            assert max(frame_sizes(one)) < 1_000_000
        async with client(app, form) as one:
            again = await one.result("subscribe", channel=CHANNEL, recover=True, offset=0, epoch=first["epoch"])
            await one.wait_pushes(60 - len(again["publications"]), CHANNEL)
            assert again["recovered"] is True
            assert [each["offset"] for each in (*again["publications"], *one.pushes(CHANNEL))] == list(range(1, 61))
            history = await one.result("history", channel=CHANNEL, limit=-1)
            assert history["publications"]
            assert max(frame_sizes(one)) < 1_000_000


@BOTH
@pytest.mark.parametrize("is_repeated", [False, True])
async def test_error_112_leaves_nothing_subscribed(form: Form, is_repeated: bool) -> None:
    async with ConnectionManager(history=History(messages=5)) as manager:
        app = app_of(manager)
        async with client(app, form) as one:
            if is_repeated:
                await one.result("subscribe", channel=CHANNEL)
            assert await one.error("subscribe", channel=CHANNEL, recover=True, offset=3, epoch="x", flag=2) == 112
            await manager.broadcast({"n": 1}, channel=CHANNEL)
            await one.ask("unsubscribe", channel="x")
            assert one.pushes(CHANNEL) == []
            assert one.pushes(CHANNEL, "unsubscribe") == [], "this would end it for good"
            assert manager.stats().channels == 0


@BOTH
async def test_without_history_nothing_is_recoverable(form: Form) -> None:
    async with ConnectionManager() as manager:
        app = app_of(manager)
        async with client(app, form) as one:
            result = await one.result("subscribe", channel=CHANNEL, recover=True, offset=3, epoch="x", recoverable=True)
            assert not result.get("recoverable")
            assert not result.get("recovered")
            await manager.broadcast({"n": 1}, channel=CHANNEL)
            (pub,) = await one.wait_pushes(1, CHANNEL)
            assert "offset" not in pub


@BOTH
async def test_no_connect_in_time_closes_so_that_the_client_comes_back(form: Form) -> None:
    async with Cluster(1) as cluster, client(app_of(cluster[0]), form, connects=False) as one:
        await cluster.advance(19)
        assert one.peer.close is None
        await cluster.advance(60)
        await turns()
        assert await one.closed() in (3000, 3004, 3502)
        assert one.peer.end is not None
        assert one.peer.end[0] != 3502, "this ends clients for good whose token was slow"


@BOTH
async def test_no_pong_closes_with_3012(form: Form) -> None:
    async with Cluster(1) as cluster, client(app_of(cluster[0]), form, connects=False) as one:
        result = await one.result("connect")
        ping = b"\x00" if form == "protobuf" else "{}"
        for _ in range(10):
            before = one.peer.messages.count(ping)
            await cluster.advance(result["ping"])
            await one.peer.wait_for(lambda before=before: one.peer.messages.count(ping) > before)  # type: ignore[misc]
            one.say({})
            await one.ask("unsubscribe", channel="x")
        assert one.peer.close is None
        await cluster.advance(result["ping"] * 2 + 20)
        assert await one.closed() == 3012


@BOTH
async def test_pings_come_while_the_connection_is_busy(form: Form) -> None:
    async with Cluster(1) as cluster, client(app_of(cluster[0]), form, connects=False) as one:
        result = await one.result("connect")
        await one.result("subscribe", channel=CHANNEL)
        ping = b"\x00" if form == "protobuf" else "{}"
        pings = 0
        for n in range(40):
            await cluster[0].broadcast({"n": n}, channel=CHANNEL)
            await cluster.advance(result["ping"] / 4)
            await one.wait_pushes(n + 1, CHANNEL)
            found = sum(
                each == ping or (isinstance(each, str) and "{}" in each.split("\n")) for each in one.peer.messages
            )
            if found > pings:
                pings = found
                one.say({})
                await one.ask("unsubscribe", channel="x")
        assert pings >= 8
        assert one.peer.close is None


@BOTH
async def test_live_messages_that_are_lost_are_read_again(form: Form) -> None:
    async with world(form, 7) as all_:
        await all_.come(0)
        for round_ in range(100):
            all_.cluster.hub.lost = float(round_ % 2)
            await all_.publish()
            await turns(10)
            all_.follower.read()
        await all_.settle()
        all_.follower.check(all_.published)
        assert all_.follower.insufficient == 0
        assert len(all_.follower.seen) >= 99


@BOTH
async def test_a_client_that_is_told_to_come_back_again_and_again_is_slowed_down(form: Form) -> None:
    async with Cluster(1, history=History(messages=2)) as cluster:
        manager, follower = cluster[0], Follower()

        async def lose() -> None:
            # More than is kept, and then one that shows it.
            for n in range(5):
                cluster.hub.lost = float(n < 4)
                await manager.broadcast({"n": n}, channel=CHANNEL)

        async with client(app_of(manager), form) as one:
            follower.use(one)
            await follower.subscribed()
            for count in (1, 2):
                await lose()
                await one.wait_pushes(count, CHANNEL, "unsubscribe")
                await follower.subscribed()
            assert follower.insufficient == 2
            assert len(follower.resets) == 3
            for seconds in (0.5, 1.0, 2.0, 3.0, 3.0):
                await lose()
                await turns(50)
                before = len(one.pushes(CHANNEL, "unsubscribe"))
                pubs = len(one.pushes(CHANNEL))
                cluster.hub.lost = 0.0
                await manager.broadcast({"n": 6}, channel=CHANNEL)
                await cluster.advance(seconds * 0.8)
                assert len(one.pushes(CHANNEL, "unsubscribe")) == before, seconds
                assert len(one.pushes(CHANNEL)) == pubs, "what comes after a hole is for later"
                assert manager.connections[0].channels == {CHANNEL}, "until then it may publish"
                await cluster.advance(seconds * 0.3)
                (*_, push) = await one.wait_pushes(before + 1, CHANNEL, "unsubscribe")
                assert push["code"] == 2500
                await follower.subscribed()
            assert one.peer.close is None
            assert len(follower.resets) == 8


@BOTH
async def test_who_waits_to_subscribe_again_may_publish(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_LOSSES", 0)
    monkeypatch.setattr(session, "_FIRST_PAUSE", 600.0)
    monkeypatch.setattr(session, "_LONGEST_PAUSE", 600.0)
    manager = ConnectionManager(history=History())

    def authorize(connection: Connection, action: str, channel: str | None) -> bool:
        return action == "subscribe" or channel in connection.channels

    app = app_of(manager, authorize=authorize)
    async with client(app, form) as one, client(app, form) as other:
        await one.result("subscribe", channel="a")
        await other.result("subscribe", channel="a")
        await manager.forget(channel="a")
        await turns(50)
        await manager.broadcast(1, channel="a")
        assert await one.result("publish", channel="a", data=2) == {}
        assert one.pushes("a") == [], "what comes after a hole is for later"
        for each in manager.connections:
            await manager.unsubscribe(each, "a")
        (push,) = await one.wait_pushes(1, "a", "unsubscribe")
        assert push["code"] == 2000
        assert await one.error("publish", channel="a", data=3) == 103
