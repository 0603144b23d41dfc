"""What a node tells the broker of who is here, and hooks and clients of who is anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest

from tests.support.servers import eventually
from wsbroadcast.concurrency import Tasks
from wsbroadcast.engines import lease as node_lease
from wsbroadcast.engines.lease import LeaseKeeper
from wsbroadcast.hooks import HookChain
from wsbroadcast.message import Message
from wsbroadcast.node import presence as node_presence
from wsbroadcast.node import watching
from wsbroadcast.node.presence import NodePresence
from wsbroadcast.presence import ANONYMOUS, ONLINE, Presence, PresenceRules, Presences
from wsbroadcast.publication import Control, Gap, PresenceChange, Publication
from wsbroadcast.stats import Counters
from wsbroadcast.testing.hub import Hub, HubEngine
from wsbroadcast.testing.nodes import NEWS


@dataclass(unsafe_hash=True)
class One:
    """What a node knows of a connection."""

    id: str
    _user_key: str | None = field(default=None, compare=False)
    info: object = field(default=None, compare=False)
    channels: frozenset[str] = field(default=frozenset({"news"}), compare=False)
    is_open: bool = True
    _shown: bytes = b""


@dataclass
class Node:
    """One node at a hub, with presence."""

    hub: Hub
    presences: Presences = field(default_factory=lambda: Presence(grace=0.2))
    told: list[str] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        hooks = HookChain(5.0, self.counters)
        hooks.add_function("on_joined", lambda channel, user: self.told.append(f"{user} joined {channel}"))
        hooks.add_function("on_left", lambda channel, user: self.told.append(f"{user} left {channel}"))
        self.engine = HubEngine(self.hub)
        self.tasks = Tasks()
        self.said: list[tuple[str, bytes]] = []
        rules = PresenceRules(self.presences)
        self.lease = LeaseKeeper(self.engine, self.tasks)
        self.presence = NodePresence(self.engine, self.lease, rules, hooks, self.tasks, self.counters, self.say)

    def say(self, connections: Sequence[One], message: Message) -> None:
        self.said.extend((each.id, message.payload) for each in connections)

    def take(self, publication: Publication | Control) -> None:
        if isinstance(publication, PresenceChange):
            self.presence.take(publication)

    async def deliver(self, publication: Publication | Control) -> None:
        self.take(publication)

    def gap(self, gap: Gap) -> None:
        self.lease.suspect()
        self.presence.suspect()

    def suspect(self) -> None:
        pass

    async def crash(self) -> None:
        """End without a word."""
        self.presence._is_ended = True
        await self.tasks.cancel()
        await self.engine.aclose()

    async def aclose(self) -> None:
        await self.presence.aclose()
        await self.tasks.cancel()
        await self.engine.aclose()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the times."""
    monkeypatch.setattr(node_lease, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(node_lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(node_lease, "MARGIN_SECONDS", 0.05)
    monkeypatch.setattr(node_presence, "_SWEEP_SECONDS", 0.04)
    monkeypatch.setattr(watching, "_TELL_SECONDS", 0.02)
    monkeypatch.setattr(watching, "_AGAIN_SECONDS", 0.02)


@asynccontextmanager
async def nodes(count: int, presences: Presences | None = None) -> AsyncIterator[list[Node]]:
    hub = Hub()
    made = [Node(hub) if presences is None else Node(hub, presences) for _ in range(count)]
    for node in made:
        await node.engine.start(node)
        node.engine.subscribe([NEWS])
    try:
        yield made
    finally:
        for node in made:
            await node.aclose()


async def until(condition: Callable[[], object]) -> None:
    async def holds() -> object:
        return condition()

    await eventually(holds)


def here(node: Node, channel: str = "news") -> set[str]:
    return set(node.hub.roll.members(channel).members)


def told(some: list[Node]) -> list[str]:
    return [text for node in some for text in node.told]


async def test_one_user_in_many_tabs_on_many_nodes_joins_and_leaves_once() -> None:
    async with nodes(3) as some:
        tabs = [(node, One(f"{number}", "ann")) for number, node in enumerate(some * 2)]
        for node, tab in tabs:
            node.presence.came(tab, "news")
        await until(lambda: here(some[0]) == {"ann"} and told(some) == ["ann joined news"])
        for node, tab in tabs:
            node.presence.gone(tab, is_final=True)
        await until(lambda: told(some) == ["ann joined news", "ann left news"])
        assert here(some[0]) == set()


async def test_who_comes_back_in_time_has_never_left_also_to_another_node() -> None:
    async with nodes(2) as (one, two):
        tab = One("1", "ann")
        one.presence.came(tab, "news")
        await until(lambda: told([one, two]) == ["ann joined news"])
        one.presence.gone(tab, is_final=False)
        two.presence.came(One("2", "ann"), "news")
        await until(lambda: len(one.hub.roll._holders["news"]["ann"]) == 2)
        await until(lambda: len(one.hub.roll._holders["news"]["ann"]) == 1)  # the grace is over
        assert told([one, two]) == ["ann joined news"]


async def test_who_is_lost_stays_for_the_grace_and_who_goes_by_intention_goes_at_once() -> None:
    async with nodes(1, Presence(grace=60)) as (node,):
        for name, is_final in (("ann", False), ("bob", True)):
            node.presence.came(tab := One(name, name), "news")
            await until(lambda: name in here(node))  # noqa: B023
            node.presence.gone(tab, is_final=is_final)
        await until(lambda: here(node) == {"ann"})
        assert node.told == ["ann joined news", "bob joined news", "bob left news"]


async def test_a_node_that_dies_leaves_nobody_behind_and_it_is_told_once() -> None:
    async with nodes(3) as (dead, *others):
        dead.presence.came(One("1", "ann"), "news")
        for node in others:
            node.presence.came(One("2", "bob"), "news")
        await until(lambda: here(dead) == {"ann", "bob"})
        await dead.crash()
        await until(lambda: here(dead) == {"bob"})
        await until(lambda: "ann left news" in told(others))
        await until(lambda: sorted(told([dead, *others])) == ["ann joined news", "ann left news", "bob joined news"])


async def test_a_node_that_was_frozen_leaves_no_ghost_and_comes_again() -> None:
    async with nodes(2) as (frozen, other):
        frozen.presence.came(One("1", "ann"), "news")
        other.presence.came(One("2", "bob"), "news")
        await until(lambda: here(other) == {"ann", "bob"})
        before = frozen.engine.incarnation
        frozen.hub.leases[before] = 0.0  # as if it had said nothing for long
        await until(lambda: frozen.engine.incarnation != before and here(other) == {"ann", "bob"})
        lines = partial(told, [frozen, other])  # hooks are told a moment later
        await until(lambda: lines().count("ann joined news") - lines().count("ann left news") == 1)
        frozen.presence.gone(One("1", "ann"), is_final=True)
        await until(lambda: here(other) == {"bob"})


async def test_a_deploy_of_all_nodes_tells_nobody() -> None:
    hub = Hub()
    running = [Node(hub, Presence(grace=5)) for _ in range(2)]
    for number, node in enumerate(running):
        await node.engine.start(node)
        node.presence.came(One(str(number), f"user {number}"), "news")
    await until(lambda: here(running[0]) == {"user 0", "user 1"})
    all_ = list(running)
    for number in range(2):  # one by one: its user comes back to a new node
        old = running.pop(0)
        new = Node(hub, Presence(grace=5))
        all_.append(new)
        await new.engine.start(new)
        await old.aclose()
        new.presence.came(One(f"{number} again", f"user {number}"), "news")
        running.append(new)
        await until(lambda: new.engine.incarnation in hub.roll._holders["news"][f"user {number}"])  # noqa: B023
    await until(lambda: sorted(told(all_)) == ["user 0 joined news", "user 1 joined news"])
    for node in running:
        await node.aclose()


async def test_an_outage_is_made_up_for() -> None:
    async with nodes(2) as (cut, other):
        cut.presence.came(One("1", "ann"), "news")
        other.presence.came(One("2", "bob"), "news")
        await until(lambda: here(other) == {"ann", "bob"})
        cut.engine.cut()
        cut.presence.came(One("3", "cid"), "news")
        cut.presence.gone(One("1", "ann"), is_final=True)
        await until(lambda: here(other) == {"bob"})  # its lease has run out
        cut.engine.heal()
        await until(lambda: here(other) == {"bob", "cid"})
        await until(lambda: "ann left news" in told([cut, other]))


async def test_anonymous_connections_count_and_are_nobody() -> None:
    async with nodes(1) as (node,):
        node.presence.came(One("1"), "news")
        node.presence.came(One("2"), "news")
        await until(lambda: here(node) == {f"{ANONYMOUS}1", f"{ANONYMOUS}2"})
        assert await node.engine.count("news") == 2
        assert node.told == []


async def test_of_channels_without_presence_nothing_is_known() -> None:
    async with nodes(1, {"room:*": Presence()}) as (node,):
        node.presence.came(One("1", "ann"), "news")
        assert set(node.presence._here) == {ONLINE}
        node.presence.gone(One("1", "ann"), is_final=True)


async def test_nothing_runs_and_nothing_is_left_when_nobody_is_here() -> None:
    async with nodes(1) as (node,):
        for number in range(200):
            channel = f"channel {number}"
            node.presence.came(tab := One(str(number), f"user {number}", channels=frozenset({channel})), channel)
            node.presence.gone(tab, is_final=number % 2 == 0)
        await until(lambda: node.presence._life is None or node.presence._life.done())
        assert (node.presence._here, node.presence._dirty, node.presence._graces) == ({}, {}, [])
        assert node.presence._seated == {}
        assert node.hub.roll._holders == {}


@pytest.mark.parametrize("info", [lambda _: "x" * 2000, lambda _: object(), lambda _: 1 / 0])
async def test_info_that_can_not_be_shown_keeps_nobody_out(
    info: Callable[[object], object], caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(1, Presence(info=info)) as (node,):
        node.presence.came(One("1", "ann"), "news")
        await until(lambda: node.hub.roll.members("news").members == {"ann": b""})
        assert node.counters.hook_errors == 1
        assert "Presence.info failed" in caplog.text


async def test_watchers_are_told_a_list_and_then_what_changes() -> None:
    async with nodes(2, Presence(grace=0.2, info=lambda one: one.info)) as (node, other):
        other.presence.came(One("0", "ann", info={"name": "Ann"}), "news")
        await until(lambda: here(node) == {"ann"})
        watcher = One("w", "wim")
        await node.presence.watches.begin(watcher, "news", Presence(members_up_to=200))
        assert node.said.pop() == (
            "w",
            (
                b'{"type":"presence","channel":"news","version":1,"count":1,'
                b'"members":[{"user":"ann","info":{"name":"Ann"}}]}'
            ),
        )
        other.presence.came(bob := One("1", "bob"), "news")
        await until(lambda: node.said)
        assert node.said.pop() == (
            "w",
            (
                b'{"type":"presence","channel":"news","version":2,"count":2,"previous":1,'
                b'"joined":[{"user":"bob","info":null}],"left":[]}'
            ),
        )
        other.presence.gone(bob, is_final=True)
        await until(lambda: node.said)
        assert b'"joined":[],"left":["bob"]' in node.said.pop()[1]
        node.presence.watches.end(watcher, "news")
        assert len(node.presence.watches) == 0


async def test_above_the_bound_watchers_are_told_how_many() -> None:
    async with nodes(1, Presence(grace=0)) as (node,):
        ones = [One(str(number), f"user {number}") for number in range(5)]
        for one in ones:
            node.presence.came(one, "news")
        await until(lambda: len(here(node)) == 5)
        await node.presence.watches.begin(One("w"), "news", Presence(members_up_to=3))
        assert node.said.pop()[1].endswith(b'"count":5}')
        for one in ones[2:]:
            node.presence.gone(one, is_final=True)
        await until(lambda: node.said and b'"count":2,"members":[' in node.said[-1][1])


async def test_a_hole_in_the_versions_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (node, other):
        other.presence.came(One("0", "ann"), "news")
        await until(lambda: here(node) == {"ann"})
        await node.presence.watches.begin(One("w"), "news", Presence(members_up_to=200))
        node.said.clear()
        node.engine.unsubscribe([NEWS])
        other.presence.came(One("1", "bob"), "news")
        await until(lambda: here(node) == {"ann", "bob"})
        node.engine.subscribe([NEWS])
        other.presence.came(One("2", "cid"), "news")
        await until(lambda: node.said)
        assert b'"previous":1,"joined":[{"user":"bob","info":null},{"user":"cid","info":null}]' in node.said[-1][1]


async def test_who_comes_and_goes_within_a_second_is_not_told_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_TELL_SECONDS", 0.3)
    async with nodes(1) as (node,):
        await node.presence.watches.begin(One("w"), "news", Presence(members_up_to=200))
        node.said.clear()
        for number in range(20):
            node.presence.came(one := One(str(number), f"user {number}"), "news")
            await until(lambda: f"user {number}" in here(node))  # noqa: B023
            node.presence.gone(one, is_final=True)
        node.presence.came(One("last", "last"), "news")
        await until(lambda: node.said and b'"last"' in node.said[-1][1])
        names = b"".join(payload for _, payload in node.said)
        assert len(node.said) <= 4
        assert names.count(b'"joined":[{') <= 4


async def test_who_goes_while_the_broker_still_lets_them_in_is_no_ghost() -> None:
    """An app that asks in that moment makes the broker agree as well as the node itself."""
    async with nodes(1) as (node,):
        node.presence.came(One("0", "bob"), "news")
        await until(lambda: here(node) == {"bob"})
        node.hub.delay = 0.02
        node.presence.came(One("1", "ann"), "news")
        await until(lambda: "news" not in node.presence._dirty)  # it is on its way
        node.presence.gone(One("1", "ann"), is_final=True)
        await node.presence.members("news")
        node.hub.delay = 0.0
        assert [member.id for member in await node.presence.members("news")] == ["bob"]
        await until(lambda: here(node) == {"bob"})


async def test_who_goes_when_nobody_knows_whether_they_came_is_no_ghost() -> None:
    async with nodes(1) as (node,):
        node.presence.came(One("0", "bob"), "news")
        await until(lambda: here(node) == {"bob"})
        node.hub.delay = 0.05
        node.presence.came(One("1", "ann"), "news")
        await until(lambda: here(node) == {"ann", "bob"})
        node.engine.cut()  # before the broker's answer comes
        node.presence.gone(One("1", "ann"), is_final=True)
        await until(lambda: node.presence._unknown)
        node.hub.delay = 0.0
        node.engine.heal()
        await until(lambda: here(node) == {"bob"})


async def test_what_an_app_asks_has_what_happened_before_on_this_node() -> None:
    async with nodes(1) as (node,):
        for number in range(5):
            node.hub.delay = 0.02
            node.presence.came(One(str(number), f"user {number}"), "news")
            await until(lambda: node.presence._life is not None and not node.presence._dirty)
            node.hub.delay = 0.0  # the question overtakes it
            assert len(await node.presence.members("news")) == number + 1


async def test_who_gives_up_asking_gives_up_nothing_else() -> None:
    async with nodes(1) as (node,):
        node.presence.came(One("0", "bob"), "news")
        await until(lambda: here(node) == {"bob"})
        node.hub.delay = 0.02
        node.presence.came(One("1", "ann"), "news")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await node.presence.members("news")
        node.hub.delay = 0.0
        await until(lambda: here(node) == {"ann", "bob"})
        await until(lambda: node.told.count("ann joined news") == 1)


async def test_who_watches_is_told_the_truth_after_the_lease_was_lost() -> None:
    """What happened meanwhile may not have come, and versions may have begun anew."""
    async with nodes(2) as (node, other):
        node.presence.came(watcher := One("w", "wim"), "news")
        other.presence.came(One("0", "ann"), "news")
        await until(lambda: here(node) == {"ann", "wim"})
        await node.presence.watches.begin(watcher, "news", Presence())
        node.engine.unsubscribe([NEWS])
        other.presence.came(One("1", "bob"), "news")
        await until(lambda: here(node) == {"ann", "bob", "wim"})
        node.said.clear()
        node.hub.leases[node.engine.incarnation] = 0.0
        await until(lambda: any(b'"bob"' in payload for _, payload in node.said))
