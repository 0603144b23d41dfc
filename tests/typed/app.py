"""An app that uses everything, for type checkers: mypy and pyright find nothing wrong in it, each at its strictest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypedDict, assert_type
from uuid import UUID

from fastapi import Depends, FastAPI, Header, HTTPException, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, RedisDsn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool

from wsbroadcast import (
    EVERYONE,
    HOLD_BACK,
    Access,
    Action,
    Audience,
    CallError,
    ClientTiming,
    CloseCode,
    Connection,
    ConnectionClosed,
    ConnectionDep,
    ConnectionManager,
    Delivery,
    EngineUnavailable,
    ErrorCode,
    FastPath,
    Gap,
    Handshake,
    Health,
    HoldBack,
    Hook,
    Identity,
    Limits,
    Manager,
    ManagerDep,
    MemoryEngine,
    Message,
    PermissionDenied,
    Publisher,
    Receipt,
    SlowConsumer,
    Stats,
    Timing,
    TokenFrom,
    UserId,
    connection_dependency,
    create_router,
    create_routes,
    get_manager,
    should_reconnect,
)
from wsbroadcast.testing import Peer


@dataclass
class Member:
    id: int
    name: str
    is_editor: bool = False


class Post(BaseModel):
    text: str


# Hooks: methods may be `def` or `async def`.


class Audit(Hook):
    def __init__(self) -> None:
        self.lines: list[str] = []

    async def on_connect(self, connection: Connection) -> None:
        self.lines.append(f"{connection.user} came")

    def on_disconnect(self, connection: Connection) -> None:
        self.lines.append(f"{connection.user} left with {connection.close_code}: {connection.close_reason}")

    def on_message(self, connection: Connection, message: str | bytes) -> bool:
        return len(message) < 1000

    async def on_subscribe(self, connection: Connection, channel: str) -> bool | None:
        return None if channel else False

    def on_unsubscribe(self, connection: Connection, channel: str) -> None:
        self.lines.append(channel)

    async def on_broadcast(self, message: Message, audience: Audience) -> Message | HoldBack | None:
        if audience.kind == "channel" and audience.name == "closed":
            return HOLD_BACK
        return Message.of({"text": message.data}, message.key) if message.is_text else None

    async def on_deliver(self, delivery: Delivery) -> None:
        delivery.recipients = [each for each in delivery.recipients if "muted" not in each.channels]
        for recipient in delivery.recipients[:1]:
            delivery.replace(recipient, "you are the first")

    def on_gap(self, gap: Gap) -> None:
        self.lines.append(f"{gap.engine} {gap.seconds}")

    def on_error(self, error: Exception, where: str) -> None:
        self.lines.append(f"{where}: {error}")


manager = ConnectionManager(
    "memory://",
    hooks=[Audit()],
    limits=Limits(max_connections_per_user=5, when_full="oldest", max_outbound_bytes=1_000_000),
    slow_consumer=SlowConsumer(policy="drop_oldest", by_channel={"ticker:*": "conflate"}),
    hook_timeout=2.0,
    json_default=str,
)
other = ConnectionManager(MemoryEngine(), slow_consumer="conflate")


def from_settings(url: RedisDsn) -> ConnectionManager:
    return ConnectionManager(url)


@manager.on_connect
async def greet(connection: Connection[Member]) -> None:
    await connection.send(f"hello {connection.info.name}")


@manager.on_connect
def only_some(connection: Connection) -> bool:
    return connection.user != "troll"


@manager.on_disconnect
async def say_goodbye(connection: Connection) -> None:
    receipt = await connection.manager.broadcast({"left": str(connection.user)})
    assert_type(receipt, Receipt)


@manager.on_message
async def count(connection: Connection, message: str | bytes) -> None:
    await asyncio.sleep(0)


@manager.on_subscribe
def guard(connection: Connection, channel: str) -> None:
    if channel.startswith("secret"):
        raise PermissionDenied("not yours")


@manager.on_unsubscribe
def note(connection: Connection, channel: str) -> None: ...


@manager.on_broadcast
def moderate(message: Message, audience: Audience) -> str | HoldBack | None:
    return HOLD_BACK if audience == EVERYONE else None


@manager.on_deliver
async def only_adults(delivery: Delivery) -> None:
    delivery.recipients = delivery.recipients[:100]


@manager.on_gap
async def reload(gap: Gap) -> None: ...


@manager.on_error
def log(error: Exception, where: str) -> None: ...


assert_type(only_some(Connection.__new__(Connection)), bool)


# Who may come in.


async def current_member(token: Annotated[str, Depends(TokenFrom(header=True, cookie="session"))]) -> Member:
    if token != "secret":
        raise HTTPException(401)
    return Member(1, "ada")


async def identify() -> Identity:
    return Identity(7, info=Member(7, "grace"), expires_at=datetime.now(UTC) + timedelta(hours=1))


def authorize(connection: Connection | Handshake, action: Action, channel: str | None) -> bool:
    return action == "subscribe" or connection.user == 1


async def authorize_later(connection: Connection | Handshake, action: str, channel: str | None) -> bool:
    return channel is not None


def user_key(member: Member) -> UserId:
    return member.id


access = Access(
    authenticate=current_member,
    authorize=authorize_later,
    allowed_origins=["https://app.example"],
    user_key=user_key,
    on_denied="close",
    subprotocols=["chat.v1"],
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with manager.lifespan(app), other:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(FastPath)
other.bind(app)
app.include_router(create_router(manager, "/ws/{channel}", authenticate=current_member, authorize=authorize))
app.include_router(create_router(manager, "/rooms/{room}", channel="room:{room}", inbound="commands", access=access))
app.include_router(create_router(other, "/feed", inbound="ignore", include_sender=False, dependencies=[]))
starlette = Starlette(routes=create_routes(manager, "/ws", accepts="json", access=access), lifespan=manager.lifespan)

MemberDep = Annotated[Connection[Member], Depends(connection_dependency(manager, authenticate=identify))]
SharedDep = Annotated[Connection[Member], Depends(connection_dependency(access=access))]


@app.websocket("/tutorial/{client_id}")
async def tutorial(websocket: WebSocket, client_id: int) -> None:
    await manager.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await manager.send_personal_message(f"You wrote: {data}", websocket)
            await manager.broadcast(f"Client #{client_id} says: {data}")
    except WebSocketDisconnect:
        manager.disconnect(websocket)
        await manager.disconnect(websocket)
        await manager.broadcast(f"Client #{client_id} left the chat")


@app.websocket("/chat")
async def chat(connection: MemberDep) -> None:
    assert_type(connection.info, Member)
    assert_type(connection.info.name, str)
    await connection.subscribe("lobby", "news")
    async for message in connection:
        assert_type(message, str | bytes)
        # A connection's user fits where users are taken.
        await manager.broadcast(message, user=connection.user, exclude=connection)
        await manager.broadcast(message, channel="lobby", exclude_users=connection.user, key="last")
        await connection.manager.close_user(connection.user, exclude=[connection])
        await connection.manager.unsubscribe_user(connection.user, "lobby")
    await connection.close(CloseCode.NORMAL, "bye")


@app.websocket("/plain")
async def plain(connection: ConnectionDep, shared: SharedDep) -> None:
    connection.renew(datetime.now(UTC) + timedelta(minutes=5))
    connection.info["seen"] = 1  # nobody said what it is
    print(connection.id, connection.channels, connection.state, connection.is_open, connection.websocket.headers)
    text = await connection.receive_text()
    data = await connection.receive_bytes()
    value: dict[str, int] = await connection.receive_json()
    await shared.send([text, data.hex(), value])
    await connection.wait_closed()


@app.websocket("/by-hand")
async def by_hand(websocket: WebSocket) -> None:
    async with manager.handshake(websocket):
        connecting = manager.connect(websocket, user=UUID(int=1), channels=["a"], info=Member(1, "ada"))
        connection = await connecting
    async with manager.connect(websocket, user="ada") as same:
        await manager.subscribe(same, "b")
        await manager.unsubscribe(websocket, "b")
    try:
        await manager.send(connection, {"a": 1})
    except ConnectionClosed as error:
        print(error.code, error.reason)
    first, second = await asyncio.gather(manager.connect(websocket), manager.connect(websocket))
    assert first is second
    async with connection.manager.connect(websocket) as again:
        assert again is connection
    task = asyncio.create_task(manager.connect(websocket))
    assert_type((await task).is_open, bool)


# Broadcasts, in all their forms.


@app.post("/posts")
async def publish(post: Post, manager: ManagerDep) -> dict[str, int]:
    receipt = await manager.broadcast(post, channels=["news", "front page"], exclude_users=["ada", 5])
    await manager.broadcast(post, to=Audience.channel("news"))
    await manager.broadcast(post, to=[EVERYONE, Audience.user(5)], transaction=object())
    await manager.broadcast_local("here", channel="news")
    nowait: Receipt = manager.broadcast_nowait("now", user=UUID(int=5))
    manager.broadcast_soon("soon", channels={"a", "b"})
    in_thread = await run_in_threadpool(manager.broadcast_threadsafe, "from a thread")
    await asyncio.to_thread(manager.broadcast_threadsafe, "from a thread", channel="news")
    return {"here": receipt.members_here, "now": nowait.members_here, "thread": in_thread.members_here}


async def forward(message: object, audience: Audience, to: Manager[Connection]) -> None:
    try:
        await to.broadcast(message, to=audience)
    except EngineUnavailable as error:
        if not error.may_have_been_sent:
            print("nothing was sent", [str(each) for each in error.positions])


@app.get("/health")
async def health(manager: Annotated[ConnectionManager, Depends(get_manager)]) -> bool:
    found: Health = await manager.health()
    stats: Stats = manager.stats()
    return found.is_ok and stats.connections >= 0 and should_reconnect(1013)


def sockets() -> Iterable[WebSocket]:
    return [connection.websocket for connection in manager.connections] + manager.active_connections


# A worker, and a class that extends the manager's.


async def work() -> None:
    async with Publisher("redis://localhost", json_default=str, start_timeout=1.0) as publisher:
        await publisher.broadcast({"done": 1}, user=5)
        await publisher.broadcast({"done": 1}, channels=["a", "b"], exclude_users="ada", key="k")
        publisher.broadcast_nowait("now", to=EVERYONE)
        await publisher.close_user(5, reason="banned")
        await publisher.unsubscribe_user(5, "a")
    with Publisher("nats://localhost", limits=Limits()) as publisher:
        publisher.broadcast_threadsafe("done", channel="a")


class RoomManager(ConnectionManager):
    async def say(self, room: str, text: str) -> int:
        receipt = await self.broadcast(text, channel=f"room:{room}")
        return receipt.members_here


def observe(hook: Hook, connection: Connection[Any]) -> Awaitable[object] | object:
    return hook.on_connect(connection)


@manager.method("add")
async def add(a: int, b: int, caller: Connection) -> int:
    if a < 0:
        raise CallError(ErrorCode.FORBIDDEN, "no debts")
    return a + b + len(caller.channels)


async def call_it(connection: Connection) -> int:
    return await add(1, 2, connection)  # it is still the function that it was


TIMING = Timing(linger=2.0)
QUICK = ConnectionManager(client_timing=ClientTiming(ping_interval=5))


# Messages with types.


class Say(BaseModel):
    type: Literal["say"] = "say"
    text: str


class Typing(BaseModel):
    type: Literal["typing"] = "typing"


class Left(TypedDict):
    type: Literal["left"]
    user: str


class Row:
    id = 1
    text = "a text"


typed = ConnectionManager(sends={"room:*": Say | Left, EVERYONE: Post})
app.include_router(
    create_router(typed, "/typed/{room}", channel="room:{room}", receives=Say | Typing, sends=Say | Left)
)


@typed.on(Say)
async def said(message: Say, connection: Connection, channel: str, agent: Annotated[str, Header()]) -> None:
    await typed.broadcast(message, channel=channel)
    await connection.manager.broadcast(Row(), as_=Post, key=agent)


@typed.on(Typing)
def is_typing(message: Typing) -> None:
    typed.broadcast_threadsafe({"text": message.type}, as_=Post)


@app.websocket("/typed")
async def typed_endpoint(connection: ConnectionDep) -> None:
    async for message in connection.typed(Say | Typing):
        assert_type(message, Say | Typing)
        match message:
            case Say():
                assert_type(message.text, str)
            case Typing():
                assert_type(message, Typing)
    async for one in connection.typed(Say):
        assert_type(one, Say)
    async for left in connection.typed(Left):
        assert_type(left["user"], str)


async def test_typed() -> None:
    async with Peer(app, "/typed") as peer:
        await peer.send(Say(text="hi"))
        assert_type(await peer.receive(Say), Say)
        assert_type(await peer.receive(Say | Left, timeout=1.0), Say | Left)
        assert_type(await peer.receive(list[Say]), list[Say])
        assert_type(await peer.receive(), str | bytes)
        assert_type(await peer.receive(1.0), str | bytes)
        assert_type(await peer.receive(timeout=1.0), str | bytes)
        await peer.expect_nothing()


async def call_handler(connection: Connection) -> None:
    await said(Say(text="hi"), connection, "room:1", "test")  # it is still the function that it was


async def publish_typed() -> None:
    async with Publisher("redis://localhost", sends=Post) as publisher:
        await publisher.broadcast(Row(), channel="a", as_=Post)
