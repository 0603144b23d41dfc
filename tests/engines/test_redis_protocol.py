"""The protocol of Redis, without a connection."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsbroadcast.engines.redis.protocol import ErrorReply, Reply, ReplyReader, pack


def test_command_is_packed_with_lengths_in_bytes() -> None:
    assert pack("PUBLISH", "näws", b"\x00\r\n") == b"*3\r\n$7\r\nPUBLISH\r\n$5\r\nn\xc3\xa4ws\r\n$3\r\n\x00\r\n\r\n"


def test_reader_knows_every_kind_of_reply() -> None:
    wire = b"+OK\r\n:-7\r\n$3\r\n\r\n\x00\r\n$0\r\n\r\n$-1\r\n*-1\r\n*0\r\n*2\r\n:1\r\n*1\r\n$1\r\na\r\n"
    assert list(ReplyReader().feed(wire)) == [b"OK", -7, b"\r\n\x00", b"", None, None, [], [1, [b"a"]]]


def test_error_reply_has_a_code() -> None:
    (reply,) = ReplyReader().feed(b"-NOPERM this user has no permissions\r\n")
    assert isinstance(reply, ErrorReply)
    assert reply.code == "NOPERM"
    assert str(reply) == "NOPERM this user has no permissions"


@given(
    st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=4), max_size=20),
    st.lists(st.integers(min_value=1, max_value=400), min_size=1),
)
def test_reader_finds_the_same_replies_however_they_are_cut(replies: list[list[bytes]], cuts: list[int]) -> None:
    wire = b"".join(pack(*reply) for reply in replies)
    reader = ReplyReader()
    found: list[Reply] = []
    position = 0
    while position < len(wire):
        size = cuts[len(found) % len(cuts)]
        found += reader.feed(wire[position : position + size])
        position += size
    assert found == replies


def test_reader_takes_a_large_reply_in_pieces_without_reading_it_again_and_again() -> None:
    envelope = bytes(20_000_000)
    wire = pack("message", "news", envelope)
    reader = ReplyReader()
    found = [reply for start in range(0, len(wire), 4096) for reply in reader.feed(wire[start : start + 4096])]
    assert found == [[b"message", b"news", envelope]]


@pytest.mark.parametrize("wire", [b"HTTP/1.1 400 Bad Request\r\n", b"$many\r\n", b"*x\r\n", b"\r\n", b">2\r\n"])
def test_reader_refuses_what_is_not_the_protocol(wire: bytes) -> None:
    with pytest.raises(ValueError, match=r"Redis|invalid literal"):
        list(ReplyReader().feed(wire))
