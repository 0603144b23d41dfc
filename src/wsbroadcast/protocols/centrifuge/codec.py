"""The codecs of the Centrifuge client protocol, one for each of its two forms: they read and write messages. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal
from typing import Protocol as Interface

from wsbroadcast.protocols.centrifuge.json import JSON, NotJSON, is_json
from wsbroadcast.protocols.centrifuge.protobuf import PROTOBUF
from wsbroadcast.protocols.centrifuge.schema import MAX_COMMANDS, Malformed, Message

__all__ = ["JSON", "MAX_COMMANDS", "PROTOBUF", "Codec", "Malformed", "Message", "NotJSON", "is_json"]


class Codec(Interface):
    """Reads what clients send, and writes what they are sent.

    A command is a dict such as `{"id": 1, "subscribe": {"channel": "a"}}`, an answer `{"id": 1, "subscribe": {}}`, a
    push `{"push": {"channel": "a", "pub": {"data": b"1"}}}`. Names are those of the JSON protocol. A payload
    (`data`, `conn_info`, `chan_info`) is always `bytes`.
    """

    @property
    def name(self) -> Literal["json", "protobuf"]:
        """The name of the form, as the query `format=` has it."""
        ...

    @property
    def subprotocol(self) -> str:
        """The WebSocket subprotocol of this form."""
        ...

    @property
    def form(self) -> Literal["text", "binary"]:
        """Whether its frames are text or binary."""
        ...

    @property
    def ping(self) -> bytes:
        """A server's ping, as `encode` would return it. A client's pong is decoded to `{}`."""
        ...

    def decode(self, frame: str | bytes) -> list[Message]:
        """Return the commands of a frame; at least one.

        A command has the fields that came, each of the right type and in its range. Fields that the protocol doesn't
        know are left out. It isn't checked which fields a command needs: without a method it is a pong, or wrong.

        Raises:
            Malformed: If the frame can't be read.
        """
        ...

    def encode(self, reply: Mapping[str, Any]) -> bytes:
        """Return an answer or a push in the form that it has in a frame.

        Fields that are zero, empty or `None` are left out. Fields that hold a message stay: `{"unsubscribe": {}}`.

        Raises:
            NotJSON: If this is the JSON form and a payload isn't JSON.
            KeyError: If the protocol has no field of this name.
        """
        ...

    def join(self, lines: Iterable[bytes]) -> bytes:
        """Return the payload of one frame that holds several results of `encode`."""
        ...
