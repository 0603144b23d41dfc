"""Names that clients choose: channels, users, addresses, close reasons, moments."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuzz.harness import fuzz, watched

with watched():
    from wsbroadcast.audience import Audience, as_channels, check_channel, user_key
    from wsbroadcast.close_codes import MAX_REASON_BYTES, cut_reason
    from wsbroadcast.engines.broker.names import AudienceNames
    from wsbroadcast.exceptions import ConnectionClosed
    from wsbroadcast.node.admission import address_of
    from wsbroadcast.options import unix_seconds

NAMES = AudienceNames()
ALLOWED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_~:@/%")


def check(data: bytes) -> None:
    """Text is a name or refused in one short line; a name at the broker is plain, and leads back to what it names."""
    text = data.decode("utf-8", "surrogateescape")  # what is no UTF-8 becomes lone surrogates
    _check_channel(text)
    _check_user(text)
    address_of({"client": (text, 1)})
    reason = cut_reason(text)
    assert len(reason.encode()) <= MAX_REASON_BYTES
    assert str(ConnectionClosed(1000, reason)).isprintable()
    if len(data) >= 8:
        refusal = _refusal(unix_seconds, struct.unpack("<d", data[:8])[0])
        assert refusal is None or refusal.startswith("expires_at")


def _refusal(take: Callable[[Any], object], value: object) -> str | None:
    try:
        take(value)
    except ValueError as error:
        return str(error)
    return None


def _check_channel(text: str) -> None:
    refusal = _refusal(check_channel, text)
    if refusal is not None:
        assert refusal.isprintable()
        assert len(refusal) < 200
        return
    assert as_channels([text, text]) == (text,)
    at_broker = NAMES.of(Audience.of(channel=text))
    assert set(at_broker) <= ALLOWED
    prefix, kind, encoded = at_broker.split(":", 2)
    assert (prefix, kind, unquote(encoded)) == ("wsbroadcast", "channel", text)
    assert at_broker != NAMES.of(Audience("user", text))


def _check_user(text: str) -> None:
    refusal = _refusal(user_key, text)
    assert refusal is None or (refusal.isprintable() and len(refusal) < 200)


if __name__ == "__main__":
    fuzz(check)
