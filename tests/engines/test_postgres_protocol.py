from __future__ import annotations

from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsbroadcast.engines.broker.link import Parcel, Place
from wsbroadcast.engines.postgres.protocol import (
    MAX_NOTE_BYTES,
    Note,
    channel_of,
    is_row,
    pack,
    pack_kept,
    pack_row,
    unpack,
)
from wsbroadcast.publication import Position

NAME = "wsbroadcast:channel:a%2E%3E*"

envelopes = st.one_of(st.binary(max_size=9000), st.text(max_size=3000).map(str.encode))


@given(envelope=envelopes, takes_unicode=st.booleans())
def test_note_brings_every_byte_or_is_none(envelope: bytes, takes_unicode: bool) -> None:
    note = pack(Parcel(NAME, envelope), takes_unicode=takes_unicode)
    if note is None:
        assert len(envelope) * 4 / 3 > MAX_NOTE_BYTES - 100
        return
    assert unpack(note) == Note(NAME, envelope)
    assert len(note.encode()) <= MAX_NOTE_BYTES
    assert "\0" not in note
    assert takes_unicode or note.isascii()


@given(envelope=envelopes, takes_unicode=st.booleans(), offset=st.integers(1, 2**63 - 1))
def test_note_of_what_is_kept_brings_its_place(envelope: bytes, takes_unicode: bool, offset: int) -> None:
    form, body = pack_kept(Parcel(NAME, envelope), takes_unicode=takes_unicode)
    place = Place(Position("kX2dh0Qb7a_Z", offset), offset - 1)
    if form is None or body is None:
        assert len(envelope) * 4 / 3 > MAX_NOTE_BYTES - 100
        assert unpack(f"{NAME} row:kX2dh0Qb7a_Z:{offset}") == Note(NAME, None, None, place)
        return
    note = f"{NAME} {form}:kX2dh0Qb7a_Z:{offset} {body}"  # as the server writes it
    assert unpack(note) == Note(NAME, envelope, None, place)
    assert len(note.encode()) <= MAX_NOTE_BYTES
    assert takes_unicode or note.isascii()


def test_note_leaves_text_readable() -> None:
    note = pack(Parcel(NAME, '{"v":1}\nGrüße ☕'.encode()), takes_unicode=True)
    assert note is not None
    assert note.startswith(f"{NAME} text:")
    assert note.endswith(' {"v":1}\nGrüße ☕')


@pytest.mark.parametrize("envelope", [b'{"v":1}\nhello', b"\xff\x00"])
def test_note_of_an_equal_envelope_differs(envelope: bytes) -> None:
    first, second = (pack(Parcel(NAME, envelope), takes_unicode=True) for _ in range(2))
    assert first != second  # Postgres merges equal notifications of one transaction


@pytest.mark.parametrize("unit", [b"x", "é".encode(), b"\xff"])
def test_note_is_as_long_as_it_may_be_and_no_longer(unit: bytes) -> None:
    sizes = [size for size in range(9000) if pack(Parcel(NAME, unit * (size // len(unit))), takes_unicode=True)]
    longest = pack(Parcel(NAME, unit * (max(sizes) // len(unit))), takes_unicode=True)
    assert longest is not None
    assert MAX_NOTE_BYTES - 10 < len(longest.encode()) <= MAX_NOTE_BYTES


def test_note_needs_no_number_from_others() -> None:
    assert unpack("a:channel:news text hello world ") == Note("a:channel:news", b"hello world ")
    assert unpack("a:channel:news base64 aGVsbG8=") == Note("a:channel:news", b"hello")
    assert unpack("a:channel:news text") == Note("a:channel:news", b"")


def test_note_names_a_row() -> None:
    row = uuid4()
    assert unpack(pack_row(NAME, row)) == Note(NAME, None, row)
    assert is_row(pack_row(NAME, row))


@pytest.mark.parametrize("note", ["", "table", "a:everyone", "a:everyone text table 7", "table text x"])
def test_note_that_names_no_row_is_not_taken_for_one(note: str) -> None:
    assert not is_row(note)


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "x",
        "a:everyone",
        "a:everyone json {}",
        "a:everyone base64 %%%",
        "a:everyone base64 YQ",
        "a:everyone table 7",
        "a:everyone row",
        "a:everyone row:7",
        "a:everyone row:e:0",
        "a:everyone text::1 x",
        "a:everyone text:e:-1 x",
        "a:everyone text:e:9223372036854775808 x",
        f"a:everyone text:{'e' * 65}:1 x",
    ],
)
def test_note_of_another_form_is_refused(payload: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        unpack(payload)


def test_channel_is_the_same_in_every_version_and_on_every_node() -> None:
    assert channel_of("wsbroadcast:channel:news", "wsbroadcast") == "wsbroadcast:4"
    assert channel_of("wsbroadcast:everyone", "wsbroadcast") == "wsbroadcast:4"


def test_channels_share_the_names_evenly_and_are_few() -> None:
    channels = [channel_of(f"app:channel:{number}", "app") for number in range(4000)]
    counts = {channel: channels.count(channel) for channel in channels}
    assert len(counts) == 8
    assert min(counts.values()) > 400
