from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wsbroadcast import CloseCode, should_reconnect
from wsbroadcast.close_codes import ABNORMAL, MAX_REASON_BYTES, cut_reason, fallback_codes, is_sendable


@pytest.mark.parametrize("code", CloseCode)
def test_every_code_of_ours_can_be_sent(code: CloseCode) -> None:
    assert is_sendable(code)


@pytest.mark.parametrize("code", [-1, 0, 999, 1004, 1005, ABNORMAL, 1015, 1016, 2000, 2999, 5000, 65536])
def test_reserved_codes_can_not_be_sent(code: int) -> None:
    assert not is_sendable(code)


@pytest.mark.parametrize("code", [1000, 1002, 1007, 1014, 3000, 4999])
def test_registered_and_private_codes_can_be_sent(code: int) -> None:
    assert is_sendable(code)


@pytest.mark.parametrize("code", CloseCode)
def test_fallback_begins_with_the_code_and_ends_with_one_every_server_takes(code: CloseCode) -> None:
    codes = fallback_codes(code)
    assert codes[0] == code
    assert codes[-1] == CloseCode.NORMAL or codes[-1] >= 3000
    assert all(is_sendable(other) for other in codes)


@pytest.mark.parametrize("code", CloseCode)
def test_fallback_means_the_same_to_a_client(code: CloseCode) -> None:
    for other in fallback_codes(code)[:2]:
        assert should_reconnect(other) == should_reconnect(code)


@pytest.mark.parametrize("code", CloseCode)
def test_codes_to_try_are_plain_integers(code: CloseCode) -> None:
    assert {type(other) for other in fallback_codes(code)} == {int}  # daphne takes nothing else


def test_slow_consumer_falls_back_to_4013() -> None:
    assert fallback_codes(CloseCode.TRY_AGAIN_LATER) == (1013, 4013, 1000)


def test_private_code_of_the_app_has_no_other_form() -> None:
    assert fallback_codes(4321) == (4321,)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (1000, False),
        (1001, True),
        (1006, True),
        (1008, False),
        (1011, True),
        (1012, True),
        (1013, True),
        (4013, True),
        (4000, False),
        (4008, False),
        (4016, False),
        (4999, False),
        (1005, False),
    ],
)
def test_client_is_told_whether_to_come_back(code: int, expected: bool) -> None:
    assert should_reconnect(code) is expected


@given(st.text(st.characters(exclude_categories=[])))
@example("a" * 123)
@example("a" * 124)
@example("é" * 62)
@example("a" + "\U0001f600" * 31)
@example("\ud800" * 200)
def test_reason_is_cut_at_a_character_border(reason: str) -> None:
    cut = cut_reason(reason)
    assert len(cut.encode()) <= MAX_REASON_BYTES
    whole = "".join("?" if "\ud800" <= character <= "\udfff" else character for character in reason)
    assert whole.startswith(cut)
    rest = whole[len(cut) :]
    assert not rest or len((cut + rest[0]).encode()) > MAX_REASON_BYTES  # not one character more than needed
