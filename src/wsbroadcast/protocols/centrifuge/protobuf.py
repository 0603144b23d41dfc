"""The Protobuf form of the Centrifuge client protocol: binary frames of messages, each after its length. No I/O.

The encoding of Protobuf is a page of rules (https://protobuf.dev/programming-guides/encoding/), and JSON needs the
table of messages anyway. So this is shorter than generated code. It needs no runtime, which people may have pinned to
another version. The tests compare it with that runtime.

A frame may have field numbers of 1 to 2^29-1, varints of at most 10 bytes, messages nested at most 100 deep (the limit
of Protobuf's own runtimes), and strings of valid UTF-8. Groups are rejected: the protocol never had one. Like every
reader of Protobuf, this one takes the last value of a field that comes twice, merges messages that come twice, and
skips what it doesn't know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from wsbroadcast.protocols.centrifuge.schema import (
    BOOL,
    BYTES,
    MAX_COMMANDS,
    SHAPES,
    SINT64,
    STRING,
    Field,
    Malformed,
    Message,
)

MAX_DEPTH = 100
"""The deepest nesting of messages."""

# The wire types.
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class ProtobufCodec:
    """Reads and writes Protobuf. See `Codec`."""

    name: Literal["json", "protobuf"] = "protobuf"
    subprotocol = "centrifuge-protobuf"
    form: Literal["text", "binary"] = "binary"
    ping = b"\x00"

    def decode(self, frame: str | bytes) -> list[Message]:
        """Return the commands of a frame.

        Raises:
            Malformed: If it is text or empty, or if it can't be read.
        """
        if isinstance(frame, str):
            raise Malformed("a Protobuf client sends binary frames")
        if not frame:
            raise Malformed("a frame has at least one command")
        commands: list[Message] = []
        at = 0
        while at < len(frame):
            if len(commands) == MAX_COMMANDS:
                raise Malformed(f"a frame has at most {MAX_COMMANDS} commands")
            start, end = _extent(frame, at, len(frame))
            commands.append(_read("Command", frame, start, end, {}, MAX_DEPTH))
            at = end
        return commands

    def encode(self, reply: Mapping[str, Any]) -> bytes:
        """Return a reply or a push, after its length."""
        written = _written("Reply", reply)
        return _varint(len(written)) + written

    def join(self, lines: Iterable[bytes]) -> bytes:
        """Return the payload of one binary frame that holds several results of `encode`."""
        return b"".join(lines)


PROTOBUF = ProtobufCodec()


# Reading.


def _number(data: bytes, at: int, end: int) -> tuple[int, int]:
    # Return a varint, and where it ends.
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at
        shift += 7
    raise Malformed("a varint has at most 64 bits, and an end")


def _extent(data: bytes, at: int, end: int) -> tuple[int, int]:
    # Return where the bytes begin and end whose length comes first.
    size, at = _number(data, at, end)
    if size > end - at:
        raise Malformed("a length is that of bytes which are there")
    return at, at + size


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    # Yield for each field its number, its wire type, and then a varint's value and 0, or where its bytes begin and end.
    while at < end:
        tag, at = _number(data, at, end)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise Malformed("a field's number is from 1 to 536870911")
        if wire == _VARINT:
            value, at = _number(data, at, end)
            yield number, wire, value, 0
        elif wire == _LENGTH:
            start, at = _extent(data, at, end)
            yield number, wire, start, at
        elif wire in (_FIXED64, _FIXED32):
            start, at = at, at + (8 if wire == _FIXED64 else 4)
            if at > end:
                raise Malformed("a fixed number has 4 or 8 bytes")
            yield number, wire, start, at
        else:
            raise Malformed("a wire type is 0, 1, 2 or 5")


def _read(shape: str, data: bytes, at: int, end: int, message: Message, depth: int) -> Message:
    # Add what is read to the message: a message that comes in two parts is the sum of both.
    if depth < 0:
        raise Malformed(f"messages are nested at most {MAX_DEPTH} deep")
    if at == end:
        return message
    by_number = SHAPES[shape].by_number
    for number, wire, first, last in _fields(data, at, end):
        field = by_number.get(number)
        if field is None or (wire == _VARINT) != field.is_varint or wire in (_FIXED64, _FIXED32):
            continue
        if field.is_map:
            key, value = _entry(field, data, first, last, depth - 1)
            message.setdefault(field.name, {})[key] = value
        elif field.is_repeated:
            message.setdefault(field.name, []).append(_single(field, data, first, last, {}, depth))
        else:
            message[field.name] = _single(field, data, first, last, message.get(field.name), depth)
    return message


def _entry(field: Field, data: bytes, at: int, end: int, depth: int) -> tuple[str, Any]:
    key = ""
    value: Any = {} if field.message else ""
    for number, wire, first, last in _fields(data, at, end):
        if wire != _LENGTH or number > 2:
            # Runtimes don't agree on the meaning of such an entry.
            raise Malformed("an entry of a map has a key and a value")
        if number == 1:
            key = _text(data, first, last)
        else:
            value = _single(field, data, first, last, value, depth)
    return key, value


def _single(field: Field, data: bytes, first: int, last: int, before: Any, depth: int) -> Any:
    if field.message:
        return _read(field.message, data, first, last, {} if before is None else before, depth - 1)
    if field.kind is STRING:
        return _text(data, first, last)
    if field.kind is BYTES:
        return data[first:last]
    return _of_varint(field, first)


def _text(data: bytes, first: int, last: int) -> str:
    try:
        return data[first:last].decode()
    except UnicodeDecodeError as error:
        raise Malformed("a string is UTF-8") from error


def _of_varint(field: Field, value: int) -> int | bool:
    if field.kind is BOOL:
        return bool(value)
    if field.kind is SINT64:
        return (value >> 1) ^ -(value & 1)
    least, greatest = field.limits or (0, 0)
    if least and value >= 1 << 63:
        value -= 1 << 64  # two's complement
    if not least <= value <= greatest:
        # Protobuf's runtimes cut it off. Then the id 2^32 + 1 would be answered as 1.
        raise Malformed(f"{field.name} is an integer from {least} to {greatest}")
    return value


# Writing. Fields are in the order of their numbers, without those that are zero, as in Protobuf's runtimes.


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _written(shape: str, message: Mapping[str, Any]) -> bytes:
    parts: list[bytes] = []
    for field, value in SHAPES[shape].present(message):
        if field.is_varint:
            parts += _varint(field.number << 3), _varint(_for_varint(field, value))
        elif field.is_map:
            for key, each in value.items():
                parts += _delimited(field.number, _entry_of(field, key, each))
        elif field.is_repeated:
            for each in value:
                parts += _delimited(field.number, _bytes_of(field, each))
        else:
            parts += _delimited(field.number, _bytes_of(field, value))
    return b"".join(parts)


def _delimited(number: int, value: bytes) -> tuple[bytes, bytes, bytes]:
    return _varint(number << 3 | _LENGTH), _varint(len(value)), value


def _entry_of(field: Field, key: str, value: Any) -> bytes:
    return b"".join((*_delimited(1, key.encode()), *_delimited(2, _bytes_of(field, value))))


def _bytes_of(field: Field, value: Any) -> bytes:
    if field.message:
        return _written(field.message, value)
    if field.kind is STRING:
        return str(value).encode()
    return bytes(value)


def _for_varint(field: Field, value: int) -> int:
    if field.kind is SINT64:
        return (value << 1) ^ (value >> 63)
    return int(value) & (1 << 64) - 1
