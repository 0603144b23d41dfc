from __future__ import annotations

import dataclasses
import datetime
import inspect
import json
import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, field_serializer

from wsbroadcast import EncodeError, Message

T = TypeVar("T")
any_text = st.text(st.characters(exclude_categories=[]))  # lone surrogates too
scalars = st.none() | st.booleans() | st.integers() | st.floats() | any_text
structures = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(any_text, inner)
)


def is_sendable(value: Any) -> bool:
    """Whether JSON in UTF-8 has a form for it."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, (list, tuple)):
        return all(map(is_sendable, value))
    if isinstance(value, dict):
        return all(is_sendable(key) and is_sendable(item) for key, item in value.items())
    return True


@given(st.text())
@example("")
@example("NaN")
@example("\x00\U0001f600")
def test_str_becomes_a_text_frame(text: str) -> None:
    message = Message.of(text)
    assert message.is_text
    assert message.payload == text.encode()
    assert message.size == len(text.encode())
    assert message.data == text


@given(st.binary())
def test_bytes_become_a_binary_frame(data: bytes) -> None:
    for value in (data, bytearray(data), memoryview(data)):
        message = Message.of(value)
        assert not message.is_text
        assert message.payload == data
        assert message.data == data


def test_bytearray_may_change_afterwards() -> None:
    value = bytearray(b"before")
    message = Message.of(value)
    value[:] = b"after!"
    assert message.payload == b"before"


@given(structures)
@example(["NaN", "Infinity"])
@example({"NaN": "-Infinity"})
@example([math.nan])
@example({"a": [1, {"b": -math.inf}]})
@example(["\ud800"])
@example({"\udfff": 1})
@example([10**5000, "NaN"])
def test_anything_else_is_json_or_an_encode_error(value: Any) -> None:
    if isinstance(value, str) or is_sendable(value):
        try:
            message = Message.of(value)
        except EncodeError:
            assert isinstance(value, str)
            assert not is_sendable(value)
            return
        assert message.is_text
        if not isinstance(value, str):
            # Python's own parser refuses an int of 5,000 digits, so both sides keep their digits.
            assert json.loads(message.data, parse_int=float) == json.loads(to_plain_json(value), parse_int=float)
    else:
        with pytest.raises(EncodeError):
            Message.of(value)


def to_plain_json(value: object) -> str:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value, allow_nan=False)
    finally:
        sys.set_int_max_str_digits(limit)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_a_number_is_refused_by_name(value: float) -> None:
    with pytest.raises(EncodeError, match=r"NaN|Infinity"):
        Message.of({"value": value})


@pytest.mark.parametrize("depth", [1, 100, 254, 255, 256, 1_000, 100_000])
@pytest.mark.parametrize("leaf", [0, "NaN"])
def test_deep_nesting_is_json_or_an_encode_error(depth: int, leaf: object) -> None:
    value = leaf
    for _ in range(depth):
        value = [value]
    try:
        message = Message.of(value)
    except EncodeError:
        assert depth > 200
    else:
        assert message.size == 2 * depth + len(json.dumps(leaf))


def test_nesting_from_deep_within_the_stack_is_an_encode_error_at_worst() -> None:
    value: object = "NaN"
    for _ in range(200):
        value = [value]
    room = sys.getrecursionlimit() - len(inspect.stack())
    outcomes = {deeper(depth, lambda: outcome(value)) for depth in range(room - 250, room - 30, 10)}
    assert outcomes <= {"sent", "refused"}


def deeper(depth: int, call: Callable[[], T]) -> T:
    return call() if depth == 0 else deeper(depth - 1, call)


def outcome(value: object) -> str:
    try:
        Message.of(value)
    except EncodeError:
        return "refused"
    return "sent"


def circular_list() -> object:
    value: list[object] = []
    value.append(value)
    return value


def circular_dict() -> object:
    value: dict[str, object] = {}
    value["inner"] = {"outer": value}
    return value


class Broken(BaseModel):
    value: int = 1

    @field_serializer("value")
    def fail(self, value: int) -> int:
        raise KeyError(value)


@pytest.mark.parametrize(
    "value",
    [
        circular_list(),
        circular_dict(),
        object(),
        [object()],
        [b"\xff"],
        Broken(),
        [Broken()],
        (1 / 0 for _ in "x"),
        lambda: None,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_json_is_an_encode_error(value: object) -> None:
    with pytest.raises(EncodeError, match="can't be written"):
        Message.of(value)


class Point(BaseModel):
    x: int


@dataclasses.dataclass
class Event:
    at: datetime.date
    id: UUID


def test_models_dataclasses_and_dates_are_json() -> None:
    message = Message.of([Point(x=1), Event(datetime.date(2024, 2, 29), UUID(int=1)), {1}, b"text"])
    assert json.loads(message.data) == [
        {"x": 1},
        {"at": "2024-02-29", "id": "00000000-0000-0000-0000-000000000001"},
        [1],
        "text",
    ]


def test_none_is_json_null() -> None:
    assert Message.of(None).data == "null"


def test_message_is_encoded_once() -> None:
    message = Message.of({"a": 1})
    assert Message.of(message) is message


def test_message_of_a_message_may_get_another_key() -> None:
    message = Message.of("text", "a")
    assert Message.of(message, "a") is message
    other = Message.of(message, "b")
    assert (other.key, other.data, other.is_text) == ("b", "text", True)
    assert message.key == "a"


def test_lone_surrogate_is_refused_with_its_place() -> None:
    with pytest.raises(EncodeError, match="position 2"):
        Message.of("ab\ud800")


def test_repr_shows_no_payload() -> None:
    assert repr(Message.of("secret")) == "<Message text 6 bytes>"
    assert repr(Message.of(b"secret")) == "<Message binary 6 bytes>"
