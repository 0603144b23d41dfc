from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsbroadcast.engines.nats.protocol import REFUSAL, Reader, pub, sub, unsub

Seen = list[tuple[bytes, bytes] | bytes]


def reader() -> tuple[Reader, Seen]:
    seen: Seen = []
    return Reader(lambda sid, payload: seen.append((sid, payload)), seen.append), seen


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
    assert seen == [event for event, _, _ in events]


def test_reader_takes_a_large_message_in_small_pieces() -> None:
    payload = bytes(range(256)) * 40_000
    stream = message(b"1", payload) + b"PONG\r\n"
    nats, seen = reader()
    for start in range(0, len(stream), 4096):
        nats.feed(stream[start : start + 4096])
    assert seen == [(b"1", payload), b"PONG"]


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
