r"""The protocol `events`: everything that a client is sent is an object of JSON with a `type`.

```
{"type": "hello", "id": "kX2…", "version": 1, "ping": 25, "reconnect": {…}}          the first event
{"type": "message", "channel": "news", "data": 42, "position": "mH3…:17"}            what was broadcast
{"type": "subscribed", "channel": "news", "position": "mH3…:16", "recovered": true}  messages follow from here on
{"type": "gap", "channel": "news", "reason": "epoch", "position": "mH3…:99"}         messages were missed
{"type": "position", "channel": "news", "position": "mH3…:18"}                       a message was withheld
{"type": "ping"}                                                                     the connection is alive
{"type": "expiring", "expires_at": 1790000000, "seconds": 30}                        it ends, unless it is renewed
{"type": "presence", "channel": "news", "version": 7, "count": 1, "members": […]}    who is there, and later changes
```

An event for a user, for everyone or for this connection alone has `"to": "user"`, `"everyone"` or `"connection"` in
place of the channel. Bytes are sent as base64, with `"encoding": "base64"`.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping
from functools import lru_cache

from pydantic_core import to_json

from wsbroadcast.audience import Audience
from wsbroadcast.history import Recovery
from wsbroadcast.message import Message
from wsbroadcast.options import ClientTiming
from wsbroadcast.presence import By
from wsbroadcast.publication import Frame, Position, Publication, Withheld

SUBPROTOCOL = "wsbroadcast.v1"
"""The subprotocol that a client must offer to speak this."""


class Events:
    """Writes publications as events."""

    has_positions = True
    """Clients know their position, so a connection that is behind may be sent the rest later."""

    def __call__(self, publication: Publication) -> Message:
        """Return what a client gets for a publication."""
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
"""The version of the protocol. A client ignores fields and events that it doesn't know."""

PING = Message(b'{"type":"ping"}', "json")
"""It is sent from time to time, so that a client knows that the connection is alive."""


def hello(connection: str, timing: ClientTiming, ping: float) -> Message:
    """Return the first event of a connection."""
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
    """Return the event that says that a connection ends soon, unless it is renewed.

    Args:
        expires_at: When it ends, in seconds since 1970.
        seconds: In how many seconds it ends, for a client whose clock is wrong.
    """
    return Message.json({"type": "expiring", "expires_at": expires_at, "seconds": round(seconds, 3)})


def subscribed(audience: Audience, recovery: Recovery | None, since: Position | None, id_: object = None) -> Message:
    """Return the event that says from where on messages follow.

    Args:
        audience: The audience that was joined.
        recovery: Whether what was missed follows; `None` if nothing was asked for.
        since: The position where messages begin; `None` if it isn't known.
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
    """Return the event that says that missed messages can't be had any more, and where messages go on."""
    event: dict[str, object] = {"type": "gap", **_names(audience), "reason": reason}
    return Message.json(event if position is None else event | {"position": position})


def presence_list(channel: str, version: int, count: int, members: Mapping[str, bytes], by: By) -> Message:
    """Return the event that says who is in a channel.

    Args:
        channel: The channel.
        version: The version of the list, to which later changes refer.
        count: How many are there, also connections without a user, which aren't in `members`.
        members: The members, with what others see of them as JSON.
        by: What counts as one member.
    """
    return Message(b"%b,%b}" % (_presence(channel, version, count), _members(b"members", members, by)), "json")


def presence_count(channel: str, version: int, count: int) -> Message:
    """Return the event that says how many are in a channel with too many members to name."""
    return Message(b"%b}" % _presence(channel, version, count), "json")


def presence_changes(
    channel: str, previous: int, version: int, count: int, joined: Mapping[str, bytes], left: Iterable[str], by: By
) -> Message:
    """Return the event with the changes since a version. `joined` also has members whose info has changed."""
    return Message(
        b'%b,"previous":%d,%b,"left":%b}'
        % (_presence(channel, version, count), previous, _members(b"joined", joined, by), to_json(list(left))),
        "json",
    )


def answering(message: Message, id_: object) -> Message:
    """Return the event with the `id` of the command that it answers."""
    return Message(b'%b,"id":%b}' % (message.payload[:-1], to_json(id_)), "json")


def _presence(channel: str, version: int, count: int) -> bytes:
    return b'{"type":"presence","channel":%b,"version":%d,"count":%d' % (to_json(channel), version, count)


def _members(name: bytes, members: Mapping[str, bytes], by: By) -> bytes:
    if by == "user":
        each = (b'{"user":%b,"info":%b}' % (to_json(key), info or b"null") for key, info in members.items())
    else:  # what is kept of it is an object of JSON with its user and info
        each = (b'{"id":%b,%b' % (to_json(key), value[1:]) for key, value in members.items())
    return b'"%b":[%b]' % (name, b",".join(each))


def _names(audience: Audience) -> dict[str, str]:
    return {"channel": audience.name} if audience.kind == "channel" else {"to": audience.kind}


@lru_cache(maxsize=1024)
def _where(audience: Audience) -> bytes:
    return to_json(_names(audience))[1:-1]


def _position(position: Position | None) -> bytes:
    return b"" if position is None else b',"position":"%b"' % position.encode()
