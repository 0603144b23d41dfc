"""What an annotation says of messages: its members, what tells them apart, and what is refused when it is made."""

from __future__ import annotations

import json
import re
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import StrEnum
from ipaddress import IPv4Address
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, Required, TypeVar, get_args, get_origin
from uuid import UUID
from zoneinfo import ZoneInfo

import pydantic
import pytest
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    RootModel,
    SecretStr,
    Tag,
    create_model,
    field_validator,
)
from pydantic_core import PydanticCustomError, SchemaValidator
from typing_extensions import TypeAliasType, TypedDict

from wsbroadcast import ConfigurationError, EncodeError
from wsbroadcast.typed.message_types import MessageTypes
from wsbroadcast.typed.mistakes import Invalid

SECRET = "s3cret-of-a-client"

T = TypeVar("T")


class Say(BaseModel):
    type: Literal["say"] = "say"
    text: str


class Typing(BaseModel):
    type: Literal["typing"] = "typing"


@dataclass
class Move:
    type: Literal["move"]
    x: int
    y: int = 0


class Leave(TypedDict):
    type: Literal["leave"]
    why: str


class Kind(StrEnum):
    SHOUT = "shout"


class Shout(BaseModel):
    type: Literal[Kind.SHOUT] = Kind.SHOUT
    text: str


class Box(BaseModel, Generic[T]):
    content: T


class Other(BaseModel):
    number: int


@dataclass
class Lost:
    type: Literal["lost"]
    what: Nowhere  # type: ignore[name-defined]  # noqa: F821


class SayAgain(BaseModel):
    type: Literal["say", "again"]


class Version(BaseModel):
    v: Literal[1]
    type: Literal["say"]


class VersionTwo(BaseModel):
    v: Literal[2]
    type: Literal["say"]


def mistakes(types: MessageTypes[Any], raw: str) -> list[Any]:
    with pytest.raises(Invalid) as caught:
        types.read(raw)
    return caught.value.mistakes


# What tells the members apart.


def test_union_is_told_apart_by_the_field_that_all_have() -> None:
    types: MessageTypes[Any] = MessageTypes(Say | Typing | Move | Leave | Shout)
    assert types.discriminator == "type"
    assert types.members == (Say, Typing, Move, Leave, Shout)
    assert types.tags == {"say": Say, "typing": Typing, "move": Move, "leave": Leave, "shout": Shout}
    for raw, value in (
        ('{"type":"say","text":"hi"}', Say(text="hi")),
        ('{"type":"typing"}', Typing()),
        ('{"type":"move","x":1}', Move("move", 1)),
        ('{"type":"leave","why":"late"}', {"type": "leave", "why": "late"}),
        ('{"type":"shout","text":"HI"}', Shout(text="HI")),
    ):
        read = types.read(raw)
        assert read == value
        assert types.member_of(read) is types.tags[json.loads(raw)["type"]]
        assert types.read(types.write(read).payload) == value


def test_discriminator_of_pydantics_own_is_taken() -> None:
    types: MessageTypes[Any] = MessageTypes(Annotated[Version | VersionTwo, Field(discriminator="v")])
    assert (types.discriminator, types.tags) == ("v", {1: Version, 2: VersionTwo})
    by_function: MessageTypes[Any] = MessageTypes(
        Annotated[
            Annotated[Say, Tag("a")] | Annotated[Other, Tag("b")],
            Discriminator(lambda each: "a" if "text" in each else "b"),
        ]
    )
    assert (by_function.discriminator, by_function.members) == (None, (Say, Other))
    assert by_function.member_of(by_function.read('{"number":1}')) is Other


def test_field_that_differs_is_found_where_type_does_not() -> None:
    assert MessageTypes(Version | VersionTwo).discriminator == "v"


class Color(StrEnum):
    RED = "red"


class Red(TypedDict, total=False):
    color: Required[Literal[Color.RED]]
    depth: NotRequired[int]


class Green(TypedDict):
    color: Literal["green"]


def test_typed_dicts_are_told_apart_by_what_they_require() -> None:
    types: MessageTypes[Any] = MessageTypes(Red | Green)
    assert types.tags == {"red": Red, "green": Green}
    for raw, member in (('{"color":"red"}', Red), ('{"color":"green"}', Green)):
        assert types.member_of(types.read(raw)) is member


@dataclass
class Crate(Generic[T]):
    type: Literal["crate"]
    content: T


def test_generic_dataclass_is_told_apart() -> None:
    types: MessageTypes[Any] = MessageTypes(Crate[int] | Say)
    assert types.member_of(types.read('{"type":"crate","content":1}')) == Crate[int]


def test_union_that_has_a_name_is_a_union() -> None:
    alias: Any = TypeAliasType("Chat", Say | Typing)
    types: MessageTypes[Any] = MessageTypes(alias)
    assert (types.members, types.discriminator) == ((Say, Typing), "type")
    assert types.read('{"type":"typing"}') == Typing()


def test_union_in_a_union_is_one_union() -> None:
    inner = Annotated[Say | Typing, Field(discriminator="type")]
    types: MessageTypes[Any] = MessageTypes(inner | Move)
    assert types.members == (Say, Typing, Move)
    assert types.read('{"type":"move","x":3}') == Move("move", 3)


@pytest.mark.parametrize("annotation", [Say, Box[int], dict[str, int], list[Say], RootModel[Say | Other], Leave, int])
def test_one_type_needs_no_discriminator(annotation: Any) -> None:
    types: MessageTypes[Any] = MessageTypes(annotation)
    assert (types.discriminator, types.members) == (None, (annotation,))
    assert types.member_of(object()) is annotation


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        (Say | Other, r'nothing tells the members of receives apart.*Other: type: Literal\["other"\]'),
        (Say | Lost, "the annotations of Lost can't be read: name 'Nowhere'"),
        (Say | SayAgain, "type is 'say' in Say and in SayAgain"),
        (Say | int, "int is none"),
        (Say | None, "NoneType is none"),
        (list["Nowhere"], "pydantic can't read receives"),  # type: ignore[name-defined]  # noqa: F821
        ("Say", r"receives is a type, such as Say, or Say \| Typing, not str"),
        ([Say, Other], "not list"),
        ((Say, Other), "not tuple"),
        ({Say}, "not set"),
        ({"room:*": Say}, "not dict"),
        (Say(text="hi"), r"not tests\.typed\.test_message_types\.Say"),
        (Callable[[], int], "a function is not JSON"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_made(annotation: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        MessageTypes(annotation, "receives")


def test_types_of_an_annotation_are_made_once() -> None:
    assert MessageTypes.of(Say | Typing) is MessageTypes.of(Say | Typing)
    unhashable = Annotated[Say, ["no hash"]]
    assert MessageTypes.of(unhashable).members == (Say,)
    assert repr(MessageTypes.of(unhashable)) == "<MessageTypes Say>"
    assert repr(MessageTypes.of(Say | Typing)) == "<MessageTypes Say | Typing>"


def _fields(number: int) -> dict[str, Any]:
    return {"type": (Literal[f"m{number}"], f"m{number}"), "number": (int, number)}


def test_union_of_a_hundred_members_reads_each() -> None:
    members = [create_model(f"M{number}", **_fields(number)) for number in range(100)]
    annotation: Any = members[0]
    for member in members[1:]:
        annotation = annotation | member
    types: MessageTypes[Any] = MessageTypes(annotation)
    assert types.members == tuple(members)
    for number, member in enumerate(members):
        assert types.read(f'{{"type":"m{number}","number":{number}}}') == member()
    assert repr(types) == "<MessageTypes M0 | M1 | M2 | M3 | 96 others>"
    assert [each["loc"] for each in mistakes(types, '{"type":"m99","number":"x"}')] == [["m99", "number"]]
    schema = types.json_schema()
    assert len(schema["oneOf"]) == 100
    assert schema["discriminator"]["propertyName"] == "type"


def test_json_schema_is_of_both_directions() -> None:
    class Model(BaseModel):
        at: date = Field(alias="when", default=date(2026, 1, 1))

    types = MessageTypes(Model)
    assert types.json_schema("validation").get("required") is None
    assert list(types.json_schema("serialization")["properties"]) == ["when"]


# How models read: pydantic's rules hold.


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    number: int
    at: date


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    number: int


class Named(BaseModel):
    user_name: str = Field(alias="userName")


def test_strict_model_reads_what_json_has() -> None:
    types = MessageTypes(Strict)
    assert types.read('{"number":1,"at":"2026-01-02"}') == Strict(number=1, at=date(2026, 1, 2))
    assert [each["type"] for each in mistakes(types, '{"number":"1","at":"2026-01-02","more":1}')] == [
        "int_type",
        "extra_forbidden",
    ]


def test_extra_fields_are_dropped_kept_or_refused_as_the_model_says() -> None:
    assert MessageTypes(Say).write(MessageTypes(Say).read('{"text":"a","x":1}')).payload == b'{"type":"say","text":"a"}'
    assert MessageTypes(Open).write(MessageTypes(Open).read('{"number":1,"x":2}')).payload == b'{"number":1,"x":2}'


def test_aliases_hold_both_ways() -> None:
    types = MessageTypes(Named)
    read = types.read('{"userName":"ada"}')
    assert (read.user_name, types.write(read).payload) == ("ada", b'{"userName":"ada"}')
    assert mistakes(types, '{"user_name":"ada"}')[0]["loc"] == ["userName"]


class Tree(BaseModel):
    name: str = ""
    children: list[Tree] = []


def test_recursive_model_is_read_as_deep_as_json_may_be() -> None:
    types = MessageTypes(Tree)

    def nested(depth: int) -> str:
        return '{"children":[' * depth + "]}" * depth

    read = types.read(nested(50))
    assert types.write(read).payload.count(b"children") == 50
    for depth in (300, 20_000):
        (mistake,) = mistakes(types, nested(depth))
        assert mistake["type"] in ("json_invalid", "recursion_loop")


NAMES = {
    **{
        each.__name__: each
        for each in (UUID, datetime, date, time, timedelta, Decimal, IPv4Address, re.Pattern, ZoneInfo)
    },
    **{name: getattr(pydantic, name) for name in ("AnyUrl", "HttpUrl", "Json", "Base64Bytes", "ByteSize")},
    "Annotated": Annotated,
    "Literal": Literal,
    "Field": Field,
}

# What is wrong is said, and nothing of what came.


def _refuse(error: Exception) -> Any:
    def refuse(value: str) -> str:
        raise error

    return refuse


def _repeat(value: str) -> str:
    raise ValueError(f"what is {value}?")


def _assert(value: str) -> str:
    raise AssertionError(value)


def _with_context(value: str) -> str:
    raise PydanticCustomError("too_rude", "not {value}", {"value": value})


def _in_words(value: str) -> str:
    raise PydanticCustomError("too_rude", "be polite")


@pytest.mark.parametrize(
    ("validator", "code", "text"),
    [
        (_repeat, "value_error", "Value error"),
        (_assert, "assertion_error", "Assertion failed"),
        (_with_context, "too_rude", "Input is not valid"),
        (_in_words, "too_rude", "be polite"),
    ],
)
def test_validator_that_refuses_says_where_and_not_what(validator: Any, code: str, text: str) -> None:
    model = create_model("Model", text=(Annotated[str, AfterValidator(validator)], ...))
    assert mistakes(MessageTypes(model), json.dumps({"text": SECRET})) == [{"loc": ["text"], "type": code, "msg": text}]


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        ("UUID", SECRET),
        ("datetime", SECRET),
        ("date", SECRET),
        ("time", SECRET),
        ("timedelta", SECRET),
        ("Decimal", SECRET),
        ("int", SECRET),
        ("float", SECRET),
        ("bool", SECRET),
        ("AnyUrl", SECRET),
        ("HttpUrl", f"ftp://{SECRET}"),
        ("Json", SECRET),
        ("Base64Bytes", SECRET),
        ("ByteSize", SECRET),
        ("IPv4Address", SECRET),
        ("Pattern", f"({SECRET}"),
        ("ZoneInfo", SECRET),
        ("complex", SECRET),
        ("Literal['a']", SECRET),
        ("Color", SECRET),
        ("list[int]", {SECRET: SECRET}),
        ("dict[str, int]", [SECRET]),
        ("Annotated[str, Field(pattern='^a$')]", SECRET),
        ("Annotated[str, Field(max_length=3)]", SECRET),
    ],
)
def test_no_mistake_repeats_what_came(annotation: str, value: object) -> None:
    names = {**NAMES, "Color": Color}
    try:
        model = create_model("Model", value=(eval(annotation, names), ...))
    except pydantic.errors.PydanticSchemaGenerationError:
        assert annotation in ("complex", "ZoneInfo")
        pytest.skip("an older pydantic doesn't know it")
    types: MessageTypes[Any] = MessageTypes(model)
    found = mistakes(types, json.dumps({"value": value}))
    assert found
    assert SECRET not in str(found)
    assert all(SECRET[:4] not in each["msg"] for each in found)


def test_tag_of_a_client_is_not_repeated() -> None:
    types: MessageTypes[Any] = MessageTypes(Say | Typing)
    for raw in (f'{{"type":"{SECRET}"}}', '{"text":"x"}', f'"{SECRET}"', f"{{{SECRET}"):
        assert SECRET not in str(mistakes(types, raw))


def test_mistakes_are_bounded() -> None:
    deep = MessageTypes(Tree)
    raw = '{"children":[' * 60 + '{"name":1,"' + "x" * 5000 + '":1}' + "]}" * 60
    (mistake,) = mistakes(deep, raw)
    assert len(mistake["loc"]) == 32
    keys: MessageTypes[Any] = MessageTypes(dict[str, int])
    (mistake,) = mistakes(keys, json.dumps({"k" * 5000: "x"}))
    assert mistake["loc"] == ["k" * 64]
    many: MessageTypes[Any] = MessageTypes(wide(20))
    assert len(mistakes(many, "{}")) == 16
    more: MessageTypes[Any] = MessageTypes(wide(1200))
    assert [each["type"] for each in mistakes(more, "{}")] == ["too_many_errors"]


def wide(fields: int) -> Any:
    each: Any = (int, ...)
    return create_model("Wide", **dict.fromkeys((f"f{number}" for number in range(fields)), each))


# Each mistake that pydantic finds takes memory, and a list of 64 KiB has room for a million.
@pytest.mark.parametrize(
    ("annotation", "raw"),
    [
        (list[Any], None),
        (tuple[Any, ...], None),
        (set[Any], None),
        (frozenset[Any], None),
        (deque[Any], None),
        (list[list[Any]], "[" + ",".join(["[{}]"] * 16_000) + "]"),
        (dict[str, Any], "{" + ",".join(f'"{number}":{{}}' for number in range(6_000)) + "}"),
    ],
)
@pytest.mark.parametrize("place", ["alone", "in_a_model", "in_a_dataclass", "in_a_union"])
@pytest.mark.skipif(
    "_use_prebuilt" not in (SchemaValidator.__text_signature__ or ""), reason="pydantic before 2.13 reads on"
)
def test_no_more_of_a_container_is_read_than_to_its_first_mistake(annotation: Any, raw: str | None, place: str) -> None:
    inner = replaced(annotation, wide(50))
    raw = raw or "[" + ",".join(["{}"] * 21_000) + "]"
    match place:
        case "in_a_model":
            annotation, raw = create_model("Holder", metadata=(inner, ...)), f'{{"metadata":{raw}}}'
        case "in_a_dataclass":
            annotation, raw = make_dataclass("Holder", [("items", inner)]), f'{{"items":{raw}}}'
        case "in_a_union":
            tagged = create_model("Tagged", __base__=Typing, items=(inner, ...))
            annotation, raw = tagged | Say, f'{{"type":"typing","items":{raw}}}'
        case _:
            annotation = inner
    with pytest.raises(Invalid) as caught:
        MessageTypes(annotation).read(raw)
    assert 1 <= caught.value.count <= 51


def replaced(annotation: Any, model: Any) -> Any:
    """The same container, of a model in place of anything."""
    if annotation is Any:
        return model
    return get_origin(annotation)[
        tuple(each if each in (str, ...) else replaced(each, model) for each in get_args(annotation))
    ]


def test_megabyte_of_mistakes_is_answered_shortly() -> None:
    numbers: MessageTypes[Any] = MessageTypes(list[list[Say | Other]])
    raw = "[" + ",".join(["[{}]"] * 200_000) + "]"
    assert len(raw) >= 1_000_000
    assert len(json.dumps(mistakes(numbers, raw))) < 200
    for raw in ("[" * 1_000_000, '{"a":' * 200_000, "[" * 500_000 + "]" * 500_000):
        assert [each["type"] for each in mistakes(numbers, raw)] == ["json_invalid"]


# Infinities, which JSON can't carry back.


class Prices(BaseModel):
    best: float
    by_name: dict[str, list[float]] = {}
    anything: Any = None


class Loop(BaseModel):
    value: float | None = None
    next: Loop | None = None


class Price(BaseModel):
    type: Literal["price"]
    value: float = Field(alias="theValue")


@dataclass(slots=True)
class Point:
    x: float


class Pair(NamedTuple):
    a: int
    b: float


class Row(TypedDict):
    x: float


@pytest.mark.parametrize(
    ("annotation", "raw", "loc"),
    [
        (float, "1e999", []),
        (float, '"inf"', []),
        (Any, "1e999", []),
        (list[float], "[1,-1e999]", [1]),
        (Prices, '{"best":1e999}', ["best"]),
        (Prices, '{"best":NaN}', ["best"]),
        (Prices, '{"best":Infinity}', ["best"]),
        (Prices, '{"best":"nan"}', ["best"]),
        (Prices, '{"best":1,"by_name":{"a":[1,1e999]}}', ["by_name", "a", 1]),
        (Prices, '{"best":1,"anything":{"a":[1e999]}}', ["anything", "a", 0]),
        (Loop, '{"next":{"next":{"value":1e999}}}', ["next", "next", "value"]),
        (Open, '{"number":1,"more":1e999}', ["more"]),
        (Point, '{"x":1e999}', ["x"]),
        (list[Point], '[{"x":1e999}]', [0, "x"]),
        (deque[float], "[1,1e999]", [1]),
        (defaultdict[str, float], '{"a":1e999}', ["a"]),
        (Pair, "[1,1e999]", [1]),
        (dict[str, Open], '{"a":{"number":1,"more":1e999}}', ["a", "more"]),
        (Row, '{"x":1e999}', ["x"]),
        (RootModel[list[float]], "[1e999]", ["root", 0]),
        (Box[float], '{"content":1e999}', ["content"]),
        (Say | Price, '{"type":"price","theValue":1e999}', ["price", "theValue"]),
        (dict[str, float], json.dumps({"k" * 100: "inf"}), ["k" * 64]),
    ],
)
def test_number_that_json_cannot_carry_back_is_a_mistake(annotation: Any, raw: str, loc: list[Any]) -> None:
    assert mistakes(MessageTypes(annotation), raw) == [
        {"loc": loc, "type": "finite_number", "msg": "Input should be a finite number"}
    ]


def test_number_that_json_can_carry_is_read() -> None:
    assert MessageTypes(Prices).read('{"best":1e308,"by_name":{"a":[0.5]},"anything":[1]}').best == 1e308
    assert MessageTypes(Loop).read('{"next":{"value":1.5}}').next == Loop(value=1.5)


# Validators that fail.


class Faulty(BaseModel):
    key: str

    @field_validator("key")
    @classmethod
    def look_up(cls, key: str) -> str:
        return {"a": "b"}[key]


def test_error_of_a_validators_own_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        MessageTypes(Faulty).read('{"key":"x"}')


# What is written.


class Login(BaseModel):
    name: str
    password: SecretStr


def test_secret_can_be_read_and_not_sent() -> None:
    types = MessageTypes(Login, "sends")
    assert types.read('{"name":"ada","password":"pw"}').password.get_secret_value() == "pw"
    with pytest.raises(ConfigurationError, match=r"sends can't be sent as JSON: Login\.password: a secret"):
        types.check_sendable()


def test_object_is_checked_by_its_attributes() -> None:
    class Row:
        type = "say"
        text = "hi"
        password = SECRET

    types: MessageTypes[Any] = MessageTypes(Say | Typing)
    checked = types.check(Row())
    assert types.write(checked).payload == b'{"type":"say","text":"hi"}'
    with pytest.raises(Invalid) as caught:
        types.check(object())
    assert caught.value.text


def test_infinity_is_not_written_as_null() -> None:
    types = MessageTypes(Prices)
    with pytest.raises(EncodeError, match="Infinity at best"):
        types.write(Prices(best=float("inf")))
