"""Who a message is for, and which names are allowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, cast
from uuid import UUID

from wsbroadcast.exceptions import InvalidChannel, shorten
from wsbroadcast.text import plain, text_of

MAX_NAME_BYTES = 200
"""The longest name of a channel or user, in bytes of UTF-8."""

UserId = str | int | UUID
"""What identifies a user. `1` and `"1"` are the same user, because brokers and URLs know only text."""


class Unset:
    """The type of `UNSET`. That is the default of arguments for which `None` would be a mistake."""

    def __repr__(self) -> str:
        return "..."


UNSET = Unset()


class Audience(NamedTuple):
    """The connections a message is for, named by what they have in common."""

    kind: Literal["everyone", "channel", "user", "connection", "nodes", "stream", "run"]
    name: str = ""
    """The name of the channel, user, connection, node, stream or run; empty for everyone and for all nodes."""

    @classmethod
    def channel(cls, channel: str) -> Audience:
        """Return the audience of a channel: the connections that are subscribed to it, on all nodes.

        Raises:
            InvalidChannel: If the name breaks a rule.
        """
        return cls("channel", check_channel(channel))

    @classmethod
    def user(cls, user: UserId) -> Audience:
        """Return the audience of a user: all connections of the user, on all nodes.

        Raises:
            ValueError: If the user is not a str, int or UUID.
        """
        return cls("user", user_key(user))

    @classmethod
    def of(cls, channel: object = UNSET, user: object = UNSET) -> Audience:
        """Return the audience of a broadcast: a channel, a user, or everyone if neither is given.

        Raises:
            InvalidChannel: If the channel's name breaks a rule.
            ValueError: If `user` is not a str, int or UUID, or both are given. `None` is an error, never "everyone".
        """
        if channel is UNSET and user is UNSET:
            return EVERYONE
        if channel is not UNSET:
            if user is not UNSET:
                raise ValueError(_ONE_OF)
            return cls("channel", check_channel(channel))
        return cls("user", user_key(user))


EVERYONE = Audience("everyone")
"""The audience of all connections."""

NODES = Audience("nodes")
"""The audience of all nodes that answer questions to all nodes. No connection is in it."""

LOGS = frozenset({"stream", "run"})
"""The kinds of audiences that are logs of streams. No connection is in them: viewers read the log."""

MAX_AUDIENCES = 1000
"""The most audiences that one broadcast goes to."""

_ONE_OF = (
    "a broadcast goes to one of channel=, channels=, user= and to=; for a channel and a user pass "
    "to=[Audience.channel(…), Audience.user(…)]"
)


def audiences_of(
    channel: object = UNSET, user: object = UNSET, channels: object = UNSET, to: object = UNSET
) -> tuple[Audience, ...]:
    """Return the audiences of a broadcast, each once.

    Raises:
        InvalidChannel: If a channel's name breaks a rule.
        ValueError: If more than one argument is given, one isn't valid, or there are too many audiences.
    """
    if channels is UNSET and to is UNSET:
        return (Audience.of(channel, user),)
    if (channel, user, channels, to).count(UNSET) < 3:
        raise ValueError(_ONE_OF)
    if channels is not UNSET:
        if not isinstance(channels, Iterable):
            raise ValueError(f"channels is a list of names, not {type(channels).__name__}")
        found = tuple(Audience("channel", name) for name in as_channels(channels))
    else:
        if not isinstance(to, Iterable):
            raise ValueError(_not_audience(to))
        found = tuple(dict.fromkeys(map(_checked, (to,) if isinstance(to, Audience) else to)))
    if len(found) > MAX_AUDIENCES:
        raise ValueError(f"a broadcast goes to at most {MAX_AUDIENCES} audiences, not {len(found)}")
    return found


def _checked(audience: object) -> Audience:
    if not isinstance(audience, Audience):
        raise ValueError(_not_audience(audience))
    if audience.kind == "channel":
        return Audience.channel(audience.name)
    if audience.kind == "user":
        return Audience.user(audience.name)
    if audience != EVERYONE:
        raise ValueError(f"an audience of a broadcast is EVERYONE, a channel or a user, not {audience!r:.80}")
    return EVERYONE


def _not_audience(value: object) -> str:
    return (
        "to is an Audience or several, such as Audience.channel(…), Audience.user(…) or EVERYONE, not "
        f"{type(value).__name__}; for one connection await `send`"
    )


def check_channel(channel: object) -> str:
    """Return the channel's name if it is valid: 1 to 200 bytes of UTF-8 without control characters.

    It is returned as a plain `str`. For a member of an enum it is the value.

    Raises:
        InvalidChannel: If it isn't valid; in particular if it is `None`.
    """
    if type(channel) is not str:  # nearly every name is one; a subclass must not decide what the name is
        if not isinstance(channel, str):
            raise InvalidChannel(channel, f"a channel is a str, not {type(channel).__name__}")
        channel = plain(channel)
    rule = broken_rule(channel)
    if rule is not None:
        raise InvalidChannel(channel, rule)
    return channel


def user_key(user: object) -> str:
    """Return the text that identifies a user. Ids are compared as text, whatever their type.

    For a member of an enum it is the text of the value.

    Raises:
        ValueError: If the user is `None`, is not a str, int or UUID, or breaks a rule for names.
    """
    if type(user) is str:
        key = user
    elif isinstance(user, bool) or not isinstance(user, (str, int, UUID)):
        raise ValueError(f"a user is a str, an int or a UUID, not {type(user).__name__}; pass the object's id")
    else:
        key = text_of(user)
    rule = broken_rule(key)
    if rule is not None:
        raise ValueError(f"invalid user {shorten(key)}: {rule}")
    return key


def check_stream_id(id_: object) -> str:
    """Return the id of a stream as a plain `str`, if it is valid. The rules for names hold for it.

    Raises:
        ValueError: If it isn't valid.
    """
    if not isinstance(id_, str):
        raise ValueError(f"the id of a stream is a str, not {type(id_).__name__}")
    name = plain(id_)
    rule = broken_rule(name)
    if rule is not None:
        raise ValueError(f"invalid stream id {shorten(name)}: {rule}")
    return name


def broken_rule(name: str) -> str | None:
    """Return the rule for names that a text breaks; `None` if it can be a name."""
    if name.isascii() and name.isprintable() and 0 < len(name) <= MAX_NAME_BYTES:
        return None  # nearly every name, for three method calls
    if not name:
        return "it is empty"
    if any(character < " " or "\x7f" <= character <= "\x9f" or character in "\u2028\u2029" for character in name):
        return "it has control characters"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it has a lone surrogate, which UTF-8 can't carry"
    return f"it has {size} bytes, the limit is {MAX_NAME_BYTES}" if size > MAX_NAME_BYTES else None


def user_keys(users: object) -> frozenset[str]:
    """Return the texts that identify users: one user, or several.

    Raises:
        ValueError: If one of them is not a str, int or UUID.
    """
    is_one = isinstance(users, (str, int, UUID, bytes, bytearray)) or not isinstance(users, Iterable)
    return frozenset(map(user_key, (users,) if is_one else cast("Iterable[object]", users)))


def as_channels(channels: object) -> tuple[str, ...]:
    """Check channel names and return each once. A single str is one channel, not a sequence of letters."""
    if isinstance(channels, str):
        return (check_channel(channels),)
    return tuple(dict.fromkeys(check_channel(channel) for channel in cast("tuple[object, ...]", channels)))


def for_logs(audience: Audience) -> str:
    """Return an audience as a log may show it: without a user's name."""
    return f"{audience.kind} {audience.name!r}" if audience.kind in ("channel", "stream") else audience.kind
