r"""The protocol `events`: everything that a client is sent is an object of JSON that says what it is.

```
{"type": "hello", "id": "kX2…", "version": 1, "ping": 25, "reconnect": {…}}          the first of all
{"type": "message", "channel": "news", "data": 42, "position": "mH3…:17"}            what was broadcast
{"type": "subscribed", "channel": "news", "position": "mH3…:16", "recovered": true}  from here on messages follow
{"type": "gap", "channel": "news", "reason": "epoch", "position": "mH3…:99"}         something was missed
{"type": "position", "channel": "news", "position": "mH3…:18"}                       a message was withheld
{"type": "ping"}                                                                     the connection is alive
{"type": "expiring", "expires_at": 1790000000, "seconds": 30}                        it ends, unless it is renewed
```

What goes to a user, to everyone or to this connection alone says `"to": "user"`, `"everyone"` or `"connection"` in the
place of the channel. Bytes are base64, and say `"encoding": "base64"`.
"""

from __future__ import annotations

from base64 import b64encode
from functools import lru_cache

from pydantic_core import to_json

from wsbroadcast.audience import Audience
from wsbroadcast.history import Recovery
from wsbroadcast.message import Message
from wsbroadcast.options import ClientTiming
from wsbroadcast.publication import Frame, Position, Publication, Withheld

SUBPROTOCOL = "wsbroadcast.v1"
"""What a client offers that speaks it."""


class Events:
    """Writes publications as events."""

    has_positions = True
    """Clients know where they are, so that a connection that is behind may be sent the rest later."""

    def __call__(self, publication: Publication) -> Message:
        """Return what a client gets of a publication."""
        message = publication.message
        if isinstance(publication, Frame):
            return message
        where = _where(publication.audience)
        if isinstance(publication, Withheld):
            return Message(b'{"type":"position",%b%b}' % (where, _position(publication.position)), "json")
        if message.form == "json":
            data = message.payload
        elif message.form == "text":
            data = to_json(message.payload.decode())
        else:
            data = b'"%b","encoding":"base64"' % b64encode(message.payload)
        id_ = b"" if publication.id is None else b',"id":%b' % to_json(publication.id)
        position = _position(publication.position)
        return Message(b'{"type":"message",%b,"data":%b%b%b}' % (where, data, id_, position), "json", key=message.key)


events = Events()
"""The protocol."""


VERSION = 1
"""That of the protocol. A client takes fields and events that it doesn't know for nothing."""

PING = Message(b'{"type":"ping"}', "json")
"""What is sent from time to time, so that a client knows that the connection is alive."""


def hello(connection: str, timing: ClientTiming, ping: float) -> Message:
    """Make the first event of a connection."""
    return Message.json(
        {
            "type": "hello",
            "id": connection,
            "version": VERSION,
            "ping": ping,
            "reconnect": {"min": timing.reconnect_min, "max": timing.reconnect_max},
        }
    )


def expiring(expires_at: float, seconds: float) -> Message:
    """Make the event that says that a connection ends soon, unless it is renewed.

    Args:
        expires_at: When, in seconds since 1970.
        seconds: How soon, for a client whose clock is wrong.
    """
    return Message.json({"type": "expiring", "expires_at": expires_at, "seconds": round(seconds, 3)})


def subscribed(audience: Audience, recovery: Recovery | None, since: Position | None, id_: object = None) -> Message:
    """Make the event that says from where on messages follow.

    Args:
        audience: What was joined.
        recovery: What became of what was missed; `None` if nothing was asked for.
        since: Where messages begin; `None` if that isn't known.
        id_: The `id` of the command that asked for it.
    """
    answer: dict[str, object] = {"type": "subscribed", **_names(audience)}
    if since is not None:
        answer["position"] = since
    if recovery is not None:
        answer["recovered"] = recovery.recovered
        if recovery.reason:
            answer["reason"] = recovery.reason
    return Message.json(answer if id_ is None else answer | {"id": id_})


def gap(audience: Audience, reason: str, position: Position | None) -> Message:
    """Make the event that says that something was missed that can't be had any more, and where messages go on."""
    event: dict[str, object] = {"type": "gap", **_names(audience), "reason": reason}
    return Message.json(event if position is None else event | {"position": position})


def _names(audience: Audience) -> dict[str, str]:
    return {"channel": audience.name} if audience.kind == "channel" else {"to": audience.kind}


@lru_cache(maxsize=1024)
def _where(audience: Audience) -> bytes:
    return to_json(_names(audience))[1:-1]


def _position(position: Position | None) -> bytes:
    return b"" if position is None else b',"position":"%b"' % position.encode()
