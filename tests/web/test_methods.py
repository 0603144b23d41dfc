"""What clients of events call: arguments and results by pydantic, as many at once as are allowed, and no longer."""

from __future__ import annotations

import asyncio
import threading
from datetime import date
from functools import partial
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from tests.support.asgi import eventually, turns
from tests.web.test_events import EventPeer, serving
from wsbroadcast import (
    CallError,
    ClientTiming,
    ConfigurationError,
    Connection,
    ConnectionClosed,
    ConnectionManager,
    EngineUnavailable,
    PermissionDenied,
)


class Seat(BaseModel):
    row: int
    place: Literal["window", "aisle"] = "aisle"


class Booking(BaseModel):
    seat: Seat
    day: date


async def called(peer: EventPeer, method: str, id_: int = 1, **args: Any) -> Any:
    """Call a method; return the answer without its id."""
    peer.ask(type="call", name=method, args=args, id=id_)
    await eventually(lambda: any(event.get("id") == id_ for event in peer.events))
    (answer,) = [event for event in peer.events if event.get("id") == id_]
    del answer["id"]
    return answer


async def test_methods_take_and_return_what_pydantic_knows() -> None:
    manager = ConnectionManager()

    @manager.method("book")
    async def book(seat: Seat, day: date, *, connection: Connection, copy: bool = False) -> Booking:
        assert isinstance(connection, Connection)
        return Booking(seat=seat, day=day)

    @manager.method("where")
    def where(connection: Connection[None]) -> list[str]:
        assert threading.current_thread() is not threading.main_thread()
        return sorted(connection.channels)

    @manager.method("echo")
    def echo(model_config: Any = 7) -> Any:
        return model_config

    @manager.method("nothing")
    async def nothing() -> None:
        return None

    async with serving(manager) as client:
        peer = client("news")
        await peer.wait_events(2)
        booked = {"seat": {"row": 3, "place": "aisle"}, "day": "2026-11-29"}
        assert await called(peer, "book", 1, seat={"row": 3}, day="2026-11-29") == {"type": "result", "data": booked}
        assert await called(peer, "where", 2) == {"type": "result", "data": ["news"]}
        assert await called(peer, "echo", 3, model_config={"a": [1]}) == {"type": "result", "data": {"a": [1]}}
        assert await called(peer, "echo", 4) == {"type": "result", "data": 7}
        assert await called(peer, "nothing", 5) == {"type": "result", "data": None}
        peer.ask(type="call", name="nothing", id=6)
        await eventually(lambda: peer.events[-1] == {"type": "result", "data": None, "id": 6})


async def test_arguments_that_do_not_fit_are_answered_with_their_places_and_nothing_of_theirs() -> None:
    manager = ConnectionManager()
    ran: list[object] = []

    @manager.method("book")
    async def book(seat: Annotated[Seat, Field()], day: date) -> None:
        ran.append(seat)

    @manager.method("block")
    async def block(seats: list[Seat]) -> None:
        ran.append(seats)

    async with serving(manager) as client:
        peer = client("news")
        answer = await called(peer, "book", seat={"row": "secret", "place": "secret"}, secret=1)
        assert answer.pop("errors") == [
            {"loc": ["seat", "row"], "type": "int_parsing", "msg": answer_text("int")},
            {"loc": ["seat", "place"], "type": "literal_error", "msg": "Input should be 'window' or 'aisle'"},
            {"loc": ["day"], "type": "missing", "msg": "Field required"},
            {"loc": ["secret"], "type": "extra_forbidden", "msg": "Extra inputs are not permitted"},
        ]
        assert answer == {"type": "error", "code": "invalid_arguments", "text": "the arguments don't fit"}
        seats = await called(peer, "block", 3, seats=[{}] * 10_000)
        assert [each["loc"] for each in seats["errors"]] == [["seats", 0, "row"]]
        many = await called(peer, "book", 2, **{f"{number:>200}": "secret" for number in range(100)})
        assert len(many["errors"]) == 16
        assert max(len(each) for mistake in many["errors"] for each in mistake["loc"]) == 64
        assert ran == []


class Adder:
    async def __call__(self, a: int, b: int = 5) -> int:
        return a + b


async def test_methods_may_be_of_any_kind() -> None:
    manager = ConnectionManager()
    manager.method("object")(Adder())
    manager.method("partial")(partial(Adder().__call__, b=2))
    manager.method("awaitable")(lambda: asyncio.sleep(0, 7))
    manager.method("generator")(lambda: (number for number in range(3)))
    manager.method("closed")(closed)
    async with serving(manager) as client:
        peer = client("news")
        assert (await called(peer, "object", 1, a="1"))["data"] == 6
        assert (await called(peer, "partial", 2, a=1))["data"] == 3
        assert (await called(peer, "awaitable", 3))["data"] == 7
        assert (await called(peer, "generator", 4))["code"] == "failed"
        assert (await called(peer, "closed", 5))["code"] == "failed"


async def closed() -> None:
    raise ConnectionClosed(1006)  # that of another connection, which it has asked


def answer_text(kind: str) -> str:
    return {"int": "Input should be a valid integer, unable to parse string as an integer"}[kind]


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


async def test_no_text_of_pydantic_repeats_what_was_sent() -> None:
    manager = ConnectionManager()

    @manager.method("feed")
    async def feed(pet: Annotated[Cat | Dog, Field(discriminator="kind")]) -> None: ...

    async with serving(manager) as client:
        answer = await called(client("news"), "feed", pet={"kind": "secret"})
        assert answer["errors"][0]["type"] == "union_tag_invalid"
        assert "secret" not in str(answer)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CallError("sold_out", "no seats"), "sold_out"),
        (PermissionDenied("not yours"), "forbidden"),
        (EngineUnavailable("gone"), "unavailable"),
        (ExceptionGroup("some", [PermissionDenied("not yours")]), "forbidden"),
        (ExceptionGroup("some", [KeyError("x")]), "failed"),
        (ZeroDivisionError("secret"), "failed"),
    ],
)
async def test_what_a_method_raises_is_an_answer_by_code(
    error: Exception, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager = ConnectionManager()

    @manager.method("fail")
    async def fail() -> None:
        raise error

    @manager.method("wrong")
    async def wrong() -> int:
        return "secret"  # type: ignore[return-value]

    async with serving(manager) as client:
        peer, other = client("news"), client("news")
        answer = await called(peer, "fail")
        assert (answer["type"], answer["code"]) == ("error", code)
        assert "secret" not in str(answer)
        assert ("method 'fail' failed" in caplog.text) == (code == "failed")
        assert (await called(peer, "wrong", 2))["code"] == "failed"
        assert (await called(peer, "missing", 3))["code"] == "unknown_method"
        assert len(manager.connections) == 2
        assert len(await other.wait_events(2)) == 2


async def test_sixteen_calls_run_at_once_and_the_next_is_refused() -> None:
    manager = ConnectionManager()
    may_go_on = asyncio.Event()
    running = 0

    @manager.method("wait")
    async def wait() -> int:
        nonlocal running
        running += 1
        await may_go_on.wait()
        return running

    async with serving(manager) as client:
        peer, other = client("news"), client("news")
        for number in range(16):
            peer.ask(type="call", name="wait", id=number)
        assert (await called(peer, "wait", 16))["code"] == "limit_exceeded"
        other.ask(type="call", name="wait", id="other's")
        await eventually(lambda: running == 17)
        peer.ask(type="ping", id="still here")
        await eventually(lambda: peer.events[-1] == {"type": "pong", "id": "still here"})
        may_go_on.set()
        await eventually(lambda: len(peer.of("result")) == 16 and len(other.of("result")) == 1)
        assert (await called(peer, "wait", 17))["type"] == "result"


async def test_call_ends_with_its_connection() -> None:
    manager = ConnectionManager()
    ends: list[str] = []
    begun = asyncio.Event()

    @manager.method("wait")
    async def wait() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    @manager.method("leave")
    async def leave(connection: Connection) -> None:
        await connection.close()

    async with serving(manager) as client:
        peer = client("news")
        peer.ask(type="call", name="wait")
        await begun.wait()
        peer.leave()
        await eventually(lambda: ends)
        leaving = client("news")
        leaving.ask(type="call", name="leave")
        assert await leaving.wait_close() == 1000
        await turns()
    assert ends == ["cancelled"]


async def test_call_that_takes_too_long_is_cut_off_and_keeps_its_place_until_it_is_over() -> None:
    manager = ConnectionManager(client_timing=ClientTiming(call_timeout=0.05))
    ends: list[str] = []
    may_end = threading.Event()

    @manager.method("wait")
    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    @manager.method("block")
    def block() -> None:
        may_end.wait(10)
        ends.append("over")

    async with serving(manager) as client:
        peer = client("news")
        timeout = {"type": "error", "code": "timeout", "text": "it took too long and was cut off"}
        assert await called(peer, "wait", 1) == timeout
        assert await called(peer, "block", 2) == timeout
        assert ends == ["cancelled"]
        for number in range(15):
            peer.ask(type="call", name="block", id=f"{number}")
        assert (await called(peer, "wait", 3))["code"] == "limit_exceeded"
        may_end.set()
        await eventually(lambda: len(ends) == 17)
        assert await called(peer, "wait", 4) == timeout


async def test_authorize_is_asked_who_may_call() -> None:
    manager = ConnectionManager()
    asked: list[tuple[str, str | None]] = []

    @manager.method("open")
    async def open_() -> int:
        return 1

    @manager.method("shut")
    async def shut() -> int:
        return 2

    def authorize(connection: object, action: str, channel: str | None) -> bool:
        asked.append((action, channel))
        match action:
            case "subscribe":
                return True
            case "call":
                return channel == "open"
        return False

    async with serving(manager, authorize=authorize) as client:
        peer = client("news")
        assert (await called(peer, "open", 1))["data"] == 1
        assert (await called(peer, "shut", 2))["code"] == "forbidden"
        assert (await called(peer, "none", 3))["code"] == "unknown_method"
    assert asked == [("subscribe", "news"), ("call", "open"), ("call", "shut")]


async def test_methods_that_make_no_sense_are_refused_when_they_are_made() -> None:
    manager = ConnectionManager()

    @manager.method("one")
    async def one() -> None: ...

    def positional(a: int, /) -> None: ...

    def several(*a: int) -> None: ...

    def unknown(a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    def strange(a: Connection | None, b: threading.Lock) -> None: ...

    function: Any
    for name, function in [("one", one), ("", one), ("x" * 201, one), ("p", positional), ("s", several)]:
        with pytest.raises(ConfigurationError):
            manager.method(name)(function)
    wrong: Any
    for wrong in (unknown, strange, 5):
        with pytest.raises(ConfigurationError):
            manager.method("x")(wrong)
    with pytest.raises(ConfigurationError, match="has a name"):
        manager.method(one)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="sold_out"):
        CallError("Sold out")
