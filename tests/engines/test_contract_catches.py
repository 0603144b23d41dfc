"""The contract can fail: for each of its tests there is a wrong engine that doesn't pass it."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any, ClassVar, Self

import pytest

from wsbroadcast import (
    Audience,
    Control,
    Dismissal,
    Engine,
    EngineUnavailable,
    Gap,
    Health,
    LifecycleError,
    Message,
    NodeMessage,
    Publication,
    Receiver,
)
from wsbroadcast.stats import EngineStats
from wsbroadcast.testing import BrokerContract


class Bus:
    """A broker in this process."""

    def __init__(self) -> None:
        self.is_up = True
        self.engines: list[BusEngine] = []

    def stop(self) -> None:
        self.is_up = False
        for engine in self.engines:
            engine.lost()

    def start(self) -> None:
        self.is_up = True
        for engine in self.engines:
            engine.found()


class BusEngine(Engine):
    """A right engine, as short as one can be; the wrong ones below change one thing each."""

    name = "bus"

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.reconnects = self.gaps = self.publish_failures = 0
        self.receiver: Receiver | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.wanted: set[Audience] = set()

    @classmethod
    def from_url(cls, url: str) -> Self:
        raise NotImplementedError

    async def start(self, receiver: Receiver) -> None:
        if self.receiver is not None and self.loop is not None and self.loop.is_running():
            raise LifecycleError("it runs")
        self.receiver, self.wanted, self.loop = receiver, set(), asyncio.get_running_loop()
        if self not in self.bus.engines:
            self.bus.engines.append(self)
        self.lost_at = time.monotonic()

    async def aclose(self) -> None:
        if self.receiver is not None:
            self.receiver = None
            self.bus.engines.remove(self)

    def subscribe(self, audiences: Iterable[Audience]) -> None:
        self.wanted.update(audiences)

    def unsubscribe(self, audiences: Iterable[Audience]) -> None:
        self.wanted.difference_update(audiences)

    async def confirmed(self, audiences: Iterable[Audience]) -> None:
        pass

    async def publish(self, publication: Publication | Control) -> None:
        self.send(publication)

    def publish_nowait(self, publication: Publication | Control) -> None:
        self.send(publication)

    def send(self, publication: Publication | Control) -> None:
        if not self.is_ok:
            self.publish_failures += 1
            raise EngineUnavailable("no bus")
        for engine in self.bus.engines:
            engine.take(publication, self)

    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        if self.receiver is not None and publication.audience in self.wanted:
            self.receiver.take(publication)

    @property
    def is_ok(self) -> bool:
        return self.receiver is not None and self.bus.is_up

    def lost(self) -> None:
        self.lost_at = time.monotonic()

    def found(self) -> None:
        self.reconnects += 1
        self.report(time.monotonic() - self.lost_at)

    def report(self, seconds: float) -> None:
        assert self.receiver is not None
        self.gaps += 1
        self.receiver.gap(Gap(self.name, seconds))

    def stats(self) -> EngineStats:
        return EngineStats(reconnects=self.reconnects, gaps=self.gaps, publish_failures=self.publish_failures)

    async def health(self) -> Health:
        return Health(self.name, self.is_ok, "" if self.is_ok else "no bus")


class OnTheBus(BrokerContract):
    kind: ClassVar[type[BusEngine]] = BusEngine

    @cached_property
    def bus(self) -> Bus:
        return Bus()

    def make_engine(self) -> Engine:
        return self.kind(self.bus)

    async def stop_broker(self) -> None:
        self.bus.stop()

    async def start_broker(self) -> None:
        self.bus.start()


class TestBus(OnTheBus):
    """Nothing is wrong with what the wrong engines have in common."""


# The wrong ones.

CATCHES: list[tuple[type[BusEngine], str]] = []


def fails(*tests: str) -> Callable[[type[BusEngine]], type[BusEngine]]:
    def add(kind: type[BusEngine]) -> type[BusEngine]:
        CATCHES.extend((kind, f"test_{test}") for test in tests)
        return kind

    return add


async def for_ever() -> None:
    await asyncio.Event().wait()


@fails("publication_arrives_as_it_was")
class TextOnly(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        if isinstance(publication, Publication):
            text = publication.message.payload.decode(errors="replace")
            super().take(publication.with_message(Message.of(text)), publisher)


@fails("publication_keeps_audience_and_exclusions")
class ForgetsWhoIsExcluded(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        if isinstance(publication, Publication):
            super().take(Publication(publication.message, publication.audience, id=publication.id), publisher)


@fails("publication_keeps_audience_and_exclusions")
class ForgetsWhatBelongsTogether(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        if isinstance(publication, Publication):
            super().take(Publication(publication.message, publication.audience, publication.exclude), publisher)


@fails("nodes_hear_each_other")
class ForgetsWhatNodesSay(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        if not isinstance(publication, NodeMessage):
            super().take(publication, publisher)


@fails("dismissal_arrives_as_it_was")
class ClosesWithoutAReason(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        if isinstance(publication, Dismissal):
            publication = Dismissal(publication.audience, publication.code, exclude=publication.exclude)
        super().take(publication, publisher)


@fails("large_message_arrives_or_is_refused")
class DropsWhatIsLarge(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        if publication.size < 65536:
            super().take(publication, publisher)


def renamed(publication: Publication | Control, audience: Audience) -> Publication:
    assert isinstance(publication, Publication)
    return Publication(publication.message, audience, publication.exclude)


@fails("message_reaches_its_audience_and_no_other")
class IgnoresCase(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        kind, name = publication.audience
        assert self.receiver is not None
        for audience in self.wanted:
            if audience.kind == kind and audience.name.casefold() == name.casefold():
                self.receiver.take(renamed(publication, audience))


@fails("message_reaches_its_audience_and_no_other")
class CutsNames(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        kind, name = publication.audience
        assert self.receiver is not None
        for audience in self.wanted:
            if audience.kind == kind and audience.name.encode()[:63] == name.encode()[:63]:
                self.receiver.take(renamed(publication, audience))


@fails("every_message_arrives_once")
class DeliversTwice(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        super().take(publication, publisher)
        super().take(publication, publisher)


@fails("every_message_arrives_once")
class DoesNotHearItself(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        if publisher is not self:
            super().take(publication, publisher)


@fails("messages_arrive_in_the_order_of_publish")
class LosesOrder(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        late = 0.01 if isinstance(publication, Publication) and publication.message.data == "7" else 0
        asyncio.get_running_loop().call_later(late, super().take, publication, publisher)


@fails("publish_and_publish_nowait_keep_their_order")
class OvertakesWhatIsNotAwaited(BusEngine):
    def publish_nowait(self, publication: Publication | Control) -> None:
        asyncio.get_running_loop().call_soon(self.send, publication)


@fails("publishers_at_the_same_time_have_one_order")
class HearsItselfFirst(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        if publisher is self:
            super().take(publication, publisher)
        else:
            asyncio.get_running_loop().call_soon(super().take, publication, publisher)


@fails("cancelled_publish_disturbs_nobody")
class StaysLocked(BusEngine):
    @cached_property
    def lock(self) -> asyncio.Lock:
        return asyncio.Lock()

    async def publish(self, publication: Publication | Control) -> None:
        await self.lock.acquire()
        await asyncio.sleep(0)
        self.send(publication)
        self.lock.release()


@fails("confirmed_subscription_misses_nothing")
class ConfirmsTooEarly(BusEngine):
    def subscribe(self, audiences: Iterable[Audience]) -> None:
        asyncio.get_running_loop().call_later(0.01, self.wanted.update, list(audiences))


@fails("thousands_of_audiences_are_confirmed_at_once")
class HoldsAThousand(BusEngine):
    def subscribe(self, audiences: Iterable[Audience]) -> None:
        self.wanted.update(list(audiences)[:1000])


@fails("last_word_counts_where_subscriptions_flap")
class LetsGoLater(BusEngine):
    def unsubscribe(self, audiences: Iterable[Audience]) -> None:
        asyncio.get_running_loop().call_later(0.01, self.wanted.difference_update, list(audiences))


@fails("confirmed_ends_when_the_audience_is_no_longer_wanted")
class WaitsForWhatWasGivenUp(BusEngine):
    async def confirmed(self, audiences: Iterable[Audience]) -> None:
        if not self.wanted.issuperset(audiences):
            await for_ever()


@fails("receiver_that_fails_holds_up_nobody")
class DiesOfAnError(BusEngine):
    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        if publication.audience in self.wanted:
            self.delivering = asyncio.create_task(self.deliver(publication))

    async def deliver(self, publication: Publication | Control) -> None:
        assert self.receiver is not None
        try:
            await self.receiver.deliver(publication)
        except Exception:
            self.wanted.clear()


@fails("receiver_that_waits_holds_up_its_own_audience_only")
class HasOneLane(BusEngine):
    @cached_property
    def lane(self) -> asyncio.Lock:
        return asyncio.Lock()

    @cached_property
    def delivering(self) -> list[asyncio.Task[None]]:
        return []

    def take(self, publication: Publication | Control, publisher: BusEngine) -> None:
        if publication.audience in self.wanted:
            self.delivering.append(asyncio.create_task(self.deliver(publication)))

    async def deliver(self, publication: Publication | Control) -> None:
        assert self.receiver is not None
        async with self.lane:
            await self.receiver.deliver(publication)


@fails("node_that_takes_nothing_is_no_matter_for_the_others")
class WaitsForReceivers(BusEngine):
    async def publish(self, publication: Publication | Control) -> None:
        for engine in self.bus.engines:
            assert engine.receiver is not None
            if publication.audience in engine.wanted:
                await engine.receiver.deliver(publication)


@fails("engine_is_made_where_no_event_loop_runs")
class WantsALoop(BusEngine):
    def __init__(self, bus: Bus) -> None:
        super().__init__(bus)
        self.loop = asyncio.get_running_loop()


@fails("publishing_needs_a_running_engine")
class SaysNothing(BusEngine):
    def send(self, publication: Publication | Control) -> None:
        with suppress(EngineUnavailable):
            super().send(publication)


@fails("publishing_fails_during_an_outage_and_never_arrives_late", "health_is_good_while_it_runs")
class KnowsNothingOfItsHealth(BusEngine):
    async def health(self) -> Health:
        return Health("", self.receiver is not None)


@fails("nothing_arrives_after_aclose", "engine_can_be_started_again")
class GoesOnAfterwards(BusEngine):
    async def aclose(self) -> None:
        pass


@fails("aclose_can_be_called_again_and_again")
class EndsOnce(BusEngine):
    async def aclose(self) -> None:
        self.bus.engines.remove(self)


@fails("engine_can_be_started_again")
class KeepsItsFirstReceiver(BusEngine):
    async def start(self, receiver: Receiver) -> None:
        self.first = receiver = getattr(self, "first", receiver)
        await super().start(receiver)


@fails("aclose_ends_a_start_that_runs")
class WaitsForItsReceiver(BusEngine):
    async def start(self, receiver: Receiver) -> None:
        await super().start(receiver)
        await asyncio.sleep(0)
        if self.receiver is None:
            await for_ever()


@fails("engine_serves_one_node_at_a_time")
class ServesTheLastNode(BusEngine):
    async def start(self, receiver: Receiver) -> None:
        self.receiver = None
        await super().start(receiver)


@fails("engine_can_be_started_again_when_its_event_loop_has_ended")
class WantsToBeClosed(BusEngine):
    async def start(self, receiver: Receiver) -> None:
        if self.receiver is not None:
            raise LifecycleError("it runs")
        await super().start(receiver)


@fails("end_of_a_node_is_no_matter_for_the_others")
class TakesOthersWithIt(BusEngine):
    async def aclose(self) -> None:
        for engine in self.bus.engines:
            engine.wanted.clear()
        await super().aclose()


@fails("publishing_fails_during_an_outage_and_never_arrives_late", "order_survives_an_outage")
class ReplaysLate(BusEngine):
    held: ClassVar[list[Publication | Control]] = []

    def send(self, publication: Publication | Control) -> None:
        if not self.bus.is_up:
            self.held.append(publication)
        super().send(publication)

    def found(self) -> None:
        super().found()
        while self.held:
            self.send(self.held.pop())


@fails("publishing_fails_during_an_outage_and_never_arrives_late")
class Waits(BusEngine):
    async def publish(self, publication: Publication | Control) -> None:
        if not self.is_ok:
            await for_ever()
        self.send(publication)


@fails("other_tasks_run_during_an_outage")
class BlocksTheLoop(BusEngine):
    def found(self) -> None:
        time.sleep(0.2)
        super().found()


@fails("audiences_are_back_with_the_broker", "gap_is_reported_when_it_is_over", "order_survives_an_outage")
class ForgetsWhatWasWanted(BusEngine):
    def lost(self) -> None:
        super().lost()
        self.wanted.clear()


@fails("audiences_are_back_with_the_broker", "broker_may_come_later_than_the_engine")
class TakesItsTime(BusEngine):
    is_back = True

    @property
    def is_ok(self) -> bool:
        return super().is_ok and self.is_back

    def found(self) -> None:
        super().found()
        self.is_back = False
        asyncio.get_running_loop().call_later(1, setattr, self, "is_back", True)


@fails("each_outage_is_one_gap")
class SaysItTwice(BusEngine):
    def found(self) -> None:
        super().found()
        self.report(time.monotonic() - self.lost_at)


@fails("each_outage_is_one_gap")
class TellsNoTime(BusEngine):
    def report(self, seconds: float) -> None:
        super().report(0.0)


@fails("gap_is_reported_when_it_is_over")
class SaysItTooEarly(BusEngine):
    def lost(self) -> None:
        super().lost()
        self.report(0.1)

    def found(self) -> None:
        self.reconnects += 1
        self.wanted, wanted = set(), self.wanted
        asyncio.get_running_loop().call_later(0.1, self.wanted.update, wanted)


@fails("broker_may_come_later_than_the_engine")
class WantsABroker(BusEngine):
    async def start(self, receiver: Receiver) -> None:
        if not self.bus.is_up:
            raise EngineUnavailable("no bus")
        await super().start(receiver)


@fails("aclose_needs_no_broker")
class EndsWithABroker(BusEngine):
    async def aclose(self) -> None:
        if self.receiver is not None and not self.bus.is_up:
            await for_ever()
        await super().aclose()


@fails("cancelled_health_leaves_no_trace")
class CountsCancelledQuestions(BusEngine):
    async def health(self) -> Health:
        try:
            await asyncio.sleep(0)
            return await super().health()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    def stats(self) -> EngineStats:
        return EngineStats(bad_envelopes={"echo": 1}) if getattr(self, "cancelled", False) else super().stats()


class Impatient(OnTheBus):
    """Waits no longer than it takes to be sure."""

    seconds = 0.1
    flapping_seconds = 0.05
    answer_seconds = 0.2
    recovery_seconds = 0.3
    lag_seconds = 0.1
    outage_seconds = 0.15


@pytest.mark.parametrize(("kind", "test"), CATCHES, ids=lambda value: getattr(value, "__name__", value))
async def test_contract_catches(kind: type[BusEngine], test: str) -> None:
    contract = type("Contract", (Impatient,), {"kind": kind})()
    method = getattr(contract, test)
    arguments: dict[str, Any] = dict.fromkeys(inspect.signature(method).parameters, True)
    with pytest.raises((Exception, pytest.fail.Exception)):
        await method(**arguments)


def test_every_test_of_the_contract_can_fail() -> None:
    assert {test for _, test in CATCHES} == {name for name in dir(BrokerContract) if name.startswith("test_")}
