"""What JSON would lose: numbers that models write as null, and rows of a database that have expired."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import pydantic.dataclasses
import pytest
from pydantic import AliasGenerator, BaseModel, ConfigDict, Field, RootModel, SerializeAsAny, computed_field
from pydantic import field_serializer as serializer
from sqlalchemy import ForeignKey, create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    InstanceState,
    Mapped,
    MappedAsDataclass,
    Session,
    defer,
    mapped_column,
    relationship,
)

from tests.support.brokers import Endpoint
from wsbroadcast import EncodeError, Message

NAN, INF = math.nan, math.inf


def sent(value: object) -> Any:
    """What a client gets."""
    return json.loads(Message.json(value).data)


# NaN and infinities.


class Price(BaseModel):
    at: float = NAN
    note: str | None = None


class Prices(BaseModel):
    all: list[float | None] = [None, 1.5, NAN]


class ByName(BaseModel):
    prices: dict[str, float] = {"gold": 1.5, "oil": -INF}


class Distinct(BaseModel):
    prices: set[float | None] = {1.5, INF}


class Outer(BaseModel):
    inner: Price = Price()


class Event(BaseModel):
    data: Any


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")


class Renamed(BaseModel):
    model_config = ConfigDict(alias_generator=AliasGenerator(serialization_alias=str.upper))
    at: float = NAN


class Averaged(BaseModel):
    prices: list[float] = []

    @computed_field
    def mean(self) -> float:
        return sum(self.prices) / len(self.prices) if self.prices else NAN


class Rounded(BaseModel):
    at: float = 1.0

    @serializer("at")
    def round(self, at: float) -> float:
        return NAN


class List(RootModel[list[float]]):
    """A list by another name."""


class Polymorphic(BaseModel):
    inner: SerializeAsAny[BaseModel] = Price()


@pydantic.dataclasses.dataclass
class Validated:
    at: float = NAN


@dataclasses.dataclass
class Plain:
    price: Price = dataclasses.field(default_factory=Price)


@dataclasses.dataclass
class Bare:
    at: float = INF


class Pair(NamedTuple):
    price: Price = Price()


class Key(Enum):
    GOLD = "gold"


class Never(Enum):
    EVER = NAN


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (Price(), "NaN at at,"),
        (Price(at=INF), "Infinity at at,"),
        (Price(at=-INF), "-Infinity at at,"),
        (Prices(), r"NaN at all\[2\],"),
        (ByName(), r"-Infinity at prices\.oil,"),
        (Distinct(), "Infinity at prices,"),
        (Outer(), r"NaN at inner\.at,"),
        (Event(data=NAN), "NaN at data,"),
        (Event(data={"a b": [NAN]}), r"NaN at data\['a b'\]\[0\],"),
        (Event(data=Price()), r"NaN at data\.at,"),
        (Event(data=[{"price": Price()}]), r"NaN at data\[0\]\.price\.at,"),
        (Loose.model_validate({"at": NAN}), "NaN at at,"),
        (Renamed(), "NaN at AT,"),
        (Averaged(), "NaN at mean,"),
        (Rounded(), "NaN at at,"),
        (List([1.0, NAN]), r"NaN at \[1\],"),
        (Polymorphic(), r"NaN at inner\.at,"),
        (Validated(), "NaN at at,"),
        (Plain(), r"NaN at price\.at,"),
        (Pair(), r"NaN at \[0\]\.at,"),
        ([Price(at=1.0), Price()], r"NaN at \[1\]\.at,"),
        ({"type": "price", "data": {"list": (Price(),)}}, r"NaN at data\.list\[0\]\.at,"),
        ({1: {None: Price()}}, r"NaN at \['1'\]\.None\.at,"),
        ({Key.GOLD: Price()}, r"NaN at gold\.at,"),
        ({datetime(2026, 1, 1): Price()}, r"NaN at \['2026-01-01T00:00:00'\]\.at,"),
        (collections.OrderedDict(a=[Price()]), r"NaN at a\[0\]\.at,"),
        ((Price(at=at) for at in (1.0, NAN)), r"NaN at \[1\]\.at,"),
        (Price.model_construct(at=1.0, note=NAN), "NaN at note,"),
        # What is written as NaN, and found there.
        (Bare(), "Infinity at at,"),
        ({"a": [{"b": NAN}]}, r"NaN at a\[0\]\.b,"),
        ({"text": "NaN", "at": (INF,)}, r"Infinity at at\[0\],"),
        (Never.EVER, "NaN,"),
        ({NAN}, r"NaN at \[0\],"),
    ],
)
def test_number_that_json_can_not_carry_is_refused_by_its_place(value: object, where: str) -> None:
    with pytest.raises(EncodeError, match=f"the message holds {where}") as caught:
        Message.json(value)
    assert "send None instead" in str(caught.value)


class AsNull(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="null")
    at: float = NAN
    any: Any = INF


class AsText(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="strings")
    at: float | None = NAN
    note: str | None = None


class OfNulls(BaseModel):
    inner: AsNull = AsNull()
    more: list[AsNull] = [AsNull()]


@pydantic.dataclasses.dataclass(config=ConfigDict(ser_json_inf_nan="null"))
class ValidatedAsNull:
    at: float = NAN


@dataclasses.dataclass(slots=True)
class Slotted:
    inner: AsNull = dataclasses.field(default_factory=AsNull)


class ListOfNulls(RootModel[list[AsNull]]):
    """A list by another name."""


class Mapped1(BaseModel):
    at: float = NAN

    @serializer("at", when_used="json")
    def leave_out(self, at: float) -> float | None:
        return at if math.isfinite(at) else None


class Mapped2(BaseModel):
    at: float = NAN

    @serializer("at")
    def leave_out(self, at: float) -> float | None:
        return at if math.isfinite(at) else None


class Hidden(BaseModel):
    at: float = Field(default=NAN, exclude=True)
    note: str | None = None


NULLS = {"at": None, "any": None}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (AsNull(), NULLS),
        ({"a": [AsNull()]}, {"a": [NULLS]}),
        (Event(data=AsNull()), {"data": NULLS}),
        (OfNulls(), {"inner": NULLS, "more": [NULLS]}),
        (ListOfNulls([AsNull()]), [NULLS]),
        (ValidatedAsNull(), {"at": None}),
        (Slotted(), {"inner": NULLS}),
        (AsText(), {"at": "NaN", "note": None}),
        (Mapped1(), {"at": None}),
        (Mapped2(), {"at": None}),
        (Hidden(), {"note": None}),
    ],
)
def test_what_the_model_says_of_such_numbers_is_done(value: object, expected: object) -> None:
    assert sent(value) == expected


def test_model_that_says_nothing_is_not_excused_by_another_that_does() -> None:
    with pytest.raises(EncodeError, match=r"NaN at \[1\]\.at,"):
        Message.json([AsNull(), Price(), AsNull()])


class Once(BaseModel):
    """Writes itself only once."""

    parts: Iterable[int]
    note: str | None = None


class Fails(BaseModel):
    at: float | None = None

    @serializer("at")
    def fail(self, at: float | None) -> float | None:
        times.append(1)
        if len(times) > 1:
            raise RuntimeError("once is enough")
        return at


times: list[int] = []


def test_what_can_be_looked_at_only_once_is_sent() -> None:
    assert sent(Once(parts=iter([1, 2]))) == {"parts": [1, 2], "note": None}
    times.clear()
    assert sent([None, Fails()]) == [None, {"at": None}]


def test_what_holds_null_and_no_such_number_is_sent() -> None:
    values: list[Any] = [
        Price(at=1.0),
        [Price(at=1.0), None, {"a": Price(at=2.0)}],
        {"a": None, "b": [None, {"c": "null"}], "d": datetime(2026, 1, 1, tzinfo=UTC), "e": (UUID(int=1), Decimal(1))},
        [{"a": None, "b": 10**100, "c": "x" * 100}] * 100,
        [{"a": None, "at": date(2026, 1, 1)}] * 100,
        Event(data={"null": Averaged(prices=[1.0])}),
    ]
    for value in values:
        assert Message.json(value).size > 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Decimal("NaN"), '"NaN"'),  # a text, as every Decimal is
        ({NAN: 1, -INF: 2, 1.5: 3, True: 4, None: 5}, '{"nan":1,"-inf":2,"1.5":3,"true":4,"None":5}'),
        ({1: "a", "1": "b"}, '{"1":"a","1":"b"}'),  # a parser takes the last
        ({2}, "[2]"),
        ([b"bytes"], '["bytes"]'),
    ],
)
def test_what_becomes_something_else_is_documented(value: object, expected: str) -> None:
    assert Message.json(value).data == expected


@pytest.mark.parametrize("value", [[b"\xff"], {b"\xff": 1}, Event(data=b"\xff"), ["\ud800"], Event(data="\ud800")])
def test_what_is_not_utf_8_is_refused(value: object) -> None:
    with pytest.raises(EncodeError, match="can't be written as JSON"):
        Message.json(value)


@pytest.mark.parametrize("key", [10**5000, "x" * 1000], ids=["number", "text"])
def test_key_that_is_too_long_to_tell_is_no_other_error(key: object) -> None:
    with pytest.raises(EncodeError) as caught:
        Message.json({key: [object(), NAN]})
    assert len(str(caught.value)) < 400


def test_generator_that_fails_is_told() -> None:
    with pytest.raises(EncodeError, match="can't be written as JSON, it raises ZeroDivisionError"):
        Message.json(1 / number for number in (1, 0))


# Rows. SQLModel's are models of pydantic with the state that SQLAlchemy gives them, and this makes such a one.


class Hero(BaseModel):
    id: int | None = None
    name: str = ""
    secret: str = Field(default="", exclude=True)

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.__dict__["_sa_instance_state"] = SimpleNamespace(key=("Hero", 1), expired_attributes=set())

    def expire(self, *names: str) -> Hero:
        """Do what a commit does."""
        self.__dict__["_sa_instance_state"].expired_attributes.update(names, ["team"])
        for name in names:
            del self.__dict__[name]
        return self


class Team(BaseModel):
    leader: Hero
    size: int = 1


def expired() -> Hero:
    return Hero(id=1, name="ann").expire("id", "name", "secret")


@pytest.fixture
def sqlmodel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if SQLModel were in use."""
    monkeypatch.setitem(sys.modules, "sqlmodel", ModuleType("sqlmodel"))
    monkeypatch.setattr(Hero, "_sa_class_manager", object(), raising=False)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (expired, "Hero"),
        (lambda: [Hero(id=1), expired()], r"Hero at \[1\]"),
        (lambda: {"rows": (expired(),), "n": 1}, r"Hero at rows\[0\]"),
        (lambda: [{"a": {"b": expired()}}], r"Hero at \[0\]\.a\.b"),
        (lambda: Team.model_construct(leader=expired()), "Hero at leader"),
        (lambda: Event(data=[expired()]), r"Hero at data\[0\]"),
    ],
)
def test_row_that_has_expired_is_refused_with_what_to_do(value: Callable[[], object], where: str) -> None:
    with pytest.raises(EncodeError, match=f"^{where} is a row that has expired.*it has no id, name; refresh it"):
        Message.json(value())


@pytest.mark.usefixtures("sqlmodel")
@pytest.mark.parametrize("wrap", [lambda row: row, lambda row: [row], lambda row: {"a": [{"row": row}]}])
def test_row_of_which_a_part_has_expired_is_refused(wrap: Callable[[Hero], object]) -> None:
    with pytest.raises(EncodeError, match=r"has expired.*it has no name; refresh it.*expire_on_commit=False"):
        Message.json(wrap(Hero(id=1).expire("name")))


@pytest.mark.usefixtures("sqlmodel")
def test_row_that_is_there_is_sent() -> None:
    assert sent([Hero(id=1, name="ann")]) == [{"id": 1, "name": "ann"}]
    assert sent(Hero(id=1, name="ann").expire("secret")) == {"id": 1, "name": "ann"}
    transient = expired()
    transient.__dict__["_sa_instance_state"].key = None  # was never in the database, so a refresh is no help
    assert sent(transient) == {}
    assert sent({"empty": {}, "text": "{}", "team": Team(leader=Hero(id=1))}) == {
        "empty": {},
        "text": "{}",
        "team": {"leader": {"id": 1, "name": ""}, "size": 1},
    }


# SQLAlchemy's own.


class Base(DeclarativeBase):
    """Rows that are no dataclasses."""


class User(Base):
    __tablename__ = "message_user"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class DataBase(MappedAsDataclass, DeclarativeBase):
    """Rows that are dataclasses."""


class Author(DataBase):
    __tablename__ = "message_author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    posts: Mapped[list[Post]] = relationship(default_factory=list)


class Post(DataBase):
    __tablename__ = "message_post"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("message_author.id"))


@pytest.fixture
def session() -> Iterator[Session]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    DataBase.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


NO_JSON = (
    "is a row of SQLAlchemy, which can't be written as JSON: send a dict, or a pydantic model made of it.*refresh it"
)


def test_row_of_sqlalchemy_is_refused_with_what_to_do(session: Session) -> None:
    user = User(id=1, name="ann")
    session.add(user)
    for _ in range(2):
        for value, where in ((user, "User"), ([user], r"User at \[0\]"), ({"a": {"b": user}}, r"User at a\.b")):
            with pytest.raises(EncodeError, match=f"^{where} {NO_JSON}"):
                Message.json(value)
        session.commit()  # and then it has expired
    session.expunge(user)
    with pytest.raises(EncodeError, match=NO_JSON):
        Message.json(user)


def test_row_of_a_result_is_refused_with_what_to_do(session: Session) -> None:
    session.add(User(id=1, name="ann"))
    session.flush()
    row = session.execute(select(User.id, User.name)).one()
    with pytest.raises(EncodeError, match=r"^Row at \[0\] is a row of a result.*send dict\(row\._mapping\)"):
        Message.json([row])
    assert sent([dict(row._mapping)]) == [{"id": 1, "name": "ann"}]


def test_row_that_is_a_dataclass_is_sent_while_it_can_be_loaded(session: Session) -> None:
    author = Author(id=1, name="ann")
    session.add(author)
    session.commit()
    assert sent(author) == {"id": 1, "name": "ann", "posts": []}
    session.commit()
    session.expunge(author)
    with pytest.raises(
        EncodeError, match=r"^Author is a row without its id, name, posts, which can't be loaded"
    ) as caught:
        Message.json(author)
    assert "sqlalche.me" not in str(caught.value)


def test_row_that_is_not_to_blame_is_not_blamed(session: Session) -> None:
    author = Author(id=1, name="ann")
    session.add(author)
    session.flush()
    with pytest.raises(EncodeError, match=r"^object at \[1\] can't be written as JSON: Unable to"):
        Message.json([author, object()])


async def test_row_that_can_only_be_loaded_by_awaiting_is_refused_without_its_statement(
    postgres_server: Endpoint, prefix: str
) -> None:
    owner = await asyncpg.connect(postgres_server.url)
    await owner.execute(f"CREATE SCHEMA {prefix}")
    engine = create_async_engine(
        postgres_server.url.replace("postgresql", "postgresql+asyncpg"),
        execution_options={"schema_translate_map": {None: prefix}},
    )
    try:
        async with engine.begin() as connection:
            await connection.run_sync(DataBase.metadata.create_all)
        async with AsyncSession(engine) as session:
            author = Author(id=1, name="ann")
            session.add(author)
            await session.commit()
            with pytest.raises(EncodeError, match=r"^Author is a row without its id, name, posts") as caught:
                Message.json(author)
            assert "SELECT" not in str(caught.value)
            await session.refresh(author)
            with pytest.raises(EncodeError, match=r"^Author is a row without its posts, which can't be loaded"):
                Message.json({"author": author}["author"])
            await session.refresh(author, ["posts"])
            assert sent(author) == {"id": 1, "name": "ann", "posts": []}
    finally:
        await engine.dispose()
        await owner.execute(f"DROP SCHEMA {prefix} CASCADE")
        await owner.close()


def test_state_of_a_row_has_the_names_that_are_looked_for(session: Session) -> None:
    """What stands in for SQLModel above rests on them."""
    user = User(id=1, name="ann")
    session.add(user)
    session.commit()
    state = vars(user)["_sa_instance_state"]
    assert isinstance(state, InstanceState)
    assert "_sa_class_manager" in User.__dict__
    assert state.key is not None
    assert state.expired_attributes == state.unloaded == {"id", "name"}
    assert vars(User(id=2))["_sa_instance_state"].key is None
    session.expunge_all()
    partly = session.scalars(select(User).options(defer(User.name))).one()
    assert vars(partly)["_sa_instance_state"].expired_attributes == set()  # left out on purpose
