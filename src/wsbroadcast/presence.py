"""Presence, which is who is in a channel over all nodes: its options and rules, its members, its changes. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from pydantic_core import from_json

from wsbroadcast.audience import Audience
from wsbroadcast.exceptions import ConfigurationError, kind_of
from wsbroadcast.options import check_count, check_seconds, longest_match
from wsbroadcast.publication import PresenceChange

By = Literal["user", "connection"]
"""What counts as one member."""

# For how many channels the options are remembered. Past this many, all are dropped.
_REMEMBERED = 8192

# The info of a member goes to everybody in the channel, so a broker must take it in one message.
_MOST_INFO_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Presence:
    """The options of channels that know who is in them.

    Raises:
        ConfigurationError: If an option makes no sense.
    """

    by: By = "user"
    """What counts as one member: each `user`, with all its connections on all nodes; or each `connection`."""
    grace: float = 10.0
    """Seconds that a member stays after its last connection was lost. A user who reloads the page or changes networks
    in that time never leaves. A member that leaves on purpose is gone at once. 0 is no grace."""
    members_up_to: int = 200
    """If a channel has more members than this, its clients are told only how many there are, not who."""
    info: Callable[[Any], Any] | None = None
    """A function of a `Connection` that returns what others see of the member: JSON, such as a name and a picture."""
    max_info_bytes: int = 1024
    """The largest such info, in bytes of JSON. At most 65,536."""

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ConfigurationError(f"Presence.by is user or connection, not {self.by!r:.80}")
        check_seconds("Presence.grace", self.grace)
        for name in ("members_up_to", "max_info_bytes"):
            check_count(f"Presence.{name}", getattr(self, name))
        if self.max_info_bytes > _MOST_INFO_BYTES:
            raise ConfigurationError(
                f"Presence.max_info_bytes is at most {_MOST_INFO_BYTES}, not {self.max_info_bytes}: "
                "let info hold a URL where the rest is"
            )
        if self.info is not None and not callable(self.info):
            raise ConfigurationError(f"Presence.info is a function of a connection, not {kind_of(self.info)}")


Presences = Presence | Mapping[str, Presence]
"""What `presence=` takes: a `Presence` for all channels, or a dict of them by pattern."""


class PresenceRules:
    """Which channels have presence, with which options.

    Args:
        presences: The value of `presence=`.

    Raises:
        ConfigurationError: If `presences` is something else.
    """

    def __init__(self, presences: Presences) -> None:
        if isinstance(presences, Presence):
            presences = {"*": presences}
        if not isinstance(presences, Mapping):
            raise ConfigurationError(_not_presences(kind_of(presences)))
        self._channels: dict[str, Presence] = {}
        for pattern, presence in presences.items():
            if not isinstance(pattern, str) or not pattern or not isinstance(presence, Presence):
                raise ConfigurationError(_not_presences(f"{kind_of(presence)} for {pattern!r:.80}"))
            self._channels[pattern] = presence
        self._known: dict[str, Presence | None] = {}

        self._online = Presence(grace=max((each.grace for each in self._channels.values()), default=0.0))

    def of(self, channel: str) -> Presence | None:
        """Return the options of a channel; `None` if it has no presence. The longest pattern that fits counts."""
        if is_hidden(channel):
            return self._online if channel == ONLINE else self.of(channel.removeprefix(_BY_USER))
        try:
            return self._known[channel]
        except KeyError:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            presence = self._known[channel] = longest_match(self._channels, channel)
            return presence

    def required(self, channel: str) -> Presence:
        """Return the options of a channel.

        Raises:
            ConfigurationError: If it has no presence.
        """
        presence = self.of(channel)
        if presence is None:
            raise ConfigurationError(
                f"the channel {channel!r} has no presence: no pattern of presence= fits it, add one that does"
            )
        return presence


def _not_presences(found: str) -> str:
    return (
        'presence is a Presence(…) for all channels, or a dict of them by pattern, such as {"room:*": Presence()}, '
        f"not {found}"
    )


ANONYMOUS = "\x01"
"""The first character of the key of a connection without a user. No user's name begins with it."""

ONLINE = "\x01online"
"""The channel of all connections, whichever channels they are in. No name of an app's channel begins so."""

_BY_USER = "\x01users:"
_ONCE = "\x01once:"


def by_user(channel: str) -> str:
    """Return the hidden channel that has the users of a channel whose members are connections."""
    return _BY_USER + channel


def once_of(name: str) -> str:
    """Return the hidden channel of a function that runs on only one of the nodes."""
    return _ONCE + name


def is_hidden(channel: str) -> bool:
    """Tell whether a channel is one of the library's own, whose changes no app and no client is told."""
    return channel.startswith("\x01")


def channels_shown(channels: Iterable[str]) -> frozenset[str]:
    """Return the app's channels among the channels that a user is in."""
    return frozenset(each.removeprefix(_BY_USER) for each in channels if each != ONLINE)


@dataclass(frozen=True, slots=True)
class Member:
    """Somebody who is in a channel: a user, or a connection."""

    id: str
    """The user; with `Presence(by="connection")` the connection's id."""
    user: str | None
    """The user, as a text; `None` for a connection without a user."""
    info: Any = None
    """What `Presence.info` has returned for the member."""


def seen_of(members: Mapping[str, bytes], by: By) -> dict[str, bytes]:
    """Return the members that others see. Where users count, connections without a user are left out.

    Args:
        members: What a broker knows of the channel.
        by: What counts as one member.
    """
    if by == "connection":
        return dict(members)
    return {key: info for key, info in members.items() if not key.startswith(ANONYMOUS)}


def members_of(members: Mapping[str, bytes], by: By) -> list[Member]:
    """Return the members of a channel, made from what a broker knows of it."""
    seen = seen_of(members, by)
    if by == "user":
        return [Member(key, key, from_json(info) if info else None) for key, info in seen.items()]
    return [Member(key, **from_json(value)) for key, value in seen.items()]


class Members(NamedTuple):
    """Who is in a channel, over all nodes, at one moment."""

    version: int
    """Grows by one with each change; 0 if nothing is known of the channel, because nobody is in it."""
    members: Mapping[str, bytes]
    """The info of each member, as JSON; empty bytes for nothing."""


class Roll:
    """Who is in which channel, as a broker keeps it, but in memory.

    A member is in a channel while at least one incarnation has entered it. Entering or leaving twice changes nothing,
    so each step may be repeated if its outcome isn't known.
    """

    def __init__(self) -> None:
        # By channel and member, the incarnations that have entered it.
        self._holders: dict[str, dict[str, set[str]]] = {}
        self._infos: dict[str, dict[str, bytes]] = {}
        # `_channels`: how many members each incarnation has in each channel. `_index`: the channels of each member.
        self._channels: dict[str, Counter[str]] = {}
        self._index: dict[str, set[str]] = {}
        # Versions are kept when a channel is empty: a later change must not have the version of an earlier one.
        self._versions: dict[str, int] = {}
        # `_empty`: the empty channels, in the order in which they became so. The oldest are forgotten, and
        # `_forgotten` is the highest version among these.
        self._empty: dict[str, None] = {}
        self._forgotten = 0

    def enter(self, channel: str, incarnation: str, members: Mapping[str, bytes]) -> PresenceChange | None:
        """Add members; return the change, if there is one."""
        holders = self._holders.setdefault(channel, {})
        infos = self._infos.setdefault(channel, {})
        joined = {name: info for name, info in members.items() if name not in holders}
        counts = self._channels.setdefault(incarnation, Counter())
        for name, info in members.items():
            infos[name] = info
            if incarnation not in (saying := holders.setdefault(name, set())):
                saying.add(incarnation)
                counts[channel] += 1
            self._index.setdefault(name, set()).add(channel)
        if not holders:
            del self._holders[channel], self._infos[channel]
        return self._change(channel, incarnation, joined=joined)

    def leave(self, channel: str, incarnation: str, members: Iterable[str]) -> PresenceChange | None:
        """Remove members; return the change, if there is one."""
        holders = self._holders.get(channel, {})
        counts = self._channels.get(incarnation, Counter())
        left = set()
        for name in members:
            if incarnation in holders.get(name, ()):
                holders[name].discard(incarnation)
                counts[channel] -= 1
                if not holders[name]:
                    self._forget(channel, name)
                    left.add(name)
        if not counts[channel]:
            del counts[channel]
        return self._change(channel, incarnation, left=frozenset(left))

    def drop(self, incarnation: str) -> list[PresenceChange]:
        """Remove all entries of an incarnation; return the changes."""
        changes = []
        for channel in sorted(self._channels.get(incarnation, ())):
            names = [name for name, each in self._holders.get(channel, {}).items() if incarnation in each]
            if (change := self.leave(channel, incarnation, names)) is not None:
                changes.append(change)
        self._channels.pop(incarnation, None)
        return changes

    @property
    def incarnations(self) -> frozenset[str]:
        """The incarnations that have entries in any channel."""
        return frozenset(incarnation for incarnation, channels in self._channels.items() if channels)

    def members(self, channel: str) -> Members:
        """Return who is in a channel."""
        return Members(self._versions.get(channel, 0), dict(self._infos.get(channel, {})))

    def count(self, channel: str) -> int:
        """Return how many are in a channel."""
        return len(self._holders.get(channel, ()))

    def channels_of(self, member: str) -> frozenset[str]:
        """Return the channels that a member is in."""
        return frozenset(self._index.get(member, ()))

    def _forget(self, channel: str, name: str) -> None:
        del self._holders[channel][name]
        del self._infos[channel][name]
        self._index[name].discard(channel)
        if not self._index[name]:
            del self._index[name]
        if not self._holders[channel]:
            del self._holders[channel], self._infos[channel]

    def _change(
        self,
        channel: str,
        incarnation: str,
        joined: Mapping[str, bytes] | None = None,
        left: frozenset[str] = frozenset(),
    ) -> PresenceChange | None:
        if not joined and not left:
            return None
        version = self._versions[channel] = self._versions.get(channel, self._forgotten) + 1
        self._empty.pop(channel, None)
        if channel not in self._holders:
            self._empty[channel] = None
            if len(self._empty) > _REMEMBERED:
                del self._empty[oldest := next(iter(self._empty))]
                self._forgotten = max(self._forgotten, self._versions.pop(oldest))
        return PresenceChange(Audience("channel", channel), version, joined or {}, left, incarnation)
