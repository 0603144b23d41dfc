"""The frames of `wsbroadcast.v1` as JSON Schema, for documents: what clients send and what they are sent. No I/O.

A schema is a dict, made anew for each caller. It describes the same as docs/protocol.md, and has no references.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from wsbroadcast.history import MAX_KEY_BYTES
from wsbroadcast.protocols.commands import MAX_ID_CHARACTERS, MAX_TOKEN_CHARACTERS, ErrorCode
from wsbroadcast.protocols.events import VERSION

Schema: TypeAlias = dict[str, Any]
"""A JSON Schema; empty for any JSON."""

Frames: TypeAlias = dict[str, Schema]
"""Schemas of frames by their `type`."""


def text(description: str = "", **more: Any) -> Schema:
    """Return the schema of a text."""
    return {"type": "string", **({"description": description} if description else {}), **more}


def frame(kind: str, description: str, required: Schema, optional: Schema | None = None) -> Schema:
    """Return the schema of a frame.

    Args:
        kind: Its `type`.
        description: What it means.
        required: The schemas of the fields that it always has.
        optional: The schemas of its other fields.
    """
    return {
        "title": kind,
        "description": description,
        "type": "object",
        "properties": {"type": {"type": "string", "const": kind}, **required, **(optional or {})},
        "required": ["type", *required],
    }


def untyped(accepts: str) -> Schema:
    """Return the schema of what is published if no type is known.

    Args:
        accepts: What clients may send: `any`, `text`, `bytes` or `json`.
    """
    return text() if accepts in ("text", "bytes") else {}


# Parts of several frames.


def _id() -> Schema:
    return {
        "anyOf": [{"type": "integer"}, {"type": "string", "maxLength": MAX_ID_CHARACTERS}],
        "description": "Names the command. Its answer has the same `id`.",
    }


def _channel() -> Schema:
    return text("The channel.")


def _position() -> Schema:
    return text("A place in the history of the channel, if messages are kept.")


def _where(*to: str) -> Schema:
    kinds = to or ("user", "everyone")
    return {"channel": _channel(), "to": text("In place of the channel.", enum=list(kinds))}


def _encoding() -> Schema:
    return text("Says that `data` is the base64 of bytes.", const="base64")


def _answer(kind: str, description: str, required: Schema | None = None, optional: Schema | None = None) -> Schema:
    return frame(kind, description, required or {}, {**(optional or {}), "id": _id()})


def _object(**required: Schema) -> Schema:
    return {"type": "object", "properties": required, "required": list(required)}


def _number() -> Schema:
    return {"type": "number"}


def _member() -> Schema:
    return {
        "type": "object",
        "properties": {
            "user": {"anyOf": [text(), {"type": "null"}], "description": "Null for a connection without a user."},
            "id": text("The connection's id, if each connection counts."),
            "info": {"description": "What others may see of it."},
        },
        "required": ["user", "info"],
    }


def mistakes() -> Schema:
    """Return the schema of a list of mistakes, which pydantic has found."""
    place = {"type": "array", "items": {"anyOf": [text(), {"type": "integer"}]}}
    return {
        "description": "What doesn't fit.",
        "type": "array",
        "items": _object(loc=place, type=text(), msg=text()),
    }


def error() -> Schema:
    """Return the schema of the answer to something that isn't done."""
    codes = [str(code) for code in ErrorCode]
    code = text("For programs: one of the examples, or a code of the app.", examples=codes)
    return _answer(
        "error", "Something isn't done.", {"code": code, "text": text("For people.")}, {"errors": mistakes()}
    )


def message(data: Schema) -> Schema:
    """Return the schema of a broadcast message, as clients of events get it."""
    optional = {
        **_where("user", "everyone", "connection"),
        "encoding": _encoding(),
        "position": _position(),
        "id": text("The same for all messages of one broadcast to several channels."),
    }
    return frame("message", "What was broadcast.", {"data": data}, optional)


def subscribed() -> Schema:
    """Return the schema of the event that says from where on messages follow."""
    optional = {
        **_where(),
        "position": _position(),
        "recovered": {"type": "boolean", "description": "Whether everything that was missed follows."},
        "reason": text("Why not."),
    }
    return _answer("subscribed", "Messages of a channel follow from here on.", {}, optional)


def gap() -> Schema:
    """Return the schema of the event that says that messages are lost."""
    return frame(
        "gap",
        "Messages were missed that can't be had any more.",
        {"reason": text()},
        {**_where(), "position": _position()},
    )


def presence() -> Schema:
    """Return the schema of the event that says who is in a channel, or what has changed."""
    members = {"type": "array", "items": _member()}
    whole = {"type": "integer"}
    return _answer(
        "presence",
        "Who is in a channel: all `members`, what has changed since `previous`, or only how many.",
        {"channel": _channel(), "version": whole, "count": whole},
        {
            "previous": whole,
            "members": members,
            "joined": members,
            "left": {"type": "array", "items": text(), "description": "Users; or ids, if each connection counts."},
        },
    )


def events(data: Schema) -> Frames:
    """Return the schemas of what a client of events is sent without asking.

    Args:
        data: The schema of what is broadcast.
    """
    reconnect = _object(min=_number(), max=_number())
    frames = [
        frame(
            "hello",
            "The first event.",
            {
                "id": text("The connection's."),
                "version": {"type": "integer", "const": VERSION},
                "ping": {"type": "number", "description": "Seconds between two pings."},
                "reconnect": {**reconnect, "description": "Seconds to wait before another attempt."},
            },
        ),
        subscribed(),
        message(data),
        frame("position", "A message was kept that this client doesn't get.", {"position": _position()}, _where()),
        gap(),
        frame("ping", "The connection is alive.", {}),
        presence(),
        frame(
            "expiring",
            "The connection ends, unless it is refreshed.",
            {
                "expires_at": {"type": "number", "description": "Seconds since 1970."},
                "seconds": {"type": "number", "description": "How soon."},
            },
        ),
    ]
    return {each["title"]: each for each in frames}


def result(data: Schema) -> Schema:
    """Return the schema of the answer to a call."""
    return _answer("result", "The result of a method.", {"data": data})


def published(*, is_typed: bool) -> list[Schema]:
    """Return the schemas of the answers to a publish.

    Args:
        is_typed: Whether a handler of the server may take it, because its type is known.
    """
    repeat = {"type": "boolean", "description": "Whether it was published before under the same key."}
    optional = {**_where("everyone"), "position": _position(), "is_repeat": repeat}
    handled = _answer("handled", "A handler of the server has taken it.", {}, _where("everyone"))
    return [_answer("published", "It was published.", {}, optional), *([handled] if is_typed else [])]


def answers() -> Frames:
    """Return the schemas of the answers to commands, apart from those to `publish` and `call`, and from events."""
    frames = [
        _answer("unsubscribed", "Messages of a channel don't come any more.", {"channel": _channel()}),
        _answer("unwatched", "Changes of who is in a channel don't come any more.", {"channel": _channel()}),
        _answer("refreshed", "The connection goes on.", {}, {"expires_at": _number()}),
        _answer("pong", "The answer to a ping."),
    ]
    return {each["title"]: each for each in frames}


def publish(data: Schema, *, is_posted: bool = False) -> Schema:
    """Return the schema of the command that publishes.

    Args:
        data: The schema of what is published.
        is_posted: Whether it comes by POST. Then the client must name its connection to leave it out.
    """
    optional = {
        "channel": _channel(),
        "encoding": _encoding(),
        "idempotency_key": text("Names the message, so it may be sent again.", minLength=1, maxLength=MAX_KEY_BYTES),
        "client": text("A random text, if a client without a user sends a key.", minLength=16, maxLength=64),
    }
    if is_posted:
        optional["exclude"] = text("The id of a connection that doesn't get it.", maxLength=MAX_ID_CHARACTERS)
    return _answer("publish", "Publish to a channel, by default that of the path.", {"data": data}, optional)


def call(name: Schema, arguments: Schema, *, needs_any: bool) -> Schema:
    """Return the schema of the command that calls a method.

    Args:
        name: The schema of the method's name.
        arguments: The schema of the method's arguments.
        needs_any: Whether one of the arguments is required.
    """
    required = {"name": name, "args": arguments} if needs_any else {"name": name}
    return _answer("call", "Call a method.", required, {"args": arguments})


def commands() -> Frames:
    """Return the schemas of what a client of events may send, apart from `publish` and `call`."""
    frames = [
        _answer(
            "subscribe",
            "Get the messages of another channel as well.",
            {"channel": _channel()},
            {"since": text("The last position that was seen, or `last`.")},
        ),
        _answer("unsubscribe", "Stop getting the messages of a channel.", {"channel": _channel()}),
        _answer(
            "presence",
            "Be told who is in a channel, by default that of the path.",
            {},
            {"channel": _channel(), "watch": {"type": "boolean", "default": True}},
        ),
        _answer("refresh", "Go on with another token.", {"token": text(minLength=1, maxLength=MAX_TOKEN_CHARACTERS)}),
        _answer("ping", "Ask for a pong."),
        frame("pong", "The client is alive. It isn't answered.", {}),
    ]
    return {each["title"]: each for each in frames}


# Over HTTP.


def close() -> Schema:
    """Return the schema of the last event of a stream, which says why it ends."""
    return frame("close", "The last event: why the stream ends.", {"code": {"type": "integer"}, "reason": text()})


def polled(data: Schema) -> Schema:
    """Return the schema of the answer to a long poll."""
    nothing = {"type": "null"}
    return {
        "title": "polled",
        "description": "The answer to a long poll.",
        "type": "object",
        "properties": {
            "position": {"anyOf": [text(), nothing], "description": "Pass it as `since` in the next poll."},
            "recovered": {"anyOf": [{"type": "boolean"}, nothing]},
            "reason": text("Why not."),
            "id": text("Pass it as `id` in the next poll, to keep the place."),
            "messages": {"type": "array", "items": {"anyOf": [*events(data).values()]}},
        },
        "required": ["position", "recovered", "messages"],
    }
