"""Who is waited for, by a clock that the tests turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextvars import Context
from typing import Any, cast

import pytest

from wsbroadcast import SlowConsumer
from wsbroadcast.audience import EVERYONE
from wsbroadcast.delivery.pace import Pace, Patience, Wait
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.delivery.slow_consumers import SlowConsumers
from wsbroadcast.stats import Counters

# With it: a pace of 100 bytes a second, 2.5 s of patience, moments of half a second.
OPTIONS = SlowConsumer(send_timeout=10.0, max_backlog_bytes=2000)
PACE = 100


class Peer:
    """A connection and its sink, of which only figures are there."""

    _user_key: str | None = None
    channels: frozenset[str] = frozenset()
    context = Context()

    def __init__(self, name: str) -> None:
        self.id = name
        self.taken = 0
        self.outstanding = 0
        self.held_bytes = 0
        self.is_half_full = False
        self.is_observable = True
        self.pace = 0.0
        """Bytes it takes in a second."""

    @property
    def _sink(self) -> Sink:
        return cast(Sink, self)

    @property
    def owner(self) -> Peer:
        return self

    def abort(self) -> None:
        pass


class Room:
    """Peers, and the time."""

    def __init__(self, size: int) -> None:
        self.registry = Registry[Peer]()
        self.slow_consumers = SlowConsumers(OPTIONS, Counters())
        self.pace = Pace(self.registry, self.slow_consumers)
        self.peers = [Peer(str(number)) for number in range(size)]
        for peer in self.peers:
            self.registry.add(peer)
        self.now = asyncio.get_running_loop().time()
        self._stay = asyncio.Event()
        self._writers: list[asyncio.Task[None]] = []

    def fall_behind(self, *peers: Peer, half_full: bool = False) -> None:
        for peer in peers:
            self._writers.append(self.slow_consumers.start_writer(peer._sink, self._wait()))
            self.slow_consumers.fell_behind(peer._sink)
            peer.is_half_full = half_full

    async def _wait(self) -> None:
        await self._stay.wait()

    def go_on(self, seconds: float, step: float = 0.05) -> None:
        """Let the time pass, in which everybody takes what he takes."""
        for _ in range(round(seconds / step)):
            self.now += step
            for peer in self.peers:
                peer.taken += round(peer.pace * step)
                self.slow_consumers.progress(peer._sink, self.now)

    def must_wait(self, wait: Wait | None = None) -> bool:
        return self.pace.must_wait(EVERYONE, frozenset(), wait or Wait(), self.now)

    def waited(self, *, in_a_loop: bool, most: float = 100.0, step: float = 0.05) -> float:
        """How long a broadcaster that comes now has to wait, in seconds."""
        wait = Wait()
        wait.fills_turns = in_a_loop
        began = self.now
        while self.now - began < most and self.must_wait(wait):
            looked = self.now
            self.go_on(step, step)
            if wait.patience is not None:
                wait.patience.spend(looked, self.now)
        return self.now - began

    async def aclose(self) -> None:
        self._stay.set()
        await asyncio.gather(*self._writers)
        await self.slow_consumers.aclose()


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    room = Room(10)
    yield room
    await room.aclose()


async def test_majority_that_takes_nothing_holds_up_no_paced_broadcaster(room: Room) -> None:
    room.fall_behind(*room.peers[:6])
    room.go_on(1)
    for _ in range(30):
        assert room.waited(in_a_loop=False) == 0
        room.go_on(1)


async def test_majority_that_has_only_just_fallen_behind_is_given_a_moment(room: Room) -> None:
    room.fall_behind(*room.peers[:6])
    assert 0.2 <= room.waited(in_a_loop=False) <= 0.35
    assert room.waited(in_a_loop=False) == 0


@pytest.mark.parametrize("in_a_loop", [False, True])
async def test_majority_that_reads_slowly_sets_the_pace(room: Room, in_a_loop: bool) -> None:
    room.fall_behind(*room.peers[:6])
    for peer in room.peers[:6]:
        peer.pace = PACE * 1.5
    room.go_on(3)
    assert room.waited(in_a_loop=in_a_loop, most=30) >= 30


@pytest.mark.parametrize("in_a_loop", [False, True])
@pytest.mark.parametrize("pace", [1, PACE / 2])
async def test_majority_that_takes_next_to_nothing_does_not(room: Room, in_a_loop: bool, pace: float) -> None:
    room.fall_behind(*room.peers[:6])
    for peer in room.peers[:6]:
        peer.pace = pace
    room.go_on(10)
    total = 0.0
    for _ in range(20):
        total += room.waited(in_a_loop=in_a_loop, most=30)
        room.go_on(1)
    assert total <= (2 if in_a_loop else 0)


@pytest.mark.parametrize(("in_a_loop", "most"), [(False, 0.0), (True, 1.5)])
async def test_hundred_that_take_turns_at_reading_are_no_crowd(in_a_loop: bool, most: float) -> None:
    room = Room(104)
    hostile = room.peers[:100]
    room.fall_behind(*hostile, half_full=True)
    room.go_on(3)
    waited = 0.0
    for one in hostile:
        one.taken += 25  # what a quarter of a second costs, and nothing more
        room.go_on(0.1)
        waited += room.waited(in_a_loop=in_a_loop, most=30)
    await room.aclose()
    assert waited <= most


@pytest.mark.parametrize(("in_a_loop", "longest"), [(False, 2.5), (True, 10)])
async def test_network_that_is_at_fault_is_waited_for_a_while(in_a_loop: bool, longest: float) -> None:
    room = Room(3)
    room.fall_behind(*room.peers)
    assert longest <= room.waited(in_a_loop=in_a_loop) <= longest + 0.5
    assert room.waited(in_a_loop=in_a_loop) == 0  # and not by each broadcast anew
    for peer in room.peers:
        peer.pace = 1
    waited = room.waited(in_a_loop=in_a_loop)
    await room.aclose()
    assert waited == 0


# The tail of the crowd.


async def test_tight_loop_gives_the_tail_a_moment_and_others_give_none(room: Room) -> None:
    room.fall_behind(room.peers[0], half_full=True)
    assert room.waited(in_a_loop=False) == 0
    assert 0.4 <= room.waited(in_a_loop=True) <= 0.6


async def test_tail_is_waited_for_while_the_crowd_still_has_something_to_take(room: Room) -> None:
    room.fall_behind(room.peers[0], half_full=True)
    room.peers[0].pace = PACE * 2
    wait = Wait()
    wait.fills_turns = True
    for step in range(100, 0, -1):
        for other in room.peers[1:]:
            other.outstanding = step * 1000
        assert room.must_wait(wait)
        assert wait.patience is None
        room.go_on(0.05)
    for other in room.peers[1:]:
        other.outstanding = 0
    assert room.waited(in_a_loop=True) <= 0.6


async def test_others_who_stand_still_themselves_are_no_reason_to_wait(room: Room) -> None:
    room.fall_behind(room.peers[0], half_full=True)
    for stuck in room.peers[1:7]:
        stuck.outstanding = 1000
    assert room.waited(in_a_loop=True) <= 0.7


@pytest.mark.parametrize("count", [1, 3])
async def test_laggards_that_pulse_cost_a_tight_loop_next_to_nothing(room: Room, count: int) -> None:
    waited = 0.0
    for turn in range(30):
        laggard = room.peers[turn % count]
        room.fall_behind(laggard, half_full=True)
        waited += room.waited(in_a_loop=True, most=2.3)
        room.slow_consumers.caught_up(laggard._sink)
        room.slow_consumers.writer_ended(laggard._sink)
        room.go_on(0.5)
    assert waited <= 0.1 * 30 * 0.5 + 1


async def test_tail_that_can_not_be_seen_is_given_longer(room: Room) -> None:
    for peer in room.peers:
        peer.is_observable = False
    room.fall_behind(room.peers[0], half_full=True)
    assert 2 <= room.waited(in_a_loop=True) <= 3
    assert room.waited(in_a_loop=True) <= 0.5


async def test_tail_of_nobody_else_is_waited_for_no_longer_than_it_stands_still(room: Room) -> None:
    room.fall_behind(room.peers[0], half_full=True)
    for other in room.peers[1:]:
        other.outstanding = 1000  # and nobody moves
    assert 2.5 <= room.waited(in_a_loop=True) <= 3


def test_patience_comes_back_slowly_and_several_spend_it_once() -> None:
    patience = Patience(1.0)
    assert patience.is_left(100.0)
    patience.spend(100.0, 100.4)
    patience.spend(100.1, 100.5)
    assert patience.is_left(100.5)
    patience.spend(100.5, 101.1)
    assert not patience.is_left(101.1)
    assert patience.is_left(104.0)
    patience.spend(104.0, 104.2)
    assert not patience.is_left(104.2)
    assert patience.is_left(1000.0)
    patience.spend(1000.0, 1001.1)  # no more than it was at first
    assert not patience.is_left(1001.1)


def test_longest_wait_is_shorter_than_a_server_waits_for_a_pong() -> None:
    registry = Registry[Any]()
    assert Pace(registry, SlowConsumers(SlowConsumer(send_timeout=60.0), Counters())).longest == 10
    assert Pace(registry, SlowConsumers(SlowConsumer(send_timeout=3.0), Counters())).longest == 3
