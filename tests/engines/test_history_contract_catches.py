"""The contract of histories can fail: for each of its tests there is a wrong engine that doesn't pass it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from secrets import token_urlsafe
from typing import ClassVar

import pytest

from wsbroadcast import Audience, Control, Engine, Publication
from wsbroadcast.engines.contract import Receiver
from wsbroadcast.engines.memory import Log
from wsbroadcast.history import Appended, History, HistoryRules, Replay
from wsbroadcast.publication import Position
from wsbroadcast.testing import HistoryContract
from wsbroadcast.testing.hub import Hub, HubEngine


class OnAHub(HistoryContract):
    """The contract over the engine of the test cluster, which `test_contract.py` shows to be right."""

    kind: ClassVar[type[HubEngine]]
    node_count = 2
    seconds = 0.3

    @cached_property
    def hub(self) -> Hub:
        return Hub()

    def make_engine(self) -> Engine:
        return self.kind(self.hub)


# The wrong ones.

CATCHES: list[tuple[type[HubEngine], str]] = []


def fails(*tests: str) -> Callable[[type[HubEngine]], type[HubEngine]]:
    def add(kind: type[HubEngine]) -> type[HubEngine]:
        CATCHES.extend((kind, f"test_{test}") for test in tests)
        return kind

    return add


# Which offset, and which epoch.


@fails("positions_are_an_unbroken_chain")
class CountsForEachPublisher(HubEngine):
    @cached_property
    def own(self) -> dict[Audience, Log]:
        return {}

    def _log(self, audience: Audience) -> Log:
        log = self.own.setdefault(audience, Log(0))
        log.epoch = self._hub.log(audience).epoch
        return log


@fails("positions_are_an_unbroken_chain")
class SaysNothingOfWhatIsBefore(HubEngine):
    def arrive(self, publication: Publication | Control, delay: float) -> None:
        super().arrive(with_previous(publication, 0), delay)


@fails("positions_are_an_unbroken_chain", "unkept_publication_has_no_position")
class NumbersWhatItDoesNotKeep(HubEngine):
    async def publish(self, publication: Publication | Control) -> None:
        self._log(publication.audience).offset += 1
        await super().publish(publication)

    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        self._log(publication.audience).offset += 1
        return await super().append(publication, history, key)


@fails("who_joins_late_sees_what_is_before_the_first_message")
class TakesThePreviousFromWhatCame(HubEngine):
    last = 0

    def arrive(self, publication: Publication | Control, delay: float) -> None:
        super().arrive(with_previous(publication, self.last), delay)
        self.last = publication.offset if isinstance(publication, Publication) else self.last


@fails("appends_at_the_same_time_are_an_unbroken_chain")
class CountsInTwoSteps(HubEngine):
    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        log = self._log(publication.audience)
        offset = log.offset
        await asyncio.sleep(0)
        log.offset = offset
        return await super().append(publication, history, key)


@fails("appends_at_the_same_time_are_an_unbroken_chain")
class TakesThePreviousOfAnyAudience(HubEngine):
    last: ClassVar[int] = 0

    def arrive(self, publication: Publication | Control, delay: float) -> None:
        super().arrive(with_previous(publication, TakesThePreviousOfAnyAudience.last), delay)
        if isinstance(publication, Publication):
            TakesThePreviousOfAnyAudience.last = publication.offset


@fails("appends_of_one_turn_keep_their_order")
class LetsOthersGoFirst(HubEngine):
    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        for _ in range(3):
            await asyncio.sleep(0)
        return await super().append(publication, history, key)


@fails("positions_are_an_unbroken_chain", "audience_without_publications_has_a_position")
class HasAnEpochOfItsOwn(HubEngine):
    @cached_property
    def epoch(self) -> str:
        return token_urlsafe(9)

    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        appended = await super().append(publication, history, key)
        return appended._replace(position=Position(self.epoch, appended.position.offset))

    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        replay = await super().read(audience, since, history)
        return replay._replace(top=Position(self.epoch, replay.top.offset))

    async def positions(self, audiences: Sequence[Audience], histories: Sequence[History]) -> Sequence[Position]:
        return [Position(self.epoch, each.offset) for each in await super().positions(audiences, histories)]


@fails("audience_without_publications_has_a_position")
class MakesTheEpochWithTheFirstMessage(HubEngine):
    async def positions(self, audiences: Sequence[Audience], histories: Sequence[History]) -> Sequence[Position]:
        return [each if each.offset else Position("", 0) for each in await super().positions(audiences, histories)]


@fails("many_positions_are_read_at_once")
class AsksForAThousand(HubEngine):
    async def positions(self, audiences: Sequence[Audience], histories: Sequence[History]) -> Sequence[Position]:
        return await super().positions(audiences[:1000], histories[:1000])


# What is kept, and what is read.


@fails("what_arrives_is_kept")
class SendsBeforeItKeeps(HubEngine):
    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        log = self._log(publication.audience)
        position, previous = Position(log.epoch, log.offset + 1), log.offset
        publication.place(position, previous, self._hub.now())
        self._hub.send(publication)
        await asyncio.sleep(0)  # and fails, if it is cancelled here
        log.append(publication, history, self._hub.now())
        return Appended(position)


@fails("what_arrives_is_kept")
class KeepsBeforeItSends(HubEngine):
    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        position = self._log(publication.audience).append(publication, history, self._hub.now())
        await asyncio.sleep(0)
        self._hub.send(publication)
        return Appended(position)


@fails("publication_is_kept_as_it_was")
class ForgetsWhoIsExcluded(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        replay = await super().read(audience, since, history)
        bare = [Publication(each.message, audience, position=each.position) for each in replay.publications]
        return replay._replace(publications=bare)


@fails("names_are_kept_apart")
class IgnoresCase(HubEngine):
    def _log(self, audience: Audience) -> Log:
        return super()._log(Audience(audience.kind, audience.name.casefold()))


@fails("names_are_kept_apart")
class TakesUsersForChannels(HubEngine):
    def _log(self, audience: Audience) -> Log:
        return super()._log(Audience("channel", audience.name))


@fails("replay_is_complete_where_it_can_be", "newest_few_are_read")
class BelievesThatItHasEverything(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        return (await super().read(audience, since, history))._replace(base=0)


@fails("replay_is_complete_where_it_can_be")
class BelievesNothing(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        replay = await super().read(audience, since, history)
        return replay._replace(base=replay.top.offset)


@fails("replay_is_complete_where_it_can_be", "what_arrives_is_kept")
class ReadsFromAReplica(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        replay = await super().read(audience, since, history)
        seen = [each for each in replay.publications if each.kept_at < self._hub.now() - 0.05]
        if not seen:
            return replay._replace(publications=(), top=Position(replay.top.epoch, replay.base))
        return replay._replace(publications=seen, top=Position(replay.top.epoch, seen[-1].offset))


@fails("newest_few_are_read")
class ReadsAllThatThereIs(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        return await super().read(audience, since, replace(history, messages=1000))


@fails("position_that_is_none_is_not_complete")
class HasNumbersOf64Bits(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        if since is not None:
            since.offset.to_bytes(8, "big", signed=True)
        return await super().read(audience, since, history)


@fails("position_that_is_none_is_not_complete")
class SaysThatItIsWhereTheClientIs(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        replay = await super().read(audience, since, history)
        if since is not None and since.epoch == replay.top.epoch and since.offset > replay.top.offset:
            replay = replay._replace(top=since, base=since.offset)
        return replay


@fails("old_publications_are_not_replayed")
class IgnoresTheAge(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        return await super().read(audience, since, replace(history, seconds=3600.0))


@fails("old_publications_are_not_replayed")
class ForgetsThatSomethingWasOlder(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        all_of_it = await super().read(audience, since, replace(history, seconds=3600.0))
        young = [each for each in all_of_it.publications if self._hub.now() - each.kept_at <= history.seconds]
        return all_of_it._replace(publications=young)


@fails("old_publications_are_not_replayed")
class ForgetsThePositionWithTheMessages(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        replay = await super().read(audience, since, history)
        if not replay.publications and replay.top.offset:
            self._hub.forget(audience)
            return await super().read(audience, since, history)
        return replay


@fails("large_publication_is_delivered_and_not_kept")
class KeepsWhatIsTooLarge(HubEngine):
    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        return await super().append(publication, replace(history, max_kept_bytes=2**30), key)


@fails("large_publication_is_delivered_and_not_kept")
class DropsWhatItDoesNotKeep(HubEngine):
    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        if publication.size > history.max_kept_bytes:
            return Appended(self._log(publication.audience).append(publication, history, self._hub.now()))
        return await super().append(publication, history, key)


@fails("large_publication_is_delivered_and_not_kept")
class ForgetsThatSomethingWasTooLarge(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        replay = await super().read(audience, since, history)
        return replay._replace(base=0 if since is None else since.offset)


@fails("forgotten_history_is_gone")
class KeepsTheEpochOfWhatIsForgotten(HubEngine):
    async def forget(self, audience: Audience) -> None:
        epoch = self._log(audience).epoch
        await super().forget(audience)
        self._log(audience).epoch = epoch


@fails("forgotten_history_is_gone")
class ForgetsTooMuch(HubEngine):
    async def forget(self, audience: Audience) -> None:
        self._hub.forget()


@fails("forgotten_history_is_gone")
class ForgetsThePositionOnly(HubEngine):
    async def forget(self, audience: Audience) -> None:
        self._log(audience).epoch = token_urlsafe(9)


# Keys, rules, start and end.


@fails("one_key_is_kept_once")
class LooksForTheKeyFirst(HubEngine):
    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        known = None if key is None else self._log(publication.audience).repeat(key)
        await asyncio.sleep(0)
        if known is not None:
            return Appended(known, is_repeat=True)
        appended = await super().append(publication, history)
        if key is not None:
            self._log(publication.audience).remember(key)
        return appended


@fails("one_key_is_kept_once")
class SaysNothingOfRepeats(HubEngine):
    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        return Appended((await super().append(publication, history, key)).position)


@fails("one_key_is_kept_once")
class RemembersKeysForItself(HubEngine):
    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        return await super().append(publication, history, None if key is None else f"{id(self)} {key}")


@fails("key_counts_in_its_audience")
class CountsKeysOverAllAudiences(HubEngine):
    @cached_property
    def keys(self) -> dict[str, Position]:
        return {}

    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        if key is not None and key in self.keys:
            return Appended(self.keys[key], is_repeat=True)
        appended = await super().append(publication, history, key)
        self.keys[key or ""] = appended.position
        return appended


@fails("key_counts_in_its_audience")
class WritesNameAndKeyInOne(CountsKeysOverAllAudiences):
    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        name = publication.audience.name
        return await super().append(publication, history, None if key is None else f"{name}:{key}")


@fails("publisher_learns_what_is_kept")
class WritesNoRules(HubEngine):
    async def start(self, receiver: Receiver) -> None:
        known = self._hub.rules
        await super().start(receiver)
        self._hub.rules = known


@fails("publisher_learns_what_is_kept")
class LearnsNothing(HubEngine):
    def keep(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        super().keep(rules)


@fails("history_needs_a_running_engine")
class ReadsWhenItIsOver(HubEngine):
    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        return self._log(audience).read(None, history, self._hub.now())


def with_previous(publication: Publication | Control, previous: int) -> Publication | Control:
    if not isinstance(publication, Publication) or publication.position is None:
        return publication
    copy = publication.with_message(publication.message)
    copy.place(publication.position, previous, publication.kept_at)
    return copy


@pytest.mark.parametrize(("kind", "test"), CATCHES, ids=lambda value: getattr(value, "__name__", value))
async def test_contract_catches(kind: type[HubEngine], test: str) -> None:
    contract = type("Contract", (OnAHub,), {"kind": kind})()
    with pytest.raises((Exception, pytest.fail.Exception)):
        await getattr(contract, test)()


def test_every_test_of_the_contract_can_fail() -> None:
    assert {test for _, test in CATCHES} == {name for name in dir(HistoryContract) if name.startswith("test_")}
