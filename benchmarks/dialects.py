"""How the load client talks to a server: plain text frames, or a protocol of the peer's own on top of them."""

from __future__ import annotations

import json
import re
from typing import NamedTuple
from urllib.parse import quote


class Step(NamedTuple):
    """One step of a handshake above the WebSocket's own."""

    expect: bytes | None
    """What the frame to wait for holds; `None` waits for nothing."""
    send: str | None
    """What to send then."""


class Plain:
    """Text frames in, the same text frames out."""

    is_countable = True
    """Whether messages of one size come in frames of one size, so that counting bytes counts messages."""
    needs_payload = False
    """Whether every frame has to be looked into, because it wants an answer."""

    def path(self, channel: str | None, is_loop: bool) -> str:
        """Return where to connect."""
        if is_loop:
            return "/loop"
        return "/ws" if channel is None else f"/ws/{channel}"

    def handshake(self, channel: str | None) -> list[Step]:
        """Return what has to be said before messages arrive."""
        return []

    def wrap(self, message: str, channel: str | None) -> str:
        """Return the text that makes the server broadcast a message."""
        return message

    def is_delivery(self, payload: bytes) -> bool:
        """Return whether a payload holds a broadcast message."""
        return True

    def answer(self, payload: bytes) -> str | None:
        """Return what has to be sent back for a payload."""
        return None


class SocketIO(Plain):
    """Socket.IO 5 on Engine.IO 4, WebSocket only."""

    is_countable = False

    def path(self, channel: str | None, is_loop: bool) -> str:
        named = "" if channel is None else f"&channel={quote(channel)}"
        return f"/socket.io/?EIO=4&transport=websocket{named}"

    def handshake(self, channel: str | None) -> list[Step]:
        return [Step(b"0{", "40"), Step(b"40", None)]

    def wrap(self, message: str, channel: str | None) -> str:
        return "42" + json.dumps(["message", message], separators=(",", ":"))

    def is_delivery(self, payload: bytes) -> bool:
        return payload.startswith(b"42")


class PermitPubSub(Plain):
    """The remote calls of fastapi_websocket_pubsub; its server waits for the answer to each notification."""

    is_countable = False
    needs_payload = True
    _CALL_ID = re.compile(rb'"call_id":\s*"([^"]+)"')

    def path(self, channel: str | None, is_loop: bool) -> str:
        return "/ws"

    def handshake(self, channel: str | None) -> list[Step]:
        subscribe = self._call("subscribe", topics=[channel or "all"])
        return [Step(None, subscribe), Step(b'"result"', None)]

    def wrap(self, message: str, channel: str | None) -> str:
        # A notifier of another name: by its own name a connection would not get its own message.
        return self._call("publish", topics=[channel or "all"], data=message, sync=False, notifier_id="load")

    def is_delivery(self, payload: bytes) -> bool:
        return b'"notify"' in payload

    def answer(self, payload: bytes) -> str | None:
        if not self.is_delivery(payload):
            return None
        found = self._CALL_ID.search(payload)
        assert found is not None
        return f'{{"response":{{"result":null,"result_type":null,"call_id":"{found[1].decode()}"}}}}'

    def _call(self, method: str, **arguments: object) -> str:
        return json.dumps({"request": {"method": method, "arguments": arguments, "call_id": method}})


DIALECTS: dict[str, Plain] = {"plain": Plain(), "socketio": SocketIO(), "permit": PermitPubSub()}
