from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as StateBundle
from hypothesis.stateful import RuleBasedStateMachine, consumes, initialize, invariant, rule

from wsbroadcast import Audience
from wsbroadcast.audience import EVERYONE
from wsbroadcast.delivery.registry import Registry

CHANNELS = ["a", "b", "c"]
USERS = ["1", "2"]


class Member:
    def __init__(self, id: str, user_key: str | None = None, channels: Collection[str] = ()) -> None:  # noqa: A002
        self.id = id
        self._user_key = user_key
        self.channels = frozenset(channels)

    def __repr__(self) -> str:
        return f"<Member {self.id}>"


class RegistryAgainstModel(RuleBasedStateMachine):
    """The model is a list of members: every question is answered by looking at each."""

    members = StateBundle("members")
    gone = StateBundle("gone")

    @initialize()
    def begin(self) -> None:
        self.registry = Registry[Member]()
        self.model: list[Member] = []
        self.made = 0

    def audiences(self, member: Member) -> set[Audience]:
        named = {Audience("channel", name) for name in member.channels}
        user = {Audience("user", member._user_key)} if member._user_key is not None else set()
        return {EVERYONE, *named, *user}

    def in_audience(self, audience: Audience) -> set[Member]:
        if audience.kind == "connection":
            return {member for member in self.model if member.id == audience.name}
        return {member for member in self.model if audience in self.audiences(member)}

    @rule(target=members, user=st.sampled_from([None, *USERS]), channels=st.sets(st.sampled_from(CHANNELS)))
    def add(self, user: str | None, channels: set[str]) -> Member:
        self.made += 1
        member = Member(str(self.made), user, channels)
        self.registry.add(member)
        self.model.append(member)
        return member

    @rule(target=gone, member=consumes(members))
    def remove(self, member: Member) -> Member:
        before = set(member.channels)
        self.model.remove(member)
        wanted = {audience for audience in self.audiences(member) if not self.in_audience(audience)}
        last = self.registry.remove(member)
        assert last is not None
        assert len(last) == len(set(last))
        assert set(last) == wanted
        assert member.channels == before
        return member

    @rule(member=gone)
    def remove_again(self, member: Member) -> None:
        assert self.registry.remove(member) is None
        assert member not in self.registry

    @rule(member=gone)
    def remove_a_stranger_with_the_same_name(self, member: Member) -> None:
        assert self.registry.remove(Member(member.id, member._user_key, member.channels)) is None

    @rule(member=members, channel=st.sampled_from(CHANNELS))
    def subscribe(self, member: Member, channel: str) -> None:
        self.registry.subscribe(member, channel)
        assert channel in member.channels

    @rule(member=members, channel=st.sampled_from(CHANNELS))
    def unsubscribe(self, member: Member, channel: str) -> None:
        was_in = channel in member.channels
        is_last = self.registry.unsubscribe(member, channel)
        assert channel not in member.channels
        assert is_last is (was_in and not self.in_audience(Audience("channel", channel)))

    @rule(exclude=st.frozensets(st.integers(1, 8).map(str)))
    def ask_for_recipients(self, exclude: frozenset[str]) -> None:
        for audience in self.every_audience():
            recipients = self.registry.recipients(audience, exclude)
            assert len(recipients) == len(set(recipients))
            assert set(recipients) == {member for member in self.in_audience(audience) if member.id not in exclude}

    def every_audience(self) -> list[Audience]:
        return [
            EVERYONE,
            *(Audience("channel", name) for name in [*CHANNELS, "nobody's"]),
            *(Audience("user", name) for name in [*USERS, "nobody"]),
            *(Audience("connection", str(number)) for number in range(1, self.made + 2)),
        ]

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        registry = self.registry
        assert len(registry) == len(self.model)
        assert registry.recipients(EVERYONE) == self.model  # in the order in which they came
        for audience in self.every_audience():
            assert set(registry.members(audience)) == self.in_audience(audience)
        assert set(registry.channels) == {name for member in self.model for name in member.channels}
        assert set(registry.users) == {member._user_key for member in self.model} - {None}
        assert all(member in registry for member in self.model)


TestRegistryAgainstModel = RegistryAgainstModel.TestCase


def test_members_of_another_object_with_the_same_id_stay_apart() -> None:
    registry = Registry[Member]()
    registry.add(Member("1", "ann", ["a"]))
    stranger = Member("1", "ann", ["a"])
    assert stranger not in registry
    assert registry.remove(stranger) is None
    assert len(registry) == 1


def test_recipients_are_the_callers_own() -> None:
    registry = Registry[Member]()
    members = [Member(str(number), "ann", ["a"]) for number in range(3)]
    for member in members:
        registry.add(member)
    for audience in (EVERYONE, Audience("channel", "a"), Audience("user", "ann")):
        for member in registry.recipients(audience):
            registry.unsubscribe(member, "a")
            registry.subscribe(member, "a")
    for member in registry.recipients(EVERYONE):
        registry.remove(member)
    assert len(registry) == 0


@pytest.mark.parametrize("kind", ["channel", "user"])
def test_audience_without_members_takes_no_memory(kind: str) -> None:
    registry = Registry[Member]()
    member = Member("1", "ann", ["a"])
    registry.add(member)
    registry.remove(member)
    assert not registry.channels
    assert not registry.users
