"""What a manager does. The library calls this, and no method of the manager, which an app may have overridden."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from wsbroadcast.audience import UNSET, Audience, audiences_of, user_keys
from wsbroadcast.close_codes import ABNORMAL
from wsbroadcast.concurrency import LoopEnded, running_loop, submit, wait_in_thread, without_waiting
from wsbroadcast.connection import Connection, Exclude, find_connection, find_open
from wsbroadcast.engines.contract import (
    Engine,
    each,
    forget,
    keeps_history,
    position_of,
    publish_all,
    publish_all_nowait,
    publish_in,
    read_page,
)
from wsbroadcast.exceptions import EncodeError, EngineError, LifecycleError, PermissionDenied, kind_of
from wsbroadcast.history import (
    NOW,
    NOWHERE,
    Appended,
    HistoryRules,
    Page,
    Recovery,
    Since,
    SinceOption,
    check_key,
    since_of,
)
from wsbroadcast.hooks import HookChain
from wsbroadcast.message import JSONDefault, Message
from wsbroadcast.node.admission import Joining
from wsbroadcast.node.lanes import Outbox
from wsbroadcast.node.lifecycle import Lifecycle
from wsbroadcast.node.listening import Listener, ListenPolicy
from wsbroadcast.node.node import Node
from wsbroadcast.options import Limits, SlowConsumer
from wsbroadcast.publication import (
    NOBODY,
    Control,
    Dismissal,
    Position,
    Publication,
    Publications,
    Receipt,
    publications_of,
)
from wsbroadcast.stats import Counters
from wsbroadcast.text import plain
from wsbroadcast.transports import SEEN_KEY
from wsbroadcast.types import Manager

_NOT_RUNNING = "the manager isn't running"
_RUN_IT = "start the app with manager.lifespan, a router made by create_router, or `async with manager`"


def _no_websocket(value: object) -> str:
    text = f"connect takes the WebSocket of an endpoint, not {kind_of(value)}"
    if isinstance(value, Connection):
        return f"{text}: it is connected"
    if isinstance(value, HTTPConnection):
        return f"{text}: write @app.websocket(…) instead of @app.get(…), and websocket: WebSocket"
    return f"{text}: connect(websocket, user=…, channels=[…])"


class Core:
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
    ) -> None:
        if rules is not None:
            # The engine again, as one that keeps: to ask whether it can takes longer than to keep a message.
            self._keeper = keeps_history(engine)
            self._keeper.keep(rules)
        self.rules = rules
        """What is kept; `None` for nothing."""
        self.manager = manager
        """Whose operations these are."""
        self._hooks = hooks
        self._limits = limits
        self._slow_consumer = slow_consumer
        self._json_default = json_default
        self.counters = counters
        """What was counted, on all nodes that the manager has been."""
        self.life = Lifecycle(engine, self._new_node)
        """Where it runs."""

    def _new_node(self, engine: Engine) -> Node:
        node = Node(self, engine, self._hooks, self._slow_consumer, self._limits, self.counters, self.rules)
        node.outbox = Outbox(partial(self.broadcast, node=node))
        return node

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
            PermissionDenied: If the check does; it has left the channel again.
        """
        where = since_of(since, (channel,)) or {Audience.channel(channel): NOW}
        self.life.check_here()
        membership = self.life.node.membership
        await membership.subscribe(connection, (channel,), where, recovers=False)
        try:
            await check()
        except PermissionDenied:
            await membership.unsubscribe(connection, (channel,))
            raise
        await membership.continuity.recover(connection, where, id_)

    def say(self, connection: Connection, message: Message) -> None:
        """Send a connection something of its protocol's."""
        self.life.node.continuity.say(connection, message)

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

    def ids(self, exclude: Exclude) -> frozenset[str]:
        """Return the ids of connections; those that aren't known here are left out.

        Raises:
            TypeError: If something else is among them.
        """
        several: Iterable[Any] = exclude  # type: ignore[assignment]  # or one connection
        if isinstance(exclude, (Connection, WebSocket, Listener, str)) or not isinstance(exclude, Iterable):
            several = (exclude,)
        try:
            found = [one if isinstance(one, Listener) else find_connection(one, self.manager) for one in several]
        except TypeError:
            raise TypeError(
                f"exclude takes connections and WebSockets, not {exclude!r:.80}; for users pass exclude_users=…"
            ) from None
        return frozenset(connection.id for connection in found if connection is not None)

    def _find_here(self, websocket: WebSocket | Connection) -> Connection | None:
        connection = find_connection(websocket, self.manager)
        if connection is not None and connection.is_open:
            self.life.check_here()
        return connection

    # Messages.

    def encode(self, message: object, key: str | None = None) -> Message:
        """Encode a message within the limit.

        Raises:
            EncodeError: If it can't be sent as text, bytes or JSON, or is too large.
        """
        return Message.of(message, key, json_default=self._json_default)._within(self._limits.max_outbound_bytes)

    def publications(
        self,
        message: object,
        channel: object = UNSET,
        user: object = UNSET,
        channels: object = UNSET,
        to: object = UNSET,
        exclude: Exclude = (),
        exclude_users: object = (),
        key: str | None = None,
    ) -> Publications:
        """Build what the arguments of a broadcast say: one publication for each audience.

        Raises:
            EncodeError: If the message can't be sent as text, bytes or JSON, or is too large.
            ValueError: If an argument isn't valid.
        """
        audiences = audiences_of(channel, user, channels, to)
        ids = self.ids(exclude) if exclude != () else NOBODY
        users = user_keys(exclude_users) if exclude_users != () else NOBODY
        return publications_of(self.encode(message, key), audiences, ids, users)

    async def broadcast(
        self,
        publications: Publications,
        transaction: object = None,
        idempotency_key: str | None = None,
        *,
        node: Node | None = None,
    ) -> Receipt:
        """Publish to all nodes.

        Args:
            publications: Those of one broadcast.
            transaction: See `ConnectionManager.broadcast`.
            idempotency_key: See there.
            node: What the manager is here, if that is known. It is where the manager is closed, too.
        """
        if node is None:
            node = self.life.node
            if not self.life.is_started or self.life.loop is not asyncio.get_running_loop():
                node = await self.life.run_here()
        if idempotency_key is not None:
            check_key(idempotency_key, self.rules, [each.audience for each in publications], transaction)
        if len(publications) != 1:
            return await self._broadcast_several(node, publications, transaction, idempotency_key)
        publication = publications[0]
        members = node.registry.count(publication.audience, publication.exclude, publication.exclude_users)
        if self._hooks.has("on_broadcast") or not node.dispatcher.is_clear:
            prepared = await self._prepare(node, publication)
            if prepared is None:
                return Receipt(members, is_held_back=True)
            publication = prepared
        if transaction is not None:
            await publish_in(self.life.engine, transaction, (publication,), self.rules)
        elif self.rules is None or (history := self.rules.of(publication.audience)) is None:
            await self.life.engine.publish(publication)
        else:
            appended = await self._keeper.append(publication, history, idempotency_key)
            return Receipt(members, {publication.audience: appended.position}, is_repeat=appended.is_repeat)
        return Receipt(members)

    async def broadcast_local(self, publications: Publications) -> Receipt:
        """Send to the connections of this node only."""
        node = await self.life.run_here()
        members = node.count(publications)
        prepared = await self._prepare_all(node, publications)
        node = await self.life.run_here()
        await each(node.deliver_local, prepared)
        return Receipt(members, is_held_back=not prepared and bool(publications))

    def broadcast_nowait(self, publications: Publications) -> Receipt:
        """Publish to all nodes without awaiting anything."""
        if not self.life.is_started or self.life.loop is not running_loop():
            self.life.settle_here()
            if self.life.engine.links_nodes:  # whose start waits for a broker, and must not be broken off
                raise LifecycleError("the engine has to start, and broadcast_nowait can't: await `broadcast`")
            without_waiting(self.life.run_here(), "the engine has to start")
        members = self.life.node.count(publications)
        prepared: Sequence[Publication] = publications
        if self._hooks.has("on_broadcast"):
            prepared = without_waiting(self._transform_all(publications), "an on_broadcast hook has to wait")
        publish_all_nowait(self.life.engine, prepared, self.rules)
        return Receipt(members, is_held_back=not prepared and bool(publications))

    def broadcast_threadsafe(self, publications: Publications) -> Receipt:
        """Publish from a thread, which is blocked until the engine has taken it."""
        while True:
            loop = self.life.loop
            if loop is None or not loop.is_running():
                raise LifecycleError(f"{_NOT_RUNNING}, so a thread can't reach it: {_RUN_IT}")
            if running_loop() is loop:
                raise LifecycleError(
                    "broadcast_threadsafe would block its own event loop: await `broadcast`, or call `broadcast_soon`, "
                    "which works in both"
                )
            try:
                return wait_in_thread(submit(self.broadcast(publications), loop), loop)
            except LifecycleError as error:
                if self.life.loop is loop or isinstance(error, LoopEnded):
                    raise
                # Another event loop has taken the manager from that one, before anything was sent.

    def broadcast_soon(self, publications: Publications) -> None:
        """Publish later, in the order of the calls; from any thread."""
        node = self.life.node  # before the look at the loop
        loop = self.life.loop
        if loop is None or not loop.is_running() or not self.life.is_started:
            raise LifecycleError(f"{_NOT_RUNNING}: {_RUN_IT}")
        try:
            node.outbox.put(publications, partial(loop.call_soon_threadsafe, node.begin_sending))
        except RuntimeError as error:
            if isinstance(error, LifecycleError):
                raise
            raise LoopEnded from None

    async def _broadcast_several(
        self, node: Node, publications: Publications, transaction: object, idempotency_key: str | None
    ) -> Receipt:
        members = node.count(publications)
        prepared = await self._prepare_all(node, publications)
        appended: Mapping[Audience, Appended] = {}
        if transaction is None:
            appended = await publish_all(self.life.engine, prepared, self.rules, idempotency_key)
        else:
            await publish_in(self.life.engine, transaction, prepared, self.rules)
        return Receipt(
            members,
            {audience: each.position for audience, each in appended.items()},
            is_held_back=not prepared and bool(publications),
            is_repeat=bool(appended) and all(each.is_repeat for each in appended.values()),
        )

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

    async def position(self, audience: Audience) -> Position:
        """Return where an audience is now; see `ConnectionManager.position`."""
        await self.life.run_here()
        return await position_of(self.life.engine, self.rules, audience)

    async def history(self, audience: Audience, since: Since | None, limit: int | None) -> Page:
        """Read what is kept of an audience; see `ConnectionManager.history`."""
        await self.life.run_here()
        return await read_page(self.life.engine, self.rules, audience, since, limit)

    async def forget(self, audience: Audience) -> None:
        """Remove what is kept of an audience; see `ConnectionManager.forget`."""
        node = await self.life.run_here()
        await forget(self.life.engine, self.rules, audience)
        if (tails := node.continuity.tails) is not None:
            tails.forgotten(audience)
            await tails.settled(audience)

    async def _prepare_all(self, node: Node, publications: Publications) -> list[Publication]:
        return [found for one in publications if (found := await self._prepare(node, one)) is not None]

    async def _transform_all(self, publications: Publications) -> list[Publication]:
        return [found for one in publications if (found := await self._transform(one)) is not None]

    async def _prepare(self, node: Node, publication: Publication) -> Publication | None:
        loop = asyncio.get_running_loop()
        if self._hooks.has("on_broadcast"):
            transformed = await self._transform(publication)
            if transformed is None:
                return None
            publication = transformed
        if not node.dispatcher.is_clear:
            await node.dispatcher.ease(publication.message.size, publication.audience, publication.exclude)
        if self.life.loop is not loop:  # it was closed, or another event loop took it
            raise self.life.elsewhere()
        return publication

    async def _transform(self, publication: Publication) -> Publication | None:
        message = await self._hooks.transform(publication.message, publication.audience, self.encode)
        return None if message is None else publication.with_message(message)
