"""The contract of presence can fail: for each of its tests there is a wrong engine that doesn't pass it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import pytest

from wsbroadcast import Audience, Control, Engine, Publication
from wsbroadcast.presence import Members
from wsbroadcast.publication import PresenceChange
from wsbroadcast.testing import PresenceContract
from wsbroadcast.testing.hub import Hub, HubEngine


class OnAHub(PresenceContract):
    """The contract over the engine of the test cluster, which `test_contract.py` shows to be right."""

    kind: ClassVar[type[HubEngine]]
    node_count = 3
    seconds = 0.3
    short = 0.05

    @cached_property
    def hub(self) -> Hub:
        return Hub()

    def make_engine(self) -> Engine:
        return self.kind(self.hub)


# The wrong ones.

CATCHES: list[tuple[type[HubEngine], str]] = []

Changed = PresenceChange | None


def fails(*tests: str) -> Callable[[type[HubEngine]], type[HubEngine]]:
    def add(kind: type[HubEngine]) -> type[HubEngine]:
        CATCHES.extend((kind, f"test_{test}") for test in tests)
        return kind

    return add


# Who is the first, and who is the last.


@fails("the_first_who_comes_joins_and_the_last_who_goes_leaves", "random_steps_and_a_model")
class LeavesForEveryNode(HubEngine):
    async def leave(self, channel: str, members: Iterable[str]) -> Changed:
        for incarnation in self._hub.alive() - {self._incarnation}:
            self._hub.roll.leave(channel, incarnation, members)
        return await super().leave(channel, members)


@fails("the_first_who_comes_joins_and_the_last_who_goes_leaves")
class TellsOfEveryNode(HubEngine):
    async def enter(self, channel: str, members: Mapping[str, bytes]) -> Changed:
        change = await super().enter(channel, members)
        if change is None:
            change = PresenceChange(Audience("channel", channel), 1, members, by=self._incarnation)
            self._hub.send(change)
        return change


@fails("the_first_who_comes_joins_and_the_last_who_goes_leaves")
class TellsNobody(HubEngine):
    def arrive(self, publication: Publication | Control, delay: float) -> None:
        if not isinstance(publication, PresenceChange):
            super().arrive(publication, delay)


@fails("the_first_who_comes_joins_and_the_last_who_goes_leaves")
class NeverCleansItsIndex(HubEngine):
    async def channels_of(self, member: str) -> frozenset[str]:
        return await super().channels_of(member) | frozenset({"news"})


@fails("the_first_who_comes_joins_and_the_last_who_goes_leaves")
class CountsEachNode(HubEngine):
    async def count(self, channel: str) -> int:
        return sum(map(len, self._hub.roll._holders.get(channel, {}).values()))


@fails("repeated_steps_change_nothing", "random_steps_and_a_model")
class CountsRepeats(HubEngine):
    @cached_property
    def times(self) -> dict[tuple[str, str], int]:
        return {}

    async def enter(self, channel: str, members: Mapping[str, bytes]) -> Changed:
        for name in members:
            self.times[channel, name] = self.times.get((channel, name), 0) + 1
        return await super().enter(channel, members)

    async def leave(self, channel: str, members: Iterable[str]) -> Changed:
        gone = []
        for name in members:
            self.times[channel, name] = self.times.get((channel, name), 0) - 1
            if self.times[channel, name] <= 0:
                gone.append(name)
        return await super().leave(channel, gone)


@fails("repeated_steps_change_nothing")
class TellsThatNobodyCame(HubEngine):
    async def enter(self, channel: str, members: Mapping[str, bytes]) -> Changed:
        change = await super().enter(channel, members)
        return change or PresenceChange(Audience("channel", channel), 1, {}, by=self._incarnation)


# What a change says.


@fails("a_change_says_where_it_was_made_and_what_others_see")
class SaysNotWhere(HubEngine):
    def arrive(self, publication: Publication | Control, delay: float) -> None:
        super().arrive(replace(publication, by="") if isinstance(publication, PresenceChange) else publication, delay)


@fails("a_change_says_where_it_was_made_and_what_others_see")
class SendsNamesOnly(HubEngine):
    def arrive(self, publication: Publication | Control, delay: float) -> None:
        if isinstance(publication, PresenceChange):
            publication = replace(publication, joined=dict.fromkeys(publication.joined, b""))
        super().arrive(publication, delay)


@fails("versions_have_no_hole")
class CountsVersionsOverAllChannels(HubEngine):
    def arrive(self, publication: Publication | Control, delay: float) -> None:
        if isinstance(publication, PresenceChange):
            publication = replace(publication, version=sum(self._hub.roll._versions.values()))
        super().arrive(publication, delay)


@fails("versions_have_no_hole")
class BeginsAgainWhenNobodyIsThere(HubEngine):
    async def leave(self, channel: str, members: Iterable[str]) -> Changed:
        change = await super().leave(channel, members)
        if not self._hub.roll.count(channel):
            self._hub.roll._versions.pop(channel, None)
        return change


@fails("versions_have_no_hole")
class ReadsTheVersionBeforeTheMembers(HubEngine):
    async def members(self, channel: str) -> Members:
        found = await super().members(channel)
        return found._replace(version=found.version - 1)


@fails("the_newest_info_holds")
class KeepsTheFirstInfo(HubEngine):
    async def enter(self, channel: str, members: Mapping[str, bytes]) -> Changed:
        known = self._hub.roll.members(channel).members
        return await super().enter(channel, {**members, **{each: known[each] for each in members if each in known}})


# Names, and how many.


@fails("odd_names_are_kept_apart")
class IgnoresCase(HubEngine):
    async def enter(self, channel: str, members: Mapping[str, bytes]) -> Changed:
        return await super().enter(channel.casefold(), members)


@fails("a_channel_of_nobody")
class WritesNamesInOneText(HubEngine):
    async def members(self, channel: str) -> Members:
        found = await super().members(channel)
        names = ",".join(found.members).split(",")
        return found._replace(members={name: found.members.get(name, b"") for name in names})


@fails("a_channel_of_nobody")
class RaisesForWhatItDoesNotKnow(HubEngine):
    async def members(self, channel: str) -> Members:
        self._hub.roll._holders[channel]
        return await super().members(channel)


@fails("many_at_once")
class TakesAThousand(HubEngine):
    async def enter(self, channel: str, members: Mapping[str, bytes]) -> Changed:
        return await super().enter(channel, dict(list(members.items())[:1000]))


@fails("many_at_once")
class TellsOfAHundred(HubEngine):
    async def leave(self, channel: str, members: Iterable[str]) -> Changed:
        names = list(members)
        change = None
        for start in range(0, len(names), 100):
            change = await super().leave(channel, names[start : start + 100])
        return change


# Leases.


@fails("a_lease_is_unique_and_goes_on")
class TakesAnotherLeaseEachTime(HubEngine):
    async def renew(self, seconds: float) -> bool:
        self._incarnation = ""
        return await super().renew(seconds)


@fails("a_lease_is_unique_and_goes_on")
class CallsEachNodeTheSame(HubEngine):
    async def renew(self, seconds: float) -> bool:
        is_same = bool(self._incarnation)
        self._incarnation = "node"
        self._hub.leases["node"] = self._hub.now() + seconds
        return is_same


@fails("a_lease_is_unique_and_goes_on")
class KnowsOnlyItself(HubEngine):
    async def alive(self) -> frozenset[str]:
        return frozenset({self._incarnation})


@fails("whose_lease_runs_out_has_left_and_that_is_told_once", "who_was_frozen_goes_on_as_another")
class NeverSweeps(HubEngine):
    async def sweep(self) -> Sequence[PresenceChange]:
        return ()


@fails("whose_lease_runs_out_has_left_and_that_is_told_once")
class SweepsInSilence(HubEngine):
    async def sweep(self) -> Sequence[PresenceChange]:
        changes: list[PresenceChange] = []
        for incarnation in self._hub.roll.incarnations - self._hub.alive():
            changes += self._hub.roll.drop(incarnation)
        return changes


@fails("whose_lease_runs_out_has_left_and_that_is_told_once")
class EverybodySaysThatItSwept(HubEngine):
    swept: ClassVar[list[PresenceChange]] = []

    async def sweep(self) -> Sequence[PresenceChange]:
        self.swept.extend(await super().sweep())
        return list(self.swept)


@fails("whose_lease_runs_out_has_left_and_that_is_told_once")
class SweepsWhomOthersHave(HubEngine):
    async def sweep(self) -> Sequence[PresenceChange]:
        if dead := self._hub.roll.incarnations - self._hub.alive():
            for alive in self._hub.alive():
                self._hub.roll.leave("news", alive, ["bob"])
            assert dead
        return await super().sweep()


@fails("who_was_frozen_goes_on_as_another")
class ComesToLifeAgain(HubEngine):
    async def renew(self, seconds: float) -> bool:
        if self._incarnation:
            self._hub.leases[self._incarnation] = self._hub.now() + seconds
            return True
        return await super().renew(seconds)


@fails("what_a_dead_node_enters_is_no_ghost")
class ForgetsTheDead(HubEngine):
    gone: ClassVar[set[str]] = set()

    async def sweep(self) -> Sequence[PresenceChange]:
        dead = self._hub.roll.incarnations - self._hub.alive() - self.gone
        changes = [change for each in dead for change in self._hub.roll.drop(each)]
        self.gone.update(dead)
        for change in changes:
            self._hub.send(change)
        return changes


@pytest.mark.parametrize(("kind", "test"), CATCHES, ids=lambda value: getattr(value, "__name__", value))
async def test_contract_catches(kind: type[HubEngine], test: str) -> None:
    contract = type("Contract", (OnAHub,), {"kind": kind})()
    with pytest.raises((Exception, pytest.fail.Exception)):
        await getattr(contract, test)()


def test_every_test_of_the_contract_can_fail() -> None:
    assert {test for _, test in CATCHES} == {name for name in dir(PresenceContract) if name.startswith("test_")}
