"""Events as they are written, read by a parser that was written from the rules of browsers."""

from __future__ import annotations

import gc
import json
import re
from base64 import b64decode
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.sse import Event, EventParser
from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.delivery.sse import chunk, drawn_retry, last_event
from wsbroadcast.message import Message
from wsbroadcast.options import ClientTiming
from wsbroadcast.protocols import sse
from wsbroadcast.protocols.events import gap, hello
from wsbroadcast.publication import Frame, Position, Publication, Withheld

NEWS = Audience("channel", "news")
AT = Position("epoch", 17)

# What parsers stumble over, beside what is drawn from all of Unicode.
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from("\r\n\0 :a\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\ufeff")),
)


def parse(stream: bytes, sizes: list[int] | None = None) -> list[Event]:
    """Parse a stream that comes in pieces."""
    parser, events = EventParser(), []
    for size in sizes or []:
        piece, stream = stream[:size], stream[size:]
        events += parser.feed(piece)
    return events + parser.feed(stream)


def as_lines(text: str) -> str:
    """What a page gets of a text: line ends of the three kinds are one to it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@given(TEXT, st.lists(st.integers(0, 9), max_size=20))
@example("", [])
@example("\n", [])
@example("\r", [])
@example("\r\n", [5, 1, 1])
@example("a\r\n\r\nb", [])
@example("\n\ndata: forged\nid: forged", [])
@example(" leading", [])
@example(":colon", [])
@example("a\u2028b\x0bc\x1cd\x85e", [])
@example("\0", [])
@example("\ufefftext", [])
def test_text_arrives_whole_and_as_one_event(text: str, sizes: list[int]) -> None:
    stream = sse.event(text.encode(), b"", "epoch:17") + sse.event(b"next")
    assert parse(stream, sizes) == [Event(as_lines(text), "message", "epoch:17"), Event("next", "message", "epoch:17")]


@given(st.binary())
def test_bytes_arrive_in_an_event_of_their_own(data: bytes) -> None:
    publication = Publication(Message.of(data), NEWS, position=AT)
    stream = sse.server_sent_events("news")(publication).payload
    [event] = parse(stream)
    assert (event.name, event.id, b64decode(event.data)) == ("binary", str(AT), data)
    [own] = parse(sse.app_event(data))
    assert (own.name, own.id, b64decode(own.data)) == ("binary", "", data)


@given(TEXT, st.sampled_from([NEWS, Audience("channel", "other"), Audience("user", "ann"), EVERYONE]))
def test_an_id_is_a_position_of_the_channel_of_the_path_and_of_nothing_else(text: str, audience: Audience) -> None:
    publication = Publication(Message.of(text), audience, position=AT)
    expected = str(AT) if audience == NEWS else ""
    assert parse(sse.server_sent_events("news")(publication).payload) == [Event(as_lines(text), "message", expected)]
    [event] = parse(sse.server_sent_events("news", is_events=True)(publication).payload)
    assert (event.name, event.id) == ("message", expected)
    assert event.json["data"] == text  # in JSON line ends are what they were
    assert event.json["position"] == str(AT)
    [event] = parse(sse.server_sent_events(None)(publication).payload)
    assert event.id == ""


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT, st.lists, max_leaves=5))
def test_json_arrives_as_it_was(data: Any) -> None:
    publication = Publication(Message.json(data), NEWS, position=AT)
    [event] = parse(sse.server_sent_events("news")(publication).payload)
    assert event.json == data
    [event] = parse(sse.server_sent_events("news", is_events=True)(publication).payload)
    assert event.json["data"] == data


@given(TEXT)
def test_what_an_app_sends_itself_is_an_event(text: str) -> None:
    assert parse(sse.app_event(text)) == [Event(as_lines(text))]


def test_an_app_may_send_half_of_a_pair_of_surrogates() -> None:
    assert parse(sse.app_event("a\ud800b")) == [Event("a?b")]


@given(TEXT)
def test_a_comment_is_nothing_else(text: str) -> None:
    parser = EventParser()
    assert parser.feed(sse.comment(text.encode()) + b"\n") == []
    assert (parser.last_id, parser.retry, parser.comments) == ("", None, 1)


def test_what_the_protocol_says_itself() -> None:
    speaks = sse.server_sent_events("news")

    def said(message: Message) -> bytes:
        return speaks(Frame(message, Audience("connection"))).payload

    [event] = parse(said(hello("kX2", ClientTiming(), 15.0)))
    assert (event.name, event.json["id"], event.json["ping"]) == ("hello", "kX2", 15.0)
    joined = {"type": "subscribed", "channel": "news", "position": str(AT), "recovered": True}
    [event] = parse(said(Message.json(joined)))
    assert (event.name, event.id, event.json) == ("recovered", str(AT), joined)
    [event] = parse(said(Message.json(joined | {"channel": "other"})))
    assert (event.name, event.id) == ("recovered", "")
    [event] = parse(said(gap(NEWS, "epoch", AT)))
    assert (event.name, event.id, event.json["reason"]) == ("gap", str(AT), "epoch")
    assert said(Message.json({"type": "ping"})) == sse.PING
    assert parse(sse.PING) == []


def test_what_is_withheld_moves_the_id_and_is_no_event() -> None:
    for is_events in (False, True):
        parser = EventParser()
        speaks = sse.server_sent_events("news", is_events=is_events)
        withheld = speaks(Withheld(Message.of("secret"), NEWS, position=AT))
        events = parser.feed(withheld.payload)
        assert b"secret" not in withheld.payload
        assert parser.last_id == str(AT)
        assert [event.json["type"] for event in events] == (["position"] if is_events else [])


def test_the_streams_of_a_channel_share_a_protocol_as_long_as_there_is_one() -> None:
    first = sse.server_sent_events("news")
    assert sse.server_sent_events("news") is first
    assert sse.server_sent_events("other") is not first
    assert sse.server_sent_events("news", is_events=True) is not first
    gone = id(first)
    del first
    gc.collect()
    assert ("news", False) not in sse._KNOWN, gone


@given(st.binary(min_size=1, max_size=70_000))
@example(b"x" * 65536)
@example(b"\r\n")
def test_a_chunk_is_its_size_and_its_bytes(data: bytes) -> None:
    size, _, rest = chunk(data).partition(b"\r\n")
    assert int(size, 16) == len(data)
    assert rest == data + b"\r\n"


def test_the_last_event_says_why_and_when_to_come_back() -> None:
    parser = EventParser()
    [event] = parser.feed(last_event(1012, "drain"))
    assert (event.name, event.json) == ("close", {"type": "close", "code": 1012, "reason": "drain"})
    assert parser.retry is not None
    assert 1000 <= parser.retry <= 5000
    parser = EventParser()
    [event] = parser.feed(last_event(1008, "x\r\nid: forged\n\n" + "ü" * 200))
    assert event.json["reason"].startswith("x\r\nid: forged\n\n")
    assert len(event.json["reason"].encode()) <= 123
    assert parser.retry is None
    assert parser.last_id == ""


def test_browsers_come_back_at_different_moments() -> None:
    drawn = {drawn_retry() for _ in range(50)}
    assert len(drawn) > 25
    assert all(re.fullmatch(rb"retry: \d{4}\n\n", each) for each in drawn)


@pytest.mark.parametrize("code", [1000, 1008, 4401, 4403])
def test_who_is_not_to_come_back_is_not_told_when(code: int) -> None:
    assert b"retry" not in last_event(code, "")
    assert json.loads(last_event(code, "").partition(b"data: ")[2])["code"] == code
