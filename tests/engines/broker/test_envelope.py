from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsbroadcast import (
    EVERYONE,
    Audience,
    Control,
    Dismissal,
    EncodeError,
    Message,
    NodeMessage,
    Publication,
    Unsubscription,
)
from wsbroadcast.audience import NODES
from wsbroadcast.engines.broker.envelope import MAX_HEADER_BYTES, BadEnvelope, Origin, decode, encode
from wsbroadcast.publication import MAX_NODE_MESSAGE_BYTES, Sender

NEWS = Audience("channel", "news")
LIMIT = 10_000
ORIGIN = Origin("node", 7)
INFOS = st.sampled_from([b"", b"1", b'{"a":"\\n"}'])


def refused(envelope: bytes) -> str:
    with pytest.raises(BadEnvelope) as caught:
        decode(envelope, NEWS, LIMIT)
    return str(caught.value)


def with_header(payload: bytes = b"text", **header: Any) -> bytes:
    return json.dumps({"v": 1} | header).encode() + b"\n" + payload


def data_of(publication: Publication | Control) -> str | bytes:
    assert isinstance(publication, Publication)
    return publication.message.data


def test_text_from_this_library_is_a_short_line_and_the_payload() -> None:
    assert encode(Publication(Message.of("hi\n"), NEWS), ORIGIN) == b'{"v":1,"node":"node","seq":7}\nhi\n'


def test_json_from_this_library_says_so() -> None:
    publication = Publication(Message.of({"a": 1}), NEWS)
    envelope = encode(publication, ORIGIN)
    assert envelope == b'{"v":1,"node":"node","seq":7,"type":"json"}\n{"a":1}'
    assert decode(envelope, NEWS, LIMIT) == (publication, ORIGIN)


def test_text_of_another_program_needs_a_version_only() -> None:
    publication, origin = decode(b'{"v":1}\nhello', NEWS, LIMIT)
    assert publication == Publication(Message.of("hello"), NEWS)
    assert data_of(publication) == "hello"
    assert origin is None


@given(
    st.one_of(st.text(max_size=50), st.binary(max_size=50), st.lists(st.integers())),
    st.frozensets(st.text("abc", min_size=1, max_size=3), max_size=3),
    st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=5)),
    st.one_of(st.none(), st.builds(Origin, st.sampled_from(["node", "nöde"]), st.integers(1, 2**60))),
    st.one_of(st.none(), st.text(st.characters(codec="utf-8"), min_size=1, max_size=64)),
    st.lists(st.sampled_from([NEWS, EVERYONE, Audience.user(5)]), max_size=3),
    st.one_of(st.none(), st.builds(Sender, st.text("ab"), st.text("5ä"), INFOS, INFOS)),
)
def test_publication_survives_the_way(
    value: object,
    exclude: frozenset[str],
    key: str | None,
    origin: Origin | None,
    several: str | None,
    audiences: list[Audience],
    sender: Sender | None,
) -> None:
    publication = Publication(
        Message.of(value, key),
        NEWS,
        exclude,
        exclude_users=exclude,
        id=several,
        audiences=() if several is None else tuple(audiences),
    )
    publication.sender = sender
    decoded, again = decode(encode(publication, origin), NEWS, LIMIT)
    assert decoded == publication
    assert again == origin


@pytest.mark.parametrize("exclude", [frozenset[str](), frozenset({"a", "b"})])
@pytest.mark.parametrize("origin", [None, ORIGIN])
def test_dismissal_survives_the_way(exclude: frozenset[str], origin: Origin | None) -> None:
    dismissal = Dismissal(NEWS, 4401, "lögged out", exclude)
    assert decode(encode(dismissal, origin), NEWS, LIMIT) == (dismissal, origin)


def test_unsubscription_survives_the_way() -> None:
    unsubscription = Unsubscription(Audience.user(5), ("news", "späße"))
    assert decode(encode(unsubscription, ORIGIN), Audience.user(5), LIMIT) == (unsubscription, ORIGIN)


@pytest.mark.parametrize(
    "message",
    [
        NodeMessage(NODES, "hello", "kX2-_", body=b'{"host":"h"}'),
        NodeMessage(NODES, "bye", "a" * 64),
        NodeMessage(NODES, "question", "a", "q1", b"[1]"),
        NodeMessage(Audience("nodes", "b"), "answer", "a", "q1", b"\xff\n\n"),
    ],
)
@pytest.mark.parametrize("origin", [None, ORIGIN])
def test_node_message_survives_the_way(message: NodeMessage, origin: Origin | None) -> None:
    assert decode(encode(message, origin), message.audience, LIMIT) == (message, origin)


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"node": "a", "seq": 1},
        {"type": "json"},
        {"type": "close", "code": 4401},
        {"type": "unsubscribe", "channels": ["news"]},
        {"type": "forgotten"},
        {"type": "nodes"},
        {"type": "nodes", "kind": "hello"},
        {"type": "nodes", "kind": "hello", "sender": ""},
        {"type": "nodes", "kind": "hello", "sender": "a" * 65},
        {"type": "nodes", "kind": "hello", "sender": "a\n"},
        {"type": "nodes", "kind": "hello", "sender": 1},
        {"type": "nodes", "kind": "hello", "sender": "a", "id": "q"},
        {"type": "nodes", "kind": "shout", "sender": "a"},
        {"type": "nodes", "kind": ["hello"], "sender": "a"},
        {"type": "nodes", "kind": "question", "sender": "a"},
        {"type": "nodes", "kind": "answer", "sender": "a", "id": ""},
        {"type": "nodes", "kind": "answer", "sender": "a", "id": 5},
        {"type": "nodes", "kind": "answer", "sender": "a", "id": ["q"]},
    ],
)
def test_nothing_but_node_messages_goes_to_nodes(header: dict[str, Any]) -> None:
    with pytest.raises(BadEnvelope, match="schema"):
        decode(with_header(b'{"v":1}', **header), NODES, LIMIT)


def test_node_message_goes_to_nodes_only() -> None:
    assert refused(with_header(b"{}", type="nodes", kind="hello", sender="a")) == "schema"


def test_larger_node_message_than_any_is_refused() -> None:
    header = {"type": "nodes", "kind": "answer", "sender": "a", "id": "q"}
    most = b"x" * MAX_NODE_MESSAGE_BYTES
    decode(with_header(most, **header), NODES, 2**24)
    with pytest.raises(BadEnvelope, match="too_large"):
        decode(with_header(most + b"x", **header), NODES, 2**24)


@pytest.mark.parametrize("field", ["something", 1, None, ["audiences"]])
def test_what_must_be_understood_and_is_not_is_refused(field: object) -> None:
    assert refused(with_header(must=["audiences", field])) == "must"
    publication, _ = decode(with_header(must=[], something=1), NEWS, LIMIT)
    assert data_of(publication) == "text"


def test_too_many_excluded_connections_are_refused_at_the_publisher() -> None:
    exclude = frozenset(f"connection-{number:06}" for number in range(20_000))
    with pytest.raises(EncodeError, match="names more connections, users or audiences"):
        encode(Publication(Message.of("x"), NEWS, exclude), ORIGIN)
    with pytest.raises(EncodeError, match="names more connections, users or audiences"):
        encode(Publication(Message.of("x"), NEWS, exclude_users=exclude), ORIGIN)


def test_field_of_a_later_release_is_passed_over() -> None:
    publication, _ = decode(
        with_header(offset=5, epoch="x", previous=4, traceparent="y", at=1.5, something=[1]), NEWS, LIMIT
    )
    assert data_of(publication) == "text"


@pytest.mark.parametrize(
    "envelope",
    [
        b"",
        b"\n",
        b"hello",
        b"hello\nworld",
        pickle.dumps({"v": 1}),
        b"cos\nsystem\n(S'true'\ntR.",
        b'\xff\xfe{"v":1}\nx',
        b'{"v":1',
        b'{"v":1}',
        b"[" * 100_000 + b"\nx",
        b'{"v":1,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\nx",
        b'{"v":NaN}\nx',
        b"[1]\nx",
        b'"v"\nx',
        b" " * (MAX_HEADER_BYTES + 1) + b'{"v":1}\nx',
    ],
)
def test_what_has_no_header_is_refused(envelope: bytes) -> None:
    assert refused(envelope) == "header"


@pytest.mark.parametrize("version", [0, 2, 99, -1, 2**70])
def test_other_version_is_refused(version: int) -> None:
    assert refused(with_header(v=version)) == "version"


@pytest.mark.parametrize(
    "header",
    [
        {"v": "1"},
        {"v": True},
        {"v": 1.0},
        {"v": None},
        {"type": "pickle"},
        {"type": 1},
        {"type": None},
        {"type": []},
        {"key": 1},
        {"id": 1},
        {"id": "x" * 65},
        {"id": ""},
        {"sender": "x"},
        {"sender": ["a", "5", ""]},
        {"sender": ["a", "5", "", 1]},
        {"exclude_users": "x"},
        {"exclude_users": [1]},
        {"audiences": "news"},
        {"audiences": ["news"]},
        {"audiences": [["news"]]},
        {"audiences": [["connection", "x"]]},
        {"audiences": [["channel", 1]]},
        {"audiences": [["channel", ""]]},
        {"audiences": [["user", "\n"]]},
        {"audiences": [["everyone", "x"]]},
        {"audiences": [["channel", "a"]] * 1001},
        {"type": "unsubscribe", "channels": []},
        {"type": "unsubscribe"},
        {"type": "unsubscribe", "channels": "news"},
        {"type": "unsubscribe", "channels": [1]},
        {"type": "unsubscribe", "channels": [""]},
        {"must": "audiences"},
        {"must": None},
        {"exclude": "abc"},
        {"exclude": [1]},
        {"exclude": {"a": 1}},
        {"node": "x"},
        {"seq": 1},
        {"node": "", "seq": 1},
        {"node": "x" * 65, "seq": 1},
        {"node": 1, "seq": 1},
        {"node": "x", "seq": 0},
        {"node": "x", "seq": True},
        {"node": "x", "seq": "1"},
        {"type": "close"},
        {"type": "close", "code": 1006},
        {"type": "close", "code": True},
        {"type": "close", "code": "1000"},
    ],
)
def test_wrong_types_and_values_are_refused(header: dict[str, Any]) -> None:
    assert refused(with_header(**header)) == "schema"


@pytest.mark.parametrize("payload", [b"\xff", b"\xed\xa0\x80", b"ok\x80"])
def test_text_that_is_no_utf_8_is_refused_and_bytes_are_not(payload: bytes) -> None:
    assert refused(with_header(payload)) == "text"
    publication, _ = decode(with_header(payload, type="binary"), NEWS, LIMIT)
    assert data_of(publication) == payload


@pytest.mark.parametrize("size", [LIMIT + 1, LIMIT + MAX_HEADER_BYTES + 1])
@pytest.mark.parametrize(
    "header", [b'{"v":1}', b'{"v":1,"node":"node","seq":7}', b'{"v":1,"node":"node","seq":7,"type":"json"}']
)
def test_larger_payload_than_the_limit_is_refused(header: bytes, size: int) -> None:
    decode(header + b"\n" + b"x" * LIMIT, NEWS, LIMIT)
    assert refused(header + b"\n" + b"x" * size) == "too_large"


@given(st.binary(max_size=300))
def test_any_bytes_are_an_envelope_or_refused(envelope: bytes) -> None:
    for data in (envelope, b'{"v":1,' + envelope, b'{"v":1}\n' + envelope):
        try:
            decode(data, NEWS, LIMIT)
        except BadEnvelope:
            pass


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.text()), st.lists, max_leaves=5), st.data())
def test_any_header_is_good_or_refused(value: Any, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(["v", "type", "node", "seq", "key", "exclude", "code", "id", "must"]))
    try:
        decode(with_header(**{field: value}), NEWS, LIMIT)
    except BadEnvelope:
        pass
