"""What is broadcast is checked by its type, once, where it is broadcast; before anything is sent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from traceback import format_exception
from typing import Any, Literal

import asyncpg
import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_serializer, field_validator
from sqlalchemy import ForeignKey, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.pool import StaticPool

from tests.support.brokers import Endpoint
from tests.support.fake_broker import FakeBroker, FakeEngine
from wsbroadcast import (
    EVERYONE,
    USERS,
    Audience,
    ConfigurationError,
    ConnectionManager,
    EncodeError,
    Message,
    Publisher,
)
from wsbroadcast.typed.sends import SendRules

SECRET = "s3cret-of-a-row"


class Said(BaseModel):
    type: Literal["said"] = "said"
    text: str = Field(max_length=10)


class Left(BaseModel):
    type: Literal["left"] = "left"
    user: str


class Notice(BaseModel):
    title: str


class SaidBySomebody(Said):
    ip: str


@dataclass
class Point:
    x: int
    y: int = 0


class PostOut(BaseModel):
    id: int
    title: str


class PostWithAuthor(PostOut):
    author: Notice


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "authors"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class Post(Base):
    __tablename__ = "posts"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    password: Mapped[str] = mapped_column(default=SECRET)
    author_id: Mapped[int | None] = mapped_column(ForeignKey("authors.id"))
    author: Mapped[Author] = relationship()


async def sent(manager: ConnectionManager, message: object, **options: Any) -> str:
    """What somebody who listens to the channel `room:1` gets of a broadcast."""
    async with manager, manager.listen("room:1") as messages:
        await manager.broadcast(message, channel="room:1", **options)
        async for each in messages:
            return str(each.data) if isinstance(each.data, str) else json.dumps(each.data)
    raise AssertionError


def payload(manager: ConnectionManager, message: object, **options: Any) -> bytes:
    """What a broadcast sends, without sending it."""
    (publication,) = manager._core.publications(message, "room:1", **options)
    return publication.message.payload


# By pattern.


@pytest.fixture
def manager() -> ConnectionManager:
    return ConnectionManager(sends={"room:*": Said | Left, "room:posts": PostOut, USERS: Notice, EVERYONE: Notice})


def test_types_hold_by_pattern_for_users_and_for_everyone(manager: ConnectionManager) -> None:
    rules = manager._core.sends
    assert rules is not None

    def members(audience: Audience) -> object:
        types = rules.of(audience)
        return None if types is None else types.members

    assert members(Audience.channel("room:1")) == (Said, Left)
    assert members(Audience.channel("room:posts")) == (PostOut,)
    assert members(Audience.channel("other")) is None
    assert members(Audience.user(5)) == (Notice,)
    assert members(EVERYONE) == (Notice,)
    assert members(Audience("connection", "x")) is None
    for number in range(10_000):  # what is remembered is bounded
        rules.of(Audience.channel(f"room:{number}"))
    assert len(rules._known) <= 8192


def test_one_type_holds_for_all_channels() -> None:
    rules = SendRules(Said)
    for audience, is_known in ((Audience.channel("x"), True), (Audience.user(1), False), (EVERYONE, False)):
        assert (rules.of(audience) is not None) == is_known


@pytest.mark.parametrize("verb", ["broadcast", "broadcast_local", "broadcast_nowait", "broadcast_soon"])
async def test_message_of_another_type_is_an_error_at_the_caller(manager: ConnectionManager, verb: str) -> None:
    broadcast = getattr(manager, verb)

    async def call(*arguments: Any, **options: Any) -> None:
        if (result := broadcast(*arguments, **options)) is not None and verb != "broadcast_nowait":
            await result

    wrong = ({"type": "said"}, Left(user="x"), "text", b"bytes", Message.of("text"), None, [Said(text="x")])
    async with manager, manager.listen("room:1", user=5) as messages:
        for message in wrong:
            for audience in ({"channel": "room:posts"}, {"user": 5}, {"channels": ["other", "room:posts"]}):
                with pytest.raises(EncodeError, match="by sends for "):
                    await call(message, **audience)
        await manager.broadcast(Said(text="the first"), channel="room:1")
        async for each in messages:
            assert each.data == {"type": "said", "text": "the first"}
            break


async def test_error_says_what_and_where(manager: ConnectionManager) -> None:
    async with manager:
        with pytest.raises(EncodeError) as caught:
            await manager.broadcast({"type": "said", "text": SECRET}, channel="room:1")
    assert str(caught.value) == (
        "by sends for channel 'room:1' a message is Said | Left: said.text: String should have at most 10 characters"
    )


class Polite(BaseModel):
    type: Literal["polite"] = "polite"
    text: str
    number: int = 0

    @field_validator("text")
    @classmethod
    def check(cls, text: str) -> str:
        if text == "rude":
            raise ValueError("be polite")
        return text


class Numberless:
    type = "polite"
    text = SECRET

    @property
    def number(self) -> int:
        raise LookupError("no number")


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"text": SECRET, "number": SECRET}, "valid integer"),
        ({"text": "rude", "more": SECRET}, "ValueError: be polite"),
        (Numberless(), "LookupError: no number"),
        ({"text": [SECRET] * 2000, "number": "x"}, "number: Input should be a valid integer"),
    ],
)
def test_traceback_tells_the_reason_and_repeats_no_message(message: object, why: str) -> None:
    with pytest.raises(EncodeError) as caught:
        payload(ConnectionManager(sends=Polite), message)
    told = "".join(format_exception(caught.value))
    assert why in told
    assert SECRET not in told


@pytest.mark.parametrize(
    ("message", "data"),
    [
        (Said(text="hi"), {"type": "said", "text": "hi"}),
        ({"type": "said", "text": "hi", "more": SECRET}, {"type": "said", "text": "hi"}),
        (SaidBySomebody(text="hi", ip=SECRET), {"type": "said", "text": "hi"}),
        (Message.json({"type": "left", "user": "ada", "more": SECRET}), {"type": "left", "user": "ada"}),
    ],
)
async def test_message_goes_out_with_the_fields_of_its_type(
    manager: ConnectionManager, message: object, data: object
) -> None:
    assert json.loads(await sent(manager, message)) == data


async def test_key_stays_with_the_message(manager: ConnectionManager) -> None:
    message = Message.json({"type": "said", "text": "hi"}, key="own")
    for given, options, key in (
        (Said(text="hi"), {"key": "k"}, "k"),
        (message, {}, "own"),
        (message, {"key": "k"}, "k"),
        (message, {"as_": Said}, "own"),
    ):
        (publication,) = manager._core.publications(given, "room:1", **options)
        assert publication.message.key == key


async def test_key_of_what_a_hook_returns_stays(manager: ConnectionManager) -> None:
    said = {"type": "said", "text": "hi"}
    returned = [Message.json(said, key="own"), Message.json(said)]
    manager.on_broadcast(lambda message, audience: returned.pop(0))
    keys = []
    for _ in range(2):
        (publication,) = manager._core.publications(Said(text="hi"), "room:1", key="k")
        prepared = await manager._core._transform(publication)
        keys.append(prepared and prepared.message.key)
    assert keys == ["own", "k"]


async def test_audiences_of_several_types_get_each_its_own() -> None:
    manager = ConnectionManager(sends={"short:*": Point, "long:*": dict[str, int]})
    publications = manager._core.publications({"x": 1, "y": 2}, channels=["short:1", "long:1", "other", "short:2"])
    assert [each.message.payload for each in publications] == [b'{"x":1,"y":2}'] * 4
    with pytest.raises(EncodeError):
        manager._core.publications({"x": 1, "z": "text"}, channels=["short:1", "long:1"])


async def test_infinity_is_no_null() -> None:
    manager = ConnectionManager(sends={"*": dict[str, float]})
    with pytest.raises(EncodeError, match="Infinity at x"):
        payload(manager, {"x": float("inf")})


class WithConstants(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="constants")
    value: float
    text: str = "NaN and Infinity are fine here"


class WithNull(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="null")
    value: float


async def test_model_that_writes_constants_is_refused_and_one_that_writes_null_is_not() -> None:
    manager = ConnectionManager()
    assert b"NaN" in payload(manager, {"value": 1.0}, as_=WithConstants)
    with pytest.raises(EncodeError, match="NaN at value"):
        payload(manager, {"value": float("nan")}, as_=WithConstants)
    assert payload(manager, {"value": float("nan")}, as_=WithNull) == b'{"value":null}'


class Faulty(BaseModel):
    text: str

    @field_serializer("text")
    def write(self, text: str) -> str:
        return {"a": "b"}[text]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (Said.model_construct(text=5), "Said can't be written as its type says"),
        (Said.model_construct(), "Said can't be written as its type says"),
    ],
)
def test_model_that_was_never_checked_is_an_error_where_it_is_written(
    manager: ConnectionManager, message: Said, said: str
) -> None:
    with pytest.raises(EncodeError, match=said):
        payload(manager, message)


def test_serializer_that_fails_is_an_error() -> None:
    with pytest.raises(EncodeError, match=r"Faulty can't be written as its type says: .*KeyError"):
        payload(ConnectionManager(sends=Faulty), Faulty(text="x"))


async def test_message_that_is_too_large_is_an_error(manager: ConnectionManager) -> None:
    manager = ConnectionManager(sends=dict[str, str])
    with pytest.raises(EncodeError, match="larger than the limit"):
        payload(manager, {"x": "x" * (16 * 1024 * 1024)})


async def test_what_a_hook_makes_of_a_message_is_checked_too(manager: ConnectionManager) -> None:
    result: Any = None
    manager.on_broadcast(lambda message, audience: result)
    assert json.loads(await sent(manager, Said(text="hi"))) == {"type": "said", "text": "hi"}
    manager.on_broadcast(lambda message, audience: message)
    assert json.loads(await sent(manager, Said(text="hi"))) == {"type": "said", "text": "hi"}
    result = {"type": "left", "user": "ada", "more": SECRET}
    assert json.loads(await sent(manager, Said(text="hi"))) == {"type": "left", "user": "ada"}
    result = {"type": "nothing"}
    async with manager:
        with pytest.raises(EncodeError, match="by sends for channel 'room:1'"):
            await manager.broadcast(Said(text="hi"), channel="room:1")


@pytest.mark.parametrize(
    ("sends", "said"),
    [
        ({5: Said}, "sends is a type for all channels, or a dict"),
        ({"": Said}, "sends is a type for all channels, or a dict"),
        ({"*": Said | Notice}, "nothing tells the members of sends apart"),
        ({"*": SecretStr}, "sends can't be sent as JSON: a secret"),
        ("Said", "sends is a type, such as Say, or Say . Typing, not str"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_made(sends: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ConnectionManager(sends=sends)


def test_pattern_has_one_type() -> None:
    rules = SendRules({"*": Said | Left})
    rules.add("*", Said | Left)
    with pytest.raises(ConfigurationError, match=r"messages to '\*' have two types by sends: Said \| Left, and Notice"):
        rules.add("*", Notice)


# As another type.


class Row:
    id = 1
    title = "a title"
    password = SECRET


@pytest.mark.parametrize("message", [Row(), {"id": 1, "title": "a title", "password": SECRET}])
async def test_message_is_made_of_what_has_its_fields(message: object) -> None:
    assert json.loads(await sent(ConnectionManager(), message, as_=PostOut)) == {"id": 1, "title": "a title"}


class PostInDatabase(PostOut):
    password: str = SECRET


async def test_subclass_is_sent_as_the_type_that_is_named() -> None:
    post = PostInDatabase(id=1, title="a title")
    assert payload(ConnectionManager(), post, as_=PostOut) == b'{"id":1,"title":"a title"}'
    assert payload(ConnectionManager(), [post, Row()], as_=list[PostOut]).count(SECRET.encode()) == 0


async def test_what_lacks_a_field_is_an_error() -> None:
    with pytest.raises(EncodeError, match=r"by as_ a message is PostOut: title: Field required"):
        payload(ConnectionManager(), {"id": 1}, as_=PostOut)
    with pytest.raises(ConfigurationError, match="as_ can't be sent as JSON"):
        payload(ConnectionManager(), "x", as_=SecretStr)


async def test_type_of_the_channel_holds_for_what_was_made() -> None:
    manager = ConnectionManager(sends={"room:*": PostOut})
    assert payload(manager, Row(), as_=PostOut) == b'{"id":1,"title":"a title"}'
    with pytest.raises(EncodeError, match="by sends for channel 'room:1' a message is PostOut"):
        payload(manager, {"title": "x"}, as_=Notice)


# Rows of a database.


def sessions(**options: Any) -> Session:
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    Base.metadata.create_all(engine)
    session = Session(engine, **options)
    session.add(Post(id=1, title="a title", author=Author(id=1, title="ada")))
    session.commit()
    return session


@pytest.mark.parametrize("how", ["sends", "as_"])
def test_row_is_sent_with_the_fields_of_the_type(how: str) -> None:
    with sessions() as session:
        post = session.get_one(Post, 1)
        manager = ConnectionManager(sends=PostWithAuthor if how == "sends" else None)
        options = {"as_": PostWithAuthor} if how == "as_" else {}
        data = payload(manager, post, **options)
    assert json.loads(data) == {"id": 1, "title": "a title", "author": {"title": "ada"}}


@pytest.mark.parametrize("how", ["sends", "as_"])
def test_row_that_has_expired_is_an_error_that_says_what_to_do(how: str) -> None:
    with sessions() as session:
        post = session.get_one(Post, 1)
        session.commit()
    manager = ConnectionManager(sends=PostOut if how == "sends" else None)
    with pytest.raises(EncodeError) as caught:
        payload(manager, post, **({"as_": PostOut} if how == "as_" else {}))
    assert "of Post can't be loaded while it is sent" in str(caught.value)
    assert "expire_on_commit=False" in str(caught.value)


async def test_row_of_an_async_session_is_an_error_that_says_what_to_do(postgres_server: Endpoint, prefix: str) -> None:
    owner = await asyncpg.connect(postgres_server.url)
    await owner.execute(f"CREATE SCHEMA {prefix}")
    engine = create_async_engine(
        postgres_server.url.replace("postgresql", "postgresql+asyncpg"),
        execution_options={"schema_translate_map": {None: prefix}},
    )
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            session.add(Post(id=1, title="a title", author=Author(id=1, title="ada")))
            await session.commit()
            post = await session.get_one(Post, 1, populate_existing=True)
            assert payload(ConnectionManager(), post, as_=PostOut) == b'{"id":1,"title":"a title"}'
            for as_, name in ((PostWithAuthor, "author"), (PostOut, "id")):
                with pytest.raises(EncodeError, match=f"{name} of Post can't be loaded while it is sent"):
                    payload(ConnectionManager(), post, as_=as_)
                await session.commit()
    finally:
        await engine.dispose()
        await owner.execute(f"DROP SCHEMA {prefix} CASCADE")
        await owner.close()


# Programs that only publish.


@pytest.mark.parametrize("how", ["sends", "as_"])
async def test_publisher_checks_like_a_manager(how: str) -> None:
    broker = FakeBroker()
    options: Any = {"as_": PostOut} if how == "as_" else {}
    publisher = Publisher(FakeEngine(broker), sends=PostOut if how == "sends" else None)
    async with publisher:
        with pytest.raises(EncodeError, match="a message is PostOut: id: Field required"):
            await publisher.broadcast({"title": "x"}, channel="room:1", **options)
        await publisher.broadcast(Row(), channel="room:1", **options)
        publisher.broadcast_nowait(Row(), channel="room:1", **options)
    envelopes = [parcel.envelope for batch in broker.batches for parcel in batch if ":node:" not in parcel.name]
    assert [each.partition(b"\n")[2] for each in envelopes] == [b'{"id":1,"title":"a title"}'] * 2
