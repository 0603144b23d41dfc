"""A broadcast to several audiences, on every engine, while members come, go and move between them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.asgi import Peer, eventually
from tests.support.brokers.redis_groups import redis_cluster
from wsbroadcast import EVERYONE, Audience, Connection, ConnectionManager, Delivery, UserId

CHANNELS = [f"channel {number}" for number in range(4)]
USERS: list[UserId] = ["ada", "bob", 3]
ROUNDS = 12


@pytest.fixture(params=["memory", "redis", "redis+cluster", "nats", "postgres"])
async def managers(request: pytest.FixtureRequest, prefix: str) -> AsyncIterator[list[ConnectionManager]]:
    """Three nodes; with `memory://` there is one."""
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            url, count = "memory://", 1
        elif request.param == "redis+cluster":
            nodes = stack.enter_context(redis_cluster())
            url, count = f"redis+cluster://{','.join(f'{node.host}:{node.port}' for node in nodes)}?prefix={prefix}", 3
        else:
            broker = request.getfixturevalue(f"{request.param}_server")
            separator = "&" if "?" in broker.url else "?"
            url, count = f"{broker.url}{separator}prefix={prefix}", 3
        made = [ConnectionManager(url) for _ in range(count)]
        for manager in made:
            await stack.enter_async_context(manager)
        yield made


@dataclass(eq=False)
class Somebody:
    """A client, and in which audiences it is by what the test knows."""

    manager: ConnectionManager
    user: UserId
    channels: set[str]
    peer: Peer = field(default_factory=Peer)
    connection: Connection | None = None
    # Since the round began, in which it was at any moment, and which it was in throughout.
    ever: set[Audience] = field(default_factory=set)
    throughout: set[Audience] = field(default_factory=set)

    @property
    def audiences(self) -> set[Audience]:
        if self.connection is None:
            return set()
        return {EVERYONE, Audience.user(self.user), *map(Audience.channel, self.channels)}

    def begin_round(self) -> None:
        self.ever, self.throughout = self.audiences, self.audiences

    async def connect(self) -> None:
        self.ever |= {EVERYONE, Audience.user(self.user), *map(Audience.channel, self.channels)}
        self.connection = await self.manager.connect(self.peer.websocket, user=self.user, channels=self.channels)

    async def leave(self) -> None:
        self.throughout.clear()
        connection, self.connection = self.connection, None
        await self.manager.disconnect(connection) if connection is not None else None

    async def move(self, old: str, new: str) -> None:
        assert self.connection is not None
        self.throughout.discard(Audience.channel(old))
        self.ever.add(Audience.channel(new))
        await self.connection.subscribe(new)
        await self.connection.unsubscribe(old)
        self.channels = self.channels - {old} | {new}


class Story:
    """Rounds of broadcasts and changes that run at the same time; between them all is still."""

    def __init__(self, managers: list[ConnectionManager], seed: int) -> None:
        self.random = random.Random(seed)
        self.managers = managers
        self.people: list[Somebody] = []
        self.number = 0

    def newcomer(self) -> Somebody:
        some = set(self.random.sample(CHANNELS, self.random.randrange(3)))
        somebody = Somebody(self.random.choice(self.managers), self.random.choice(USERS), some)
        self.people.append(somebody)
        return somebody

    def here(self) -> list[Somebody]:
        return [somebody for somebody in self.people if somebody.connection is not None]

    def changes(self) -> list[Coroutine[Any, Any, None]]:
        changes = [self.newcomer().connect() for _ in range(2)]
        people = self.here()
        self.random.shuffle(people)
        changes += [somebody.leave() for somebody in people[:2]]
        for somebody in people[2:8]:
            old, new = self.random.sample(CHANNELS, 2)
            if old in somebody.channels and new not in somebody.channels:
                changes.append(somebody.move(old, new))
        return changes

    async def broadcast(self, text: str, audiences: list[Audience], outsiders: list[UserId]) -> None:
        manager = self.random.choice(self.managers)
        if all(audience.kind == "channel" for audience in audiences):
            await manager.broadcast(text, channels=[each.name for each in audiences], exclude_users=outsiders)
        else:
            await manager.broadcast(text, to=audiences, exclude_users=outsiders)

    async def play(self) -> None:
        await asyncio.gather(*(self.newcomer().connect() for _ in range(8)))
        for _ in range(ROUNDS):
            for somebody in self.people:
                somebody.begin_round()
            said: dict[str, tuple[list[Audience], list[UserId]]] = {}
            calls = self.changes()
            for _ in range(3):
                self.number += 1
                pool = [*map(Audience.channel, CHANNELS), *map(Audience.user, USERS)]
                audiences = self.random.sample(pool, self.random.randint(1, 4))
                outsiders = self.random.sample(USERS, self.random.randrange(2))
                said[str(self.number)] = audiences, outsiders
                calls.append(self.broadcast(str(self.number), audiences, outsiders))
            self.random.shuffle(calls)
            await asyncio.gather(*calls)
            await self.settle()
            self.check(said)

    async def settle(self) -> None:
        """Wait for a last word to each audience from each node: what came before it has arrived."""
        for node, manager in enumerate(self.managers):
            for audience in (*map(Audience.channel, CHANNELS), *map(Audience.user, USERS)):
                await manager.broadcast(f"end {self.number} {node} {audience.name}", to=audience)
        for somebody in self.here():
            names = [each.name for each in somebody.audiences if each != EVERYONE]
            ends = {f"end {self.number} {node} {name}" for node in range(len(self.managers)) for name in names}
            await eventually(lambda ends=ends, peer=somebody.peer: ends <= set(peer.messages))  # type: ignore[misc]

    def check(self, said: dict[str, tuple[list[Audience], list[UserId]]]) -> None:
        for somebody in self.people:
            came = Counter(somebody.peer.messages)
            for text, (audiences, outsiders) in said.items():
                assert came[text] <= 1, (text, audiences)
                if somebody.user in outsiders or not somebody.ever & set(audiences):
                    assert came[text] == 0, (text, audiences, outsiders)
                elif somebody.throughout & set(audiences):
                    assert came[text] == 1, (text, audiences, outsiders)


@pytest.mark.parametrize("seed", range(3))
async def test_each_connection_gets_it_once_and_never_nothing(managers: list[ConnectionManager], seed: int) -> None:
    if seed == 0:
        for manager in managers:
            manager.on_deliver(_ponder)
    await Story(managers, seed).play()


async def _ponder(delivery: Delivery) -> None:
    await asyncio.sleep(0)


async def test_user_is_unsubscribed_on_every_node(managers: list[ConnectionManager]) -> None:
    told: list[str] = []
    people = [Somebody(manager, user, {"a", "b"}) for manager in managers for user in ("ada", "bob")]
    for manager in managers:
        manager.on_unsubscribe(lambda connection, channel: told.append(f"{connection.user} {channel}"))
    for somebody in people:
        await somebody.connect()
    receipt = await managers[0].unsubscribe_user("ada", "a", "c")
    assert receipt.members_here == 1
    await eventually(lambda: told == ["ada a"] * len(managers))
    await managers[0].broadcast("to a", channel="a")
    await managers[0].broadcast("to b", channel="b")
    for somebody in people:
        await eventually(lambda peer=somebody.peer: "to b" in peer.messages)  # type: ignore[misc]
        await eventually(lambda one=somebody: ("to a" in one.peer.messages) == (one.user == "bob"))  # type: ignore[misc]
        assert somebody.connection is not None
        assert somebody.connection.channels == ({"b"} if somebody.user == "ada" else {"a", "b"})


async def test_user_is_closed_on_every_node(managers: list[ConnectionManager]) -> None:
    people = [Somebody(manager, user, set()) for manager in managers for user in ("ada", "bob", "ada")]
    for somebody in people:
        await somebody.connect()
    receipt = await managers[0].close_user("ada", code=4001, exclude=people[0].connection or ())
    assert receipt.members_here == 1
    for somebody in people[1:]:
        if somebody.user == "ada":
            await eventually(lambda peer=somebody.peer: peer.close_code == 4001)  # type: ignore[misc]
    assert people[0].connection is not None
    assert people[0].connection.is_open
