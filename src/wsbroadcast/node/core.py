"""The operations of a manager. The library calls these, never the manager's methods, which an app may override."""

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
from wsbroadcast.engines.contract import Engine, keeps_presence
from wsbroadcast.exceptions import ConfigurationError, EncodeError, EngineError, kind_of
from wsbroadcast.handlers import Handlers
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
from wsbroadcast.node.jobs import Job
from wsbroadcast.node.lanes import Outbox
from wsbroadcast.node.lifecycle import Lifecycle
from wsbroadcast.node.listening import Listener, ListenPolicy
from wsbroadcast.node.node import Node
from wsbroadcast.node.presence import NodePresence
from wsbroadcast.node.siblings import Answers
from wsbroadcast.node.streams import Follower, NodeStreams
from wsbroadcast.options import ClientTiming, Limits, SlowConsumer
from wsbroadcast.presence import PresenceRules
from wsbroadcast.publication import (
    NOBODY,
    Control,
    Dismissal,
    Position,
    Publication,
    Receipt,
)
from wsbroadcast.stats import Counters
from wsbroadcast.streams.ledger import STREAMS, Known, can_stream
from wsbroadcast.streams.producers import Producer, StreamOptions
from wsbroadcast.streams.run import Run
from wsbroadcast.text import plain
from wsbroadcast.transports import SEEN_KEY
from wsbroadcast.typed.sends import SendRules
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
        manager: The manager.
        engine: Links it to other nodes.
        hooks: The hooks that run around its events.
        limits: The limits of connections and messages.
        slow_consumer: What happens to a connection that doesn't keep up.
        json_default: Writes values that JSON doesn't know.
        counters: The counters of the manager.
        rules: What is kept; `None` for nothing.
        drain: Seconds of the drain at a signal; `None` for none.
        methods: The functions that clients may call; `None` for none.
        client_timing: The times that clients of events are told.
        presence_rules: Which channels know who is in them; `None` for none.
        sends: The types that broadcasts have; `None` for any.
        handlers: The functions that handle clients' messages; `None` for none.

    Raises:
        ConfigurationError: If there are rules, and the engine keeps no histories; or if there are presence rules, and
            it keeps no presence.
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
        presence_rules: PresenceRules | None = None,
        sends: SendRules | None = None,
        handlers: Handlers | None = None,
    ) -> None:
        self.methods = methods or Methods()
        """The functions that clients may call."""
        self.handlers = handlers or Handlers()
        """The functions that handle clients' messages."""
        self.client_timing = client_timing
        """The times that clients of events are told."""
        self._limits = limits
        self._slow_consumer = slow_consumer
        self.counters = counters
        """The counters. They go on when the manager is started again in another event loop."""
        super().__init__(manager, engine, hooks, limits.max_outbound_bytes, json_default, rules)
        self.sends = sends
        self._knows_siblings = False
        self._has_streams = self._keeps_streams = False
        self.send_timeout = slow_consumer.send_timeout
        """Seconds after which a peer that takes nothing is given up."""
        # The functions that run in the background on each node of the manager.
        self._jobs = list[Job]()
        self.presence_rules = presence_rules
        """Which channels know who is in them; `None` for none."""
        self.life = Lifecycle(engine, self._new_node, drain)

    def _new_node(self, engine: Engine) -> Node:
        node = Node(
            self,
            engine,
            self._hooks,
            self._slow_consumer,
            self._limits,
            self.counters,
            self.rules,
            self.client_timing,
            self.presence_rules,
            self._jobs,
        )
        node.outbox = Outbox(partial(self.broadcast, node=node))
        if self._knows_siblings:
            node.know_siblings()
        if self._has_streams and self.rules is not None:
            node.know_streams(self.rules, self._json_default)
        return node

    # Streams.

    def use_streams(self) -> None:
        """Carry streams, from now on.

        Raises:
            ConfigurationError: If the engine can't.
        """
        if self._has_streams:
            return
        self._keeper, _ = can_stream(self.life.engine)
        rules = HistoryRules({}) if self.rules is None else self.rules
        rules.keep_streams(STREAMS)
        self._keeper.keep(rules)
        self._keeps_streams = not self.life.is_started  # if it is started, the engine may have to be told
        self.life.node.know_streams(rules, self._json_default)
        self.rules = rules
        self._has_streams = True

    async def streams(self) -> NodeStreams:
        """Return the streams of the node.

        Raises:
            ConfigurationError: If the engine can't carry them.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        self.use_streams()
        node = await self.life.run_here()
        if not self._keeps_streams:
            await self.life.engine.ready_to_keep()
            self._keeps_streams = True
        assert self.rules is not None
        return node.know_streams(self.rules, self._json_default)

    @asynccontextmanager
    async def stream(self, options: StreamOptions) -> AsyncIterator[Run]:
        """Produce a stream in a block; see `ConnectionManager.stream`."""
        node = self.life.enter()
        try:
            async with (await self.streams()).producers.stream(options) as run:
                yield run
        finally:
            node.entering -= 1

    async def start_stream(self, options: StreamOptions, producer: Producer) -> Run:
        """Let a task produce a stream; see `ConnectionManager.start_stream`."""
        return await (await self.streams()).producers.produce(options, producer)

    @asynccontextmanager
    async def follow(self, id_: str, since: Position | None, viewer: str | None = None) -> AsyncIterator[Follower]:
        """Watch a stream; see `ConnectionManager.follow_stream`."""
        node = self.life.enter()
        try:
            async with (await self.streams()).follow(id_, since, viewer) as follower:
                yield follower
        finally:
            node.entering -= 1

    async def stop_stream(self, id_: str) -> bool:
        """Stop a stream; see `ConnectionManager.stop_stream`."""
        return await (await self.streams()).producers.stop(id_)

    async def find_stream(self, id_: str) -> Known | None:
        """Find the newest run of a stream."""
        return await (await self.streams()).producers.find(id_)

    # Nodes.

    def know_siblings(self) -> None:
        """Take part in questions to all nodes, from the next start on or from this node's first question on."""
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
                yield  # the handshake has its place
                return
            async with node.membership.admission.handshake(websocket):
                await self.life.run_here()
                yield
        finally:
            node.entering -= 1

    def background(self, job: Job) -> None:
        """Run something as long as the manager runs; see `ConnectionManager.background`.

        Raises:
            ConfigurationError: If the engine can't decide which node runs it, or another function has its name.
        """
        if job.once:
            keeps_presence(self.life.engine).uses_lease = True
        if any(job.name == each.name for each in self._jobs):
            raise ConfigurationError(f"another background function is named {job.name!r}: give this one a name=")
        self._jobs.append(job)
        if self.life.is_started:
            self.life.check_here()
            self.life.node.run_background()

    async def drain(self, over: float) -> None:
        """Refuse new connections and close all others; see `ConnectionManager.drain`."""
        if not self.life.is_closed:
            await self.life.settle_here().drain.run(over)

    def disconnect(self, websocket: WebSocket | Connection) -> None:
        """Remove a connection whose peer is gone."""
        connection = self._find_here(websocket)
        if connection is not None:
            self.life.node.membership.leave(connection, ABNORMAL, "")

    async def close(self, websocket: WebSocket | Connection, code: int, reason: str) -> None:
        """Send what was handed over before, then close and remove a connection."""
        connection = self._find_here(websocket)
        if connection is not None:
            await self.life.node.membership.close(connection, code, plain(reason or ""))

    async def subscribe(
        self, websocket: WebSocket | Connection, channels: tuple[str, ...], since: SinceOption = None
    ) -> Recovery | None:
        """Subscribe a connection to channels; if there is only one, return whether it gets what it missed."""
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
        """Subscribe a connection that speaks events to a channel; run a check before it is sent anything.

        Raises:
            Exception: If the check raises it, such as `PermissionDenied`. The connection has left the channel again.
        """
        where = since_of(since, (channel,)) or {Audience.channel(channel): NOW}
        self.life.check_here()
        membership = self.life.node.membership
        await membership.subscribe(connection, (channel,), where, recovers=False)
        try:
            await check()
        except BaseException:  # also if the check can't be made now, or is cancelled
            await membership.unsubscribe(connection, (channel,))
            raise
        await membership.continuity.recover(connection, where, id_)

    async def presence(self) -> NodePresence:
        """Return the presence of this node, once the engine is started.

        Raises:
            ConfigurationError: If no channel has presence.
        """
        presence = (await self.life.run_here()).presence
        if presence is None:
            raise ConfigurationError("no channel has presence: write ConnectionManager(…, presence=Presence())")
        return presence

    async def watch(self, connection: Connection, channel: str, id_: object = None) -> bool:
        """Tell a connection that speaks events who is in one of its channels, now and at each change.

        Args:
            connection: The connection.
            channel: The channel.
            id_: The `id` of the command that asked for it.

        Returns:
            Whether it is told. It isn't if it has left the channel meanwhile.

        Raises:
            ConfigurationError: If the channel has no presence.
            EngineUnavailable: If the broker can't be asked.
            Refused: If it was sent the whole list a moment ago.
        """
        presence = await self.presence()
        return await presence.watches.begin(connection, channel, presence.rules.required(channel), id_)

    def unwatch(self, connection: Connection, channel: str) -> None:
        """Tell a connection no more who is in a channel."""
        if (presence := self.life.node.presence) is not None:
            presence.watches.end(connection, channel)

    def say(self, connection: Connection, message: Message) -> None:
        """Send a connection a message of its protocol."""
        self.life.node.continuity.say(connection, message)

    async def ease(self, connection: Connection) -> None:
        """Wait until a connection takes what it is sent, before the next of its commands is answered."""
        dispatcher = self.life.node.dispatcher
        if not dispatcher.is_clear:
            await dispatcher.ease(0, Audience("connection", connection.id))

    async def unsubscribe(self, websocket: WebSocket | Connection, channels: tuple[str, ...]) -> None:
        """Unsubscribe a connection from channels."""
        connection = self._find_here(websocket)
        if connection is not None:
            await self.life.node.membership.unsubscribe(connection, channels)

    async def control(self, control: Control) -> Receipt:
        """Do something to the connections of an audience on all nodes. This node does it also if the broker is away.

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
                    "the arguments are swapped: write send(connection, message), or send_personal_message(message, "
                    "websocket)"
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
