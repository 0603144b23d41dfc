"""What travels between the nodes: a message with its audience. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

from wsbroadcast.audience import Audience
from wsbroadcast.message import Message
from wsbroadcast.options import Limits


class Publication(NamedTuple):
    """One broadcast between its origin and the nodes."""

    message: Message
    audience: Audience
    exclude: frozenset[str] = frozenset()
    """Ids of connections that don't get it, wherever they are."""
    close_code: int | None = None
    """If set, the audience's connections are closed with this code, and the message is the reason."""

    @classmethod
    def of(
        cls,
        message: object,
        channel: object,
        user: object,
        key: str | None,
        limits: Limits,
        exclude: frozenset[str] = frozenset(),
    ) -> Self:
        """Build what the arguments of a broadcast say.

        Raises:
            EncodeError: If the message can't be sent as text, bytes or JSON, or is too large.
            ValueError: If the channel (`InvalidChannel`) or user is none, or both are given.
        """
        audience = Audience.of(channel, user)
        return cls(Message.of(message, key).within(limits.max_message_bytes), audience, exclude)


@dataclass(frozen=True, slots=True)
class Gap:
    """An outage of the broker: what other nodes published meanwhile never came."""

    engine: str
    """The engine's name."""
    seconds: float
    """How long it lasted."""
