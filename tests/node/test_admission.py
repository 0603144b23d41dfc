from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wsbroadcast import CloseCode, LimitExceeded, Limits
from wsbroadcast.node.admission import (
    DRAINING,
    IN_ALL,
    MAX_KEYS,
    PER_ADDRESS,
    PER_USER,
    REFUSALS,
    InboundLimit,
    Lease,
    Quotas,
    TokenBuckets,
    Violations,
    address_of,
)
from wsbroadcast.stats import Counters


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Table:
    """Quotas with the counters and the clock it uses."""

    def __init__(self, **limits: Any) -> None:
        self.clock = Clock()
        self.counters = Counters()
        self.quotas = Quotas(Limits(**limits), Violations(self.counters, self.clock), self.clock)

    def admit(self, user: str | None = None, address: str | None = None) -> Lease:
        place = self.quotas.admit(address)
        try:
            place.take(PER_USER, user)
        except LimitExceeded:
            place.release()
            raise
        return place

    @property
    def taken(self) -> dict[str, dict[str, int]]:
        return {name: each.taken for name, each in self.quotas.counted.items()}


EMPTY: dict[str, dict[str, int]] = {IN_ALL: {}, PER_USER: {}, PER_ADDRESS: {}}

# Places.


@pytest.mark.parametrize(
    ("limit", "who", "others"),
    [
        (IN_ALL, {}, None),
        (PER_USER, {"user": "ann"}, {"user": "bob"}),
        (PER_ADDRESS, {"address": "1.2.3.4"}, {"address": "1.2.3.5"}),
    ],
)
def test_limit_is_the_most_that_is_allowed(limit: str, who: dict[str, str], others: dict[str, str] | None) -> None:
    table = Table(**{limit: 3})
    places = [table.admit(**who) for _ in range(3)]
    with pytest.raises(LimitExceeded) as caught:
        table.admit(**who)
    assert caught.value.limit == limit
    assert table.counters.limited == {limit: 1}
    if others is not None:
        places.append(table.admit(**others))  # nobody else is concerned
    places.pop(0).release()
    places.append(table.admit(**who))
    for place in places:
        place.release()
    assert table.taken == EMPTY


def test_nobody_is_refused_without_limits() -> None:
    table = Table()
    for _ in range(1000):
        table.admit("ann", "1.2.3.4")
    assert table.taken == EMPTY  # and nothing is remembered of them


def test_peer_without_address_is_not_limited_by_address() -> None:
    table = Table(max_connections_per_address=1, max_handshake_rate=1, handshake_burst=1)
    for _ in range(10):
        table.admit(address=None)


def test_place_is_given_back_once() -> None:
    table = Table(max_connections=2)
    first, _ = table.admit(), table.admit()
    first.release()
    first.release()
    assert table.taken[IN_ALL] == {"": 1}


def test_refusal_takes_nothing() -> None:
    table = Table(max_connections=10, max_connections_per_user=1, max_connections_per_address=10)
    table.admit("ann", "a")
    before = {name: dict(taken) for name, taken in table.taken.items()}
    with pytest.raises(LimitExceeded):
        table.admit("ann", "a")
    assert table.taken == before


def test_place_that_finds_no_seat_for_its_user_keeps_what_it_has() -> None:
    table = Table(max_connections=10, max_connections_per_user=1)
    table.admit("ann")
    place = table.quotas.admit("a")
    with pytest.raises(LimitExceeded):
        place.take(PER_USER, "ann")
    assert table.taken[IN_ALL] == {"": 2}
    place.release()
    assert table.taken[IN_ALL] == {"": 1}


@given(st.lists(st.tuples(st.sampled_from(["ann", "bob", None]), st.sampled_from(["a", "b", None]), st.booleans())))
def test_counts_are_those_of_the_places_that_are_held(steps: list[tuple[str | None, str | None, bool]]) -> None:
    table = Table(max_connections=4, max_connections_per_user=2, max_connections_per_address=3)
    held: list[tuple[Lease, str | None, str | None]] = []
    for user, address, leaves in steps:
        if leaves and held:
            held.pop(0)[0].release()
        else:
            try:
                held.append((table.admit(user, address), user, address))
            except LimitExceeded:
                pass
        users: dict[str, int] = defaultdict(int)
        addresses: dict[str, int] = defaultdict(int)
        for _, held_user, held_address in held:
            if held_user is not None:
                users[held_user] += 1
            if held_address is not None:
                addresses[held_address] += 1
        in_all = {"": len(held)} if held else {}
        assert table.taken == {IN_ALL: in_all, PER_USER: users, PER_ADDRESS: addresses}
        assert len(held) <= 4
        assert all(count <= 2 for count in users.values())
        assert all(count <= 3 for count in addresses.values())


@pytest.mark.parametrize("count", [99, 100])
def test_channels_up_to_the_limit_are_allowed(count: int) -> None:
    Table().quotas.check_channels(count, "who")


def test_channels_beyond_the_limit_are_refused() -> None:
    table = Table()
    with pytest.raises(LimitExceeded) as caught:
        table.quotas.check_channels(101, "who")
    assert (caught.value.limit, caught.value.code) == ("max_channels_per_connection", 1008)
    Table(max_channels_per_connection=None).quotas.check_channels(10**6, "who")


# The pace of handshakes.


def test_handshakes_may_come_in_a_burst_and_then_at_the_rate() -> None:
    table = Table(max_handshake_rate=2, handshake_burst=5)
    for _ in range(5):
        table.admit(address="a").release()
    for _ in range(3):
        with pytest.raises(LimitExceeded) as caught:
            table.admit(address="a")
        assert (caught.value.limit, caught.value.code) == ("max_handshake_rate", 1013)
    table.admit(address="b")
    table.clock.now += 0.5  # one more each half second; what was refused doesn't count
    table.admit(address="a")
    with pytest.raises(LimitExceeded):
        table.admit(address="a")
    table.clock.now += 2.5
    for _ in range(5):
        table.admit(address="a")
    with pytest.raises(LimitExceeded):
        table.admit(address="a")


def test_addresses_are_forgotten_when_they_could_burst_again() -> None:
    table = Table(max_handshake_rate=1, handshake_burst=10)
    assert table.quotas.pace is not None
    for number in range(1000):
        table.clock.now += 0.01
        table.admit(address=str(number)).release()
    assert len(table.quotas.pace) <= 101  # those of the last second
    last = table.admit(address="last")
    table.clock.now += 1
    last.release()  # whoever goes tidies up as well
    assert len(table.quotas.pace) == 0


def test_no_more_addresses_are_remembered_than_there_is_room_for() -> None:
    clock = Clock()
    pace = TokenBuckets(rate=0.001, burst=1, clock=clock)
    for number in range(MAX_KEYS + 100):
        assert pace.take(str(number))
    assert len(pace) == MAX_KEYS
    assert not pace.take(str(MAX_KEYS + 99))
    assert pace.take("0")  # the oldest begins anew


@given(
    rate=st.floats(0.01, 1e5),
    burst=st.integers(1, 50),
    gaps=st.lists(st.floats(0, 10, allow_subnormal=False), max_size=100),
)
@example(rate=1e5, burst=50, gaps=[0.0] * 60)
def test_pace_is_a_token_bucket(rate: float, burst: int, gaps: list[float]) -> None:
    clock = Clock()
    pace = TokenBuckets(rate, burst, clock)
    tokens = float(burst)
    for gap in gaps:
        clock.now += gap
        tokens = min(float(burst), tokens + gap * rate)
        is_taken = pace.take("a")
        if abs(tokens - 1) > 0.6:  # half a token forgives rounding
            assert is_taken is (tokens > 1)
        tokens -= is_taken
    assert len(pace) <= 1


# What clients say.


class Sender:
    _inbound_full_at: float | None = None


def sender_of(gate: InboundLimit, *, is_routers: bool = False) -> Sender:
    sender = Sender()
    gate.begin(sender, is_routers=is_routers)
    return sender


def inbound(**limits: Any) -> tuple[InboundLimit, Clock, Counters]:
    clock, counters = Clock(), Counters()
    return InboundLimit(Limits(**limits), Violations(counters, clock), clock), clock, counters


@pytest.mark.parametrize("message", ["x" * 65535, "x" * 65536, b"x" * 65536, "é" * 32768, "😀" * 16384, "", b""])
def test_message_up_to_the_limit_is_allowed(message: str | bytes) -> None:
    inbound()[0].check(Sender(), message)


@pytest.mark.parametrize(
    "message",
    ["x" * 65537, b"x" * 65537, "é" * 32769, "😀" * 16385, "😀" * 16384 + "x", "x" * 16777217, "\ud800" * 21846],
)
def test_message_beyond_the_limit_is_refused_whatever_its_characters_take(message: str | bytes) -> None:
    gate, _, counters = inbound()
    with pytest.raises(LimitExceeded) as caught:
        gate.check(Sender(), message)
    assert (caught.value.limit, caught.value.code) == ("max_inbound_bytes", CloseCode.MESSAGE_TOO_BIG)
    assert str(caught.value) == caught.value.reason == "message too big"
    assert counters.limited == {"max_inbound_bytes": 1}


@given(st.text(max_size=40), st.integers(1, 60))
def test_size_is_that_of_utf_8(text: str, most: int) -> None:
    gate, _, _ = inbound(max_inbound_bytes=most)
    try:
        gate.check(Sender(), text)
        is_allowed = True
    except LimitExceeded:
        is_allowed = False
    assert is_allowed is (len(text.encode()) <= most)


def test_messages_may_come_in_a_burst_and_then_at_the_rate() -> None:
    gate, clock, counters = inbound(max_inbound_rate=10, inbound_burst=100)
    sender, other = sender_of(gate), sender_of(gate)
    for _ in range(100):
        gate.check(sender, "x")
    with pytest.raises(LimitExceeded) as caught:
        gate.check(sender, "x")
    assert (caught.value.limit, caught.value.code) == ("max_inbound_rate", CloseCode.POLICY_VIOLATION)
    assert str(caught.value) == "too many messages (max_inbound_rate)"
    gate.check(other, "x")
    clock.now += 0.1
    gate.check(sender, "x")
    with pytest.raises(LimitExceeded):
        gate.check(sender, "x")
    assert counters.limited == {"max_inbound_rate": 2}


def test_ten_thousand_frames_in_a_second_are_too_many_for_a_router_by_default() -> None:
    gate, clock, _ = inbound()
    sender = sender_of(gate, is_routers=True)

    def flood() -> None:
        for _ in range(10_000):
            clock.now += 0.0001
            gate.check(sender, "x")

    with pytest.raises(LimitExceeded):
        flood()
    assert clock.now < 1000.2  # after the burst of 1,000, which takes a tenth of a second


def test_sixty_messages_a_second_are_welcome_for_ever_by_default() -> None:
    gate, clock, _ = inbound()
    sender = sender_of(gate, is_routers=True)
    for _ in range(60 * 3600):
        clock.now += 1 / 60
        gate.check(sender, "x")


def test_limits_that_are_off_check_nothing() -> None:
    gate, _, _ = inbound(max_router_inbound_rate=None, max_inbound_bytes=None)
    assert sender_of(gate, is_routers=True)._inbound_full_at is None
    sender = sender_of(gate)
    for _ in range(10_000):
        gate.check(sender, "x")
    gate.check(sender, b"x" * 2**25)


# What is told.


def test_every_limit_has_its_refusal() -> None:
    limits = {name for name in Limits.__slots__ if name.startswith("max_")}
    assert set(REFUSALS) - {DRAINING} == limits - {"max_outbound_bytes", "max_connection_age"}  # which refuse nobody


def test_flood_is_counted_in_full_and_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock, counters = Clock(), Counters()
    breaches = Violations(counters, clock)
    for _ in range(1000):
        breaches.count(PER_ADDRESS, "1.2.3.4")
    breaches.count(IN_ALL, "")
    assert len(caplog.records) == 2
    clock.now += 60
    breaches.count(PER_ADDRESS, "a\nb\x1b[2J" * 1000)
    assert counters.limited == {PER_ADDRESS: 1001, IN_ALL: 1}
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    text = caplog.records[-1].getMessage()
    assert text.startswith(f"{PER_ADDRESS}: refused 1001 so far, the last was 'a\\nb\\x1b[2J")
    assert text.isprintable()
    assert len(text) < 300


def test_user_who_has_too_many_connections_is_not_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    quotas = Quotas(Limits(max_connections_per_user=1), Violations(Counters()))
    quotas.admit("192.0.2.1").take(PER_USER, "ada@example.org")
    with pytest.raises(LimitExceeded):
        quotas.admit("192.0.2.7").take(PER_USER, "ada@example.org")
    assert caplog.messages == [f"{PER_USER}: refused 1 so far, the last was '192.0.2.7'"]


# Addresses.


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("203.0.113.7", 1234), "203.0.113.7"),
        (["203.0.113.7", 1234], "203.0.113.7"),
        (("2001:db8:1:2:3:4:5:6", 1), "2001:db8:1:2::/64"),
        (("2001:db8:1:2:ffff::1", 1), "2001:db8:1:2::/64"),
        (("::ffff:203.0.113.7", 1), "203.0.113.7"),
        (("fe80::1%eth0", 1), "fe80::/64"),
        (("::1", 1), "::/64"),
        (("testclient", 50000), "testclient"),
        (("x" * 60_000, 0), "x" * 64),
        (None, None),
        ((), None),
        (("", 0), None),
        ((None, 0), None),
    ],
)
def test_address_is_that_of_the_socket(client: Any, address: str | None) -> None:
    assert address_of({"client": client}) == address
    assert address_of({"client": client, "headers": [(b"x-forwarded-for", b"1.2.3.4")]}) == address


def test_scope_without_client_has_no_address() -> None:
    assert address_of({}) is None


def test_place_is_the_same_for_all_where_nothing_is_counted() -> None:
    free = Quotas(Limits(), Violations(Counters()))
    assert free.admit("192.0.2.1") is free.admit("192.0.2.2")
    counted = Quotas(Limits(max_connections_per_user=1), Violations(Counters()))
    assert counted.admit("192.0.2.1") is not counted.admit("192.0.2.1")
