"""Until when a connection may live. No I/O."""

from __future__ import annotations

from datetime import datetime

_LAST_SECOND = 253_402_300_800  # of the year 9999; tokens that count milliseconds lie far beyond

ExpiresAt = float | datetime | None


def unix_seconds(expires_at: object) -> float | None:
    """Return a moment as seconds since 1970; `None` is never.

    Args:
        expires_at: Seconds since 1970, such as the `exp` of a JWT (RFC 7519, 4.1.4), or a datetime with a timezone.

    Raises:
        ValueError: If it is neither, not finite, or can't be meant as seconds.
    """
    if expires_at is None:
        return None
    if isinstance(expires_at, datetime):
        if expires_at.utcoffset() is None:
            raise ValueError("expires_at has no timezone, so nobody knows when it is: use datetime.now(UTC) + …")
        return expires_at.timestamp()
    if isinstance(expires_at, bool) or not isinstance(expires_at, (int, float)):
        raise ValueError(f"expires_at is seconds since 1970 or a datetime, not {type(expires_at).__name__}")
    if not -_LAST_SECOND < expires_at < _LAST_SECOND:  # which NaN isn't either
        raise ValueError("expires_at is in seconds since 1970: what came is not finite, or is milliseconds")
    return float(expires_at)
