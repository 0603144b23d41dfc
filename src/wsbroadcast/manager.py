"""ConnectionManager: the class every FastAPI tutorial makes its readers write, as a library."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

from starlette.websockets import WebSocket

from wsbroadcast.audience import EVERYONE, UNSET, Audience, Unset, UserId, as_channels
from wsbroadcast.close_codes import ABNORMAL, CloseCode, check_sendable, cut_reason
from wsbroadcast.concurrency import AwaitableContext, LoopEnded, running_loop, submit, wait_in_thread, without_waiting
from wsbroadcast.connection import Connection, Exclude, Headers, find_connection, find_open
from wsbroadcast.engines import create_engine
from wsbroadcast.engines.contract import Engine, Health, transactional
from wsbroadcast.exceptions import ConfigurationError, ConnectionClosed, EngineError, LifecycleError
from wsbroadcast.hooks import Hook, HookChain, HookDecorators
from wsbroadcast.message import Message
from wsbroadcast.node.admission import Joining
from wsbroadcast.node.lifecycle import Lifecycle
from wsbroadcast.node.node import Node
from wsbroadcast.options import ExpiresAt, Limits, SlowConsumer, check_positive
from wsbroadcast.publication import NOBODY, Dismissal, Publication
from wsbroadcast.signatures import no_dependency
from wsbroadcast.stats import Counters, Stats
from wsbroadcast.text import plain
from wsbroadcast.transports.exit_stack import give_exit_stack


@no_dependency(
    "take a ManagerDep",
    connect="whoever connects would say in the query who it is; take a ConnectionDep or a connection_dependency(…), or "
    "call it in the endpoint",
)
class ConnectionManager(HookDecorators):
    """Keeps the connections of an app and broadcasts to them.

    Made without any I/O, at import time if you like. It runs in one event loop: where `start`, `async with` or
    `lifespan` begins it, or a connection comes in first. Another one may only use it before that.

    Args:
        engine: A URL that names the engine, or an engine. `memory://` reaches the connections of this process.
        hooks: Code of yours around its events, in the order in which it runs.
        limits: How much is too much.
        slow_consumer: What happens to a connection that doesn't keep up.
        hook_timeout: Seconds after which a hook is cut off.

    Raises:
        ConfigurationError: If an option or the URL makes no sense.
    """

    def __init__(
        self,
        engine: str | Engine = "memory://",
        *,
        hooks: Iterable[Hook] = (),
        limits: Limits = Limits(),  # noqa: B008  # frozen
        slow_consumer: SlowConsumer = SlowConsumer(),  # noqa: B008  # frozen
        hook_timeout: float = 5.0,
    ) -> None:
        if not isinstance(limits, Limits) or not isinstance(slow_consumer, SlowConsumer):
            raise ConfigurationError("limits is a Limits(…), slow_consumer is a SlowConsumer(…)")
        check_positive("hook_timeout", hook_timeout)
        self._limits = limits
        self._slow_consumer = slow_consumer
        self._counters = Counters()
        self.hooks = HookChain(hook_timeout, self._counters)
        """The hooks by event; the decorators add to it."""
        for hook in hooks:
            self.hooks.add(hook)
        self._life = Lifecycle(create_engine(engine), self._new_node)

    # From start to end.

    async def start(self) -> None:
        """Begin to run in this event loop. Every `start` wants an `aclose`; only the last one ends it.

        Raises:
            LifecycleError: If it runs in another event loop, or is closed while it starts.
        """
        await self._life.start()

    async def aclose(self) -> None:
        """End: send what was handed over, close the connections with 1001, wait for hooks, stop the engine.

        Does nothing if `start` was called more often than `aclose`. Idempotent: a second call at the same time returns
        when the first has done it. Afterwards the manager refuses to work until it is started again.

        Raises:
            LifecycleError: If it runs in another event loop.
        """
        await self._life.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Run as long as an app: `FastAPI(lifespan=manager.lifespan)`. Routers of `create_router` carry it."""
        self.bind(app)
        give_exit_stack(app)
        async with self:
            yield

    def bind(self, app: Any) -> None:
        """Make this the manager that `ManagerDep` and `ConnectionDep` find in an app; `lifespan` does it too.

        They find it in apps that are mounted in this one as well, unless such an app has one of its own.
        """
        managers = getattr(app.state, "wsbroadcast_managers", ())
        if self not in managers:
            managers = app.state.wsbroadcast_managers = (*managers, self)
        if hasattr(app, "router"):  # which is all that a request to a mounted app knows of the app around it
            app.router.wsbroadcast_managers = managers

    # Connections.

    def connect(
        self,
        websocket: WebSocket,
        *,
        user: UserId | None = None,
        channels: Iterable[str] = (),
        info: object = None,
        subprotocol: str | None = None,
        headers: Headers | None = None,
        expires_at: ExpiresAt = None,
    ) -> AwaitableContext[Connection]:
        """Accept a WebSocket, unless it is accepted already, and register it.

        Await it for the `Connection`, or use it with `async with`, which removes the connection on the way out. A
        socket that is registered already stays what it is; it is subscribed to the channels, and expires when this call
        says so. If the call fails or is cancelled, nothing is registered.

        Args:
            websocket: The endpoint's WebSocket. Its `send` and `receive` are taken over.
            user: Who is behind it; one user may have many connections.
            channels: The channels it is subscribed to from the start.
            info: Whatever you want to find again as `connection.info`.
            subprotocol: The subprotocol to accept with.
            headers: Headers to accept with.
            expires_at: When it is closed with 4401 unless it is renewed (see `Connection.renew`): seconds since 1970,
                such as a token's `exp`, or a datetime with a timezone.

        Raises:
            ConnectionClosed: If the socket is closed, or its peer goes away during the call.
            InvalidChannel: If a channel name breaks a rule.
            ValueError: If `user` is not a str, int or UUID, or `expires_at` is not a valid time; or if the socket is
                registered already, as another user.
            PermissionDenied: If a hook refuses it; the socket is closed with 1008. Or if it has expired; the handshake
                is refused with 401, or a socket that is accepted already closed with 4401.
            LimitExceeded: If it is one too many; the handshake is refused with 429, 503 for `max_connections`, or a
                socket that is accepted already closed with 1008 or 1013.
            EngineUnavailable: If the broker forbids us to subscribe to it. One that is out of reach is not an error:
                what is missed is announced as a gap.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        joining = partial(Joining.of, user, channels, info, subprotocol, headers, expires_at)
        return AwaitableContext(self._connect(websocket, joining), self._part)

    async def _connect(self, websocket: WebSocket, joining: Callable[[], Joining]) -> Connection:
        node = self._life.enter()
        try:
            if not self._life.is_started:
                await self._life.run_here()
            return await node.membership.join(websocket, joining())
        finally:
            node.entering -= 1

    async def _part(self, connection: Connection) -> None:
        await self._life.node.membership.part(connection)

    def disconnect(self, websocket: WebSocket | Connection) -> None:
        """Remove a connection whose peer is gone. Synchronous and idempotent; the socket isn't closed.

        Raises:
            LifecycleError: If called from a thread, or in another event loop; nothing has changed then.
        """
        connection = self._find_here(websocket)
        if connection is not None:
            self._life.node.membership.leave(connection, ABNORMAL, "")

    async def close(self, websocket: WebSocket | Connection, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Send what was handed over before, then close and remove. Idempotent.

        Never hangs: a peer that takes nothing for `close_timeout` is cut off.

        Args:
            websocket: What to close; one that was never connected is left alone.
            code: A code that a close frame may carry; where the server refuses it, the same plus 3000, or 1000.
            reason: Cut to 123 bytes of UTF-8.

        Raises:
            LifecycleError: If called in another event loop.
            ValueError: If the code can't be sent.
        """
        connection = self._find_here(websocket)
        if connection is not None:
            await self._life.node.membership.close(connection, code, plain(reason or ""))

    async def disconnect_user(
        self,
        user: UserId,
        *,
        code: int = CloseCode.UNAUTHENTICATED,
        reason: str = "",
        exclude: Exclude = (),
    ) -> None:
        """Close every connection of a user, on all nodes: after a log-out, or when its rights were taken back.

        Returns once the engine has taken it. What waits for these connections is not sent any more. Take back first,
        then disconnect. A handshake that was authenticated before that may still come in after it: an `on_connect` hook
        that looks again closes this gap, because every later call reaches the connections that it runs for. A node that
        is cut off from the broker at that moment misses the call: look again in `on_gap`, too.

        Args:
            user: Whose connections.
            code: The code they are closed with. By default 4401, after which a client doesn't come back by itself.
            reason: Cut to 123 bytes of UTF-8.
            exclude: Connections or WebSockets that stay, such as the one that asked for the others to be signed out.

        Raises:
            ValueError: If the user is not an id, or the code can't be sent.
            EngineError: If the broker didn't take it, mostly `EngineUnavailable`: those of this node were closed, those
                of others not.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        check_sendable(code)
        dismissal = Dismissal(Audience.of(user=user), int(code), cut_reason(reason), self._ids(exclude))
        node = await self._life.run_here()
        try:
            await self._life.engine.publish(dismissal)
        except EngineError:
            node.take(dismissal)
            raise

    @asynccontextmanager
    async def handshake(self, websocket: WebSocket) -> AsyncIterator[None]:
        """Hold a place for a handshake while it is looked into: `async with manager.handshake(websocket):`.

        For an endpoint that authenticates before it connects: a client that makes too many handshakes is refused before
        that costs anything, also while the engine starts, and who is being authenticated counts as a connection
        already. `connect` inside the block takes the place over; at the end of the block one that wasn't taken is free
        again. A block inside such a block has the same place.

        Raises:
            LimitExceeded: If there is no place, as for `connect`; the handshake is refused.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        node = self._life.enter()
        try:
            known = find_connection(websocket, self)
            if known is not None and known.is_open:
                yield  # it has its place
                return
            async with node.membership.admission.handshake(websocket):
                await self._life.run_here()
                yield
        finally:
            node.entering -= 1

    async def subscribe(self, connection: WebSocket | Connection, *channels: str) -> None:
        """Subscribe a connection to channels; every later broadcast to them, from any node, arrives.

        Raises:
            ConnectionClosed: If the connection has ended.
            InvalidChannel: If a name breaks a rule; then none of them is subscribed.
            LimitExceeded: If they are more than `max_channels_per_connection`; none of them is subscribed, and the
                connection stays.
            PermissionDenied: If a hook refuses a channel; that one and those after it are not subscribed.
            EngineUnavailable: If the broker forbids us one of them; none of them is subscribed.
        """
        names = as_channels(channels)
        found = self._find_open(connection)
        self._life.check_here()
        await self._life.node.membership.subscribe(found, names)

    async def unsubscribe(self, connection: WebSocket | Connection, *channels: str) -> None:
        """Unsubscribe a connection from channels; those it isn't in are passed over.

        Raises:
            InvalidChannel: If a name breaks a rule.
        """
        names = as_channels(channels)
        found = self._find_here(connection)
        if found is not None:
            await self._life.node.membership.unsubscribe(found, names)

    @property
    def connections(self) -> list[Connection]:
        """The registered connections of this node, in the order in which they came."""
        return self._life.node.registry.recipients(EVERYONE)

    @property
    def active_connections(self) -> list[WebSocket]:
        """Their WebSockets, as in FastAPI's tutorial."""
        return [connection.websocket for connection in self._life.node.registry.recipients(EVERYONE)]

    # Messages.

    async def broadcast(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        exclude: Exclude = (),
        key: str | None = None,
        transaction: object = None,
    ) -> None:
        """Send a message to every connection of an audience, on all nodes; to everyone if none is named.

        Returns once the engine has taken it. Connections receive it at most once, in the order in which the engine took
        the messages of the audience. On `memory://` nothing that is sent to a connection afterwards overtakes it; over
        a broker what goes to one connection directly, a close too, may be there first. A connection that is closed or
        slow never makes the call fail or wait; if more than half of the recipients here are behind and keep pace, it
        waits until that is no longer so, at most `send_timeout` and 10 s. Who takes nothing holds up nobody but a
        tight loop, and that for a moment.

        Args:
            message: `str` for a text frame, `bytes` for a binary one, anything else is sent as JSON.
            channel: The channel whose subscribers get it.
            user: The user whose connections get it.
            exclude: Connections or WebSockets that don't.
            key: What the message is the newest of, for slow consumers under the policy `conflate`.
            transaction: On Postgres, a database connection or session of yours: the message is sent when its
                transaction commits, and never if it is rolled back.

        Raises:
            EncodeError: If the message can't be sent as text, bytes or JSON; nobody gets it.
            ValueError: If `channel` (`InvalidChannel`) or `user` is not valid. `None` is an error, never "everyone".
            EngineUnavailable: If the broker can't be reached, takes no messages now, or no longer lets us publish:
                nothing was sent; or if it doesn't answer in time, and whether it took the message isn't known: the text
                says which.
            EngineError: If the broker refuses this very message: to try again doesn't help.
            ConfigurationError: If the engine can't publish inside a transaction, or in this one.
            LifecycleError: If the manager is closed, or runs in another event loop.
            Exception: What an `on_broadcast` or `on_deliver` hook raises, or the driver of the transaction; nobody gets
                the message.
        """
        publication = self._publication(message, channel, user, exclude, key)
        prepared = await self._prepare(publication)
        if prepared is None:
            return
        if transaction is None:
            await self._life.engine.publish(prepared)
        else:
            await transactional(self._life.engine).publish_in(transaction, prepared)

    async def broadcast_local(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        exclude: Exclude = (),
        key: str | None = None,
    ) -> None:
        """Send a message like `broadcast`, to the connections of this node only; no broker is needed."""
        publication = self._publication(message, channel, user, exclude, key)
        prepared = await self._prepare(publication)
        if prepared is not None:
            node = await self._life.run_here()
            await node.deliver_local(prepared)

    def broadcast_nowait(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        exclude: Exclude = (),
        key: str | None = None,
    ) -> None:
        """Send a message like `broadcast`, without awaiting anything: for hot loops and plain callbacks.

        It sets no pace: what a connection can't take, and its backlog can't hold, is handled by the slow-consumer
        policy. Where `on_deliver` hooks run, the message waits for its turn: it keeps its place among the broadcasts to
        its audience, what is sent to a connection directly may overtake it, and a hook that fails is logged.

        Raises:
            EngineUnavailable: If the broker is known to be out of reach, or too much waits for it. What it refuses
                later is logged.
            EncodeError: If the message can't be sent as text, bytes or JSON; nobody gets it.
            LifecycleError: If called outside the event loop, before the start of an engine that needs one, or with an
                `on_broadcast` hook that has to wait.
        """
        publication = self._publication(message, channel, user, exclude, key)
        if not self._life.is_started or self._life.loop is not running_loop():
            self._life.settle_here()
            if self._life.engine.links_nodes:  # whose start waits for a broker, and must not be broken off
                raise LifecycleError("the engine has to start, and broadcast_nowait can't: await `broadcast`")
            without_waiting(self._life.run_here(), "the engine has to start")
        if self.hooks.has("on_broadcast"):
            prepared = without_waiting(self._transform(publication), "an on_broadcast hook has to wait")
            if prepared is None:
                return
            publication = prepared
        self._life.engine.publish_nowait(publication)

    def broadcast_threadsafe(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        exclude: Exclude = (),
        key: str | None = None,
    ) -> None:
        """Send a message like `broadcast`, from a thread: a sync endpoint, a worker. Blocks until it is handed over.

        Raises:
            LifecycleError: If the manager isn't running, or the call comes from its own event loop.
        """
        while True:
            loop = self._life.loop
            if loop is None or not loop.is_running():
                raise LifecycleError(
                    "the manager isn't running, so a thread can't reach it: start the app with manager.lifespan, "
                    "a router made by create_router, or `async with manager`"
                )
            if running_loop() is loop:
                raise LifecycleError("broadcast_threadsafe would block its own event loop: await `broadcast`")
            broadcast = self.broadcast(message, channel=channel, user=user, exclude=exclude, key=key)
            try:
                return wait_in_thread(submit(broadcast, loop), loop)
            except LifecycleError as error:
                if self._life.loop is loop or isinstance(error, LoopEnded):
                    raise
                # Another event loop has taken the manager from that one, before anything was sent.

    async def send(self, connection: WebSocket | Connection, message: object) -> None:
        """Send a message to one connection of this node, after everything handed over before.

        If the connection is behind, the call waits while it keeps pace, at most `send_timeout` and 10 s.

        Raises:
            ConnectionClosed: If the connection has ended, or was never here.
            EncodeError: If the message can't be sent as text, bytes or JSON.
        """
        encoded = self._encode(message, None)
        await self._life.run_here()
        audience = Audience("connection", self._find_open(connection).id)
        if not self._life.node.dispatcher.is_clear:
            await self._life.node.dispatcher.ease(encoded.size, audience)
            self._find_open(connection)
        self._counters.sends += 1
        self._life.node.dispatcher.dispatch(Publication(encoded, audience))

    async def send_personal_message(self, message: object, websocket: WebSocket | Connection) -> None:
        """Send a message to one connection; the name and order of arguments of FastAPI's tutorial."""
        await self.send(websocket, message)

    # State.

    def stats(self) -> Stats:
        """Return what this node holds now and has counted so far."""
        return self._life.node.stats()

    async def health(self) -> Health:
        """Tell whether messages travel between the nodes now."""
        await self._life.run_here()
        return await self._life.engine.health()

    def __repr__(self) -> str:
        return f"<ConnectionManager {self._life.engine.name}, {len(self._life.node.registry)} connections>"

    # Inside.

    def _publication(
        self, message: object, channel: object, user: object, exclude: Exclude, key: str | None
    ) -> Publication:
        ids = self._ids(exclude) if exclude != () else NOBODY
        return Publication.of(message, channel, user, key, self._limits, ids)

    def _encode(self, message: object, key: str | None) -> Message:
        return Message.of(message, key).within(self._limits.max_message_bytes)

    def _ids(self, exclude: Exclude) -> frozenset[str]:
        several = (exclude,) if isinstance(exclude, (Connection, WebSocket)) else tuple(exclude or ())
        if not all(isinstance(one, (Connection, WebSocket)) for one in several):
            raise ValueError(f"exclude takes connections or WebSockets, not {exclude!r:.80}")
        found = (find_connection(one, self) for one in several)
        return frozenset(connection.id for connection in found if connection is not None)

    def _find_here(self, websocket: WebSocket | Connection) -> Connection | None:
        connection = find_connection(websocket, self)
        if connection is not None and connection.is_open:
            self._life.check_here()
        return connection

    def _find_open(self, websocket: WebSocket | Connection) -> Connection:
        connection = find_open(websocket, self)
        if connection is None:
            raise ConnectionClosed(ABNORMAL, "it is not connected to this manager")
        return connection

    async def _prepare(self, publication: Publication) -> Publication | None:
        loop, node = asyncio.get_running_loop(), self._life.node
        if not self._life.is_started or self._life.loop is not loop:
            node = await self._life.run_here()
        if self.hooks.has("on_broadcast"):
            transformed = await self._transform(publication)
            if transformed is None:
                return None
            publication = transformed
        if not node.dispatcher.is_clear:
            await node.dispatcher.ease(publication.message.size, publication.audience, publication.exclude)
        if self._life.loop is not loop:  # it was closed, or another event loop took it
            raise self._life.elsewhere()
        return publication

    async def _transform(self, publication: Publication) -> Publication | None:
        message = await self.hooks.transform(publication.message, publication.audience)
        return None if message is None else publication.with_message(self._encode(message, None))

    def _new_node(self, engine: Engine) -> Node:
        return Node(self, engine, self.hooks, self._slow_consumer, self._limits, self._counters)


def count_unpublished(manager: ConnectionManager) -> int:
    """Count a message of a client that the broker didn't take, for `stats()`; return how many there are by now."""
    manager._counters.unpublished += 1
    return manager._counters.unpublished
