"""What both type checkers have to report: each line that says so, and no other."""

from __future__ import annotations

from fastapi import WebSocket
from pydantic import BaseModel

from wsbroadcast import (
    Access,
    Audience,
    Connection,
    ConnectionManager,
    Delivery,
    Gap,
    Handshake,
    Hook,
    Limits,
    Message,
    Publisher,
    SlowConsumer,
    connection_dependency,
    create_router,
)
from wsbroadcast.testing import Peer

manager = ConnectionManager()
publisher = Publisher("redis://localhost")


class Member:
    name = "ada"


async def broadcasts(websocket: WebSocket, connection: Connection[Member]) -> None:
    await manager.broadcast("x", channel="a", user="b")  # wrong
    await manager.broadcast("x", channel="a", channels=["b"])  # wrong
    await manager.broadcast("x", user=None)  # wrong
    await manager.broadcast("x", channel=None)  # wrong
    await manager.broadcast("x", to="news")  # wrong
    await manager.broadcast("x", chanel="a")  # wrong
    await manager.broadcast("x", exclude="ada")  # wrong
    await manager.broadcast("x", key=5)  # wrong
    await manager.broadcast_local("x", transaction=object())  # wrong
    manager.broadcast_soon("x", channel="a", user="b")  # wrong
    manager.broadcast_nowait("x", user=5.0)  # wrong
    await publisher.broadcast("x", exclude=connection)  # wrong
    await publisher.broadcast("x", channel="a", user="b")  # wrong
    await connection.manager.broadcast("x", channel="a", user="b")  # wrong
    await manager.send("ada", "x")  # wrong
    await manager.send_personal_message(websocket, "x")  # wrong
    manager.disconnect("ada")  # wrong
    await manager.connect(websocket, channels=[1])  # wrong
    await manager.connect(websocket, user=5.0)  # wrong
    print(manager.connect(websocket).is_open)  # wrong
    print(connection.info.nome)  # wrong
    await manager.close_user(None)  # wrong
    await manager.disconnect_user("ada")  # wrong
    await manager.unsubscribe_user("ada", 1)  # wrong


@manager.on_connect  # wrong
def too_many(connection: Connection, channel: str) -> None: ...


@manager.on_connect  # wrong
def strange_answer(connection: Connection) -> str:
    return "yes"


@manager.on_subscribe  # wrong
async def too_few(connection: Connection) -> None: ...


@manager.on_broadcast  # wrong
async def swapped(audience: Audience, message: Message) -> None: ...


@manager.on_deliver  # wrong
def of_messages(message: Message) -> None: ...


@manager.on_gap  # wrong
def of_deliveries(delivery: Delivery) -> None: ...


class Wrong(Hook):
    def on_connect(self, connection: Connection, more: int) -> None: ...  # wrong

    async def on_message(self, connection: Connection, message: str | bytes) -> str:  # wrong
        return "yes"

    def on_gap(self, gap: str) -> None: ...  # wrong


def authorize(connection: Connection | Handshake, action: str) -> bool:
    return True


def only_connections(connection: Connection, action: str, channel: str | None) -> bool:
    return True


def says_text(connection: Connection | Handshake, action: str, channel: str | None) -> str:
    return "yes"


create_router(manager, authorize=authorize)  # wrong
create_router(manager, authorize=only_connections)  # wrong
Access(authorize=says_text)  # wrong
create_router(manager, on_denied="close")  # wrong
create_router(manager, inbound="ignored")  # wrong
create_router("/ws")  # wrong
create_router(manager, access="open")  # wrong
connection_dependency(subprotocols=["a"])  # wrong
Limits(max_message_bytes=5)  # wrong
Limits(when_full="newest")  # wrong
SlowConsumer(policy="drop")  # wrong
ConnectionManager(slow_consumer="drop")  # wrong
ConnectionManager(hooks=Wrong())  # wrong
ConnectionManager(5)  # wrong
manager.on_disconnect("text")  # wrong
gap: Gap = manager.stats()  # wrong
connection_dependency(authorize=authorize)  # wrong


class Say(BaseModel):
    text: str


class Typing(BaseModel):
    who: str


async def typed(connection: Connection, peer: Peer) -> None:
    async for message in connection.typed(Say | Typing):
        print(message.text)  # wrong
    async for one in connection.typed(Say):
        print(one.who)  # wrong
    said: Typing = await peer.receive(Say)  # wrong
    print(said, (await peer.receive(Say)).who)  # wrong
    await manager.broadcast(said, as_typed=Say)  # wrong
    manager.on()  # wrong
