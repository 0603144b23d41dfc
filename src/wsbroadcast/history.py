"""What is kept of which audiences, and what comes back of it. No I/O."""

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

# Audiences whose history is remembered, because a broadcast needs it each time; past this many, the memory is emptied.
_REMEMBERED = 8192


# What every broker can count to: a thousand million messages, and a hundred years.
_MOST = {"messages": 10**9, "seconds": 3.2e9, "remember": 3.2e9}


class _Users(Enum):
    """The type of `USERS`."""

    USERS = "users"

    def __repr__(self) -> str:
        return "USERS"


USERS: Final = _Users.USERS
"""In `history=`: what is sent to users, each of whom has a history of its own."""


@dataclass(frozen=True, slots=True)
class History:
    """How much is kept of what is broadcast to a channel, so that who comes back gets what it missed.

    A message that is more than one of the numbers allows isn't replayed any more.

    Raises:
        ConfigurationError: If a number makes no sense.
    """

    messages: int = 100
    """The newest so many messages."""
    seconds: float = 300.0
    """Messages that are not older than this."""
    remember: float = 86_400.0
    """For how many seconds after the last message a position is known: who comes back to a quiet channel in that time
    is told that nothing was missed."""
    max_kept_bytes: int = 1024 * 1024
    """The largest message that is kept, in bytes. A larger one is delivered; a replay over it is incomplete, and says
    so."""

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
                f"History.remember, {self.remember} s, is shorter than History.seconds, {self.seconds} s: a position "
                "is known at least for as long as the messages after it are kept. Raise remember as well, as in "
                f"History(seconds={self.seconds!r}, remember={self.seconds!r})"
            )


Histories = History | Mapping[Any, History]
"""What `history=` takes: one for all channels, or one for each pattern of channels, for `USERS` and for `EVERYONE`."""


class HistoryRules:
    """Which audiences have a history.

    Args:
        histories: What `history=` was given.

    Raises:
        ConfigurationError: If it is something else.
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
        self._known: dict[Audience, History | None] = {}

    def of(self, audience: Audience) -> History | None:
        """Return the history of an audience; `None` if nothing is kept. Of the patterns that fit the longest holds."""
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
        return None

    @property
    def all(self) -> list[History]:
        """All that there are."""
        return [each for each in (*self._channels.values(), self._users, self._everyone) if each is not None]

    def to_json(self) -> bytes:
        """Return the text that stands beside the data, so that who only publishes knows what is kept."""
        rules: dict[str, Any] = {"channels": {name: asdict(each) for name, each in self._channels.items()}}
        for name, history in (("users", self._users), ("everyone", self._everyone)):
            if history is not None:
                rules[name] = asdict(history)
        return json.dumps(rules, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> HistoryRules:
        """Read what `to_json` has written. The bytes are untrusted.

        Raises:
            ConfigurationError: If they are something else.
        """
        try:
            rules = from_json(text)
            histories: dict[Any, History] = {name: History(**each) for name, each in rules["channels"].items()}
            for key, name in ((USERS, "users"), (EVERYONE, "everyone")):
                if name in rules:
                    histories[key] = History(**rules[name])
        except (ValueError, TypeError, LookupError, AttributeError):
            raise ConfigurationError("what the broker says of histories was not written by this library") from None
        return cls(histories)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HistoryRules) and self.to_json() == other.to_json()

    def __repr__(self) -> str:
        return f"<HistoryRules {self.to_json().decode()}>"


def _not_histories(found: str) -> str:
    return (
        'history is a History(…) for all channels, or a dict of them by pattern, such as {"room:*": History(), USERS: '
        f"History(), EVERYONE: History()}}, not {found}"
    )


class Appended(NamedTuple):
    """What an engine says of a publication that it has kept."""

    position: Position
    """Its place in the history."""
    is_repeat: bool = False
    """Whether it was kept before, under the same key; it wasn't sent again then."""


class Replay(NamedTuple):
    """A stretch of the history of an audience, as an engine has read it."""

    top: Position
    """The newest position at the moment of the read; offset 0 if nothing was ever kept."""
    publications: Sequence[Publication]
    """What was kept, in order, none older than the history allows; each with its position."""
    base: int
    """Everything that came after this offset, up to `top`, is among `publications`: that is proven."""

    def is_complete(self, since: Position) -> bool:
        """Tell whether everything after a position is among them, up to `top`.

        An empty epoch equals none, and an offset that none of the publications has is no position of this history.
        """
        if not since.epoch or since.epoch != self.top.epoch or not self.base <= since.offset <= self.top.offset:
            return False
        known = (each.offset for each in self.publications)
        return since.offset in (self.base, self.top.offset) or since.offset in known


class _Moment(Enum):
    """The type of `LAST`."""

    LAST = "last"
    NOW = "now"

    def __repr__(self) -> str:
        return self.name


LAST: Final = _Moment.LAST
"""As `since`: the newest message alone, for prices, flags and other states."""

NOW: Final = _Moment.NOW
"""Of a client that knows where it is: nothing that was before it."""

Since = Position | _Moment
"""Since when a connection wants what it missed."""

SinceByAudience = Mapping[Audience, Since]

NOWHERE: SinceByAudience = MappingProxyType({})
"""Of a connection that wants nothing that came before it."""

SinceOption = Since | str | Mapping[Any, Since | str | None] | None
"""What `since=` takes: a position of the only channel, or a dict of them by channel and audience. A text is a position
as `str` writes it. `LAST`, or the text "last", is the newest message."""

# A position of no history, for a text that is none: who sends it is told that nothing can be recovered.
_UNKNOWN = Position("", 0)


def since_of(since: SinceOption, channels: Sequence[str], user_key: str | None = None) -> SinceByAudience:
    """Check what `since=` was given.

    Args:
        since: What was given.
        channels: The channels that are joined.
        user_key: The user of the connection, whose own audience may be named.

    Raises:
        ValueError: If it is something else, or is about an audience that isn't joined.
    """
    if since is None:
        return NOWHERE
    if not isinstance(since, Mapping):
        if len(channels) != 1:
            raise ValueError(
                f"since is a dict of positions by channel where the channels are {len(channels)}, such as "
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
                f"since names {key!r:.80}, which is neither joined nor the connection's own; as a dict it is positions "
                'by channel, such as {"news": "kX2dh0Qb7a_Z:17"}'
            )
        if value is not None:
            found[audience] = _checked_since(value)
    return found


def one_since(since: Since | str | None) -> Since | None:
    """Check a position that a question about one audience names.

    Raises:
        ValueError: If it is something else.
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
"""Why something could not be recovered: `epoch` if the position is of another history, or of none; `expired` if what
was missed is no longer kept, and `too_many` if it is more than is kept; `unavailable` if the broker can't be asked;
`not_kept` if the channel has no history."""


class Recovery(NamedTuple):
    """Whether a connection that was away has got exactly what it missed in a channel."""

    recovered: bool
    """Whether it gets everything after the position that it named, without a hole. It is never `True` unproven."""
    reason: Reason
    """Why not; empty if it is."""
    position: Position | None
    """Where the channel is now; `None` if that isn't known, or the channel has no history."""


def kept_audience(channel: object, user: object, everyone: bool) -> Audience:
    """Build the audience that a question about a history is for.

    Raises:
        InvalidChannel: If the channel's name breaks a rule.
        ValueError: If none is named, or more than one.
    """
    if (channel is not UNSET) + (user is not UNSET) + bool(everyone) != 1:
        raise ValueError("name one: a channel, user=… or everyone=True")
    return EVERYONE if everyone else Audience.of(channel, user)


class Page(Described):
    """What is kept of an audience, as `history()` returns it. A route may return it as it is."""

    # No named tuple, which would be a list in JSON; and no dataclass, whose messages FastAPI would copy.
    __slots__ = ("is_complete", "messages", "position")

    def __init__(self, messages: Sequence[Publication], position: Position, is_complete: bool) -> None:
        self.messages = messages
        """In order: without `since` the newest, with it the first after it."""
        self.position = position
        """The position behind them: who goes on since there misses nothing."""
        self.is_complete = is_complete
        """Whether these are all messages from `since` up to `position`. If not, they are the newest that are kept."""

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
    """Check how many messages a page may have.

    Raises:
        ValueError: If it is neither `None` nor a positive number.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit is a positive number of messages, not {limit!r:.80}")


def page_of(replay: Replay, since: Position | None, limit: int | None) -> Page:
    """Make a page of what was read."""
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
    """Check an idempotency key, and whether it can be kept to.

    Raises:
        ConfigurationError: If an audience has no history, in which the key would be remembered.
        ValueError: If it is not a text, or too long.
    """
    if not isinstance(key, str) or not 0 < _utf8_bytes(key) <= MAX_KEY_BYTES:
        raise ValueError(f"idempotency_key is a text of 1 to {MAX_KEY_BYTES} bytes of UTF-8, not {key!r:.80}")
    if transaction is not None:
        raise ConfigurationError("idempotency_key and transaction don't go together: the transaction commits once")
    for audience in audiences:
        if rules is None or rules.of(audience) is None:
            raise ConfigurationError(f"idempotency_key needs a history to be remembered in: {no_history(audience)}")


def _utf8_bytes(text: str) -> int:
    # Half of a surrogate pair is no UTF-8: a driver that has to write it loses the connection, and what others say.
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0


def no_history(audience: Audience) -> str:
    """Say that nothing is kept of an audience, and what to do."""
    names = {"channel": f"the channel {audience.name!r:.80}", "user": "users", "everyone": "everyone"}
    return (
        f"nothing is kept for {names.get(audience.kind, audience.kind)}: name it in history=, as in "
        'ConnectionManager(url, history={"room:*": History(), USERS: History()})'
    )
