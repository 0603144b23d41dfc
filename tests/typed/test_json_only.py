"""Every type of a field that pydantic documents goes over JSON and back, or is refused when it is named."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from importlib.util import find_spec
from ipaddress import IPv4Address, IPv4Interface, IPv6Network
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, NewType, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import pydantic
import pytest
from pydantic import BaseModel, Field, create_model
from typing_extensions import TypedDict

from wsbroadcast import ConfigurationError
from wsbroadcast.typed.json_only import Finite, infinity_in
from wsbroadcast.typed.message_types import MessageTypes


class Color(Enum):
    RED = "red"


class Level(IntEnum):
    LOW = 1


class Mode(StrEnum):
    FAST = "fast"


class Pair(NamedTuple):
    a: int
    b: str


class Row(TypedDict):
    a: int


class Inner(BaseModel):
    x: int


T = TypeVar("T")
Number = NewType("Number", int)

# What there is, and JSON of a value of it.
ROUND = [
    (bool, True),
    (int, 10**30),
    (float, 1.5),
    (Decimal, "1.50"),
    (complex, "1+2j"),
    (str, "x"),
    (bytes, "x"),
    (date, "2020-01-01"),
    (time, "10:00:00"),
    (datetime, "2020-01-01T10:00:00Z"),
    (timedelta, "P1DT1S"),
    (Color, "red"),
    (Level, 1),
    (Mode, "fast"),
    (NoneType, None),
    (list, [1, "a", None]),
    (list[int], [1]),
    (tuple, [1, 2]),
    (tuple[int, str], [1, "a"]),
    (tuple[int, ...], [1]),
    (Pair, [1, "b"]),
    (set, [1]),
    (set[int], [1]),
    (frozenset, [1]),
    (frozenset[int], [1]),
    (collections.deque, [1]),
    (collections.deque[int], [1]),
    (Sequence[int], [1]),
    (dict, {"a": 1}),
    (dict[int, int], {"1": 2}),
    (dict[date, int], {"2020-01-01": 2}),
    (Row, {"a": 1}),
    (Mapping[str, int], {"a": 1}),
    (collections.defaultdict[str, int], {"a": 1}),
    (collections.Counter[str], {"a": 1}),
    (collections.OrderedDict[str, int], {"a": 1}),
    (T, 1),
    (re.Pattern, "a+"),
    (Path, "/tmp"),
    (Any, {"a": [1]}),
    (object, 1),
    (Literal["a", 1], "a"),
    (int | None, None),
    (int | str, "x"),
    (Number, 1),
    (Annotated[int, Field(ge=1)], 1),
    (IPv4Address, "1.2.3.4"),
    (IPv4Interface, "1.2.3.4/24"),
    (IPv6Network, "::/64"),
    (UUID, str(UUID(int=5))),
    (ZoneInfo, "UTC"),
    (Fraction, "1/3"),
    (Inner, {"x": 1}),
    (pydantic.RootModel[list[int]], [1]),
    (pydantic.ByteSize, "1kb"),
    (pydantic.PastDate, "2000-01-01"),
    (pydantic.FutureDate, "2990-01-01"),
    (pydantic.PastDatetime, "2000-01-01T00:00:00"),
    (pydantic.FutureDatetime, "2990-01-01T00:00:00"),
    (pydantic.AwareDatetime, "2000-01-01T00:00:00Z"),
    (pydantic.NaiveDatetime, "2000-01-01T00:00:00"),
    (pydantic.AnyUrl, "http://a/"),
    (pydantic.HttpUrl, "http://a/"),
    (pydantic.PostgresDsn, "postgres://a/b"),
    (pydantic.RedisDsn, "redis://a/0"),
    (pydantic.IPvAnyAddress, "1.2.3.4"),
    (pydantic.IPvAnyNetwork, "1.2.3.0/24"),
    (pydantic.UUID4, "7f0f36f5-5e0d-4a0e-9a39-8b2a34bb8a11"),
    (pydantic.FilePath, __file__),
    (pydantic.DirectoryPath, str(Path(__file__).parent)),
    (pydantic.NewPath, f"{__file__}.new"),
    (pydantic.Base64Bytes, "aGk="),
    (pydantic.Base64Str, "aGk="),
    (pydantic.Base64UrlBytes, "aGk="),
    (pydantic.Base64UrlStr, "aGk="),
    (pydantic.conint(gt=1), 2),
    (pydantic.constr(pattern="a"), "a"),
    (pydantic.condecimal(max_digits=3), "1.5"),
    (pydantic.StrictInt, 1),
    (pydantic.StrictStr, "a"),
    (pydantic.StrictBytes, "a"),
    (pydantic.PositiveInt, 1),
    (pydantic.FiniteFloat, 1.5),
    (pydantic.JsonValue, {"a": [1.5]}),
    (list[pydantic.OnErrorOmit[int]], [1, "x"]),
    (pydantic.SerializeAsAny[Inner], {"x": 1}),
    (pydantic.SkipValidation[int], 1),
    (pydantic.InstanceOf[Inner], {"x": 1}),
    (Annotated[datetime, pydantic.Strict()], "2020-01-01T10:00:00Z"),
    *(
        [(pydantic.EmailStr, "a@example.com"), (pydantic.NameEmail, "A <a@example.com>")]
        if find_spec("email_validator")
        else []
    ),
]

UNREADABLE = [
    (Iterable[int], "Model.value: an iterable is read only while it is used"),
    (Generator[int, None, None], "Model.value: an iterable is read only while it is used"),
    (Callable[[int], int], "Model.value: a function is not JSON"),
    (dict[str, Callable[[], int]], "Model.value: a function is not JSON"),
    (type, "Model.value.type: pydantic takes any object of this class, and none is JSON"),
    (type[int], "Model.value.int: a class is not JSON"),
    (Hashable, "receives "),
    (dict[tuple[int, int], int], "Model.value: a key of an object is a text"),
    (pydantic.ImportString, "Model.value: a client would say what is imported"),
]

UNWRITABLE = [
    (pydantic.SecretStr, "s", "a secret is written as asterisks"),
    (pydantic.SecretBytes, "s", "a secret is written as asterisks"),
    (pydantic.Secret[int], 1, "a secret is written as asterisks"),
    (list[pydantic.SecretStr], ["s"], "a secret is written as asterisks"),
    (pydantic.Json, "[1]", "a Json is read from a text"),
    (pydantic.Json[list[int]], "[1]", "a Json is read from a text"),
]


def model_of(annotation: Any) -> Any:
    try:
        return create_model("Model", value=(annotation, ...))
    except pydantic.errors.PydanticSchemaGenerationError:
        if annotation not in (complex, ZoneInfo, Fraction):
            raise
        pytest.skip("an older pydantic doesn't know it")


@pytest.mark.parametrize(("annotation", "value"), ROUND, ids=lambda each: str(each)[:50])
def test_field_goes_over_json_and_back(annotation: Any, value: object) -> None:
    types: MessageTypes[Any] = MessageTypes(model_of(annotation))
    types.check_sendable()
    read = types.read(json.dumps({"value": value}))
    again = types.read(types.write(read).payload)
    assert again == read
    assert types.write(again).payload == types.write(read).payload
    for mode in ("validation", "serialization"):
        assert "value" in types.json_schema(mode)["properties"]


@pytest.mark.parametrize(("annotation", "said"), UNREADABLE, ids=lambda each: str(each)[:50])
def test_field_that_json_cannot_be_is_refused_with_the_reason(annotation: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        MessageTypes(model_of(annotation), "receives")


@pytest.mark.parametrize(("annotation", "value", "said"), UNWRITABLE, ids=lambda each: str(each)[:50])
def test_field_that_is_written_otherwise_is_read_and_not_sent(annotation: Any, value: object, said: str) -> None:
    types: MessageTypes[Any] = MessageTypes(model_of(annotation), "sends")
    types.read(json.dumps({"value": value}))
    with pytest.raises(ConfigurationError, match=re.escape(f"sends can't be sent as JSON: Model.value: {said}")):
        types.check_sendable()


def test_literal_of_an_enum_is_read_or_refused() -> None:
    said, types = "", None
    try:
        types = MessageTypes(model_of(Literal[Color.RED, 1]))
    except ConfigurationError as error:
        said = str(error)
    if types is None:
        assert "Model.value: JSON can't be the literal Color.RED: make it a StrEnum" in said
    else:
        assert types.read('{"value":"red"}').value is Color.RED
    assert MessageTypes(model_of(Literal[Mode.FAST, Level.LOW])).read('{"value":"fast"}').value is Mode.FAST


def test_secret_with_a_serializer_of_its_own_is_sent() -> None:
    class Token(BaseModel):
        value: pydantic.SecretStr

        @pydantic.field_serializer("value", when_used="json")
        def show(self, value: pydantic.SecretStr) -> str:
            return value.get_secret_value()

    types = MessageTypes(Token)
    types.check_sendable()
    assert types.read(types.write(Token(value=pydantic.SecretStr("s"))).payload).value.get_secret_value() == "s"


def test_arbitrary_class_is_refused_and_may_have_a_schema() -> None:
    class Thing:
        pass

    class Holder(BaseModel):
        model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
        thing: Thing

    with pytest.raises(ConfigurationError, match=r"Holder\.thing\.Thing: pydantic takes any object of this class"):
        MessageTypes(Holder)


def test_infinities_are_looked_for_where_they_may_be() -> None:
    def finite(annotation: Any) -> Finite:
        return Finite(pydantic.TypeAdapter(annotation).core_schema)

    assert not finite(Inner).is_needed
    assert not finite(model_of(pydantic.FiniteFloat)).is_needed
    prices = finite(model_of(float))
    assert prices.is_needed
    assert prices.find(model_of(float)(value=1.0)) is None
    assert prices.find(model_of(float)(value=float("nan"))) == ("value",)
    assert infinity_in({"a": [1, {"b": (2.0, float("-inf"))}]}) == ("a", 1, "b", 1)
    assert infinity_in([Decimal("Infinity")]) == (0,)
    assert infinity_in({1: date(2026, 1, 1), "x": Color.RED}) is None
