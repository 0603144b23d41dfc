"""Any interleaving of what an app does gives each connection what a naive model gives, in order, on both sinks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.asgi import Peer
from tests.support.fast import WebSocketsSansIOProtocol
from wsbroadcast import Connection, ConnectionClosed, ConnectionManager

CHANNELS = "ab"
PEERS = 4

peers = st.integers(0, PEERS - 1)
channels = st.sampled_from(CHANNELS)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("broadcast"), st.sets(peers, max_size=2)),
        st.tuples(st.just("broadcast_nowait"), st.sets(peers, max_size=2)),
        st.tuples(st.just("channel"), channels, st.sets(peers, max_size=2)),
        st.tuples(st.just("user"), peers),
        st.tuples(st.just("send"), peers),
        st.tuples(st.just("app_send"), peers),
        st.tuples(st.just("subscribe"), peers, channels),
        st.tuples(st.just("unsubscribe"), peers, channels),
        st.tuples(st.just("close"), peers),
        st.tuples(st.just("app_close"), peers),
        st.tuples(st.just("stall"), peers),
        st.tuples(st.just("resume"), peers),
        st.tuples(st.just("turn")),
    ),
    max_size=40,
)


class World:
    """The manager with its peers beside the model: a list of messages for each."""

    def __init__(self, kind: str) -> None:
        self.manager = ConnectionManager()
        self.peers: list[Any] = [WebSocketsSansIOProtocol() if kind == "uvicorn" else Peer() for _ in range(PEERS)]
        self.connections: list[Connection] = []
        self.expected: list[list[str]] = [[] for _ in range(PEERS)]
        self.is_open = [True] * PEERS
        self.is_in: list[set[str]] = [set() for _ in range(PEERS)]
        self.pending: list[asyncio.Task[None]] = []
        self.number = 0

    async def connect(self) -> None:
        for number, peer in enumerate(self.peers):
            self.connections.append(await self.manager.connect(peer.websocket, user=number % 2))

    def text(self, recipients: list[int]) -> str:
        self.number += 1
        for recipient in recipients:
            if self.is_open[recipient]:
                self.expected[recipient].append(str(self.number))
        return str(self.number)

    def everyone(self, exclude: set[int]) -> list[int]:
        return [number for number in range(PEERS) if number not in exclude]

    async def run(self, name: str, *args: Any) -> None:
        await getattr(self, f"do_{name}")(*args)

    async def do_broadcast(self, exclude: set[int]) -> None:
        text = self.text(self.everyone(exclude))
        await self.manager.broadcast(text, exclude=[self.connections[number] for number in exclude])

    async def do_broadcast_nowait(self, exclude: set[int]) -> None:
        text = self.text(self.everyone(exclude))
        self.manager.broadcast_nowait(text, exclude=[self.peers[number].websocket for number in exclude])

    async def do_channel(self, channel: str, exclude: set[int]) -> None:
        text = self.text([number for number in self.everyone(exclude) if channel in self.is_in[number]])
        excluded = [self.connections[number] for number in exclude]
        await self.manager.broadcast(text, channel=channel, exclude=excluded)

    async def do_user(self, peer: int) -> None:
        text = self.text([number for number in range(PEERS) if number % 2 == peer % 2])
        await self.manager.broadcast(text, user=peer % 2)

    async def do_send(self, peer: int) -> None:
        if self.is_open[peer]:
            await self.connections[peer].send(self.text([peer]))
        else:
            with pytest.raises(ConnectionClosed):
                await self.connections[peer].send("never")

    async def do_app_send(self, peer: int) -> None:
        if self.is_open[peer]:
            await self.in_background(self.peers[peer].websocket.send_text(self.text([peer])))

    async def do_subscribe(self, peer: int, channel: str) -> None:
        if self.is_open[peer]:
            await self.connections[peer].subscribe(channel)
            self.is_in[peer].add(channel)

    async def do_unsubscribe(self, peer: int, channel: str) -> None:
        await self.connections[peer].unsubscribe(channel)
        self.is_in[peer].discard(channel)

    async def do_close(self, peer: int) -> None:
        await self.end(peer, self.connections[peer].close())

    async def do_app_close(self, peer: int) -> None:
        await self.end(peer, self.peers[peer].websocket.close())

    async def end(self, peer: int, close: Any) -> None:
        if self.is_open[peer]:
            self.is_open[peer] = False
            self.expected[peer].append("<close>")
        await self.in_background(close)

    async def in_background(self, coroutine: Any) -> None:
        # Towards a stalled peer it takes its time; what follows mustn't wait for it, and has to stay behind it.
        self.pending.append(asyncio.get_running_loop().create_task(coroutine))
        await asyncio.sleep(0)

    async def do_stall(self, peer: int) -> None:
        self.peers[peer].stall()

    async def do_resume(self, peer: int) -> None:
        self.peers[peer].resume()

    async def do_turn(self) -> None:
        await asyncio.sleep(0)

    async def settle(self) -> None:
        for peer in self.peers:
            peer.resume()
        await asyncio.gather(*self.pending)
        for _ in range(1000):
            await asyncio.sleep(0)  # at least once: the last turn isn't delivered yet
            if not self.manager._core.life.node._slow_consumers.waiting:
                break

    def received(self, peer: Any) -> list[str]:
        if isinstance(peer, WebSocketsSansIOProtocol):
            return peer.messages
        sent = [event for event in peer.sent if event["type"] in ("websocket.send", "websocket.close")]
        return [event.get("text", "<close>") for event in sent]


@pytest.mark.parametrize("kind", ["uvicorn", "asgi"])
@settings(max_examples=150)
@given(operations)
def test_every_connection_gets_what_the_model_gives(kind: str, steps: list[tuple[Any, ...]]) -> None:
    async def main() -> None:
        world = World(kind)
        await world.connect()
        assert world.manager.stats().sinks == {kind: PEERS}
        for step in steps:
            await world.run(*step)
        await world.settle()
        assert [world.received(peer) for peer in world.peers] == world.expected
        await world.manager.aclose()

    asyncio.run(main())
