"""The fuzz targets of `tests/fuzz` in short, and what they found."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import centrifuge, client_json, envelopes, names, tokens

RAW = b"\x08"  # see TEMPLATES

FRAMES = st.sampled_from(
    [
        b"\x01a",
        b"\x05no",
        RAW + b'{"type":"subscribe","channel":"no","id":1}',
        RAW + b'{"type":"publish","channel":"a","data":[1e999]}',
        RAW + b'{"type":"publish","channel":"a","data":"\\ud800","id":"x"}',
        RAW + b'{"type":"unsubscribe","channel":""}',
        RAW + b'{"type":"subscribe","channel":null}',
        RAW + b'{"id":' + b"9" * 900 + b"}",
        RAW + b"[" * 900,
        RAW + b"NaN",
        RAW + b"x" * 1001,
        b"\x80",
        b"",
    ]
)


@given(
    st.binary(max_size=300)
    | st.text(st.characters(exclude_categories=[]), max_size=100).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    )
)
def test_names_are_taken_or_refused(data: bytes) -> None:
    names.check(data)


@given(
    st.lists(
        st.binary(max_size=40)
        | st.sampled_from(
            [b"http://[::1]:80", b"https://app.example", b"null", b"Bearer x", b"session=x; a=b", b"bearer, x"]
        ),
        max_size=6,
    )
)
def test_headers_are_taken_or_refused(values: list[bytes]) -> None:
    tokens.check(b"\n".join(values))


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 3), st.lists(FRAMES | st.binary(max_size=50), max_size=25))
def test_what_clients_send_ends_nothing_but_their_connection(path: int, frames: list[bytes]) -> None:
    client_json.check(bytes([path]) + b"\x00".join(frames))


@given(
    st.binary(max_size=300)
    | st.sampled_from(
        [
            b"7}\n",
            b"1000}\nbye",
            b'"a","b"]}\nx',
            b'"type":"binary"}\n\xff',
            b"MSG a 1 3\r\nabc\r\n",
            b"*1\r\n$1\r\na\r\n",
        ]
    )
)
def test_what_a_broker_brings_is_read_or_refused(data: bytes) -> None:
    envelopes.check(data)


@given(
    st.binary(max_size=300)
    | st.sampled_from(
        [
            b'{"id":1,"publish":{"channel":"a","data":{"a":[1,2]}}}\n{}',
            b'{"id":1,"publish":{"data":"\\ud800"}}',
            b"\x0a\x08\x01\x3a\x06\x0a\x01a\x12\x01\xff",
            b"\xff" * 11,
            b"[" * 300,
        ]
    )
)
def test_what_clients_of_centrifuge_send_is_read_or_refused(data: bytes) -> None:
    centrifuge.check(data)
