"""Names and texts of other classes: an enum's member, a str that says something else of itself, a subclass of int."""

from __future__ import annotations

from enum import Enum, IntEnum, StrEnum
from uuid import UUID, uuid4

import pytest
from fastapi import FastAPI, WebSocketException

from tests.support.asgi import Peer, lifespan, visit
from wsbroadcast import (
    Audience,
    ConnectionClosed,
    ConnectionDep,
    ConnectionManager,
    LimitExceeded,
    Message,
    PermissionDenied,
    TokenFrom,
)
from wsbroadcast.audience import as_channels, check_channel, user_key
from wsbroadcast.close_codes import cut_reason
from wsbroadcast.engines import create_engine
from wsbroadcast.engines.nats import NATSEngine
from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.text import plain, text_of
from wsbroadcast.web.access import Access
from wsbroadcast.web.path_channel import PathChannel


class Mixed(str, Enum):  # noqa: UP042  # what apps have; str(Mixed.ADMIN) is "Mixed.ADMIN"
    ADMIN = "admin"


class Modern(StrEnum):
    ADMIN = "admin"


class Lying(str):
    """Says something else wherever it is asked."""

    __slots__ = ()

    def __str__(self) -> str:
        return "somebody else"

    def __repr__(self) -> str:
        return "'somebody else'"

    def __format__(self, spec: str) -> str:
        return "somebody else"

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"somebody else"

    def __add__(self, other: str) -> str:
        return "somebody else"

    def __radd__(self, other: str) -> str:
        return "somebody else"


class Number(IntEnum):
    SEVEN = 7


class MixedNumber(int, Enum):
    SEVEN = 7


class LyingNumber(int):
    def __str__(self) -> str:
        return "somebody else"

    __repr__ = __str__


class LyingId(UUID):
    def __str__(self) -> str:
        return "somebody else"


class Plain(Enum):
    ADMIN = "admin"


TEXTS = [Mixed.ADMIN, Modern.ADMIN, Lying("admin")]
NUMBERS = [Number.SEVEN, MixedNumber.SEVEN, LyingNumber(7), True + 6]
ids = [type(value).__name__ for value in TEXTS]
number_ids = [type(value).__name__ for value in NUMBERS]


def is_plain(text: object, expected: str) -> bool:
    return type(text) is str and text == expected and f"{text}" == expected


@pytest.mark.parametrize("text", TEXTS, ids=ids)
def test_plain_text_is_what_the_value_holds(text: str) -> None:
    assert is_plain(plain(text), "admin")
    assert is_plain(text_of(text), "admin")


@pytest.mark.parametrize("number", NUMBERS, ids=number_ids)
def test_text_of_a_number_is_its_digits(number: int) -> None:
    assert is_plain(text_of(number), "7")


def test_text_of_an_enum_without_a_type_is_that_of_its_value() -> None:
    assert is_plain(text_of(Plain.ADMIN), "admin")


@pytest.mark.parametrize("text", TEXTS, ids=ids)
def test_names_become_plain(text: str) -> None:
    assert is_plain(check_channel(text), "admin")
    assert is_plain(user_key(text), "admin")
    assert all(is_plain(name, "admin") for name in (*as_channels(text), *as_channels([text])))
    assert is_plain(Audience.of(channel=text).name, "admin")
    assert is_plain(Audience.of(user=text).name, "admin")


def test_channels_may_be_an_enum() -> None:
    assert as_channels(Mixed) == ("admin",)


@pytest.mark.parametrize("number", NUMBERS, ids=number_ids)
def test_user_that_is_a_number_becomes_its_digits(number: int) -> None:
    assert is_plain(user_key(number), "7")


def test_user_that_is_a_subclass_of_uuid_becomes_its_digits() -> None:
    value = uuid4()
    assert is_plain(user_key(LyingId(int=value.int)), str(value))


@pytest.mark.parametrize("text", TEXTS, ids=ids)
def test_message_and_its_key_become_plain(text: str) -> None:
    message = Message.of(text, key=text)
    assert message.payload == b"admin"
    assert is_plain(message.data, "admin")
    assert is_plain(message.key, "admin")


@pytest.mark.parametrize("text", TEXTS, ids=ids)
def test_reasons_become_plain(text: str) -> None:
    assert is_plain(cut_reason(text), "admin")
    assert is_plain(str(PermissionDenied(text)), "admin")
    assert is_plain(PermissionDenied(text).reason, "admin")
    assert is_plain(str(LimitExceeded("max_connections", text)), "admin")
    assert is_plain(ConnectionClosed(1000, text).reason, "admin")


@pytest.mark.parametrize("text", TEXTS, ids=ids)
def test_channel_of_a_path_becomes_plain(text: str) -> None:
    assert is_plain(PathChannel("/{room}", None).of({"room": text}), "admin")
    assert is_plain(PathChannel("/{room}", "room:{room}").of({"room": text}), "room:admin")


@pytest.mark.parametrize("value", [*NUMBERS, Plain.ADMIN], ids=[*number_ids, "Plain"])
def test_channel_of_a_path_with_a_convertor_is_the_value(value: object) -> None:
    expected = "admin" if value is Plain.ADMIN else "7"
    assert is_plain(PathChannel("/{room}", "room:{room}").of({"room": value}), f"room:{expected}")


@pytest.mark.parametrize("text", TEXTS, ids=ids)
def test_pattern_may_be_of_another_class(text: str) -> None:
    assert is_plain(PathChannel("/{room}", text).of({"room": "lobby"}), "admin")


@pytest.mark.parametrize("text", TEXTS, ids=ids)
async def test_user_of_another_class_is_the_same_user(text: str) -> None:
    manager = ConnectionManager()
    peer = Peer()
    connection = await manager.connect(peer.websocket, user=text, channels=[text])
    assert connection.user is text
    assert is_plain(connection._user_key, "admin")
    assert all(is_plain(name, "admin") for name in connection.channels)
    await manager.broadcast("to the user", user="admin")
    await manager.broadcast("to the channel", channel="admin")
    assert await peer.wait_messages(2) == ["to the user", "to the channel"]
    await manager.unsubscribe(connection, text)
    assert connection.channels == frozenset()
    await manager.close_user("admin", reason=text)
    assert await peer.wait_close() == 4401
    assert peer.close is not None
    assert is_plain(peer.close["reason"], "admin")
    await manager.aclose()


@pytest.mark.parametrize("text", TEXTS, ids=ids)
async def test_what_goes_to_the_server_is_plain(text: str) -> None:
    manager = ConnectionManager()
    peer = Peer(subprotocols=["admin"])
    connection = await manager.connect(peer.websocket, subprotocol=text)
    assert peer.accepted is not None
    assert is_plain(peer.accepted["subprotocol"], "admin")
    await connection.close(4000, text)
    assert peer.close is not None
    assert is_plain(peer.close["reason"], "admin")
    assert is_plain(connection.close_reason, "admin")
    await manager.aclose()


@pytest.mark.parametrize("text", TEXTS, ids=ids)
@pytest.mark.parametrize("is_alone", [True, False])
async def test_subprotocol_of_an_endpoint_goes_out_plain(text: str, is_alone: bool) -> None:
    access = Access(subprotocols=text if is_alone else [text])
    manager = ConnectionManager()
    peer = Peer(subprotocols=["other", "admin"])
    await access._connect(manager, peer.websocket)
    assert peer.accepted is not None
    assert is_plain(peer.accepted["subprotocol"], "admin")
    await manager.aclose()


@pytest.mark.parametrize("text", TEXTS, ids=ids)
async def test_token_s_places_may_be_of_another_class(text: str) -> None:
    peer = Peer(subprotocols=["admin", "token-1"], headers=[(b"cookie", b"admin=token-2")])
    assert await TokenFrom(subprotocol=text)(peer.websocket) == "token-1"
    assert is_plain(peer.scope["wsbroadcast.subprotocol"], "admin")
    assert await TokenFrom(cookie=text)(peer.websocket) == "token-2"


class Site(str, Enum):  # noqa: UP042
    APP = "https://app.example"
    ALL = "*"


@pytest.mark.parametrize("origins", [[Site.APP], Site.APP, Lying("https://app.example")], ids=["list", "one", "lying"])
async def test_origin_may_be_of_another_class(origins: list[str] | str) -> None:
    manager = ConnectionManager()
    peer = Peer(headers=[(b"origin", b"https://app.example")])
    await Access(allowed_origins=origins)._connect(manager, peer.websocket)
    assert len(manager.connections) == 1
    await manager.aclose()


class Broker(str, Enum):  # noqa: UP042
    MEMORY = "memory://"
    REDIS = "redis://localhost:6390"
    NATS = "nats://localhost:4290"
    POSTGRES = "postgresql://localhost:5490/shop"


@pytest.mark.parametrize("broker", list(Broker))
def test_engine_s_url_may_be_an_enum_s_member(broker: Broker) -> None:
    of_enum, of_text = create_engine(broker), create_engine(broker.value)
    assert (of_enum.name, getattr(of_enum, "address", "")) == (of_text.name, getattr(of_text, "address", ""))


def test_prefix_may_be_an_enum_s_member() -> None:
    engines = RedisEngine(prefix=Mixed.ADMIN), NATSEngine(prefix=Mixed.ADMIN), PostgresEngine(prefix=Mixed.ADMIN)
    assert [engine.names.of(Audience("everyone"))[:6] for engine in engines] == ["admin:", "admin.", "admin:"]
    redis, _, postgres = engines
    assert getattr(redis.new_link(), "probe", "") == "admin:probe"
    assert "admin_spill" in postgres._table.name
    assert postgres._prefix == "admin"


@pytest.mark.parametrize("text", TEXTS, ids=ids)
async def test_reason_of_an_endpoint_s_exception_goes_out_plain(text: str) -> None:
    manager = ConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/")
    async def endpoint(connection: ConnectionDep) -> None:
        raise WebSocketException(4000, text)

    async with lifespan(app), visit(app, "/") as peer:
        assert await peer.wait_close() == 4000
        assert peer.close is not None
        assert is_plain(peer.close["reason"], "admin")
