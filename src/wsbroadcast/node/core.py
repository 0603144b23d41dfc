"""What a manager does. The library calls this, and no method of the manager, which an app may have overridden."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from wsbroadcast.asking import Question
from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import ABNORMAL
from wsbroadcast.connection import Connection, find_connection, find_open
from wsbroadcast.engines.contract import (
    Engine,
)
from wsbroadcast.exceptions import EncodeError, EngineError, kind_of
from wsbroadcast.history import (
    NOW,
    NOWHERE,
    HistoryRules,
    Recovery,
    SinceOption,
    since_of,
)
from wsbroadcast.hooks import HookChain
from wsbroadcast.message import JSONDefault, Message
from wsbroadcast.methods import Methods
from wsbroadcast.node.admission import Joining
from wsbroadcast.node.broadcasting import Broadcasting
from wsbroadcast.node.lanes import Outbox
from wsbroadcast.node.lifecycle import Lifecycle
from wsbroadcast.node.listening import Listener, ListenPolicy
from wsbroadcast.node.node import Node
from wsbroadcast.node.siblings import Answers
from wsbroadcast.options import ClientTiming, Limits, SlowConsumer
from wsbroadcast.publication import (
    NOBODY,
    Control,
    Dismissal,
    Publication,
    Receipt,
)
from wsbroadcast.stats import Counters
from wsbroadcast.text import plain
from wsbroadcast.transports import SEEN_KEY
from wsbroadcast.types import Manager

T = TypeVar("T")


def _no_websocket(value: object) -> str:
    text = f"connect takes the WebSocket of an endpoint, not {kind_of(value)}"
    if isinstance(value, Connection):
        return f"{text}: it is connected"
    if isinstance(value, HTTPConnection):
        return f"{text}: write @app.websocket(…) instead of @app.get(…), and websocket: WebSocket"
    return f"{text}: connect(websocket, user=…, channels=[…])"


class Core(Broadcasting):
    """The operations of one manager, in whichever event loop it runs.

    Args:
        manager: Whose.
        engine: Links it to other nodes.
        hooks: Run around its events.
        limits: How much is too much.
        slow_consumer: What happens to a connection that doesn't keep up.
        json_default: Writes what JSON doesn't know.
        counters: Of the manager.
        rules: What is kept; `None` for nothing.
        drain: Seconds of the drain at a signal; `None` for none.
        methods: What clients may call; `None` for nothing.
        client_timing: What clients of events are told to do when.

    Raises:
        ConfigurationError: If the engine can't keep it.
    """

    def __init__(
        self,
        manager: Manager[Connection],
        engine: Engine,
        hooks: HookChain,
        limits: Limits,
        slow_consumer: SlowConsumer,
        json_default: JSONDefault | None,
        counters: Counters,
        rules: HistoryRules | None = None,
        drain: float | None = None,
        methods: Methods | None = None,
        client_timing: ClientTiming = ClientTiming(),  # noqa: B008  # frozen
    ) -> None:
        self.methods = methods or Methods()
        """What clients may call."""
        self.client_timing = client_timing
        """What clients of events are told to do when."""
        self._limits = limits
        self._slow_consumer = slow_consumer
        self.counters = counters
        """What was counted, on all nodes that the manager has been."""
        super().__init__(manager, engine, hooks, limits.max_outbound_bytes, json_default, rules)
        self._knows_siblings = False
        self.life = Lifecycle(engine, self._new_node, drain)

    def _new_node(self, engine: Engine) -> Node:
        node = Node(
            self, engine, self._hooks, self._slow_consumer, self._limits, self.counters, self.rules, self.client_timing
        )
        node.outbox = Outbox(partial(self.broadcast, node=node))
        if self._knows_siblings:
            node.know_siblings()
        return node

    def know_siblings(self) -> None:
        """Take part in questions to all nodes, from the next start on, or from the first question of its own."""
        self._knows_siblings = True
        self.life.node.know_siblings()

    async def ask_nodes(self, topic: str, arguments: Mapping[str, Any], read: Callable[[bytes], T]) -> Answers[T]:
        """Ask all nodes; see `Siblings.ask`."""
        node = await self.life.run_here()
        return await node.know_siblings().ask(topic, arguments, read)

    # Connections.

    async def connect(self, websocket: WebSocket, joining: Callable[[], Joining]) -> Connection:
        """Accept and register a WebSocket; see `ConnectionManager.connect`."""
        if not isinstance(websocket, WebSocket) and not hasattr(websocket, "accept"):
            raise TypeError(_no_websocket(websocket))
        websocket.scope[SEEN_KEY] = self.manager
        node = self.life.enter()
        try:
            if not self.life.is_started:
                await self.life.run_here()
            return await node.membership.join(websocket, joining())
        finally:
            node.entering -= 1

    async def part(self, connection: Connection) -> None:
        """Remove a connection at the end of the block of its `connect`."""
        await self.life.node.membership.part(connection)

    @asynccontextmanager
    async def handshake(self, websocket: WebSocket) -> AsyncIterator[None]:
        """Hold a place for a handshake; see `ConnectionManager.handshake`."""
        node = self.life.enter()
        try:
            known = find_connection(websocket, self.manager)
            if known is not None and known.is_open:
                yield  # it has its place
                return
            async with node.membership.admission.handshake(websocket):
                await self.life.run_here()
                yield
        finally:
            node.entering -= 1

    async def drain(self, over: float) -> None:
        """Refuse newcomers and close everybody; see `ConnectionManager.drain`."""
        if not self.life.is_closed:
            await self.life.settle_here().drain.run(over)

    def disconnect(self, websocket: WebSocket | Connection) -> None:
        """Remove a connection whose peer is gone."""
        connection = self._find_here(websocket)
        if connection is not None:
            self.life.node.membership.leave(connection, ABNORMAL, "")

    async def close(self, websocket: WebSocket | Connection, code: int, reason: str) -> None:
        """Send what was handed over before, then close and remove."""
        connection = self._find_here(websocket)
        if connection is not None:
            await self.life.node.membership.close(connection, code, plain(reason or ""))

    async def subscribe(
        self, websocket: WebSocket | Connection, channels: tuple[str, ...], since: SinceOption = None
    ) -> Recovery | None:
        """Subscribe a connection to channels; return what became of what it missed in the only one."""
        where = NOWHERE if since is None else since_of(since, channels)
        connection = find_open(websocket, self.manager)
        self.life.check_here()
        await self.life.node.membership.subscribe(connection, channels, where)
        return connection.recovered.get(channels[0]) if where and len(channels) == 1 else None

    async def subscribe_if(
        self,
        connection: Connection,
        channel: str,
        since: SinceOption,
        check: Callable[[], Awaitable[None]],
        id_: object = None,
    ) -> None:
        """Subscribe a connection that speaks events to a channel; ask again before it is sent anything.

        Raises:
            Exception: What the check raises, such as `PermissionDenied`; it has left the channel again.
        """
        where = since_of(since, (channel,)) or {Audience.channel(channel): NOW}
        self.life.check_here()
        membership = self.life.node.membership
        await membership.subscribe(connection, (channel,), where, recovers=False)
        try:
            await check()
        except BaseException:  # also if nobody can say just now
            await membership.unsubscribe(connection, (channel,))
            raise
        await membership.continuity.recover(connection, where, id_)

    def say(self, connection: Connection, message: Message) -> None:
        """Send a connection something of its protocol's."""
        self.life.node.continuity.say(connection, message)

    async def ease(self, connection: Connection) -> None:
        """Wait, before more is asked that a connection is answered, until it takes what it is sent."""
        dispatcher = self.life.node.dispatcher
        if not dispatcher.is_clear:
            await dispatcher.ease(0, Audience("connection", connection.id))

    async def unsubscribe(self, websocket: WebSocket | Connection, channels: tuple[str, ...]) -> None:
        """Unsubscribe a connection from channels."""
        connection = self._find_here(websocket)
        if connection is not None:
            await self.life.node.membership.unsubscribe(connection, channels)

    async def control(self, control: Control) -> Receipt:
        """Do something to the connections of an audience, on all nodes; on this one also if the broker is away.

        Raises:
            EngineError: If the broker didn't take it.
        """
        node = await self.life.run_here()
        exclude = control.exclude if isinstance(control, Dismissal) else NOBODY
        members = node.registry.count(control.audience, exclude)
        try:
            await self.life.engine.publish(control)
        except EngineError:
            node.take(control)
            raise
        return Receipt(members)

    async def send(self, websocket: WebSocket | Connection, message: object) -> None:
        """Send a message to one connection of this node."""
        try:
            encoded = self.encode(message)
        except EncodeError:
            if isinstance(message, (WebSocket, Connection)):
                raise TypeError(
                    "the arguments are swapped: send(connection, message), send_personal_message(message, websocket)"
                ) from None
            raise
        await self.life.run_here()
        audience = Audience("connection", find_open(websocket, self.manager).id)
        dispatcher = self.life.node.dispatcher
        if not dispatcher.is_clear:
            await dispatcher.ease(encoded.size, audience)
            find_open(websocket, self.manager)
        self.counters.sends += 1
        self.life.node.dispatcher.dispatch(Publication(encoded, audience))

    def _find_here(self, websocket: WebSocket | Connection) -> Connection | None:
        connection = find_connection(websocket, self.manager)
        if connection is not None and connection.is_open:
            self.life.check_here()
        return connection

    # What is kept.

    @asynccontextmanager
    async def listen(
        self, channels: tuple[str, ...], user_key: str | None, since: SinceOption, size: int, policy: ListenPolicy
    ) -> AsyncIterator[Listener]:
        """Listen to channels; see `ConnectionManager.listen`."""
        listener = Listener(channels, user_key, size, policy)
        where = since_of(since, channels, user_key)
        node = self.life.enter()
        try:
            await self.life.run_here()
            async with (
                node.membership.demand.holding(listener.audiences),
                node.continuity.listen(listener, where),
            ):
                yield listener
        finally:
            node.entering -= 1
            listener.end()

    async def ask(self, question: Question[T]) -> T:
        """Ask the engine about a history."""
        await self.life.run_here()
        return await question(self.life.engine, self.rules)
