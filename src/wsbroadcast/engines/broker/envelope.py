r"""The envelope: the form in which a publication travels between nodes. It is a line of JSON, then the payload.

    {"v":1,"node":"kX2…","seq":42}\nhello

Any program can publish with `{"v":1}`, a newline and a text; docs/envelope.md describes the form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from pydantic_core import from_json

from wsbroadcast.audience import EVERYONE, MAX_AUDIENCES, Audience, check_channel, user_key
from wsbroadcast.close_codes import is_sendable
from wsbroadcast.exceptions import EncodeError
from wsbroadcast.message import Form, Message
from wsbroadcast.publication import (
    EPOCH,
    MAX_NODE_MESSAGE_BYTES,
    MAX_OFFSET,
    NOBODY,
    Control,
    Dismissal,
    Forgetting,
    NodeMessage,
    NodeMessageKind,
    Position,
    PresenceChange,
    Publication,
    Sender,
    Unsubscription,
)
from wsbroadcast.tracing import is_traceparent

VERSION = 1
"""The version that this library writes and reads."""

MAX_HEADER_BYTES = 256 * 1024
"""The longest header, in bytes. Only `exclude` makes a header long; this is room for about 13,000 connections."""

# The fields that `must` may name. A node that doesn't understand a field in `must` drops the envelope.
_MUST = ("audiences", "exclude_users")

_MAX_NODE_LENGTH = 64
_MAX_ID_LENGTH = 64

# The form of the id of a node or a question.
_NODE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NODE_MESSAGES: dict[str, NodeMessageKind] = {kind: kind for kind in get_args(NodeMessageKind)}

# Nearly all messages have one of these two headers. `decode` reads them without a parser.
_TEXT = b'{"v":1,"node":"%s","seq":%d}\n%s'
_JSON = b'{"v":1,"node":"%s","seq":%d,"type":"json"}\n%s'
_PLAIN = re.compile(
    rb'\{"v":1,"node":"([A-Za-z0-9_-]{1,64})","seq":([1-9][0-9]{0,17})(,"type":"json")?'
    # The position, which a broker adds at the end of the header.
    rb'(?:,"epoch":"([A-Za-z0-9_-]{1,64})","offset":([1-9][0-9]{0,17}),"previous":(0|[1-9][0-9]{0,17}))?\}\n'
)


class BadEnvelope(Exception):
    """Raised for bytes that are no envelope. Its text is the reason under which they are counted."""


class Origin(NamedTuple):
    """The node that an envelope comes from, and its number among the envelopes of that node."""

    node: str
    seq: int


def encode(publication: Publication | Control, origin: Origin | None) -> bytes:
    """Write an envelope.

    Args:
        publication: What it holds.
        origin: The node and the envelope's number; `None` if that isn't known, as inside a transaction.

    Raises:
        EncodeError: If it names too many connections, users or audiences.
    """
    if isinstance(publication, Dismissal):
        header = {"type": "close", "code": publication.code}
        return _encoded(header, publication.exclude, origin, publication.reason.encode(errors="replace"))
    if isinstance(publication, Unsubscription):
        return _encoded({"type": "unsubscribe", "channels": publication.channels}, NOBODY, origin, b"")
    if isinstance(publication, Forgetting):
        return _encoded({"type": "forgotten"}, NOBODY, origin, b"")
    if isinstance(publication, PresenceChange):
        return _encoded({"type": "presence", "version": publication.version}, NOBODY, origin, _who(publication))
    if isinstance(publication, NodeMessage):
        header = {"type": "nodes", "kind": publication.kind, "sender": publication.sender}
        if publication.id:
            header["id"] = publication.id
        return _encoded(header, NOBODY, origin, publication.body)
    message, exclude = publication.message, publication.exclude
    form = message.form
    is_special = (
        publication.id is not None
        or publication.exclude_users
        or publication.traceparent
        or publication.sender is not None
    )
    if origin is not None and form != "binary" and not exclude and message.key is None and not is_special:
        # Nearly all messages: the same text as `json.dumps` writes, in a tenth of the time.
        template = _TEXT if form == "text" else _JSON
        return template % (origin.node.encode(), origin.seq, message.payload)
    header = {} if form == "text" else {"type": form}
    if message.key is not None:
        header["key"] = message.key
    if is_special:
        header |= _special(publication)
    return _encoded(header, exclude, origin, message.payload)


def _who(change: PresenceChange) -> bytes:
    joined = {name: info.decode() for name, info in change.joined.items()}
    return json.dumps({"by": change.by, "joined": joined, "left": sorted(change.left)}).encode()


def _special(publication: Publication) -> dict[str, Any]:
    # A node that ignored these would send the message to somebody twice, or to somebody who is excluded.
    header: dict[str, Any] = {}
    if publication.id is not None:
        header["id"] = publication.id
    if publication.audiences:
        header["audiences"] = [list(audience) for audience in publication.audiences]
    if publication.exclude_users:
        header["exclude_users"] = sorted(publication.exclude_users)
    if must := [name for name in _MUST if name in header]:
        header["must"] = must
    if publication.traceparent:
        header["traceparent"] = publication.traceparent
    if (sender := publication.sender) is not None:
        header["sender"] = [sender.client, sender.user, sender.info.decode(), sender.channel_info.decode()]
    return header


def _encoded(fields: dict[str, Any], exclude: frozenset[str], origin: Origin | None, payload: bytes) -> bytes:
    header: dict[str, Any] = {"v": VERSION}
    if origin is not None:
        header |= {"node": origin.node, "seq": origin.seq}
    header |= fields
    if exclude:
        header["exclude"] = sorted(exclude)
    line = json.dumps(header, separators=(",", ":")).encode()
    if len(line) > MAX_HEADER_BYTES:
        raise EncodeError("a broadcast names more connections, users or audiences than an envelope holds: name fewer")
    return line + b"\n" + payload


def decode(envelope: bytes, audience: Audience, max_bytes: int) -> tuple[Publication | Control, Origin | None]:
    """Read an envelope that came under an audience's name. The bytes are untrusted.

    Raises:
        BadEnvelope: If the bytes are too large, are no envelope or one of another version, break the schema, or name a
            field in `must` that isn't known here.
    """
    plain = _PLAIN.match(envelope)
    if plain is not None and len(envelope) - plain.end() <= max_bytes and audience.kind != "nodes":
        publication = Publication(_message(envelope[plain.end() :], "json" if plain[3] else "text", None), audience)
        if plain[4] is not None:
            publication.place(Position(plain[4].decode(), int(plain[5])), int(plain[6]))
        return publication, Origin(plain[1].decode(), int(plain[2]))
    if len(envelope) > max_bytes + MAX_HEADER_BYTES:
        raise BadEnvelope("too_large")
    header, payload = _split(envelope)
    if len(payload) > max_bytes:
        raise BadEnvelope("too_large")
    return _publication(header, payload, audience), _origin(header)


def _split(envelope: bytes) -> tuple[dict[str, Any], bytes]:
    end = envelope.find(b"\n", 0, MAX_HEADER_BYTES + 1)
    if end < 0:
        raise BadEnvelope("header")
    try:
        header = from_json(envelope[:end], allow_inf_nan=False)
    except ValueError:  # broken JSON or UTF-8, or JSON that is nested too deep
        raise BadEnvelope("header") from None
    if type(header) is not dict:
        raise BadEnvelope("header")
    version = header.get("v")
    if type(version) is not int:
        raise BadEnvelope("schema")
    if version != VERSION:
        raise BadEnvelope("version")
    must = header.get("must", [])
    if type(must) is not list:
        raise BadEnvelope("schema")
    if not all(name in _MUST for name in must):  # this node would misunderstand the envelope
        raise BadEnvelope("must")
    return header, envelope[end + 1 :]


def _publication(header: dict[str, Any], payload: bytes, audience: Audience) -> Publication | Control:
    kind = header.get("type", "text")
    if kind == "nodes" or audience.kind == "nodes":
        return _node_message(header, payload, audience)
    if kind in ("text", "json", "binary"):
        key, id_ = header.get("key"), header.get("id")
        is_id = id_ is None or (type(id_) is str and 0 < len(id_) <= _MAX_ID_LENGTH)
        if not (key is None or type(key) is str) or not is_id:
            raise BadEnvelope("schema")
        publication = Publication(
            _message(payload, kind, key),
            audience,
            _texts(header, "exclude"),
            exclude_users=_texts(header, "exclude_users"),
            id=id_,
            audiences=_audiences(header.get("audiences", [])),
        )
        if is_traceparent(traceparent := header.get("traceparent")):  # anything else is ignored
            publication.traceparent = traceparent
        publication.sender = _sender(header.get("sender"))
        if "epoch" in header:
            publication.place(*_place(header))
        return publication
    if kind == "unsubscribe":
        return Unsubscription(audience, _channels(header.get("channels")))
    if kind == "forgotten":
        return Forgetting(audience)
    if kind == "presence":
        return _change(header.get("version"), payload, audience)
    code = header.get("code")
    if kind != "close" or type(code) is not int or not is_sendable(code):
        raise BadEnvelope("schema")
    return Dismissal(audience, code, _decoded(payload), _texts(header, "exclude"))


def _change(version: object, payload: bytes, audience: Audience) -> PresenceChange:
    try:
        found = from_json(payload, allow_inf_nan=False)
    except ValueError:
        raise BadEnvelope("schema") from None
    match found:
        case {"by": str() as by, "joined": dict() as joined, "left": list() as left}:
            are_texts = all(type(info) is str for info in joined.values()) and all(type(name) is str for name in left)
            if are_texts and type(version) is int and 0 < version <= MAX_OFFSET:
                infos = {name: info.encode() for name, info in joined.items()}
                return PresenceChange(audience, version, infos, frozenset(left), by)
    raise BadEnvelope("schema")


def _node_message(header: dict[str, Any], payload: bytes, audience: Audience) -> NodeMessage:
    if len(payload) > MAX_NODE_MESSAGE_BYTES:
        raise BadEnvelope("too_large")
    match header:
        case {"type": "nodes", "kind": str() as kind, "sender": str() as sender} if audience.kind == "nodes":
            id_ = header.get("id")
            is_asked = kind in ("question", "answer")
            is_id = _is_node_id(id_) if is_asked else id_ is None
            if kind in _NODE_MESSAGES and _is_node_id(sender) and is_id:
                return NodeMessage(audience, _NODE_MESSAGES[kind], sender, id_ or "", payload)
    raise BadEnvelope("schema")


def _is_node_id(text: object) -> bool:
    return type(text) is str and _NODE_ID.fullmatch(text) is not None


def _place(header: dict[str, Any]) -> tuple[Position, int]:
    match header:
        case {"epoch": str() as epoch, "offset": int() as offset, "previous": int() as previous}:
            if EPOCH.fullmatch(epoch) and 0 <= previous < offset <= MAX_OFFSET:
                return Position(epoch, int(offset)), int(previous)
    raise BadEnvelope("schema")


def _sender(found: object) -> Sender | None:
    match found:
        case [str() as client, str() as user, str() as info, str() as channel_info]:
            return Sender(client, user, info.encode(), channel_info.encode())
        case None:
            return None
    raise BadEnvelope("schema")


def _texts(header: dict[str, Any], name: str) -> frozenset[str]:
    texts = header.get(name)
    if texts is None:
        return NOBODY
    if type(texts) is not list or not all(type(text) is str for text in texts):
        raise BadEnvelope("schema")
    return frozenset(texts) or NOBODY


def _audiences(found: object) -> tuple[Audience, ...]:
    audiences: list[Audience] = []
    for each in found if type(found) is list else [None]:
        match each:
            case ["everyone", ""]:
                audiences.append(EVERYONE)
            case ["channel", str() as name]:
                audiences.append(Audience("channel", _checked(check_channel, name)))
            case ["user", str() as name]:
                audiences.append(Audience("user", _checked(user_key, name)))
            case _:
                raise BadEnvelope("schema")
    if len(audiences) > MAX_AUDIENCES:
        raise BadEnvelope("schema")
    return tuple(audiences)


def _channels(found: object) -> tuple[str, ...]:
    if type(found) is not list or not found:
        raise BadEnvelope("schema")
    return tuple(_checked(check_channel, name) for name in found)


def _checked(check: Callable[[object], str], name: object) -> str:
    try:
        return check(name)
    except ValueError:
        raise BadEnvelope("schema") from None


def _message(payload: bytes, form: Form, key: str | None) -> Message:
    if form != "binary":
        _decoded(payload)
    return Message(payload, form, key=key)


def _decoded(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise BadEnvelope("text") from None


def _origin(header: dict[str, Any]) -> Origin | None:
    node, seq = header.get("node"), header.get("seq")
    if node is None and seq is None:
        return None
    if type(node) is not str or not 0 < len(node) <= _MAX_NODE_LENGTH or type(seq) is not int or seq < 1:
        raise BadEnvelope("schema")
    return Origin(node, seq)
