"""What travels between the nodes, and from there to the connections. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

from wsbroadcast.audience import Audience
from wsbroadcast.message import Message
from wsbroadcast.options import Limits

NOBODY: frozenset[str] = frozenset()
"""The ids of no connection."""


class Position(NamedTuple):
    """A place in the history of an audience."""

    epoch: str
    """Names the history. Positions of another one can't be compared with these."""
    offset: int
    """Grows with each publication that is kept."""


class Publication:
    """A message on its way to an audience."""

    __slots__ = ("_seen", "audience", "exclude", "id", "message", "position")

    def __init__(
        self,
        message: Message,
        audience: Audience,
        exclude: frozenset[str] = NOBODY,
        *,
        id: str | None = None,  # noqa: A002  # the name that it has in the envelope
        position: Position | None = None,
    ) -> None:
        self.message = message
        """What was broadcast."""
        self.audience = audience
        """Whom it is for."""
        self.exclude = exclude
        """Ids of connections that don't get it, wherever they are."""
        self.id = id
        """What the publications of one broadcast to several audiences have in common; `None` for one audience."""
        self.position = position
        """Its place in the history of its audience; `None` where nothing is kept."""
        # What clients of other protocols than the plain one get of it, once one of them has asked.
        self._seen: dict[Protocol, Message] | None = None

    @classmethod
    def of(
        cls,
        message: object,
        channel: object,
        user: object,
        key: str | None,
        limits: Limits,
        exclude: frozenset[str] = NOBODY,
    ) -> Self:
        """Build what the arguments of a broadcast say.

        Raises:
            EncodeError: If the message can't be sent as text, bytes or JSON, or is too large.
            ValueError: If `channel` (`InvalidChannel`) or `user` isn't valid, or both are given.
        """
        audience = Audience.of(channel, user)
        return cls(Message.of(message, key).within(limits.max_message_bytes), audience, exclude)

    @property
    def size(self) -> int:
        """The payload's size in bytes."""
        return self.message.size

    def with_message(self, message: Message) -> Publication:
        """Return the same publication of another message."""
        return Publication(message, self.audience, self.exclude, id=self.id, position=self.position)

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
        return message.payload, message.form, message.key, self.audience, self.exclude, self.id, self.position

    def __repr__(self) -> str:
        return f"<Publication {self.message!r} to {self.audience!r}>"


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

    @property
    def size(self) -> int:
        """The size of the reason in bytes."""
        return len(self.reason.encode(errors="replace"))


@dataclass(frozen=True, slots=True)
class Gap:
    """An outage of the broker: what other nodes published in that time never came."""

    engine: str
    """The engine's name."""
    seconds: float
    """How long it lasted."""
