"""What a broker brings: envelopes, and what they travel in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuzz.harness import fuzz, watched

with watched():
    from wsbroadcast.audience import NODES, Audience
    from wsbroadcast.engines.broker.envelope import BadEnvelope, decode, encode
    from wsbroadcast.engines.nats.protocol import Answer, Reader, chain
    from wsbroadcast.engines.postgres.protocol import unpack
    from wsbroadcast.engines.redis.protocol import ReplyReader
    from wsbroadcast.publication import Publication

NEWS = Audience("channel", "news")
MAX_BYTES = 500

# An envelope is the bytes themselves, or they stand in a header or behind one, so that not only broken JSON is tried.
STARTS = (
    b"",
    b'{"v":1,',
    b'{"v":1,"type":"close","code":',
    b'{"v":1,"node":"a","seq":',
    b'{"v":1}\n',
    b'{"v":1,"exclude":[',
    b'{"v":1,"type":"nodes","kind":"answer","sender":"a","id":"q"',
)

HEADERS = (b"", b"NATS/1.0 ", b"NATS/1.0\r\nNats-Time-Stamp: ", b"NATS/1.0\r\nNats-Last-Sequence: 1\r\nNats-Sequence: ")


def check(data: bytes) -> None:
    """An envelope is read or refused, and one that was read can be written and read again."""
    for start in STARTS:
        _check_envelope(start + data, NEWS)
        _check_envelope(start + data, NODES)
    _check_stream(Reader(lambda _words, _payload, _headers: None, lambda _line: None).feed, data)
    for start in HEADERS:
        _check_headers(start + data + b"\r\n")
    _check_stream(lambda part: list(ReplyReader().feed(part)), data)
    try:
        unpack(data.decode("utf-8", "replace"))
    except ValueError:
        pass


def _check_envelope(envelope: bytes, audience: Audience) -> None:
    try:
        publication, origin = decode(envelope, audience, MAX_BYTES)
    except BadEnvelope:
        return
    assert publication.size <= MAX_BYTES
    if isinstance(publication, Publication):
        assert isinstance(publication.message.data, str) is publication.message.is_text
    assert decode(encode(publication, origin), audience, MAX_BYTES) == (publication, origin)


def _check_headers(headers: bytes) -> None:
    answer = Answer(b"", headers)
    numbers = (answer.status, answer.pending, answer.last, answer.up_to, *answer.record[:2], *(chain(headers) or ()))
    assert min(numbers) >= 0
    assert isinstance(answer.subject, str)


def _check_stream(feed: Callable[[bytes], object], data: bytes) -> None:
    try:
        feed(data[: len(data) // 2])
        feed(data[len(data) // 2 :])
    except ValueError:  # it isn't the protocol: the link is lost
        pass


if __name__ == "__main__":
    fuzz(check)
