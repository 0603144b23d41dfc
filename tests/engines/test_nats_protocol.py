from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsbroadcast.engines.nats.protocol import (
    REFUSAL,
    Answer,
    Reader,
    chain,
    head_of,
    moment_of,
    nanoseconds,
    pub,
    request,
    request_with,
    sub,
    unsub,
)

Seen = list[tuple[bytes, bytes, bytes] | bytes]


def reader() -> tuple[Reader, Seen]:
    seen: Seen = []
    return Reader(lambda words, payload, headers: seen.append((words[2], payload, headers)), seen.append), seen


def message(sid: bytes, payload: bytes, reply: bytes = b"", headers: bytes | None = None) -> bytes:
    middle = reply and reply + b" "
    if headers is None:
        return b"MSG a.b %b %b%d\r\n%b\r\n" % (sid, middle, len(payload), payload)
    size = len(headers) + len(payload)
    return b"HMSG a.b %b %b%d %d\r\n%b%b\r\n" % (sid, middle, len(headers), size, headers, payload)


PAYLOADS = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"\r\n", b"MSG a 1 3\r\n", b"PING\r\n", bytes(range(256))])
)
EVENTS = st.one_of(
    st.sampled_from([b"PING", b"PONG", b"+OK", b"-ERR 'Slow Consumer'", b'INFO {"max_payload":1}', b""]),
    st.tuples(st.integers(1, 10**9).map(b"%d".__mod__), PAYLOADS),
)


@given(st.lists(st.tuples(EVENTS, st.booleans(), st.sampled_from([None, b"", b"X", b"NATS/1.0\r\n\r\n"]))), st.data())
def test_reader_sees_the_same_however_the_stream_is_cut(
    events: list[tuple[bytes | tuple[bytes, bytes], bool, bytes | None]], data: st.DataObject
) -> None:
    stream = b"".join(
        event + b"\r\n" if isinstance(event, bytes) else message(*event, b"_INBOX.1" if reply else b"", headers)
        for event, reply, headers in events
    )
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    nats, seen = reader()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        nats.feed(stream[start:end])
    assert seen == [event if isinstance(event, bytes) else (*event, headers or b"") for event, _, headers in events]


def test_reader_takes_a_large_message_in_small_pieces() -> None:
    payload = bytes(range(256)) * 40_000
    stream = message(b"1", payload) + b"PONG\r\n"
    nats, seen = reader()
    for start in range(0, len(stream), 4096):
        nats.feed(stream[start : start + 4096])
    assert seen == [(b"1", payload, b""), b"PONG"]


@pytest.mark.parametrize("garbage", [b"MSG a 1 x\r\n", b"MSG a\r\n", b"MSG a 1 -9\r\n", b"x" * (1024 * 1024 + 1)])
def test_reader_refuses_what_is_not_the_protocol(garbage: bytes) -> None:
    nats, _ = reader()
    with pytest.raises((ValueError, IndexError)):
        nats.feed(garbage)


@pytest.mark.parametrize(
    ("line", "is_refusal"),
    [
        ("-ERR 'Authorization Violation'", True),
        ("-ERR 'User Authentication Expired'", True),
        ("-ERR 'User Authentication Revoked'", True),
        ("-ERR 'maximum subscriptions exceeded'", True),
        ("-ERR 'Authentication Timeout'", False),
        ("-ERR 'maximum connections exceeded'", False),
        ("-ERR 'Stale Connection'", False),
    ],
)
def test_refusals_are_what_trying_again_does_not_mend(line: str, is_refusal: bool) -> None:
    assert bool(REFUSAL.search(line)) is is_refusal


def test_commands_are_those_of_the_protocol() -> None:
    assert pub("a.b", b"x\r\n") == b"PUB a.b 3\r\nx\r\n\r\n"
    assert pub("a.b", b"") == b"PUB a.b 0\r\n\r\n"
    assert sub("a.b", b"7") == b"SUB a.b 7\r\n"
    assert unsub(b"7") == b"UNSUB 7\r\n"
    assert request("a.b", b"r", b"x") == b"PUB a.b r 1\r\nx\r\n"
    head = head_of({"A": "1", "B-C": "d e"})
    assert head == b"NATS/1.0\r\nA: 1\r\nB-C: d e\r\n\r\n"
    assert request_with("a.b", b"r", head, b"xy") == b"HPUB a.b r 28 30\r\n%bxy\r\n" % head
    assert request_with("a.b", b"", head, b"xy").split() == b"HPUB a.b 28 30\r\n%bxy\r\n".replace(b"%b", head).split()


# What JetStream says.

HEADERS = (
    b"NATS/1.0\r\nNats-Stream: app\r\nNats-Subject: app:keep.channel.a\r\nNats-Sequence: 12\r\n"
    b"Nats-Time-Stamp: 2026-11-28T22:52:12.82246146Z\r\nNats-Last-Sequence: 7\r\n\r\n"
)


def test_headers_of_a_kept_message_are_read() -> None:
    answer = Answer(b"x", HEADERS)
    assert chain(HEADERS) == chain(HEADERS, b"\r\nNats-Stream: app\r\n") == (12, 7)
    assert chain(HEADERS, b"\r\nNats-Stream: other\r\n") is None
    assert (answer.status, answer.sequence, answer.last, answer.pending) == (0, 12, 7, 0)
    assert (answer.subject, answer.record) == ("app:keep.channel.a", (12, answer.time, b"x"))
    assert answer.time % 10**9 == 822461460


@pytest.mark.parametrize(
    "headers",
    [
        b"",
        b"\r\n",
        b"Nats-Sequence: 5\r\n\r\n",
        b"Nats-Sequence: 5\r\nNats-Last-Sequence: 5\r\n\r\n",
        b"Nats-Sequence: 0\r\nNats-Last-Sequence: 0\r\n\r\n",
        b"Nats-Sequence: -5\r\nNats-Last-Sequence: 1\r\n\r\n",
        b"Nats-Sequence: 99999999999999999999\r\nNats-Last-Sequence: 1\r\n\r\n",
        b"X: Nats-Sequence: 5\r\nNats-Last-Sequence: 1\r\n\r\n",
    ],
)
def test_headers_that_make_no_sense_are_no_place(headers: bytes) -> None:
    assert chain(headers) is None
    assert chain(b"NATS/1.0\r\nNats-Stream: app\r\n" + headers) is None


def test_headers_of_a_publisher_are_not_those_of_the_stream() -> None:
    forged = HEADERS.replace(b"12", b"90").replace(b"7", b"80").replace(b"keep.channel.a", b"b").removesuffix(b"\r\n")
    headers = forged + HEADERS.removeprefix(b"NATS/1.0\r\n")
    assert chain(headers) == (12, 7)
    answer, real = Answer(b"", headers), Answer(b"", HEADERS)
    assert (answer.record, answer.subject, answer.last) == (real.record, real.subject, real.last)


def test_end_of_several_messages_is_read() -> None:
    end = Answer(
        b"", b"NATS/1.0 204 EOB\r\nNats-Num-Pending: 3\r\nNats-Last-Sequence: 9\r\nNats-UpTo-Sequence: 11\r\n\r\n"
    )
    assert (end.status, end.pending, end.last, end.up_to) == (204, 3, 9, 11)
    assert Answer(b"", b"NATS/1.0 404 Message Not Found\r\n\r\n").status == 404
    assert Answer(b"", b"NATS/1.0 503\r\n\r\n").status == 503


@given(st.integers(0, 4 * 10**18))
def test_moments_are_read_as_they_were_written(moment: int) -> None:
    assert nanoseconds(moment_of(moment)) == moment


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1970-01-01T00:00:01Z", 10**9),
        ("1970-01-01T00:00:00.5Z", 5 * 10**8),
        ("1970-01-01T00:00:00.000000001Z", 1),
        ("1970-13-01T00:00:00Z", 0),
        ("1970-01-01T00:00:00.0000000001Z", 0),
        ("", 0),
        ("now", 0),
    ],
)
def test_moments_of_go_are_read(text: str, moment: int) -> None:
    assert nanoseconds(text) == moment
