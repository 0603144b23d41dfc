from __future__ import annotations

import random
import zlib
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from wsbroadcast import Message
from wsbroadcast.delivery.frames import FRAGMENT_BYTES, FRAMED, PIECE_BYTES, Deflated, Unframed, wire_form

LENGTHS = [0, 1, 124, 125, 126, 127, 65534, 65535, 65536]


def serialized(message: Message) -> bytes:
    """What websockets' own serializer makes of it."""
    return Frame(Opcode.TEXT if message.is_text else Opcode.BINARY, message.payload).serialize(mask=False)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("letter", ["x", b"\xff"])
def test_plain_frame_is_what_websockets_writes(length: int, letter: str | bytes) -> None:
    message = Message.of(letter * length)
    assert message._wire(FRAMED) == serialized(message)


@given(st.text() | st.binary() | st.lists(st.integers()))
@example("\U0001f600" * 40)
def test_plain_frame_of_anything_is_what_websockets_writes(value: object) -> None:
    message = Message.of(value)
    assert message._wire(FRAMED) == serialized(message)


def test_frame_is_made_once_for_everybody() -> None:
    message = Message.of("text")
    assert message._wire(FRAMED) is message._wire(FRAMED)


def test_unframed_is_the_payload() -> None:
    message = Message.of("text")
    assert message._wire(Unframed()) is message.payload


# Fragments.


class Piece(NamedTuple):
    """One frame of a message."""

    is_compressed: bool
    frame: Frame

    @property
    def data(self) -> bytes:
        return bytes(self.frame.data)


def pieces(wire: bytes) -> list[Piece]:
    """Cut a wire form where a sink does, and parse each piece by itself: it has to be one whole frame."""
    found = []
    for start in range(0, len(wire), PIECE_BYTES):
        piece = wire[start : start + PIECE_BYTES]
        reader = StreamReader()
        reader.feed_data(bytes((piece[0] & ~0x40,)) + piece[1:])
        reader.feed_eof()
        parsing = Frame.parse(reader.read_exact, mask=False, max_size=None)
        with pytest.raises(StopIteration) as end:
            next(parsing)
        assert not reader.buffer
        found.append(Piece(bool(piece[0] & 0x40), end.value.value))
    return found


LARGE = [FRAGMENT_BYTES + 1, 2 * FRAGMENT_BYTES - 1, 2 * FRAGMENT_BYTES, 2 * FRAGMENT_BYTES + 125, 1_000_000]


@pytest.mark.parametrize("length", LARGE)
@pytest.mark.parametrize("letter", ["x", b"\xff"])
def test_large_message_is_cut_into_fragments(length: int, letter: str | bytes) -> None:
    message = Message.of(letter * length)
    parts = pieces(message._wire(FRAMED))
    assert b"".join(part.data for part in parts) == message.payload
    first = Opcode.TEXT if message.is_text else Opcode.BINARY
    assert [part.frame.opcode for part in parts] == [first] + [Opcode.CONT] * (len(parts) - 1)
    assert [part.frame.fin for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(len(part.data) == FRAGMENT_BYTES for part in parts[:-1])
    assert not any(part.is_compressed for part in parts)


@pytest.mark.parametrize("bits", [9, 12, 15])
def test_large_compressed_message_is_cut_into_fragments_and_says_so_in_the_first(bits: int) -> None:
    message = Message.of(random.Random(1).randbytes(300_000).hex())
    parts = pieces(deflated(message, bits))
    assert len(parts) > 1
    assert [part.is_compressed for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.frame.opcode for part in parts] == [Opcode.TEXT] + [Opcode.CONT] * (len(parts) - 1)
    compressed = b"".join(part.data for part in parts) + b"\x00\x00\xff\xff"
    assert zlib.decompressobj(wbits=-bits).decompress(compressed) == message.payload


def test_message_that_is_small_once_compressed_is_one_frame() -> None:
    [part] = pieces(deflated(Message.of("x" * 1_000_000), 12))
    assert part.frame.fin
    assert part.is_compressed


# permessage-deflate

DEFLATED = {bits: Deflated(bits) for bits in range(9, 16)}


def deflated(message: Message, bits: int) -> bytes:
    return message._wire(DEFLATED[bits])


windows = pytest.mark.parametrize("bits", range(9, 16))
text = st.text("ab \u00e9", max_size=3000) | st.text(min_size=200).map(lambda some: some * 5)


class Client:
    """What websockets' client makes of the frames: one inflater, which remembers what it saw before."""

    def __init__(self, bits: int) -> None:
        self._extension = PerMessageDeflate(
            remote_no_context_takeover=False,
            local_no_context_takeover=False,
            remote_max_window_bits=bits,
            local_max_window_bits=15,
        )

    def read(self, frame: bytes) -> tuple[Opcode, bytes]:
        reader = StreamReader()
        reader.feed_data(frame)
        reader.feed_eof()
        parsing = Frame.parse(reader.read_exact, mask=False, max_size=None, extensions=[self._extension])
        try:
            next(parsing)
        except StopIteration as end:
            parsed: Frame = end.value
            return parsed.opcode, bytes(parsed.data)
        raise AssertionError("the frame is not complete")


@windows
@given(st.lists(text | st.binary(max_size=300), max_size=6))
def test_deflated_frames_reach_a_client_as_they_were(bits: int, values: list[str | bytes]) -> None:
    client = Client(bits)
    for value in values:
        message = Message.of(value)
        opcode = Opcode.TEXT if message.is_text else Opcode.BINARY
        assert client.read(deflated(message, bits)) == (opcode, message.payload)


@windows
def test_deflated_frame_is_smaller_where_that_is_possible(bits: int) -> None:
    message = Message.of({"values": list(range(1000))})
    frame = deflated(message, bits)
    assert len(frame) < message.size * 0.6
    assert deflated(message, bits) is frame
    assert wire_form(window_bits=bits) is wire_form(window_bits=bits)


@windows
@pytest.mark.parametrize("value", ["", "short", bytes(range(256))])
def test_what_does_not_shrink_goes_plain(bits: int, value: str | bytes) -> None:
    message = Message.of(value)
    assert deflated(message, bits) is message._wire(FRAMED)
