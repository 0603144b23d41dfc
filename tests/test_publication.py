from __future__ import annotations

import pytest

from wsbroadcast import Audience, Message, Publication
from wsbroadcast.delivery.frames import Events, unframed, wire_form
from wsbroadcast.publication import Dismissal, Position, plain

NEWS = Audience("channel", "news")
SPORT = Audience("channel", "sport")


def told(publication: Publication) -> Message:
    """A protocol that tells the channel and the place in its history."""
    offset = publication.position.offset if publication.position else None
    return Message.of({"channel": publication.audience.name, "offset": offset, "data": publication.message.data})


def counted(publication: Publication) -> Message:
    """A binary protocol."""
    return Message.of(bytes((publication.message.size,)))


HELLO = Publication(Message.of("hello", "key"), NEWS, position=Position("e", 5))
TOLD = b'{"channel":"news","offset":5,"data":"hello"}'


def test_protocol_says_what_a_client_gets() -> None:
    assert HELLO.seen_by(plain) is HELLO.message
    assert HELLO.seen_by(told).payload == TOLD
    assert HELLO.seen_by(counted).data == b"\x05"


def test_protocol_is_asked_once_for_all_clients() -> None:
    assert HELLO.seen_by(told) is HELLO.seen_by(told)
    assert wire_form(told).encode(HELLO) is wire_form(told).encode(HELLO)


def test_wire_form_is_one_for_each_protocol_and_window() -> None:
    forms = [wire_form(protocol, bits) for protocol in (plain, told) for bits in (None, 9, 15)]
    assert len(set(forms)) == 6
    assert forms == [wire_form(protocol, bits) for protocol in (plain, told) for bits in (None, 9, 15)]
    assert unframed(told) is unframed(told)


def test_frame_and_event_of_a_protocol_say_the_same() -> None:
    assert wire_form(told).encode(HELLO) == bytes((0x81, len(TOLD))) + TOLD
    assert Events().of(unframed(told).entry(HELLO)) == {"type": "websocket.send", "text": TOLD.decode()}
    assert wire_form(counted).encode(HELLO) == b"\x82\x01\x05"
    assert Events().of(unframed(counted).entry(HELLO)) == {"type": "websocket.send", "bytes": b"\x05"}


def test_what_waits_has_the_size_of_what_the_client_gets_and_the_key_of_the_message() -> None:
    entry = wire_form(told).entry(HELLO)
    assert (entry.size, entry.key) == (len(TOLD), (NEWS, "key"))


def test_same_message_is_another_for_another_audience() -> None:
    message = Message.of("hello")
    one, two = Publication(message, NEWS), Publication(message, SPORT)
    assert wire_form().encode(one) is wire_form().encode(two)
    assert wire_form(told).encode(one) != wire_form(told).encode(two)


def test_publication_of_another_message_keeps_the_rest() -> None:
    publication = Publication(Message.of("a"), NEWS, frozenset({"x"}), id="y", position=Position("e", 1))
    other = publication.with_message(Message.of("b"))
    assert other != publication
    assert other.with_message(publication.message) == publication
    assert other.seen_by(told).payload == b'{"channel":"news","offset":1,"data":"b"}'


@pytest.mark.parametrize(
    "other",
    [
        Publication(Message.of("b"), NEWS),
        Publication(Message.of(b"a"), NEWS),
        Publication(Message.json("a"), NEWS),
        Publication(Message(b"a", "json"), NEWS),
        Publication(Message.of("a", "key"), NEWS),
        Publication(Message.of("a"), SPORT),
        Publication(Message.of("a"), NEWS, frozenset({"x"})),
        Publication(Message.of("a"), NEWS, id="x"),
        Publication(Message.of("a"), NEWS, position=Position("e", 1)),
        Dismissal(NEWS, 1000, "a"),
        "a",
    ],
)
def test_publications_are_equal_if_all_of_them_is(other: object) -> None:
    publication = Publication(Message.of("a"), NEWS)
    assert publication == Publication(Message.of("a"), NEWS)
    assert publication != other


def test_size_is_that_of_the_payload() -> None:
    assert Publication(Message.of("hé"), NEWS).size == 3
    assert Dismissal(NEWS, 1000, "hé").size == 3
