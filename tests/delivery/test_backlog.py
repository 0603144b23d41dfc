from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from wsbroadcast import Audience, SlowConsumer
from wsbroadcast.audience import EVERYONE
from wsbroadcast.delivery.backlog import Backlog, BacklogFull, Entry, SpokenEntry, Turn
from wsbroadcast.options import Policy

POLICIES = get_args(Policy)
MAX_BYTES = 20
MAX_MESSAGES = 5


def backlog_with(policy: Any, max_bytes: int = MAX_BYTES, max_messages: int = MAX_MESSAGES) -> Backlog:
    return Backlog(SlowConsumer(policy=policy, max_backlog_bytes=max_bytes, max_backlog_messages=max_messages))


def message_of(size: int, key: str | None = None, audience: Audience = EVERYONE) -> Entry:
    return Entry(b"frame", size, is_text=False, key=None if key is None else (audience, key))


class BacklogAgainstModel(RuleBasedStateMachine):
    """The model is a plain list, searched from its beginning for everything."""

    @initialize(policy=st.sampled_from(POLICIES))
    def begin(self, policy: Policy) -> None:
        self.policy = policy
        self.backlog = backlog_with(policy)
        self.model: list[Entry | Turn] = []
        self.withdrawn: list[Turn] = []

    def waiting(self) -> list[Entry]:
        return [item for item in self.model if isinstance(item, Entry)]

    def fits(self, message: Entry, waiting: list[Entry]) -> bool:
        total = sum(other.size for other in waiting) + message.size
        return not waiting or (len(waiting) < MAX_MESSAGES and total <= MAX_BYTES)

    @rule(
        size=st.integers(0, MAX_BYTES + 5),
        key=st.sampled_from([None, "a", "b"]),
        audience=st.sampled_from([EVERYONE, Audience("channel", "a")]),
    )
    def push(self, size: int, key: str | None, audience: Audience) -> None:
        message = message_of(size, key, audience)
        same = [
            other
            for other in self.waiting()
            if self.policy == "conflate" and key is not None and other.key == (audience, key)
        ]
        if self.fits(message, [other for other in self.waiting() if other not in same]):
            dropped = same
        elif self.policy == "drop_newest":
            assert self.backlog.push(message) == 1
            return
        elif self.policy == "drop_oldest":
            dropped = []
            while not self.fits(message, [other for other in self.waiting() if other not in dropped]):
                dropped.append(next(other for other in self.waiting() if other not in dropped))
        else:
            with pytest.raises(BacklogFull):
                self.backlog.push(message)
            return
        assert self.backlog.push(message) == len(dropped)
        self.model = [item for item in self.model if item not in dropped] + [message]

    @rule()
    def push_turn(self) -> None:
        turn = Turn()
        self.backlog.push_turn(turn)
        self.model.append(turn)

    @rule()
    def pop(self) -> None:
        assert self.backlog.pop() is (self.model.pop(0) if self.model else None)

    @rule(data=st.data())
    def remove_turn(self, data: st.DataObject) -> None:
        turns = [item for item in self.model if isinstance(item, Turn)]
        if turns:
            turn = data.draw(st.sampled_from(turns), label="turn")
            assert self.backlog.remove_turn(turn)
            self.model.remove(turn)
            self.withdrawn.append(turn)
        for turn in self.withdrawn:
            assert not self.backlog.remove_turn(turn)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert list(self.backlog) == self.model
        waiting = self.waiting()
        assert self.backlog.messages == len(waiting)
        assert self.backlog.bytes == sum(message.size for message in waiting)
        assert len(waiting) <= MAX_MESSAGES
        assert self.backlog.bytes <= MAX_BYTES or len(waiting) == 1
        assert self.backlog.is_past_high_water is (
            8 * self.backlog.bytes > MAX_BYTES or 8 * len(waiting) > MAX_MESSAGES
        )


TestBacklogAgainstModel = BacklogAgainstModel.TestCase


def test_empty_backlog_has_nothing_to_pop() -> None:
    assert backlog_with("disconnect").pop() is None


def test_messages_come_out_in_the_order_in_which_they_went_in() -> None:
    backlog = backlog_with("disconnect")
    messages = [message_of(size) for size in (3, 1, 2)]
    for message in messages:
        assert backlog.push(message) == 0
    assert [backlog.pop() for _ in range(3)] == messages


@pytest.mark.parametrize("policy", POLICIES)
def test_message_past_the_bound_goes_to_who_has_nothing_waiting(policy: str) -> None:
    backlog = backlog_with(policy)
    backlog.push_turn(Turn())
    assert backlog.push(message_of(MAX_BYTES * 10)) == 0
    assert backlog.bytes == MAX_BYTES * 10


def test_drop_oldest_keeps_turns_in_their_place() -> None:
    backlog = backlog_with("drop_oldest", max_messages=1)
    turns = Turn(), Turn()
    newest = message_of(1)
    backlog.push_turn(turns[0])
    backlog.push(message_of(1))
    backlog.push_turn(turns[1])
    assert backlog.push(newest) == 1
    assert list(backlog) == [*turns, newest]


def test_conflate_moves_the_newest_of_a_key_to_the_end() -> None:
    backlog = backlog_with("conflate")
    old, other, new = message_of(1, "price"), message_of(2, "news"), message_of(3, "price")
    assert [backlog.push(message) for message in (old, other, new)] == [0, 0, 1]
    assert list(backlog) == [other, new]
    assert backlog.bytes == 5


def test_conflate_replaces_nothing_of_another_audience() -> None:
    backlog = backlog_with("conflate")
    audiences = [EVERYONE, *(Audience(kind, "a") for kind in ("channel", "user", "connection")), Audience("user", "b")]
    for size in (1, 2):
        for audience in audiences:
            assert backlog.push(message_of(size, "gold", audience)) == size - 1
    assert [item.key for item in backlog if isinstance(item, Entry) and item.size == 2] == [
        (audience, "gold") for audience in audiences
    ]
    assert backlog.messages == len(audiences)


def test_conflate_keeps_every_message_without_a_key() -> None:
    backlog = backlog_with("conflate")
    messages = [message_of(1), message_of(1)]
    assert [backlog.push(message) for message in messages] == [0, 0]
    assert list(backlog) == messages


@pytest.mark.parametrize("policy", ["disconnect", "drop_newest", "drop_oldest"])
def test_key_means_nothing_to_the_other_policies(policy: str) -> None:
    backlog = backlog_with(policy)
    messages = [message_of(1, "price"), message_of(1, "price")]
    assert [backlog.push(message) for message in messages] == [0, 0]
    assert list(backlog) == messages


def test_conflate_takes_back_nothing_when_the_newer_one_does_not_fit() -> None:
    backlog = backlog_with("conflate")
    waiting = [message_of(1, "price"), message_of(MAX_BYTES - 1)]
    for message in waiting:
        backlog.push(message)
    with pytest.raises(BacklogFull):
        backlog.push(message_of(2, "price"))
    assert list(backlog) == waiting  # so that what is thrown away with the connection is counted


@pytest.mark.parametrize(
    ("sizes", "expected"), [([], False), ([10], False), ([11], True), ([0] * 2, False), ([0] * 3, True)]
)
def test_high_water_is_an_eighth_of_what_may_wait(sizes: list[int], expected: bool) -> None:
    backlog = backlog_with("disconnect", max_bytes=80, max_messages=16)
    for size in sizes:
        backlog.push(message_of(size))
    assert backlog.is_past_high_water is expected


def test_backlog_with_the_rest_of_a_message_is_not_empty() -> None:
    backlog = Backlog(SlowConsumer())
    assert backlog.is_empty
    backlog.rest = memoryview(b"rest")
    assert not backlog.is_empty


def test_small_message_that_was_written_counts_like_its_share_of_a_full_backlog() -> None:
    backlog = Backlog(SlowConsumer(max_backlog_bytes=1000, max_backlog_messages=10))
    backlog.hand_over(5)
    assert backlog.handed_over == 105
    backlog.hand_over(0)
    assert backlog.handed_over == 205


MIXED = SlowConsumer(by_channel={"old": "drop_oldest", "new": "drop_newest", "key": "conflate"}, max_backlog_messages=3)


def to_channel(channel: str | None, key: str | None = None) -> Entry:
    return Entry(b"frame", 1, is_text=False, key=None if key is None else (EVERYONE, key), channel=channel)


def test_policy_of_the_message_that_does_not_fit_decides() -> None:
    backlog = Backlog(MIXED)
    kept = [to_channel("safe"), to_channel("old"), to_channel("old")]
    for entry in kept:
        assert backlog.push(entry) == 0
    assert backlog.push(to_channel("new")) == 1
    assert list(backlog) == kept
    newer = to_channel("old")
    assert backlog.push(newer) == 1
    assert list(backlog) == [kept[0], kept[2], newer]
    with pytest.raises(BacklogFull):
        backlog.push(to_channel("safe"))
    with pytest.raises(BacklogFull):
        backlog.push(to_channel(None))
    with pytest.raises(BacklogFull):
        backlog.push(to_channel("key", "a"))


def test_drop_oldest_takes_nothing_from_channels_that_lose_nothing() -> None:
    backlog = Backlog(MIXED)
    safe = [to_channel("safe"), to_channel("new"), to_channel(None)]
    for entry in safe:
        backlog.push(entry)
    assert backlog.push(to_channel("old")) == 1
    assert list(backlog) == safe


def test_key_counts_only_in_channels_that_conflate() -> None:
    backlog = Backlog(MIXED)
    one, two, three = to_channel("safe", "a"), to_channel("key", "a"), to_channel("key", "a")
    assert [backlog.push(entry) for entry in (one, two, three)] == [0, 0, 1]
    assert list(backlog) == [one, three]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_protocol_says_is_never_dropped_and_has_as_much_room_again(policy: str) -> None:
    backlog = backlog_with(policy)
    messages = [message_of(1) for _ in range(MAX_MESSAGES)]
    spoken = [SpokenEntry(b"frame", 1, is_text=True) for _ in range(MAX_MESSAGES)]
    for entry in [*messages, *spoken]:
        assert backlog.push(entry) == 0
    assert list(backlog) == [*messages, *spoken]
    with pytest.raises(BacklogFull):
        backlog.push(SpokenEntry(b"frame", 1, is_text=True))
    for _ in messages:
        backlog.pop()
    if policy == "drop_oldest":
        assert backlog.push(message_of(1)) == 1
    assert list(backlog) == spoken
