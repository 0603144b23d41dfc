"""What one client has sent, and what it may send next. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from wsbroadcast.protocols.centrifuge.codec import Codec, Malformed, Message
from wsbroadcast.protocols.centrifuge.codes import Disconnect, Disconnected

# If a command has several methods, the first in this order counts.
_METHODS = (
    "connect",
    "ping",
    "subscribe",
    "unsubscribe",
    "publish",
    "presence",
    "presence_stats",
    "history",
    "rpc",
    "send",
    "refresh",
    "sub_refresh",
)

# After so many losses within so many seconds, a client waits before it is told to subscribe again, and longer with each
# further loss: it subscribes again without any pause.
_LOSSES = 2
_LOSS_SECONDS = 10.0
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 3.0


@dataclass(frozen=True, slots=True)
class Command:
    """A command: what a client asks for."""

    id: int
    """The id that the answer repeats; 0 for a command that isn't answered."""
    method: str
    """The name of the method."""
    request: Mapping[str, Any]
    """The fields that came with the method."""

    @property
    def channel(self) -> str:
        """The channel that it is about; empty if it names none."""
        channel: str = self.request.get("channel", "")
        return channel


@dataclass(slots=True)
class Subscription:
    """A subscription that the client has asked for, or was given."""

    is_server_side: bool = False
    info: bytes = b""
    """What others see of the client in this channel, by its token: `chan_info`."""
    expires_at: float | None = None
    """When it must show another token; `None` for never."""
    data: bytes = b""
    """What the client is told with it."""


class Brake:
    """Decides how long a client waits before it is told to subscribe again."""

    def __init__(self) -> None:
        self._losses: dict[str, list[float]] = {}

    def pause(self, channel: str, now: float) -> float:
        """Count one more loss; return for how many seconds the client waits."""
        recent = [each for each in self._losses.get(channel, ()) if now - each < _LOSS_SECONDS]
        self._losses = {name: times for name, times in self._losses.items() if now - times[-1] < _LOSS_SECONDS}
        self._losses[channel] = [*recent, now]
        over = len(recent) + 1 - _LOSSES
        return 0.0 if over <= 0 else min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (over - 1))


@dataclass(slots=True)
class Session:
    """The state of one client.

    A command is checked when its turn comes. The commands before it are done, even if it is wrong.
    """

    codec: Codec
    is_connected: bool = False
    """Whether its `connect` was answered."""
    has_asked: bool = False
    """Whether it has sent a `connect`."""
    pings: int = 0
    """How many pings were sent."""
    answered_pings: int = 0
    """The number of the newest ping that was answered."""
    subscriptions: dict[str, Subscription] = field(default_factory=dict)
    """Its subscriptions, as far as the client knows them."""
    brake: Brake = field(default_factory=Brake)

    def commands(self, frame: str | bytes) -> list[Message]:
        """Return the commands in a frame.

        Raises:
            Disconnected: If it can't be read.
        """
        try:
            return self.codec.decode(frame)
        except Malformed as error:
            raise Disconnected(Disconnect.BAD_REQUEST, str(error)) from None

    def command(self, message: Message) -> Command | None:
        """Return the command in a message; `None` for a pong.

        Raises:
            Disconnected: If the command isn't known, or not allowed now.
        """
        method = next((each for each in _METHODS if each in message), None)
        if method is None:
            if message.get("id"):
                raise Disconnected(Disconnect.BAD_REQUEST, "a command has a known method")
            if not self.is_connected:
                raise Disconnected(Disconnect.BAD_REQUEST, "the first command is connect")
            self.answered_pings = self.pings
            return None
        if (method == "connect") is self.has_asked:
            text = "connect is sent once" if self.has_asked else "the first command is connect"
            raise Disconnected(Disconnect.BAD_REQUEST, text)
        if method == "ping":
            raise Disconnected(Disconnect.BAD_REQUEST, "pings come from the server")
        id_ = message.get("id", 0)
        if not id_ and method != "send":
            raise Disconnected(Disconnect.BAD_REQUEST, "a command has an id")
        self.has_asked = True
        return Command(id_, method, message[method])

    def subscribes(self, messages: list[Message]) -> Iterator[Command]:
        """Yield the commands to subscribe at the beginning of the messages, until another command comes."""
        seen: set[str] = set()
        for message in messages:
            method = next((each for each in _METHODS if each in message), None)
            if method != "subscribe" or not message.get("id"):
                return
            command = Command(message["id"], method, message[method])
            if command.channel in seen:
                return
            seen.add(command.channel)
            yield command
