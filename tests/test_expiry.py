from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from wsbroadcast.options import unix_seconds


@pytest.mark.parametrize(
    ("expires_at", "seconds"),
    [
        (None, None),
        (1_800_000_000, 1_800_000_000.0),
        (1_800_000_000.5, 1_800_000_000.5),
        (0, 0.0),
        (-1, -1.0),
        (datetime(2027, 1, 15, 8, 0, tzinfo=UTC), 1_800_000_000.0),
        (datetime(2027, 1, 15, 10, 0, tzinfo=timezone(timedelta(hours=2))), 1_800_000_000.0),
        (datetime.max.replace(tzinfo=UTC), 253_402_300_800.0),
        (datetime.min.replace(tzinfo=UTC), -62_135_596_800.0),
    ],
)
def test_moment_is_seconds_since_1970(expires_at: Any, seconds: float | None) -> None:
    found = unix_seconds(expires_at)
    assert found == seconds
    assert found is None or type(found) is float


@pytest.mark.parametrize(
    ("expires_at", "why"),
    [
        (datetime(2027, 1, 15), "no timezone"),
        (math.nan, "seconds since 1970"),
        (math.inf, "seconds since 1970"),
        (-math.inf, "seconds since 1970"),
        (1_800_000_000_000, "milliseconds"),
        (10**400, "milliseconds"),
        (-(10**400), "milliseconds"),
        (True, "not bool"),
        ("1800000000", "not str"),
        (timedelta(hours=1), "not timedelta"),
    ],
)
def test_what_is_no_moment_is_refused(expires_at: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        unix_seconds(expires_at)
