"""What travels between the nodes, and from there to the connections. No I/O."""

from __future__ import annotations

import re
from abc import abstractmethod
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from secrets import token_urlsafe
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

from pydantic_core import SchemaSerializer, from_json

from wsbroadcast.audience import Audience, UserId, as_channels
from wsbroadcast.close_codes import check_sendable, cut_reason
from wsbroadcast.message import Message

EPOCH = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What an epoch looks like."""

MAX_OFFSET = 2**63 - 1
"""The largest offset that every broker can count to."""

_POSITION = re.compile(rf"({EPOCH.pattern}):(0|[1-9][0-9]{{0,18}})")

# How pydantic writes what describes itself. As a dict, because pydantic itself isn't imported here.
_AS_DICT: Any = {"type": "function-plain", "function": dict, "return_schema": {"type": "dict"}}

NOBODY: frozenset[str] = frozenset()
"""The ids of no connection."""


class Position(str):
    """A place in the history of an audience: a text, so that it is one wherever an app puts it, such as in JSON."""

    __slots__ = ("epoch", "offset")
    __match_args__ = ("epoch", "offset")

    epoch: str
    """Names the history, and is never empty. Positions of another one can't be compared with these."""
    offset: int
    """Grows with each publication that is kept; 0 before the first."""

    def __new__(cls, epoch: str, offset: int) -> Self:  # noqa: D102
        self = str.__new__(cls, f"{epoch}:{offset}")  # not by super(): it is made for each message that is kept
        self.epoch = epoch
        self.offset = offset
        return self

    @classmethod
    def of(cls, text: str) -> Self:
        """Read a position from its text.

        Raises:
            ValueError: If it is something else.
        """
        found = _POSITION.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"a position is {POSITION_TEXT}, not {text!r:.80}")
        return cls(found[1], int(found[2]))

    # Texts are compared letter by letter, which would put offset 10 before offset 9.

    def __lt__(self, other: object) -> bool:
        return self.offset < self._comparable(other)

    def __le__(self, other: object) -> bool:
        return self.offset <= self._comparable(other)

    def __gt__(self, other: object) -> bool:
        return self.offset > self._comparable(other)

    def __ge__(self, other: object) -> bool:
        return self.offset >= self._comparable(other)

    def _comparable(self, other: object) -> int:
        if not isinstance(other, Position) or other.epoch != self.epoch:
            raise TypeError(f"a position is before or after another one of the same history, not {other!r:.80}")
        return other.offset

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override]  # what a copy is made of
        return self.epoch, self.offset

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> dict[str, Any]:
        """Let routes and models take it by its text."""
        reads = {"type": "no-info", "function": cls.of}
        return {"type": "function-after", "function": reads, "schema": {"type": "str"}}

    def __repr__(self) -> str:
        return f"Position({self.epoch!r}, {self.offset!r})"


POSITION_TEXT = 'an epoch, a colon and an offset, such as "kX2dh0Qb7a_Z:17"'
"""What the text of a position looks like, for errors."""


class Described:
    """Something that is written as JSON by what `dict` makes of it: in a route's answer, and in a broadcast."""

    __slots__ = ()

    # What pydantic looks for in a value that it has to write.
    __pydantic_serializer__ = SchemaSerializer({"type": "any", "serialization": _AS_DICT})

    @abstractmethod
    def keys(self) -> Iterable[str]:
        """Return the names of what is written."""

    @abstractmethod
    def __getitem__(self, key: str) -> Any:
        """Return what is written under a name."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> dict[str, Any]:
        """Let a route say that it returns this: in its documentation it is an object, and nobody can send one."""
        one = {"type": "is-instance", "cls": cls}
        sent = {"type": "chain", "steps": [{"type": "dict"}, one]}
        return {"type": "json-or-python", "json_schema": sent, "python_schema": one, "serialization": _AS_DICT}


class Publication(Described):
    """A message on its way to an audience.

    As JSON, and by `dict`, it is what a client of the subprotocol `wsbroadcast.v1` gets of it, without the `type`.
    """

    __slots__ = (
        "_seen",
        "audience",
        "audiences",
        "exclude",
        "exclude_users",
        "id",
        "kept_at",
        "message",
        "position",
        "previous",
        "taken_at",
        "traceparent",
    )

    def __init__(
        self,
        message: Message,
        audience: Audience,
        exclude: frozenset[str] = NOBODY,
        *,
        exclude_users: frozenset[str] = NOBODY,
        id: str | None = None,  # noqa: A002  # the name that it has in the envelope
        audiences: tuple[Audience, ...] = (),
        position: Position | None = None,
        previous: int = 0,
        kept_at: float = 0.0,
    ) -> None:
        self.message = message
        """What was broadcast."""
        self.audience = audience
        """Whom it is for."""
        self.exclude = exclude
        """Ids of connections that don't get it, wherever they are."""
        self.exclude_users = exclude_users
        """Users whose connections don't get it, as `Connection.user` is written as text."""
        self.id = id
        """What the publications of one broadcast to several audiences have in common; `None` for one audience."""
        self.audiences = audiences
        """All audiences of a broadcast to several; empty for one audience."""
        self.position = position
        """Its place in the history of its audience; `None` where nothing is kept."""
        self.previous = previous
        """The offset before it in its audience, if it has a position: a jump shows that one is missing."""
        self.kept_at = kept_at
        """When it was kept, by the clock of the event loop, if it has a position."""
        self.taken_at = 0.0
        """When the node had it, by the monotonic clock, if it is one of those that are measured."""
        self.traceparent: str | None = None
        """Where its broadcast is found in a trace; empty if it is not recorded, `None` if nobody traces."""
        # What clients of other protocols than the plain one get of it, once one of them has asked.
        self._seen: dict[Protocol, Message] | None = None

    @property
    def size(self) -> int:
        """The payload's size in bytes."""
        return self.message.size

    @property
    def channel(self) -> str | None:
        """The channel that it was broadcast to; `None` for a user or everyone."""
        return self.audience.name if self.audience.kind == "channel" else None

    @property
    def data(self) -> Any:
        """What was broadcast: the text, the bytes, or the value that the JSON stands for."""
        message = self.message
        return from_json(message.payload) if message.form == "json" else message.data

    @property
    def offset(self) -> int:
        """That of its position; 0 if it has none."""
        return 0 if self.position is None else self.position.offset

    def keys(self) -> Iterable[str]:
        """Return the names of what is written as JSON."""
        yield "channel" if self.audience.kind == "channel" else "to"
        yield "data"
        if not self.message.is_text:
            yield "encoding"
        if self.id is not None:
            yield "id"
        if self.position is not None:
            yield "position"

    def __getitem__(self, key: str) -> Any:
        match key:
            case "to":
                return self.audience.kind
            case "data" if not self.message.is_text:
                return b64encode(self.message.payload).decode()
            case "encoding":
                return "base64"
            case "channel" | "data" | "id" | "position":
                return getattr(self, key)
        raise KeyError(key)

    def withheld(self) -> Withheld:
        """Return what a client gets in its place that knows where it is, and doesn't get it."""
        return Withheld(self.message, self.audience, position=self.position, previous=self.previous)

    def with_message(self, message: Message) -> Publication:
        """Return the same publication of another message."""
        other = Publication(
            message,
            self.audience,
            self.exclude,
            exclude_users=self.exclude_users,
            id=self.id,
            audiences=self.audiences,
            position=self.position,
            previous=self.previous,
            kept_at=self.kept_at,
        )
        other.taken_at, other.traceparent = self.taken_at, self.traceparent
        return other

    def place(self, position: Position, previous: int, kept_at: float = 0.0) -> None:
        """Give it its place in the history of its audience."""
        self.position, self.previous, self.kept_at = position, previous, kept_at

    def seen_by(self, protocol: Protocol) -> Message:
        """Return what a client of a protocol gets of it, made once for all clients of that protocol."""
        if protocol is plain:
            return self.message
        if self._seen is None:
            self._seen = {}
        seen = self._seen.get(protocol)
        if seen is None:
            seen = self._seen[protocol] = protocol(self)
        return seen

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Publication):
            return NotImplemented
        return self._content == other._content

    __hash__ = None  # type: ignore[assignment]  # like a list: two that are equal are still two publications

    @property
    def _content(self) -> tuple[object, ...]:
        message = self.message
        place = self.audience, self.audiences, self.id, self.position
        return message.payload, message.form, message.key, self.exclude, self.exclude_users, place

    def __repr__(self) -> str:
        return f"<Publication {self.message!r} to {self.audience!r}>"


class Frame(Publication):
    """Something that a protocol itself says to one connection."""

    __slots__ = ()


class Withheld(Publication):
    """A publication that a connection doesn't get, for one that has to know that it is past it."""

    __slots__ = ()


Publications = tuple[Publication, ...]
"""Those of one broadcast: one for each audience."""


def publications_of(
    message: Message,
    audiences: tuple[Audience, ...],
    exclude: frozenset[str] = NOBODY,
    exclude_users: frozenset[str] = NOBODY,
) -> Publications:
    """Build the publications of a broadcast; those of several have an id in common."""
    if len(audiences) == 1:
        return (Publication(message, audiences[0], exclude, exclude_users=exclude_users),)
    id_ = token_urlsafe(12)
    return tuple(
        Publication(message, audience, exclude, exclude_users=exclude_users, id=id_, audiences=audiences)
        for audience in audiences
    )


class Receipt(NamedTuple):
    """What is known of a broadcast when the engine has taken it."""

    members_here: int
    """Connections of this node that it was for at the time of the call: the members of its audiences, but for those
    that it excludes. Those of other nodes aren't counted."""
    positions: Mapping[Audience, Position] = MappingProxyType({})
    """Its places in the histories of its audiences; empty where nothing is kept."""
    is_held_back: bool = False
    """Whether a hook held it back, so that nobody gets it."""
    is_repeat: bool = False
    """Whether it was published before, by the same idempotency key, so that nobody gets it again."""

    @property
    def position(self) -> Position | None:
        """Its place in the history of its audience; `None` for several audiences, or where nothing is kept."""
        return next(iter(self.positions.values())) if len(self.positions) == 1 else None


Protocol = Callable[[Publication], Message]
"""What a publication looks like to a client. A pure function: it is called once for all clients that use it."""


def plain(publication: Publication) -> Message:
    """Return the message itself: the protocol of FastAPI's tutorial."""
    return publication.message


@dataclass(frozen=True, slots=True)
class Dismissal:
    """Closes the connections of an audience, wherever they are."""

    audience: Audience
    """Whose connections."""
    code: int
    """The code they are closed with."""
    reason: str = ""
    """The reason that comes with the code; at most 123 bytes of UTF-8."""
    exclude: frozenset[str] = NOBODY
    """Ids of connections that stay."""

    @classmethod
    def of_user(cls, user: UserId, code: int, reason: str, exclude: frozenset[str] = NOBODY) -> Self:
        """Close the connections of a user.

        Raises:
            ValueError: If the user is not an id, or the code can't be sent.
        """
        check_sendable(code)
        return cls(Audience.user(user), int(code), cut_reason(reason), exclude)

    @property
    def size(self) -> int:
        """The size of the reason in bytes."""
        return len(self.reason.encode(errors="replace"))


@dataclass(frozen=True, slots=True)
class Unsubscription:
    """Takes the connections of an audience out of channels, wherever they are."""

    audience: Audience
    """Whose connections."""
    channels: tuple[str, ...]
    """The channels that they leave."""

    @classmethod
    def of_user(cls, user: UserId, channels: tuple[str, ...]) -> Self:
        """Take the connections of a user out of channels.

        Raises:
            InvalidChannel: If a name breaks a rule.
            ValueError: If the user is not an id, or no channel is named.
        """
        names = as_channels(channels)
        if not names:
            raise ValueError("name the channels: unsubscribe_user(user, channel)")
        return cls(Audience.user(user), names)

    @property
    def size(self) -> int:
        """It has no payload."""
        return 0


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Says that the history of an audience was removed, so that nobody replays what a node still holds of it."""

    audience: Audience
    """Whose history."""

    @property
    def size(self) -> int:
        """It has no payload."""
        return 0


MAX_NODE_MESSAGE_BYTES = 256 * 1024
"""The largest body of what one node tells another."""

NodeMessageKind = Literal["hello", "bye", "question", "answer"]
"""What a node says: that it is there, that it ends, what it wants to know of the others, and what it was asked."""


@dataclass(frozen=True, slots=True)
class NodeMessage:
    """What nodes say to each other about themselves. It changes no connection, and none is sent it."""

    audience: Audience
    """All nodes that take part, or one of them."""
    kind: NodeMessageKind
    """What it is."""
    sender: str
    """The id of the node that says it."""
    id: str = ""
    """Of a question and its answers: which one."""
    body: bytes = b""
    """JSON."""

    @property
    def size(self) -> int:
        """The size of the body in bytes."""
        return len(self.body)


Control = Dismissal | Unsubscription | Forgetting | NodeMessage
"""What nodes tell each other beside messages. No connection is sent it."""


@dataclass(frozen=True, slots=True)
class Gap:
    """An outage of the broker: what other nodes published in that time never came."""

    engine: str
    """The engine's name."""
    seconds: float
    """How long it lasted."""
    audiences: frozenset[Audience] = frozenset()
    """Those with connections here that have missed messages, as far as it is known. An audience with a history isn't
    one of them if everything could be read that had been missed."""
