r"""The versioned form in which a publication travels between nodes: a line of JSON, then the payload as it is.

    {"v":1,"node":"kX2…","seq":42}\nhello

Any program can publish with `{"v":1}`, a newline and a text; docs/envelope.md describes the form.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from pydantic_core import from_json

from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import is_sendable
from wsbroadcast.exceptions import EncodeError
from wsbroadcast.message import Form, Message
from wsbroadcast.publication import NOBODY, Dismissal, Publication

VERSION = 1
"""The version this library writes and reads."""

MAX_HEADER_BYTES = 256 * 1024
"""The longest header. What makes one long is `exclude`: this is room for about 13,000 connections."""

_MAX_NODE_LENGTH = 64
_MAX_ID_LENGTH = 64

# What `encode` writes for nearly all messages, so that the header need not be parsed.
_TEXT = b'{"v":1,"node":"%s","seq":%d}\n%s'
_JSON = b'{"v":1,"node":"%s","seq":%d,"type":"json"}\n%s'
_PLAIN = re.compile(rb'\{"v":1,"node":"([A-Za-z0-9_-]{1,64})","seq":([1-9][0-9]{0,17})(,"type":"json")?\}\n')


class BadEnvelope(Exception):
    """Raised for bytes that are no envelope; its text is the reason they are counted under."""


class Origin(NamedTuple):
    """Where an envelope comes from, and its place among those from there."""

    node: str
    seq: int


def encode(publication: Publication | Dismissal, origin: Origin | None) -> bytes:
    """Write an envelope; without an origin where its place in an order isn't known, as inside a transaction.

    Raises:
        EncodeError: If it excludes too many connections.
    """
    if isinstance(publication, Dismissal):
        header = {"type": "close", "code": publication.code}
        return _encoded(header, publication.exclude, origin, publication.reason.encode(errors="replace"))
    message, exclude = publication.message, publication.exclude
    form = message.form
    if origin is not None and form != "binary" and not exclude and message.key is None and publication.id is None:
        # Nearly all: what `json.dumps` would write, at a tenth of its price.
        template = _TEXT if form == "text" else _JSON
        return template % (origin.node.encode(), origin.seq, message.payload)
    header = {} if form == "text" else {"type": form}
    if publication.id is not None:
        header["id"] = publication.id
    if message.key is not None:
        header["key"] = message.key
    return _encoded(header, exclude, origin, message.payload)


def _encoded(fields: dict[str, Any], exclude: frozenset[str], origin: Origin | None, payload: bytes) -> bytes:
    header: dict[str, Any] = {"v": VERSION}
    if origin is not None:
        header |= {"node": origin.node, "seq": origin.seq}
    header |= fields
    if exclude:
        header["exclude"] = sorted(exclude)
    line = json.dumps(header, separators=(",", ":")).encode()
    if len(line) > MAX_HEADER_BYTES:
        raise EncodeError(f"a broadcast excludes {len(exclude)} connections, more than an envelope holds")
    return line + b"\n" + payload


def decode(envelope: bytes, audience: Audience, max_bytes: int) -> tuple[Publication | Dismissal, Origin | None]:
    """Read an envelope that came under an audience's name. The bytes are untrusted.

    Raises:
        BadEnvelope: If they are too large, no envelope, of another version, don't keep to the schema, or have a field
            that must be understood and isn't.
    """
    plain = _PLAIN.match(envelope)
    if plain is not None and len(envelope) - plain.end() <= max_bytes:
        message = _message(envelope[plain.end() :], "json" if plain[3] else "text", None)
        return Publication(message, audience), Origin(plain[1].decode(), int(plain[2]))
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
    except ValueError:  # broken UTF-8 and a nesting that is too deep, too
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
    if must:  # this version knows no field without which an envelope would be misunderstood
        raise BadEnvelope("must")
    return header, envelope[end + 1 :]


def _publication(header: dict[str, Any], payload: bytes, audience: Audience) -> Publication | Dismissal:
    kind = header.get("type", "text")
    key, id_, exclude = header.get("key"), header.get("id"), header.get("exclude")
    if not (key is None or type(key) is str) or not (id_ is None or (type(id_) is str and len(id_) <= _MAX_ID_LENGTH)):
        raise BadEnvelope("schema")
    if exclude is not None and (type(exclude) is not list or not all(type(one) is str for one in exclude)):
        raise BadEnvelope("schema")
    excluded = frozenset(exclude) if exclude else NOBODY
    if kind in ("text", "json", "binary"):
        return Publication(_message(payload, kind, key), audience, excluded, id=id_)
    code = header.get("code")
    if kind != "close" or type(code) is not int or not is_sendable(code):
        raise BadEnvelope("schema")
    return Dismissal(audience, code, _decoded(payload), excluded)


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
