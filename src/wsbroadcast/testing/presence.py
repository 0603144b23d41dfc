"""The contract of engines that know who is in a channel, as tests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar, cast

import pytest

from wsbroadcast.audience import Audience
from wsbroadcast.engines.contract import KeepsPresence, keeps_presence
from wsbroadcast.presence import Roll
from wsbroadcast.publication import PresenceChange
from wsbroadcast.testing.nodes import NAMES, NEWS, SPORT, Node, Nodes

# A lease that outlives each test.
_LONG = 60.0

Told = list[tuple[frozenset[str], frozenset[str]]]
"""For each change: who joined, and who left."""


@pytest.mark.asyncio
class PresenceContract(Nodes):
    """What an engine with the ability `KeepsPresence` must do, with one node or with many.

    Subclass it beside `EngineContract`, override `make_engine`, and give the subclass a name that begins with `Test`.
    """

    has_leases: ClassVar[bool] = True
    """Whether other nodes see a lease, so that it can run out."""
    short: ClassVar[float] = 1.0
    """How long a lease is that runs out during a test, in seconds: as short as the broker allows."""

    @asynccontextmanager
    async def present(self, *audiences: Audience) -> AsyncIterator[list[Node]]:
        """Run nodes that hold a lease and have joined these channels."""
        async with self.nodes(*audiences) as nodes:
            for node in nodes:
                assert not await of(node).renew(_LONG)
            yield nodes

    # Joining and leaving.

    async def test_the_first_who_comes_joins_and_the_last_who_goes_leaves(self) -> None:
        """A member may be on many nodes: all nodes are told once that it joined, and once that it left."""
        async with self.present(NEWS) as nodes:
            entered = [await of(node).enter("news", {"ann": b'"Ann"'}) for node in nodes]
            assert [change is not None for change in entered] == [True] + [False] * (len(nodes) - 1)
            for node in nodes:
                assert await of(node).members("news") == (version_of(entered[0]), {"ann": b'"Ann"'})
                assert await of(node).count("news") == 1
                assert await of(node).channels_of("ann") == {"news"}
            left = [await of(node).leave("news", ["ann"]) for node in nodes]
            assert [change is not None for change in left] == [False] * (len(nodes) - 1) + [True]
            for node in nodes:
                await self.tells(node, [(frozenset({"ann"}), frozenset()), (frozenset(), frozenset({"ann"}))])
                assert (await of(node).members("news")).members == {}
                assert await of(node).count("news") == 0
                assert await of(node).channels_of("ann") == frozenset()

    async def test_a_change_says_where_it_was_made_and_what_others_see(self) -> None:
        """A change has the incarnation of the node that made it, a version, and the info of those who joined."""
        async with self.present(NEWS) as nodes:
            change = await of(nodes[0]).enter("news", {"ann": b'{"name":"Ann"}', "bob": b""})
            assert change is not None
            assert (change.audience, change.by, change.left) == (NEWS, of(nodes[0]).incarnation, frozenset())
            assert change.joined == {"ann": b'{"name":"Ann"}', "bob": b""}
            for node in nodes:
                await self.changes(node, 1)
                assert [each for each in changes_of(node) if each.audience == NEWS] == [change]

    async def test_repeated_steps_change_nothing(self) -> None:
        """A step that is done twice, because its outcome wasn't known, counts once."""
        async with self.present(NEWS) as nodes:
            assert await of(nodes[0]).enter("news", {"ann": b""}) is not None
            assert await of(nodes[0]).enter("news", {"ann": b""}) is None
            assert await of(nodes[-1]).enter("news", {"ann": b""}) is None
            if len(nodes) > 1:
                assert await of(nodes[-1]).leave("news", ["ann"]) is None
            assert await of(nodes[0]).leave("news", ["ann"]) is not None
            assert await of(nodes[0]).leave("news", ["ann"]) is None
            assert await of(nodes[0]).leave("news", []) is None
            assert await of(nodes[0]).enter("news", {}) is None
            await self.tells(nodes[0], [(frozenset({"ann"}), frozenset()), (frozenset(), frozenset({"ann"}))])

    async def test_versions_have_no_hole(self) -> None:
        """The versions of a channel's changes grow by one, on whichever nodes they are made, even if it was empty."""
        async with self.present(NEWS, SPORT) as nodes:
            for number in range(10):
                node = nodes[number % len(nodes)]
                await of(node).enter("news", {f"user {number}": b""})
                await of(node).enter("sport", {"other": b""})
                if number % 3 == 0:
                    await of(node).leave("news", [f"user {number}"])
            for node in nodes:
                await self.changes(node, 15)
                versions = [change.version for change in changes_of(node) if change.audience == NEWS]
                assert versions == list(range(versions[0], versions[0] + len(versions)))
                assert (await of(node).members("news")).version == versions[-1]

    async def test_the_newest_info_holds(self) -> None:
        """Others see the info of a member that was given last."""
        async with self.present() as nodes:
            await of(nodes[0]).enter("news", {"ann": b'"old"'})
            await of(nodes[-1]).enter("news", {"ann": b'"new"'})
            assert (await of(nodes[0]).members("news")).members == {"ann": b'"new"'}

    async def test_odd_names_are_kept_apart(self) -> None:
        """Channels and members are texts, even if a broker could take them for something else."""
        async with self.present() as nodes:
            node, last = of(nodes[0]), of(nodes[-1])
            for name in NAMES:
                await node.enter(name, {name: name.encode()})
            await node.enter("all", dict.fromkeys(NAMES, b""))
            for name in NAMES:
                assert (await last.members(name)).members == {name: name.encode()}
                assert await last.channels_of(name) == {name, "all"}
            assert set((await last.members("all")).members) == set(NAMES)
            for name in NAMES:
                assert await node.leave(name, NAMES) is not None
                assert await last.count(name) == 0

    async def test_a_channel_of_nobody(self) -> None:
        """An unknown channel or member is no error: nobody is in it, and it is in no channel."""
        async with self.present() as nodes:
            for node in map(of, nodes):
                assert (await node.members("nobody")).members == {}
                assert await node.count("nobody") == 0
                assert await node.channels_of("nobody") == frozenset()
                assert await node.leave("nobody", ["nobody"]) is None

    async def test_many_at_once(self) -> None:
        """A crowd joins in one step, and leaves in one step."""
        async with self.present(NEWS) as nodes:
            crowd = {f"user {number}": b"{}" for number in range(2000)}
            change = await of(nodes[0]).enter("news", crowd)
            assert change is not None
            assert change.joined == crowd
            assert await of(nodes[-1]).count("news") == len(crowd)
            assert (await of(nodes[-1]).members("news")).members == crowd
            change = await of(nodes[0]).leave("news", crowd)
            assert change is not None
            assert change.left == set(crowd)

    # Leases.

    async def test_a_lease_is_unique_and_goes_on(self) -> None:
        """Each node has its own incarnation. It stays the same while it is renewed, and all nodes see it as alive."""
        async with self.present() as nodes:
            incarnations = [of(node).incarnation for node in nodes]
            assert len(set(incarnations)) == len(nodes)
            for node in nodes:
                assert await of(node).renew(_LONG)
                assert await of(node).alive() == set(incarnations)
            assert [of(node).incarnation for node in nodes] == incarnations

    async def test_whose_lease_runs_out_has_left_and_that_is_told_once(self) -> None:
        """The members of a dead node leave when its lease has run out. That is told once, even if many nodes sweep."""
        async with self.present(NEWS) as nodes:
            if not self.has_leases or len(nodes) < 2:
                return
            dead, *others = nodes
            await of(dead).enter("news", {"ann": b"", "bob": b""})
            await of(others[0]).enter("news", {"bob": b""})
            await of(dead).renew(self.short)
            swept = await self.swept(others, of(dead).incarnation)
            assert [(each.audience, each.left) for each in swept] == [(NEWS, frozenset({"ann"}))]
            for node in others:
                await self.tells(node, [(frozenset({"ann", "bob"}), frozenset()), (frozenset(), frozenset({"ann"}))])
                assert set((await of(node).members("news")).members) == {"bob"}
                assert await of(node).channels_of("ann") == frozenset()

    async def test_who_was_frozen_goes_on_as_another(self) -> None:
        """A node whose lease has run out takes a new one. A late sweep doesn't remove what it enters under that."""
        async with self.present(NEWS) as nodes:
            if not self.has_leases or len(nodes) < 2:
                return
            frozen, *others = nodes
            await of(frozen).enter("news", {"ann": b""})
            before = of(frozen).incarnation
            await of(frozen).renew(self.short)
            await self.swept(others, before)
            assert not await of(frozen).renew(_LONG)
            assert of(frozen).incarnation != before
            assert await of(frozen).enter("news", {"ann": b""}) is not None
            for node in others:
                assert list(await of(node).sweep()) == []
            assert set((await of(others[0]).members("news")).members) == {"ann"}

    async def test_what_a_dead_node_enters_is_no_ghost(self) -> None:
        """What a node enters before it knows that its lease has run out doesn't stay for ever."""
        async with self.present(NEWS) as nodes:
            if not self.has_leases or len(nodes) < 2:
                return
            late, *others = nodes
            before = of(late).incarnation
            await of(late).enter("news", {"ann": b""})
            await of(late).renew(self.short)
            await self.swept(others, before)
            await of(late).enter("news", {"ann": b"", "bob": b""})
            if of(late).incarnation == before:  # it may have noticed by itself
                await self.swept(others, before)
                assert (await of(others[0]).members("news")).members == {}

    # All together.

    async def test_random_steps_and_a_model(self) -> None:
        """After random steps of all nodes, some repeated, all see the same as a model, and the changes lead there."""
        chance = random.Random(15)  # noqa: S311  # a seeded test
        model = Roll()
        names = [f"user {number}" for number in range(6)]
        async with self.present(NEWS) as nodes:
            start = (await of(nodes[0]).members("news")).version
            for _ in range(150):
                engine = of(chance.choice(nodes))
                some = chance.sample(names, chance.randint(1, 3))
                for _ in range(chance.choice((1, 1, 1, 2))):
                    if chance.random() < 0.5:
                        got = await engine.enter("news", dict.fromkeys(some, b""))
                        meant = model.enter("news", engine.incarnation, dict.fromkeys(some, b""))
                    else:
                        got = await engine.leave("news", some)
                        meant = model.leave("news", engine.incarnation, some)
                    assert (got and (got.joined, got.left)) == (meant and (meant.joined, meant.left))
            expected = model.members("news")
            for node in nodes:
                found = await of(node).members("news")
                assert (found.version - start, found.members) == (expected.version, expected.members)
                await self.changes(node, expected.version)
                assert follow(changes_of(node)) == set(expected.members)
                for name in names:
                    assert await of(node).channels_of(name) == model.channels_of(name)

    # For the tests.

    async def swept(self, nodes: Sequence[Node], incarnation: str) -> list[PresenceChange]:
        """Let nodes sweep at the same time until an incarnation and its members are gone; return the changes."""
        found: list[PresenceChange] = []
        async with asyncio.timeout(self.short + 2 * self.seconds):
            while True:
                is_dead = incarnation not in await of(nodes[0]).alive()
                for changes in await asyncio.gather(*(of(node).sweep() for node in nodes)):
                    found += changes
                if is_dead:  # it was dead before this round
                    return found
                await asyncio.sleep(self.short / 10)

    async def changes(self, node: Node, count: int) -> None:
        """Wait until a node has been told of so many changes."""
        assert await node.recorder.wait_until(lambda: len(changes_of(node)) >= count, self.seconds)

    async def tells(self, node: Node, expected: Told) -> None:
        """Wait until a node has been told of as many changes to a channel; check that they are exactly these."""
        await self.changes(node, len(expected))
        assert [(frozenset(each.joined), each.left) for each in changes_of(node)] == expected


def of(node: Node) -> KeepsPresence:
    """Return the engine of a node."""
    return keeps_presence(node.engine)


def changes_of(node: Node) -> list[PresenceChange]:
    """Return the changes that a node was told of."""
    return [each for each in node.recorder.controls if isinstance(each, PresenceChange)]


def follow(changes: Sequence[PresenceChange]) -> set[str]:
    """Return who is there after these changes."""
    members: set[str] = set()
    for change in changes:
        members |= set(change.joined)
        members -= change.left
    return members


def version_of(change: PresenceChange | None) -> int:
    """Return the version of a change; there must be one."""
    return cast(PresenceChange, change).version
