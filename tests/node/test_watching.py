"""Clients that are told who is in a channel: a list once, then what changes, and never more than is good for others."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.asgi import eventually, turns
from wsbroadcast.concurrency import Tasks
from wsbroadcast.exceptions import EngineUnavailable
from wsbroadcast.message import Message
from wsbroadcast.node import watching
from wsbroadcast.node.watching import Watches
from wsbroadcast.presence import ANONYMOUS, Members, Presence, Roll
from wsbroadcast.protocols.commands import Refused
from wsbroadcast.publication import PresenceChange


@dataclass(eq=False)
class Client:
    """A connection, and the list that it keeps as the protocol says."""

    id: str
    _user_key: str | None = None
    _shown: bytes = b""
    channels: frozenset[str] = frozenset({"news"})
    is_open: bool = True
    events: list[dict[str, Any]] = field(default_factory=list)
    users: set[str] | None = None
    version: int = -1

    def hear(self, message: Message) -> None:
        event = json.loads(message.payload)
        self.events.append(event)
        if "previous" in event:
            assert event["previous"] == self.version
            assert self.users is not None
            assert not self.users & {each["user"] for each in event["joined"]}
            assert self.users >= {*event["left"]}
            self.users = self.users - {*event["left"]} | {each["user"] for each in event["joined"]}
        else:
            self.users = {each["user"] for each in event["members"]} if "members" in event else None
        self.version = event["version"]


class Place:
    """A node's watches with a broker of their own; nobody is told by a timer, but by `tick`."""

    def __init__(self) -> None:
        self.roll = Roll()
        self.tasks = Tasks()
        self.questions = 0
        self.answers: Callable[[], Awaitable[None]] | None = None
        self.handed: list[int] = []
        self.watches = Watches(self.read, self.say, self.tasks)

    async def read(self, channel: str) -> Members:
        self.questions += 1
        if self.answers is not None:
            await self.answers()
        return self.roll.members(channel)

    def say(self, connections: Sequence[Client], message: Message) -> None:
        self.handed.append(len(connections))
        for connection in connections:
            connection.hear(message)

    def enter(self, *users: str, channel: str = "news") -> None:
        self.tell(self.roll.enter(channel, "node", dict.fromkeys(users, b"")))

    def leave(self, *users: str, channel: str = "news") -> None:
        self.tell(self.roll.leave(channel, "node", users))

    def tell(self, change: PresenceChange | None) -> None:
        if change is not None:
            self.watches.take(change)

    async def begin(self, client: Client, channel: str = "news", **options: Any) -> bool:
        return await self.watches.begin(client, channel, Presence(**options))

    def tick(self) -> None:
        if self.watches._timer is not None:
            self.watches._timer.cancel()
            self.watches._tell_all()


@pytest.fixture
async def place(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    monkeypatch.setattr(watching, "_TELL_SECONDS", 3600)
    monkeypatch.setattr(watching, "_AGAIN_SECONDS", 0.01)
    place = Place()
    yield place
    place.watches.aclose()
    await place.tasks.cancel()


async def test_newcomer_is_told_what_the_others_know_and_they_are_told_nothing_for_it(place: Place) -> None:
    place.enter("ann")
    first, second = Client("1"), Client("2")
    assert await place.begin(first)
    place.enter("bob")
    assert await place.begin(second)
    assert [first.users, second.users] == [{"ann"}, {"ann"}]
    assert len(first.events) == 1
    place.tick()
    assert [first.users, second.users] == [{"ann", "bob"}] * 2
    assert place.handed == [1, 1, 2]
    assert place.questions == 1


async def test_who_comes_and_goes_in_between_is_not_told(place: Place) -> None:
    client = Client("1")
    await place.begin(client)
    place.enter("ann", "bob")
    place.leave("ann")
    place.tick()
    assert client.events[-1]["joined"] == [{"user": "bob", "info": None}]
    assert client.events[-1]["left"] == []
    place.enter("eve")
    place.leave("eve")
    place.tick()
    assert len(client.events) == 2
    place.enter("dan")
    place.tick()
    assert client.users == {"bob", "dan"}  # its versions fit, although some were left out


async def test_somebody_who_is_nobody_changes_the_number(place: Place) -> None:
    client = Client("1")
    await place.begin(client)
    place.enter(ANONYMOUS + "x")
    place.tick()
    assert (client.events[-1]["count"], client.users) == (1, set())


async def test_over_the_bound_the_number_is_told_when_it_changes(place: Place) -> None:
    client = Client("1")
    await place.begin(client, members_up_to=2)
    for count in (3, 4):
        place.enter(*map(str, range(count)))
        place.tick()
        assert (client.events[-1]["count"], client.users) == (count, None)
    place.enter("x")
    place.leave("x")
    place.tick()
    assert len(client.events) == 3
    place.leave("0", "1", "2")
    place.tick()
    assert client.users == {"3"}


async def test_many_who_begin_at_once_ask_once_and_fare_alike(place: Place) -> None:
    gate = asyncio.Event()
    fails = True

    async def answers() -> None:
        await gate.wait()
        if fails:
            raise EngineUnavailable("the broker is away")

    place.answers = answers
    clients = [Client(str(number)) for number in range(50)]
    beginning = [asyncio.ensure_future(place.begin(client)) for client in clients]
    await turns()
    beginning[0].cancel()  # who has asked first
    await turns()
    gate.set()
    results = await asyncio.gather(*beginning, return_exceptions=True)
    assert {type(each) for each in results} == {asyncio.CancelledError, EngineUnavailable}
    assert (place.questions, len(place.watches)) == (1, 0)
    fails = False
    assert await asyncio.gather(*(place.begin(client) for client in clients)) == [True] * 50
    assert place.questions == 2
    for client in clients:
        place.watches.end(client, "news")
    assert len(place.watches) == 0


async def test_client_that_has_left_meanwhile_does_not_watch(place: Place) -> None:
    changes: list[dict[str, Any]] = [{"channels": frozenset()}, {"is_open": False}]
    for change in changes:
        client = Client("1")

        async def answers(client: Client = client, change: dict[str, Any] = change) -> None:
            for name, value in change.items():
                setattr(client, name, value)

        place.answers = answers
        assert not await place.begin(client)
        assert client.events == []
        assert len(place.watches) == 0


async def test_whole_list_is_told_a_few_times_a_second_however_it_is_asked_for(place: Place) -> None:
    client, other = Client("1"), Client("2")
    await place.begin(other)
    for _ in range(2):
        for _ in range(watching._LISTS_AT_ONCE):
            await place.begin(client)
            place.watches.end(client, "news")
        with pytest.raises(Refused):
            await place.begin(client)
        assert other.events[1:] == []
        place.tick()
    assert len(client.events) == 2 * watching._LISTS_AT_ONCE
    assert not place.watches._lately


async def test_crowd_is_told_in_turns_in_which_some_leave(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_AT_ONCE", 100)
    monkeypatch.setattr(watching, "_CHANNEL_COUNTS", 10)
    clients = [Client(str(number)) for number in range(350)]
    for client in clients:
        await place.begin(client)
    place.handed.clear()
    place.enter("ann")
    place.tick()
    assert place.handed == [100]
    place.watches.end(clients[150], "news")
    place.enter("bob")
    newcomer = Client("x")
    await place.begin(newcomer)
    await eventually(lambda: not place.watches._telling)
    assert place.handed == [100, 1, 99, 100, 50]
    assert {len(client.events) for client in clients} == {1, 2}
    assert len(clients[150].events) == 1
    place.tick()
    await eventually(lambda: not place.watches._telling)
    stay = [client for client in clients if client is not clients[150]] + [newcomer]
    assert all(client.users == {"ann", "bob"} for client in stay)


async def test_many_channels_are_told_in_several_turns(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_AT_ONCE", 100)
    clients = {name: Client(name, channels=frozenset({name})) for name in map(str, range(30))}
    for name, client in clients.items():
        await place.begin(client, name)
        place.enter("ann", channel=name)
    place.tick()
    assert 0 < sum(client.users == {"ann"} for client in clients.values()) < 10
    await eventually(lambda: all(client.users == {"ann"} for client in clients.values()))


async def test_after_a_gap_a_few_channels_are_read_at_once(place: Place) -> None:
    clients = {name: Client(name, channels=frozenset({name})) for name in map(str, range(100))}
    for name, client in clients.items():
        await place.begin(client, name)
        place.roll.enter(name, "node", {"ann": b""})
    now, most = 0, 0

    async def answers() -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await turns(1)
        now -= 1

    place.answers = answers
    place.watches.read_anew()
    await eventually(lambda: place.questions == 200)
    await eventually(lambda: not any(watch.is_suspect for watch in place.watches._watches.values()))
    assert most == watching._READ_AT_ONCE
    place.tick()
    await eventually(lambda: all(client.users == {"ann"} for client in clients.values()))


async def test_what_is_told_replays_to_what_is_so_whatever_happens(place: Place) -> None:
    chance = random.Random(7)
    clients = [Client(str(number)) for number in range(8)]
    watchers: set[Client] = set()
    for _ in range(2000):
        client = chance.choice(clients)
        match chance.randrange(6):
            case 0 if client in watchers:
                place.watches.end(client, "news")
                watchers.discard(client)
            case 0:
                try:
                    watchers |= {client} if await place.begin(client, members_up_to=6) else set()
                except Refused:
                    place.tick()
            case 1:
                place.tick()
            case 2:  # what came was lost, and others say so
                place.roll.enter("news", "node", {str(chance.randrange(9)): b""})
                place.watches.read_anew()
                await turns()
            case 3:  # what came was lost, and the next one shows it
                place.roll.leave("news", "node", [str(chance.randrange(9))])
            case 4:
                place.leave(*(str(chance.randrange(9)) for _ in range(3)))
            case _:
                place.enter(str(chance.randrange(9)))
        await turns(2)
    place.watches.read_anew()
    await eventually(lambda: not any(watch.is_suspect for watch in place.watches._watches.values()))
    place.tick()
    members = set(place.roll.members("news").members)
    assert watchers
    assert all(client.users == (members if len(members) <= 6 else None) for client in watchers)


async def test_nothing_is_told_after_the_end(place: Place) -> None:
    client = Client("1")
    await place.begin(client)
    place.enter("ann")
    place.watches.aclose()
    place.tick()
    assert not await place.begin(client)
    place.enter("bob")
    assert (len(client.events), place.watches._timer) == (1, None)


# Those who are told at once of each who comes and goes.


class Follower:
    """Writes down what it is told."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.told: list[tuple[str, str, str]] = []

    def follow(self, *ids: str) -> list[Client]:
        clients = [Client(each) for each in ids]
        for each in clients:
            self._place.watches.follow(each, "news", Presence(), self.tell)
        return clients

    def tell(self, channel: str, clients: Sequence[Client], joined: Mapping[str, bytes], left: Any) -> None:
        for kind, members in (("+", joined), ("-", left)):
            self.told += [(client.id, kind, key) for key in members for client in clients]


async def test_followers_are_told_of_each_at_once(place: Place) -> None:
    follower = Follower(place)
    place.enter("ann")
    one, two = follower.follow("1", "2")
    await eventually(lambda: place.questions == 1)
    await turns()
    assert follower.told == []
    place.enter("bob")
    assert follower.told == [("1", "+", "bob"), ("2", "+", "bob")]
    place.watches.end(one, "news")
    place.leave("ann")
    assert follower.told[2:] == [("2", "-", "ann")]
    place.watches.end(two, "news")
    assert len(place.watches) == 0
    place.enter("eve")
    assert len(follower.told) == 3
    assert place.questions == 1


async def test_who_came_while_the_broker_was_asked_has_come_for_followers(place: Place) -> None:
    follower, may_answer = Follower(place), asyncio.Event()

    async def wait() -> None:
        await may_answer.wait()

    place.answers = wait
    place.enter("ann")
    follower.follow("1")
    await eventually(lambda: place.questions == 1)
    place.enter("bob")
    may_answer.set()
    await eventually(lambda: bool(follower.told))
    assert follower.told == [("1", "+", "bob")]


async def test_followers_are_told_what_was_missed(place: Place) -> None:
    follower = Follower(place)
    place.enter("ann")
    follower.follow("1")
    await eventually(lambda: place.questions == 1)
    await turns()
    place.roll.enter("news", "node", {"bob": b""})
    place.roll.leave("news", "node", ["ann"])
    place.enter("eve")  # two versions further
    await eventually(lambda: len(follower.told) == 3)
    assert set(follower.told) == {("1", "+", "bob"), ("1", "-", "ann"), ("1", "+", "eve")}


async def test_followers_and_watchers_of_one_channel_share_a_question(place: Place) -> None:
    follower, client = Follower(place), Client("1")
    follower.follow("2")
    await eventually(lambda: place.questions == 1)
    await place.begin(client)
    place.enter("ann")
    place.tick()
    assert client.users == {"ann"}
    assert follower.told == [("2", "+", "ann")]
    assert place.questions == 1
