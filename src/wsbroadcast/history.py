"""Histories: which audiences have one, what is kept, and what a client that comes back gets of it. No I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

from pydantic_core import from_json

from wsbroadcast.audience import EVERYONE, UNSET, Audience
from wsbroadcast.exceptions import ConfigurationError, kind_of
from wsbroadcast.options import check_count, check_positive, longest_match
from wsbroadcast.publication import POSITION_TEXT, Described, Position, Publication

# For how many audiences the options are remembered, because each broadcast needs them. Past this many, all are dropped.
_REMEMBERED = 8192


# What every broker can count to: a thousand million messages, and a hundred years in seconds.
_MOST = {"messages": 10**9, "seconds": 3.2e9, "remember": 3.2e9}


class _Users(Enum):
    """The type of `USERS`."""

    USERS = "users"

    def __repr__(self) -> str:
        return "USERS"


USERS: Final = _Users.USERS
"""As a key in `history=`: messages to users. Each user has a history of its own."""


@dataclass(frozen=True, slots=True)
class History:
    """How much of a channel's messages is kept, so that a client that comes back gets what it missed.

    Both limits hold: a message is no longer replayed when it is too old, or when enough newer ones have come.

    Raises:
        ConfigurationError: If a number makes no sense.
    """

    messages: int = 100
    """How many messages are kept; the newest are. At most 1,000,000,000."""
    seconds: float = 300.0
    """How old a kept message may be, in seconds. At most 3,200,000,000, which is a hundred years."""
    remember: float = 86_400.0
    """For how many seconds after the last message a position is known. A client that comes back to a quiet channel in
    that time is told that it missed nothing. Not less than `seconds`."""
    max_kept_bytes: int = 1024 * 1024
    """The largest message that is kept, in bytes. A larger one is delivered and not kept; a replay that would need it
    is incomplete, and says so."""

    def __post_init__(self) -> None:
        for name in ("messages", "max_kept_bytes"):
            check_count(f"History.{name}", getattr(self, name))
        for name in ("seconds", "remember"):
            check_positive(f"History.{name}", getattr(self, name))
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ConfigurationError(f"History.{name} is at most {most:,.0f}, not {getattr(self, name)!r:.80}")
        if self.remember < self.seconds:
            raise ConfigurationError(
                f"History.remember is {self.remember} s, but must be at least History.seconds, {self.seconds} s: a "
                "position is known for as long as the messages after it are kept. Raise remember as well, as in "
                f"History(seconds={self.seconds!r}, remember={self.seconds!r})"
            )


Histories = History | Mapping[Any, History]
"""What `history=` takes: a `History` for all channels, or a dict of them by pattern, `USERS` and `EVERYONE`."""


class HistoryRules:
    """Which audiences have a history.

    Args:
        histories: The value of `history=`.

    Raises:
        ConfigurationError: If `histories` is something else.
    """

    def __init__(self, histories: Histories) -> None:
        if isinstance(histories, History):
            histories = {"*": histories}
        self._channels: dict[str, History] = {}
        self._users: History | None = None
        self._everyone: History | None = None
        if not isinstance(histories, Mapping):
            raise ConfigurationError(_not_histories(kind_of(histories)))
        for key, history in histories.items():
            if not isinstance(history, History):
                raise ConfigurationError(_not_histories(f"{kind_of(history)} for {key!r:.80}"))
            if key is USERS:
                self._users = history
            elif key == EVERYONE:
                self._everyone = history
            elif isinstance(key, str) and key:
                self._channels[key] = history
            else:
                raise ConfigurationError(_not_histories(f"a history for {key!r:.80}"))
        self._streams: History | None = None
        self._known: dict[Audience, History | None] = {}

    def keep_streams(self, history: History) -> None:
        """Keep streams too, under these options."""
        self._streams = history
        self._known.clear()

    def of(self, audience: Audience) -> History | None:
        """Return the history of an audience; `None` if nothing is kept. The longest pattern that fits counts."""
        try:
            return self._known[audience]
        except KeyError:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            history = self._known[audience] = self._find(audience)
            return history

    def _find(self, audience: Audience) -> History | None:
        match audience.kind:
            case "channel":
                return longest_match(self._channels, audience.name)
            case "user":
                return self._users
            case "everyone":
                return self._everyone
            case "stream" | "run":
                return self._streams
        return None

    @property
    def all(self) -> list[History]:
        """The histories of all audiences."""
        return [
            each for each in (*self._channels.values(), self._users, self._everyone, self._streams) if each is not None
        ]

    def to_json(self) -> bytes:
        """Return the rules as text. An engine keeps it at the broker, so that a publisher knows what is kept."""
        rules: dict[str, Any] = {"channels": {name: asdict(each) for name, each in self._channels.items()}}
        others = ("users", self._users), ("everyone", self._everyone), ("streams", self._streams)
        for name, history in others:
            if history is not None:
                rules[name] = asdict(history)
        return json.dumps(rules, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> HistoryRules:
        """Read what `to_json` wrote. The bytes are untrusted.

        Raises:
            ConfigurationError: If the bytes are something else.
        """
        try:
            rules = from_json(text)
            histories: dict[Any, History] = {name: History(**each) for name, each in rules["channels"].items()}
            for key, name in ((USERS, "users"), (EVERYONE, "everyone")):
                if name in rules:
                    histories[key] = History(**rules[name])
            found = cls(histories)
            if "streams" in rules:
                found.keep_streams(History(**rules["streams"]))
        except (ValueError, TypeError, LookupError, AttributeError):
            raise ConfigurationError("the text on histories at the broker was not written by this library") from None
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HistoryRules) and self.to_json() == other.to_json()

    def __repr__(self) -> str:
        return f"<HistoryRules {self.to_json().decode()}>"


def _not_histories(found: str) -> str:
    return (
        'history is a History(…) for all channels, or a dict of them by pattern, such as {"room:*": History(), '
        f"USERS: History(), EVERYONE: History()}}, not {found}"
    )


class Appended(NamedTuple):
    """What an engine returns for a publication that it has kept."""

    position: Position
    """Its position in the history."""
    is_repeat: bool = False
    """Whether a publication with the same key was kept before. This one was not sent then."""


class Replay(NamedTuple):
    """A part of the history of an audience, as an engine has read it."""

    top: Position
    """The newest position at the moment of reading. Its offset is 0 if nothing was ever kept."""
    publications: Sequence[Publication]
    """What is kept, in order, each with its position. None is older than the history allows."""
    base: int
    """It is proven that `publications` has everything after this offset, up to `top`."""

    def is_complete(self, since: Position) -> bool:
        """Tell whether `publications` has everything after a position, up to `top`.

        It never has for an empty epoch, nor for an offset past `base` that neither `top` nor a publication has: that is
        no position of this history.
        """
        if not since.epoch or since.epoch != self.top.epoch or not self.base <= since.offset <= self.top.offset:
            return False
        known = (each.offset for each in self.publications)
        return since.offset in (self.base, self.top.offset) or since.offset in known


class _Moment(Enum):
    """The type of `LAST`."""

    LAST = "last"
    NOW = "now"
    FIRST = "first"

    def __repr__(self) -> str:
        return self.name


LAST: Final = _Moment.LAST
"""As `since`: only the newest message, for prices, flags and other states."""

NOW: Final = _Moment.NOW
"""As `since`: nothing older. The client is only told where the channel is now."""

FIRST: Final = _Moment.FIRST
"""As `since`: everything that is kept, for a reader that begins at the beginning."""


class Offset(int):
    """As `since`: an offset in the present history, from a client that doesn't know the epoch."""


Since = Position | Offset | _Moment
"""The place after which a connection wants what it missed."""

SinceByAudience = Mapping[Audience, Since]

NOWHERE: SinceByAudience = MappingProxyType({})
"""The `since` of a connection that wants nothing older."""

SinceOption = Since | str | Mapping[Any, Since | str | None] | None
"""What `since=` takes: a position in the only channel, or a dict of positions by channel or audience. A text is a
position as `str` writes it. `LAST`, or the text "last", is the newest message. A text that is no position is refused
like a position of another history."""

# Stands for a text that is no position. It is of no history, so the client is told that nothing can be recovered.
_UNKNOWN = Position("", 0)


def since_of(since: SinceOption, channels: Sequence[str], user_key: str | None = None) -> SinceByAudience:
    """Check the value of `since=`, and return it by audience.

    Args:
        since: The value.
        channels: The channels that are joined.
        user_key: The user of the connection. Its audience may be named too.

    Raises:
        ValueError: If the value is something else, or names an audience that isn't joined.
    """
    if since is None:
        return NOWHERE
    if not isinstance(since, Mapping):
        if len(channels) != 1:
            raise ValueError(
                f"since is a dict of positions by channel where there are {len(channels)} channels: write it as in "
                '{"news": "kX2dh0Qb7a_Z:17"}'
            )
        return {Audience("channel", channels[0]): _checked_since(since)}
    found: dict[Audience, Since] = {}
    joined = {EVERYONE, *(Audience("channel", channel) for channel in channels)}
    if user_key is not None:
        joined.add(Audience("user", user_key))
    for key, value in since.items():
        audience = key if isinstance(key, Audience) else Audience("channel", key)
        if audience not in joined:
            raise ValueError(
                f"since names {key!r:.80}, which is neither a joined channel nor the connection's user: give positions "
                'of joined channels, such as {"news": "kX2dh0Qb7a_Z:17"}'
            )
        if value is not None:
            found[audience] = _checked_since(value)
    return found


def one_since(since: Since | str | None) -> Since | None:
    """Check the value of `since=` in a question about one audience.

    Raises:
        ValueError: If it is neither a position, nor `LAST`, nor `None`.
    """
    return None if since is None else _checked_since(since)


def _checked_since(value: object) -> Since:
    match value:
        case _Moment.LAST | _Moment.LAST.value:
            return LAST
        case Position(str(), int()):
            return value
        case str():
            try:
                return Position.of(value)
            except ValueError:
                return _UNKNOWN
    raise ValueError(f"since is a Position, LAST, or the text of a position, {POSITION_TEXT}, not {kind_of(value)}")


Reason = Literal["", "epoch", "expired", "too_many", "unavailable", "not_kept"]
"""Why missed messages could not be recovered. `epoch`: the position is of another history, or of none. `expired`: they
are no longer kept. `too_many`: they are more than is kept. `unavailable`: the broker can't be asked. `not_kept`: the
channel has no history."""


class Recovery(NamedTuple):
    """Whether a connection that was away gets exactly what it missed in a channel."""

    recovered: bool
    """Whether it gets everything after the position that it named, with nothing missing. `True` only if that is
    proven."""
    reason: Reason
    """Why `recovered` is `False`; empty if it is `True`."""
    position: Position | None
    """The newest position of the channel; `None` if it isn't known, or the channel has no history."""


def kept_audience(channel: object, user: object, everyone: bool) -> Audience:
    """Return the audience that a question about a history is for.

    Raises:
        InvalidChannel: If the channel's name breaks a rule.
        ValueError: If no audience is named, or more than one.
    """
    if (channel is not UNSET) + (user is not UNSET) + bool(everyone) != 1:
        raise ValueError("name one audience: a channel, user=… or everyone=True")
    return EVERYONE if everyone else Audience.of(channel, user)


class Page(Described):
    """A part of a history, as `history()` returns it. A route may return it as it is.

    As JSON, and as a `dict`, it is an object with its three fields.
    """

    # A named tuple would be a list in JSON. FastAPI would copy the messages of a dataclass.
    __slots__ = ("is_complete", "messages", "position")

    def __init__(self, messages: Sequence[Publication], position: Position, is_complete: bool) -> None:
        self.messages = messages
        """The messages in order: with `since` the first ones after it, without it the newest ones."""
        self.position = position
        """The position after the messages. A client that goes on from here misses nothing."""
        self.is_complete = is_complete
        """Whether these are all messages after `since`, up to `position`. If not, they are the newest that are kept."""

    def keys(self) -> Iterable[str]:
        """Return the names of what is written as JSON."""
        return "messages", "position", "is_complete"

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __repr__(self) -> str:
        return f"<Page of {len(self.messages)} messages up to {self.position}>"


def check_limit(limit: object) -> None:
    """Check the value of `limit=`.

    Raises:
        ValueError: If it is neither `None` nor a positive number.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit is a positive number of messages, not {limit!r:.80}")


def page_of(replay: Replay, since: Position | None, limit: int | None) -> Page:
    """Return what was read as a page."""
    if since is None or not replay.is_complete(since):
        return Page(replay.publications[-(limit or 0) :], replay.top, since is None)
    messages = [each for each in replay.publications if each.offset > since.offset]
    if limit is None or len(messages) <= limit:
        return Page(messages, replay.top, True)
    last = messages[limit - 1].position
    assert last is not None
    return Page(messages[:limit], last, True)


MAX_KEY_BYTES = 200
"""The longest idempotency key, in bytes of UTF-8."""


def check_key(
    key: object, rules: HistoryRules | None, audiences: Iterable[Audience], transaction: object = None
) -> None:
    """Check an idempotency key, and that each audience has a history, which remembers it.

    Raises:
        ConfigurationError: If an audience has no history, or the broadcast is part of a transaction.
        ValueError: If the key is not a text, empty or too long.
    """
    if not isinstance(key, str) or not 0 < _utf8_bytes(key) <= MAX_KEY_BYTES:
        raise ValueError(f"idempotency_key is a text of 1 to {MAX_KEY_BYTES} bytes of UTF-8, not {key!r:.80}")
    if transaction is not None:
        raise ConfigurationError("idempotency_key and transaction exclude each other: a transaction commits only once")
    for audience in audiences:
        if rules is None or rules.of(audience) is None:
            raise ConfigurationError(f"idempotency_key needs a history, which remembers it: {no_history(audience)}")


def _utf8_bytes(text: str) -> int:
    # Half of a surrogate pair can't be UTF-8. A driver that has to write it loses its connection, and other messages.
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0


def no_history(audience: Audience) -> str:
    """Return the text for errors that says that an audience has no history, and what to do."""
    names = {"channel": f"the channel {audience.name!r:.80}", "user": "users", "everyone": "everyone"}
    return (
        f"nothing is kept for {names.get(audience.kind, audience.kind)}: name it in history=, as in "
        'ConnectionManager(url, history={"room:*": History(), USERS: History()})'
    )
