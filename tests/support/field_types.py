"""Every field type that pydantic documents and JSON can carry, each with a value as Python has it."""

from __future__ import annotations

import enum
import ipaddress
import re
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, NotRequired, TypeVar, Union
from zoneinfo import ZoneInfo

import annotated_types
from pydantic import (
    UUID1,
    UUID3,
    UUID4,
    UUID5,
    AfterValidator,
    AnyHttpUrl,
    AnyUrl,
    AnyWebsocketUrl,
    AwareDatetime,
    Base64Bytes,
    Base64Str,
    Base64UrlBytes,
    Base64UrlStr,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    DirectoryPath,
    Discriminator,
    FailFast,
    Field,
    FilePath,
    FileUrl,
    FiniteFloat,
    FtpUrl,
    FutureDate,
    FutureDatetime,
    HttpUrl,
    IPvAnyAddress,
    IPvAnyInterface,
    IPvAnyNetwork,
    JsonValue,
    NaiveDatetime,
    NewPath,
    NonNegativeInt,
    OnErrorOmit,
    PastDate,
    PastDatetime,
    PlainSerializer,
    PositiveInt,
    PostgresDsn,
    RootModel,
    SecretBytes,
    SecretStr,
    SerializeAsAny,
    StrictBool,
    StrictInt,
    StrictStr,
    StringConstraints,
    Tag,
    WebsocketUrl,
    WithJsonSchema,
    computed_field,
    conlist,
    field_serializer,
    model_serializer,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypeAliasType, TypedDict

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mixed(enum.Enum):
    ONE = 1
    TWO = "two"


class Point(NamedTuple):
    x: int
    y: int = 0


class Bare(NamedTuple):
    left: Any
    right: Any


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


@dataclass
class Plain:
    a: int
    b: list[str] = field(default_factory=list)


@pydantic_dataclass
class Checked:
    a: int
    later: date | None = None


class Inner(BaseModel):
    """What is inside."""

    value: int


class Node(BaseModel):
    name: str
    children: list[Node] = []
    parent: Node | None = None


class Page(BaseModel, Generic[T]):
    items: list[T]
    total: int


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    barks: bool


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")

    known: int


class LooseNumbers(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int] = Field(init=False)

    known: str


class Tight(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    only: int


class Empty(BaseModel):
    pass


class Aliased(BaseModel):
    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    from_: str = Field(alias="from")
    odd: int = Field(alias="no-identifier, at all\u2028\"'")
    ways: int = Field(default=1, validation_alias="comes-as", serialization_alias="goesAs")


class Computed(BaseModel):
    width: int
    secret: int = Field(default=0, exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def area(self) -> float:
        return self.width**2

    @field_serializer("width")
    def as_text(self, value: int) -> str:
        return str(value)


class Whole(BaseModel):
    x: int

    @model_serializer
    def as_list(self) -> list[int]:
        return [self.x]


class Tree(RootModel[dict[str, "Tree"]]):
    pass


class Names(RootModel[list[str]]):
    pass


class Described(BaseModel):
    """A model that */ ends no comment.

    \u2028 Nor a line.
    """

    old: int = Field(default=0, deprecated=True, description="Not any more.\n\nAt all.")
    shown: str = Field(examples=["*/"], json_schema_extra={"x-more": 1})


Recursive = TypeAliasType("Recursive", "list[Recursive] | int | None")
Pair = TypeAliasType("Pair", tuple[T, T], type_params=(T,))
UserNumber = NewType("UserNumber", int)


def kind_of(value: Any) -> str:
    return "text" if isinstance(value, str) else "number"


class Case(NamedTuple):
    """A type with a value of it."""

    type: Any
    value: Any
    is_unknown: bool = False
    """Whether TypeScript can't say anything about it."""


NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

CASES: dict[str, Case] = {
    "any": Case(Any, {"a": [1]}, is_unknown=True),
    "object": Case(object, 1, is_unknown=True),
    "none": Case(None, None),
    "bool": Case(bool, True),
    "int": Case(int, 2**60),
    "float": Case(float, 1.5),
    "str": Case(str, 'quote " and \u2028'),
    "bytes": Case(bytes, b"abc"),
    "complex": Case(complex, 1 + 2j),
    "fraction": Case(Fraction, Fraction(1, 3)),
    "decimal": Case(Decimal, Decimal("1.10")),
    "enum": Case(Colour, Colour.RED),
    "int_enum": Case(Level, Level.HIGH),
    "mixed_enum": Case(Mixed, Mixed.TWO),
    "enum_member": Case(Literal[Colour.GREEN], Colour.GREEN),
    "literal": Case(Literal["a", 1, None, True], None),
    "odd_literal": Case(Literal['quote " \\ \u2028 */', "line\nend"], "line\nend"),
    "datetime": Case(datetime, NOW),
    "date": Case(date, date(2026, 1, 2)),
    "time": Case(time, time(3, 4)),
    "timedelta": Case(timedelta, timedelta(hours=1)),
    "aware": Case(AwareDatetime, NOW),
    "naive": Case(NaiveDatetime, datetime(2026, 1, 2)),
    "past_date": Case(PastDate, date(2000, 1, 1)),
    "future_date": Case(FutureDate, date(9000, 1, 1)),
    "past_datetime": Case(PastDatetime, datetime(2000, 1, 1, tzinfo=UTC)),
    "future_datetime": Case(FutureDatetime, datetime(9000, 1, 1, tzinfo=UTC)),
    "zone": Case(ZoneInfo, ZoneInfo("UTC")),
    "uuid": Case(uuid.UUID, uuid.UUID(int=1)),
    "uuid1": Case(UUID1, uuid.UUID("a6cc5730-2261-11ee-9c43-2eb5a363657c")),
    "uuid3": Case(UUID3, uuid.uuid3(uuid.NAMESPACE_DNS, "a")),
    "uuid4": Case(UUID4, uuid.UUID("8f1b4d3e-0c8a-4b58-9c7f-2f5a0b1c2d3e")),
    "uuid5": Case(UUID5, uuid.uuid5(uuid.NAMESPACE_DNS, "a")),
    "path": Case(Path, Path("/tmp")),
    "file_path": Case(FilePath, Path(__file__)),
    "directory_path": Case(DirectoryPath, Path(__file__).parent),
    "new_path": Case(NewPath, Path(__file__).parent / "nothing-here"),
    "pattern": Case(re.Pattern[str], re.compile("a+")),
    "ipv4": Case(ipaddress.IPv4Address, ipaddress.IPv4Address("127.0.0.1")),
    "ipv6_network": Case(ipaddress.IPv6Network, ipaddress.IPv6Network("::/64")),
    "ip_any": Case(IPvAnyAddress, ipaddress.IPv4Address("127.0.0.1")),
    "ip_any_interface": Case(IPvAnyInterface, ipaddress.IPv4Interface("127.0.0.1/8")),
    "ip_any_network": Case(IPvAnyNetwork, ipaddress.IPv4Network("127.0.0.0/8")),
    "any_url": Case(AnyUrl, AnyUrl("x://y")),
    "any_http_url": Case(AnyHttpUrl, AnyHttpUrl("http://y")),
    "http_url": Case(HttpUrl, HttpUrl("https://y")),
    "file_url": Case(FileUrl, FileUrl("file:///y")),
    "ftp_url": Case(FtpUrl, FtpUrl("ftp://y")),
    "websocket_url": Case(WebsocketUrl, WebsocketUrl("wss://y")),
    "any_websocket_url": Case(AnyWebsocketUrl, AnyWebsocketUrl("ws://y")),
    "dsn": Case(PostgresDsn, PostgresDsn("postgres://u:p@h/d")),
    "byte_size": Case(ByteSize, ByteSize(1024)),
    "secret_str": Case(SecretStr, SecretStr("x")),
    "secret_bytes": Case(SecretBytes, SecretBytes(b"x")),
    "base64_bytes": Case(Base64Bytes, b"YWJj"),
    "base64_str": Case(Base64Str, "YWJj"),
    "base64_url_bytes": Case(Base64UrlBytes, b"YWJj"),
    "base64_url_str": Case(Base64UrlStr, "YWJj"),
    "json_value": Case(JsonValue, {"a": [1, None, "x"]}, is_unknown=True),
    "list": Case(list[int], [1]),
    "bare_list": Case(list, [1, "a"]),
    "list_of_union": Case(list[int | str | None], [1, "a", None]),
    "tuple": Case(tuple[int, str], (1, "a")),
    "tuple_any_length": Case(tuple[int, ...], (1, 2)),
    "empty_tuple": Case(tuple[()], ()),
    "tuple_of_union": Case(tuple[int | None, list[str | int]], (None, ["a"])),
    "named_tuple": Case(Point, Point(1)),
    "untyped_named_tuple": Case(Bare, Bare(1, "a")),
    "set": Case(set[int], {1}),
    "frozenset": Case(frozenset[str], frozenset({"a"})),
    "deque": Case(deque[int], deque([1])),
    "sequence": Case(Sequence[int], [1]),
    "iterable": Case(Iterable[int], [1]),
    "mapping": Case(Mapping[str, int], {"a": 1}),
    "dict": Case(dict[str, int], {"a": 1}),
    "bare_dict": Case(dict, {"a": 1}),
    "dict_by_int": Case(dict[int, str], {1: "a"}),
    "dict_by_literal": Case(dict[Literal["a", "b"], int], {"a": 1}),
    "dict_by_enum": Case(dict[Colour, int], {Colour.RED: 1}),
    "dict_by_pattern": Case(dict[Annotated[str, Field(pattern="^a")], int], {"ab": 1}),
    "dict_of_dicts": Case(dict[str, dict[str, list[int]]], {"a": {"b": [1]}}),
    "default_dict": Case(defaultdict[str, list[int]], {"a": [1]}),
    "typed_dict": Case(Movie, {"title": "a"}),
    "dataclass": Case(Plain, Plain(1)),
    "pydantic_dataclass": Case(Checked, Checked(1)),
    "model": Case(Inner, Inner(value=1)),
    "recursive_model": Case(Node, Node(name="a", children=[Node(name="b")])),
    "recursive_alias": Case(Recursive, [1, [2, None]]),
    "recursive_root": Case(Tree, Tree({"a": Tree({})})),
    "root_model": Case(Names, Names(["a"])),
    "generic_alias": Case(Pair[int], (1, 2)),
    "generic": Case(Page[Inner], Page[Inner](items=[Inner(value=1)], total=1)),
    "generic_of_union": Case(Page[int | str], Page[int | str](items=[1, "a"], total=2)),
    "nested_generic": Case(Page[Page[int]], Page[Page[int]](items=[Page[int](items=[1], total=1)], total=1)),
    "optional": Case(int | None, None),
    "union": Case(Union[int, str, list[float]], [1.5]),  # noqa: UP007
    "discriminated": Case(Annotated[Cat | Dog, Field(discriminator="kind")], Dog(barks=True)),
    "called_discriminator": Case(
        Annotated[Annotated[str, Tag("text")] | Annotated[int, Tag("number")], Discriminator(kind_of)], 1
    ),
    "extra_allowed": Case(Loose, Loose(known=1, more="a")),  # type: ignore[call-arg]
    "extra_typed": Case(LooseNumbers, LooseNumbers(known="a", more=1)),  # type: ignore[call-arg]
    "extra_forbidden": Case(Tight, Tight(only=1)),
    "empty": Case(Empty, Empty()),
    "aliases": Case(
        Aliased,
        Aliased.model_validate({"from": "a", "no-identifier, at all\u2028\"'": 1, "comes-as": 2}),
    ),
    "computed": Case(Computed, Computed(width=2)),
    "model_serializer": Case(Whole, Whole(x=1)),
    "described": Case(Described, Described(shown="a")),
    "constrained_int": Case(Annotated[int, Field(gt=0, le=10, multiple_of=2)], 2),
    "positive": Case(PositiveInt, 1),
    "non_negative": Case(NonNegativeInt, 0),
    "finite": Case(FiniteFloat, 1.5),
    "constrained_str": Case(Annotated[str, StringConstraints(max_length=3, pattern="^a", strip_whitespace=True)], "a"),
    "constrained_list": Case(conlist(int, min_length=1, max_length=3), [1]),
    "constrained_decimal": Case(Annotated[Decimal, Field(max_digits=3, decimal_places=1)], Decimal("1.5")),
    "annotated_types": Case(Annotated[int, annotated_types.Interval(ge=1, lt=5)], 1),
    "strict": Case(StrictInt | StrictStr | StrictBool, "a"),
    "new_type": Case(UserNumber, UserNumber(1)),
    "fail_fast": Case(Annotated[list[int], FailFast()], [1]),
    "error_omitted": Case(list[OnErrorOmit[int]], [1]),
    "as_any": Case(SerializeAsAny[Inner], Inner(value=1)),
    "validators": Case(Annotated[int, BeforeValidator(int), AfterValidator(abs)], 1),
    "serializer": Case(Annotated[int, PlainSerializer(str, return_type=str)], 1),
    "own_schema": Case(Annotated[Any, WithJsonSchema({"type": ["string", "null"], "format": "own"})], None),
}
"""By name; each is the field `value` of a model of its own."""

REFUSED: dict[str, Any] = {"callable": Callable[[int], int], "hashable": Hashable}
"""Types that no JSON Schema is made of."""
