"""The registry: which connections are in which audience. No I/O, no await: a change is complete when its call returns.

Here a member is a connection that is in an audience.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Generic, Protocol, TypeVar

from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.publication import NOBODY


class Member(Protocol):
    """The part of a connection that the registry needs."""

    @property
    def id(self) -> str: ...  # noqa: D102  # as `Connection` says
    @property
    def _user_key(self) -> str | None: ...

    channels: frozenset[str]


M = TypeVar("M", bound=Member)


class Registry(Generic[M]):
    """The members of one node, by id, channel and user. An audience without members takes no memory."""

    def __init__(self) -> None:
        self.by_id: dict[str, M] = {}
        """All members by id, in the order in which they came."""
        self.channels: dict[str, set[M]] = {}
        """The members of each channel that has any."""
        self.users: dict[str, set[M]] = {}
        """The connections of each user that has any, by `user_key`."""

    def __contains__(self, member: M) -> bool:
        return self.by_id.get(member.id) is member

    def __len__(self) -> int:
        return len(self.by_id)

    def add(self, member: M) -> None:
        """Add a member to its user and its channels."""
        self.by_id[member.id] = member
        if member._user_key is not None:
            _join(self.users, member._user_key, member)
        for name in member.channels:
            _join(self.channels, name, member)

    def remove(self, member: M) -> list[Audience] | None:
        """Remove a member everywhere; return the audiences that are empty now, or `None` if it wasn't there.

        `member.channels` isn't changed, so that hooks see where the member was.
        """
        if member not in self:
            return None
        del self.by_id[member.id]
        last = [] if self.by_id else [EVERYONE]
        if member._user_key is not None and _leave(self.users, member._user_key, member):
            last.append(Audience("user", member._user_key))
        last += [Audience("channel", name) for name in member.channels if _leave(self.channels, name, member)]
        return last

    def subscribe(self, member: M, channel: str) -> None:
        """Put a member into a channel."""
        member.channels |= {channel}
        _join(self.channels, channel, member)

    def unsubscribe(self, member: M, channel: str) -> bool:
        """Take a member out of a channel; return whether it was the last one there."""
        member.channels -= {channel}
        return _leave(self.channels, channel, member)

    def members(self, audience: Audience) -> Collection[M]:
        """Return the live collection of an audience's members. Don't keep it, because it changes."""
        if audience.kind == "everyone":
            return self.by_id.values()
        if audience.kind == "channel":
            return self.channels.get(audience.name, ())
        if audience.kind == "user":
            return self.users.get(audience.name, ())
        member = self.by_id.get(audience.name)
        return () if member is None else (member,)

    def is_member(self, member: M, audience: Audience) -> bool:
        """Tell whether a member is in an audience."""
        if audience.kind == "everyone":
            return member in self
        return member in self.members(audience)

    def count(
        self, audience: Audience, exclude: frozenset[str] = NOBODY, exclude_users: frozenset[str] = NOBODY
    ) -> int:
        """Return how many members an audience has, without the excluded ids and users."""
        members = self.members(audience)
        if not exclude and not exclude_users:
            return len(members)
        excluded = [self.by_id[each] for each in exclude if each in self.by_id]
        excluded += [member for key in exclude_users for member in self.users.get(key, ())]
        return len(members) - sum(self.is_member(member, audience) for member in set(excluded))

    def recipients(
        self, audience: Audience, exclude: frozenset[str] = NOBODY, exclude_users: frozenset[str] = NOBODY
    ) -> list[M]:
        """Return an audience's members without the excluded ids and users, as a new list."""
        members = self.members(audience)
        if exclude_users:
            members = [member for member in members if member._user_key not in exclude_users]
        if not exclude:
            return list(members)
        return [member for member in members if member.id not in exclude]


def _join(index: dict[str, set[M]], name: str, member: M) -> None:
    members = index.get(name)
    if members is None:
        index[name] = {member}
    else:
        members.add(member)


def _leave(index: dict[str, set[M]], name: str, member: M) -> bool:
    members = index.get(name)
    if members is None:
        return False
    members.discard(member)
    if members:
        return False
    del index[name]
    return True
