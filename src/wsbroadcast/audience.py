"""Who a message is for, and what names are allowed."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast
from uuid import UUID

from wsbroadcast.exceptions import InvalidChannel, shorten
from wsbroadcast.text import plain, text_of

MAX_NAME_BYTES = 200
"""The longest channel or user name, in UTF-8 bytes."""

UserId = str | int | UUID
"""What identifies a user. `1` and `"1"` are the same user, because a broker and a URL know only text."""


class Unset:
    """The type of `UNSET`, the default of an argument for which `None` would be a mistake."""

    def __repr__(self) -> str:
        return "..."


UNSET = Unset()


class Audience(NamedTuple):
    """The connections a message is meant for, by what they have in common."""

    kind: Literal["everyone", "channel", "user", "connection"]
    name: str = ""
    """The channel, the user or the connection's id; empty for everyone."""

    @classmethod
    def of(cls, channel: object = UNSET, user: object = UNSET) -> Audience:
        """Build the audience of a broadcast.

        Raises:
            InvalidChannel: If the channel's name breaks a rule.
            ValueError: If `user` is not a str, int or UUID, or both are given. `None` is an error, never "everyone".
        """
        if channel is UNSET and user is UNSET:
            return EVERYONE
        if channel is not UNSET:
            if user is not UNSET:
                raise ValueError("a broadcast goes to a channel or to a user, not to both")
            return cls("channel", check_channel(channel))
        return cls("user", user_key(user))


EVERYONE = Audience("everyone")


def check_channel(channel: object) -> str:
    """Return the channel's name if it is one: 1 to 200 bytes of UTF-8 without control characters.

    It is a plain `str` then; of an enum's member it is the value.

    Raises:
        InvalidChannel: If it isn't; `None` in particular.
    """
    if type(channel) is not str:  # which nearly every name is; nobody else's class decides what the name is
        if not isinstance(channel, str):
            raise InvalidChannel(channel, f"a channel is a str, not {type(channel).__name__}")
        channel = plain(channel)
    rule = _broken_rule(channel)
    if rule is not None:
        raise InvalidChannel(channel, rule)
    return channel


def user_key(user: object) -> str:
    """Return the text that identifies a user: an id is compared as text, whatever type it has.

    Of an enum's member it is the text of the value.

    Raises:
        ValueError: If the user is `None`, not a str, int or UUID, or breaks the rule for names.
    """
    if type(user) is str:
        key = user
    elif isinstance(user, bool) or not isinstance(user, (str, int, UUID)):
        raise ValueError(f"a user is a str, an int or a UUID, not {type(user).__name__}; pass the object's id")
    else:
        key = text_of(user)
    rule = _broken_rule(key)
    if rule is not None:
        raise ValueError(f"invalid user {shorten(key)}: {rule}")
    return key


def _broken_rule(name: str) -> str | None:
    if name.isascii() and name.isprintable() and 0 < len(name) <= MAX_NAME_BYTES:
        return None  # nearly every name, at the price of three method calls
    if not name:
        return "it is empty"
    if any(character < " " or "\x7f" <= character <= "\x9f" or character in "\u2028\u2029" for character in name):
        return "it has control characters"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it has a lone surrogate, which UTF-8 can't carry"
    return f"it has {size} bytes, the limit is {MAX_NAME_BYTES}" if size > MAX_NAME_BYTES else None


def as_channels(channels: object) -> tuple[str, ...]:
    """Check the names in `channels`; a lone str is one channel, not a sequence of letters."""
    if isinstance(channels, str):
        return (check_channel(channels),)
    return tuple(dict.fromkeys(check_channel(channel) for channel in cast("tuple[object, ...]", channels)))
