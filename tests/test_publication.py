from __future__ import annotations

import copy
import json
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_json

from wsbroadcast import EVERYONE, Audience, Message, Publication
from wsbroadcast.delivery.frames import Events, unframed, wire_form
from wsbroadcast.history import Page
from wsbroadcast.protocols.events import events
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
    assert wire_form(told).encode([HELLO]) is wire_form(told).encode([HELLO])


def test_wire_form_is_one_for_each_protocol_and_window() -> None:
    forms = [wire_form(protocol, bits) for protocol in (plain, told) for bits in (None, 9, 15)]
    assert len(set(forms)) == 6
    assert forms == [wire_form(protocol, bits) for protocol in (plain, told) for bits in (None, 9, 15)]
    assert unframed(told) is unframed(told)


def test_frame_and_event_of_a_protocol_say_the_same() -> None:
    assert wire_form(told).encode([HELLO]) == bytes((0x81, len(TOLD))) + TOLD
    assert Events().of(unframed(told).entry(HELLO)) == {"type": "websocket.send", "text": TOLD.decode()}
    assert wire_form(counted).encode([HELLO]) == b"\x82\x01\x05"
    assert Events().of(unframed(counted).entry(HELLO)) == {"type": "websocket.send", "bytes": b"\x05"}


def test_what_waits_has_the_size_of_what_the_client_gets_and_the_key_of_the_message() -> None:
    entry = wire_form(told).entry(HELLO)
    assert (entry.size, entry.key) == (len(TOLD), (NEWS, "key"))


def test_same_message_is_another_for_another_audience() -> None:
    message = Message.of("hello")
    one, two = Publication(message, NEWS), Publication(message, SPORT)
    assert wire_form().encode([one]) is wire_form().encode([two])
    assert wire_form(told).encode([one]) != wire_form(told).encode([two])


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


# Positions, which are texts.


def test_position_is_its_text_wherever_it_is_written() -> None:
    position = Position("e", 5)
    assert position == str(position) == f"{position}" == "e:5"
    assert Position.of("e:5") == position
    assert json.dumps({"since": position}) == '{"since": "e:5"}'
    assert to_json([position]) == b'["e:5"]'
    assert Message.of({"since": position, "none": None}).data == '{"since":"e:5","none":null}'
    assert Message.of(position).data == "e:5"
    assert "e:5" in {position}
    assert repr(position) == "Position('e', 5)"


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copy_of_a_position_is_one(again: Callable[[Position], Position]) -> None:
    position = again(Position("e", 5))
    assert (type(position), position, position.epoch, position.offset) == (Position, "e:5", "e", 5)


def test_positions_of_one_history_are_compared_by_their_offsets() -> None:
    positions = [Position("e", offset) for offset in (9, 10, 100, 2)]
    assert [each.offset for each in sorted(positions)] == [2, 9, 10, 100]
    one, two = Position("e", 9), Position("e", 10)
    assert (one < two, one <= two, one > two, one >= two, one <= one) == (True, True, False, False, True)


@pytest.mark.parametrize("other", [Position("f", 5), "e:5", ("e", 5), 5])
def test_position_is_not_compared_with_something_else(other: Any) -> None:
    position = Position("e", 5)
    for compare in (operator.lt, operator.le, operator.gt, operator.ge):
        for one, two in ((position, other), (other, position)):
            with pytest.raises(TypeError, match="can be compared with one of the same history"):
                compare(one, two)


class Bookmark(BaseModel):
    since: Position


def test_model_reads_and_writes_a_position_by_its_text() -> None:
    for bookmark in (Bookmark.model_validate_json('{"since":"e:5"}'), Bookmark(since=Position("e", 5))):
        assert (type(bookmark.since), bookmark.since.epoch, bookmark.since.offset) == (Position, "e", 5)
        assert bookmark.model_dump_json() == '{"since":"e:5"}'
    assert Bookmark.model_json_schema()["properties"]["since"]["type"] == "string"
    for nonsense in ("e", "e:-1", "", 5, ["e", 5], None):
        with pytest.raises(ValidationError):
            Bookmark.model_validate({"since": nonsense})


# Publications and pages as JSON.


@pytest.mark.parametrize(
    ("publication", "expected"),
    [
        (Publication(Message.of("a"), NEWS), {"channel": "news", "data": "a"}),
        (Publication(Message.of({"a": None}), EVERYONE), {"to": "everyone", "data": {"a": None}}),
        (Publication(Message.of(b"\xff"), Audience.user(5)), {"to": "user", "data": "/w==", "encoding": "base64"}),
        (
            Publication(Message.of([1]), NEWS, frozenset({"x"}), id="y", position=Position("e", 1)),
            {"channel": "news", "data": [1], "id": "y", "position": "e:1"},
        ),
    ],
)
def test_publication_is_written_as_clients_see_it(publication: Publication, expected: dict[str, object]) -> None:
    assert dict(publication) == expected
    assert json.loads(to_json(publication)) == expected
    assert json.loads(Message.of({"none": None, "a": [publication]}).payload) == {"none": None, "a": [expected]}
    event = json.loads(Message.of(dict(publication)).payload)
    said = json.loads(publication.seen_by(events).payload)
    assert said == {"type": "message"} | event
    with pytest.raises(KeyError):
        publication["exclude"]


def test_page_is_written_with_its_messages() -> None:
    page = Page([HELLO], Position("e", 5), True)
    expected = {
        "messages": [{"channel": "news", "data": "hello", "position": "e:5"}],
        "position": "e:5",
        "is_complete": True,
    }
    assert json.loads(to_json({"page": page})) == {"page": expected}
    assert json.loads(Message.of(page).payload) == expected
    assert dict(page) == {"messages": [HELLO], "position": "e:5", "is_complete": True}
    assert repr(page) == "<Page of 1 messages up to e:5>"
    with pytest.raises(KeyError):
        page["keys"]
    with pytest.raises(ValidationError):
        TypeAdapter(Page).validate_json(json.dumps(expected))
