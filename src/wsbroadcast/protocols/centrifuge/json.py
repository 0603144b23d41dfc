"""The JSON form of the Centrifuge client protocol: one object in each line. No I/O.

A payload is cut out of a command as the text that came, and is put into a reply unchanged. So clients get what was
published byte for byte, with the same spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from json import JSONDecoder
from typing import Any, Literal

from pydantic_core import from_json, to_json

from wsbroadcast.protocols.centrifuge.schema import BOOL, BYTES, MAX_COMMANDS, SHAPES, Field, Malformed, Message

_SPACE = re.compile(r"[ \t\r\n]*")
_value = JSONDecoder().raw_decode


class NotJSON(ValueError):
    """Raised for a payload that clients of the JSON form can't be sent."""


def is_json(payload: bytes) -> bool:
    """Return whether a payload is JSON: UTF-8, nested less than 200 deep, without NaN or lone surrogates."""
    try:
        from_json(payload, allow_inf_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


class JSONCodec:
    """Reads and writes JSON. See `Codec`."""

    name: Literal["json", "protobuf"] = "json"
    subprotocol = "centrifuge-json"
    form: Literal["text", "binary"] = "text"
    ping = b"{}"

    def decode(self, frame: str | bytes) -> list[Message]:
        """Return the commands of a frame.

        Raises:
            Malformed: If it is binary or empty, or if one of its lines is not a command.
        """
        if not isinstance(frame, str):
            raise Malformed("a JSON client sends text frames")
        lines = frame.removesuffix("\n").split("\n", MAX_COMMANDS)
        if len(lines) > MAX_COMMANDS:
            raise Malformed(f"a frame has at most {MAX_COMMANDS} commands")
        return [{} if line == "{}" else _command(line) for line in lines]

    def encode(self, reply: Mapping[str, Any]) -> bytes:
        """Return a reply or a push as one line, without a line end.

        Raises:
            NotJSON: If a payload isn't JSON.
        """
        return _written("Reply", reply)

    def join(self, lines: Iterable[bytes]) -> bytes:
        """Return the payload of one text frame that holds several results of `encode`."""
        return b"\n".join(lines)


JSON = JSONCodec()


# Reading. `from_json` has checked each line first, so from here on it is known to be JSON.


def _command(line: str) -> Message:
    try:
        command = from_json(line.encode(), allow_inf_nan=False)
        if not isinstance(command, dict):
            raise Malformed("a command is an object of JSON")
        return _read("Command", command, line, _after_space(line, 0))
    except (ValueError, RecursionError) as error:
        raise Malformed("a command is one line of JSON") from error


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # it may be empty
    return match.end()


def _extents(text: str, at: int) -> dict[str, tuple[int, int]]:
    # For each member of the object that begins there: where the text of its value begins and ends.
    found = {}
    at = _after_space(text, at + 1)
    while text[at] != "}":
        name, at = _value(text, at)
        start = _after_space(text, _after_space(text, at) + 1)
        _, at = _value(text, start)
        found[name] = start, at
        at = _after_space(text, at)
        if text[at] == ",":
            at = _after_space(text, at + 1)
    return found


def _read(shape: str, object_: dict[str, Any], text: str, at: int) -> Message:
    # The text is searched again only where a payload may be: in a command that is at most four objects deep. Searching
    # a whole frame of 64 KiB, once for each object in it, would take half a second.
    found = SHAPES[shape]
    extents = _extents(text, at) if found.has_payloads else {}
    message: Message = {}
    for name, value in object_.items():
        field = found.by_name.get(name)
        if field is None:
            continue
        start, end = extents.get(name, (0, 0))
        if field.kind is BYTES:
            message[name] = text[start:end].encode()
        elif value is not None:  # null means that the field is missing
            message[name] = _checked(field, value, text, start)
    return message


def _checked(field: Field, value: Any, text: str, at: int) -> Any:
    if field.is_map:
        if not isinstance(value, dict):
            raise Malformed(f"{field.name} is an object")
        extents = _extents(text, at) if field.message and SHAPES[field.message].has_payloads else {}
        return {key: _single(field, each, text, extents.get(key, (0, 0))[0]) for key, each in value.items()}
    if field.is_repeated:
        if not isinstance(value, list):
            raise Malformed(f"{field.name} is a list")
        return [_single(field, each, text, 0) for each in value]  # no list in a command has payloads
    return _single(field, value, text, at)


def _single(field: Field, value: Any, text: str, at: int) -> Any:
    if field.message:
        if not isinstance(value, dict):
            raise Malformed(f"{field.name} is an object")
        return _read(field.message, value, text, at)
    limits = field.limits
    if limits:
        if type(value) is not int or not limits[0] <= value <= limits[1]:
            raise Malformed(f"{field.name} is an integer from {limits[0]} to {limits[1]}")
    elif type(value) is not (bool if field.kind is BOOL else str):
        raise Malformed(f"{field.name} is {'true or false' if field.kind is BOOL else 'a string'}")
    return value


# Writing.


def _written(shape: str, message: Mapping[str, Any]) -> bytes:
    found = SHAPES[shape]
    members = [b'"%b":%b' % (field.name.encode(), _put(field, value)) for field, value in found.present(message)]
    members += [
        b'"%b":%b' % (field.name.encode(), to_json(field.zero))
        for field in found.in_json
        if not message.get(field.name) and (field.is_always or message.get(field.goes_with))
    ]
    return b"{%b}" % b",".join(members)


def _put(field: Field, value: Any) -> bytes:
    if field.is_map and field.message:
        return b"{%b}" % b",".join([b"%b:%b" % (to_json(key), _put_one(field, each)) for key, each in value.items()])
    if field.is_repeated and field.message:
        return b"[%b]" % b",".join([_put_one(field, each) for each in value])
    return _put_one(field, value)


def _put_one(field: Field, value: Any) -> bytes:
    if field.message:
        return _written(field.message, value)
    if field.kind is not BYTES:
        return to_json(value)
    if not is_json(value):
        raise NotJSON(f"{field.name} isn't JSON")
    payload: bytes = value
    # A line end can only be between tokens: a string of JSON has none.
    return payload.replace(b"\n", b"") if b"\n" in payload else payload
