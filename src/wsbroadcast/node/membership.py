"""Every way in and every way out: who is registered, and what follows when somebody comes or goes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from contextvars import Context, copy_context
from types import TracebackType
from typing import TYPE_CHECKING

from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from wsbroadcast.audience import EVERYONE, Audience, as_channels, user_key
from wsbroadcast.close_codes import ABNORMAL, CloseCode, is_sendable
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection, ConnectionState, find_known, is_known
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.delivery.slow_consumers import Watch
from wsbroadcast.engines.contract import Engine
from wsbroadcast.exceptions import ConnectionClosed, LifecycleError, PermissionDenied, ungrouped
from wsbroadcast.hooks import HookChain
from wsbroadcast.logs import logger
from wsbroadcast.node.admission import EXPIRED, Door
from wsbroadcast.node.demand import Wanted
from wsbroadcast.node.departures import Farewells
from wsbroadcast.options import ExpiresAt, Limits, unix_seconds
from wsbroadcast.text import plain
from wsbroadcast.transports.exit_stack import exit_stack_of
from wsbroadcast.transports.websocket import Ended

if TYPE_CHECKING:
    from wsbroadcast.manager import ConnectionManager  # only to hand it on to connections


CLOSED = "the manager is closed: `start` or `async with manager` runs it again"
"""What an error says after `aclose`."""

SUBPROTOCOL = "wsbroadcast.subprotocol"
"""Where in its scope the subprotocol stands that a WebSocket is accepted with if `connect` names none."""

ROUTER = "wsbroadcast.router"
"""Is in its scope where the WebSocket is a router's, whose clients' messages reach others without code of the app's."""

Headers = Iterable[tuple[bytes, bytes]]


# How often sockets are looked for that are gone without anybody noticing: one look for all connections.
_LOOK_SECONDS = 5.0


class EndpointGuard:
    """Ends a connection with the ASGI call of its endpoint, on that call's exit stack."""

    __slots__ = ("_connection", "_membership")

    def __init__(self, membership: Membership, connection: Connection) -> None:
        self._membership = membership
        self._connection = connection

    async def __call__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it; an error of the endpoint's goes on."""
        await self._membership.endpoint_ended(self._connection, error)


class Membership:
    """Keeps connections from their registration to their end.

    Leaving is synchronous and happens once, whoever notices first; what takes time follows in tasks of its own. Before
    the registry changes, what was handed over for its present state is delivered.
    """

    def __init__(
        self,
        registry: Registry[Connection],
        dispatcher: Dispatcher[Connection],
        watch: Watch,
        hooks: HookChain,
        tasks: Tasks,
        engine: Engine,
        limits: Limits,
    ) -> None:
        self._registry = registry
        self._dispatcher = dispatcher
        self._watch = watch
        self._hooks = hooks
        self._counters = watch.counters
        self._tasks = tasks
        self._farewells = Farewells(hooks, tasks)
        self.see_off = self._farewells.see_off
        """Gives a connection's place back as soon as the server has let go of its socket."""
        self._wanted = Wanted(engine, registry)
        # Set when everybody was sent away: nobody comes in any more.
        self._is_ended = False
        # The next look for sockets that are gone, while there are connections.
        self._look: asyncio.TimerHandle | None = None
        # Those whose socket was gone at the last look.
        self._gone: set[Connection] = set()
        self.door = Door(limits, watch.counters)
        """Who may come in, and what they may do there."""

    # In.

    async def join(
        self,
        websocket: WebSocket,
        manager: ConnectionManager,
        *,
        user: object,
        channels: Iterable[str],
        info: object,
        subprotocol: str | None,
        headers: Headers | None,
        expires_at: ExpiresAt,
    ) -> Connection:
        """Accept and register; what `ConnectionManager.connect` promises."""
        key = None if user is None else user_key(user)
        names = as_channels(channels) if channels else ()
        expires = unix_seconds(expires_at)
        if is_known(websocket) and (known := await self._known(websocket, manager, key, names, expires)) is not None:
            return known
        self._check_running()
        place = await self.door.admit(websocket, key, names, expires)
        connection: Connection | None = None
        wanted = self._wanted.audiences(key, names)
        try:
            # Before it is accepted, so that messages arrive as soon as the peer sees that it is.
            if wanted:
                await self._wanted.expect(wanted)
            try:
                await _accept(websocket, subprotocol, headers)
                self._check_running()
                # Another task was connecting it meanwhile.
                if is_known(websocket) and (
                    (known := await self._known(websocket, manager, key, names, expires)) is not None
                ):
                    place.release()
                    return known
                connection = Connection(
                    websocket, manager, self, self._watch, place, user=user, user_key=key, channels=names, info=info
                )
                is_routers = ROUTER in websocket.scope
                connection.inbound_pace = self.door.inbound.router_pace if is_routers else self.door.inbound.pace
                await self._enter(connection, names, expires)
            finally:
                if wanted:
                    self._wanted.expected(wanted)
        except BaseException:
            if connection is None:  # else the place is its own, and goes with the socket
                place.release()
            raise
        return connection

    async def _enter(self, connection: Connection, channels: tuple[str, ...], expires: float | None) -> None:
        self._dispatcher.flush()
        self._registry.add(connection)
        self._counters.connects += 1
        if (stack := exit_stack_of(connection.websocket.scope)) is not None:
            stack.push_async_exit(EndpointGuard(self, connection))
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look_around, context=Context())
        try:
            if expires is not None:
                connection.renew(expires)
            if self._hooks.has("on_connect") or self._hooks.has("on_subscribe"):
                await self._announce(connection, channels)
                if not connection.is_open:
                    raise connection.closed_error()
        except PermissionDenied as denied:
            await self.close(connection, CloseCode.POLICY_VIOLATION, str(denied))
            raise
        except BaseException:
            self.leave(connection, CloseCode.INTERNAL_ERROR, "")
            raise

    async def _known(
        self,
        websocket: WebSocket,
        manager: ConnectionManager,
        user_key: str | None,
        channels: tuple[str, ...],
        expires: float | None,
    ) -> Connection | None:
        known = find_known(websocket, manager)
        if known is None:
            return None
        if isinstance(known, Ended):
            raise known.closed_error()
        if known.is_open:
            if user_key is not None and user_key != known.user_key:
                raise ValueError(
                    "the WebSocket is connected already, as another user or as nobody: disconnect it first"
                )
            if expires is not None:
                known.renew(expires)
            await self.subscribe(known, channels)
            return known
        if known.sink.is_ended:
            raise known.closed_error()
        known.give_back()
        return None

    def _check_running(self) -> None:
        if self._is_ended:
            raise LifecycleError(CLOSED)

    async def _announce(self, connection: Connection, channels: tuple[str, ...]) -> None:
        unannounced = list(reversed(channels))
        with self._farewells.after(connection):
            try:
                await self._hooks.observe("on_connect", connection)
                while unannounced and self._hooks.has("on_subscribe"):
                    await self._hooks.observe("on_subscribe", connection, unannounced.pop())
                unannounced.clear()
            finally:
                for channel in unannounced:  # on_unsubscribe is for those whose on_subscribe began
                    if not self._leave_channel(connection, channel):
                        connection.channels -= {channel}

    async def subscribe(self, connection: Connection, channels: tuple[str, ...]) -> None:
        """Subscribe to those of the channels it isn't in yet; if a hook refuses one, to that one and the rest not.

        Raises:
            LimitExceeded: If they are too many, before it is subscribed to any.
        """
        self.door.check_channels(len(connection.channels.union(channels)), connection)
        async with self._wanted.expecting([Audience("channel", channel) for channel in channels]):
            await self._subscribe_each(connection, channels)

    async def _subscribe_each(self, connection: Connection, channels: tuple[str, ...]) -> None:
        for channel in channels:
            self._dispatcher.flush()  # which may end this very connection, so before looking at it
            if not connection.is_open:
                raise connection.closed_error()
            if channel in connection.channels:
                continue
            self.door.check_channels(len(connection.channels) + 1, connection)  # others may subscribe it as well
            self._registry.subscribe(connection, channel)
            if self._hooks.has("on_subscribe"):
                with self._farewells.after(connection):
                    await self._announce_channel(connection, channel)
                if not connection.is_open:
                    raise connection.closed_error()

    async def _announce_channel(self, connection: Connection, channel: str) -> None:
        try:
            await self._hooks.observe("on_subscribe", connection, channel)
        except BaseException:
            if self._leave_channel(connection, channel):
                observing = self._hooks.observe("on_unsubscribe", connection, channel)
                self._tasks.spawn(observing, "on_unsubscribe hooks", connection.context)
            raise

    async def unsubscribe(self, connection: Connection, channels: tuple[str, ...]) -> None:
        """Unsubscribe from those of the channels it is in."""
        for channel in channels:
            if self._leave_channel(connection, channel) and self._hooks.has("on_unsubscribe"):
                await self._hooks.observe("on_unsubscribe", connection, channel)

    def _leave_channel(self, connection: Connection, channel: str) -> bool:
        self._dispatcher.flush()  # which may end this very connection, so before looking at it
        if channel not in connection.channels or not connection.is_open:
            return False
        if self._registry.unsubscribe(connection, channel):
            self._wanted.left((Audience("channel", channel),))
        self._watch.wake()  # as when one leaves
        return True

    # Out.

    def leave(
        self, connection: Connection, code: int, reason: str, state: ConnectionState = ConnectionState.CLOSED
    ) -> bool:
        """Take a connection out of the registry; return whether it was there."""
        self._dispatcher.flush()
        last = self._registry.remove(connection)
        if last is None:
            return False
        self._wanted.left(last)
        self._watch.wake()  # the crowd that a broadcaster waits for has changed
        self._counters.disconnects += 1
        connection.enter(state, code, reason)
        self._farewells.tell(connection)
        return True

    def lost(self, connection: Connection, code: int, reason: str) -> None:
        """The peer is gone."""
        connection.sink.end()
        if not self.leave(connection, code, reason) and connection.state is ConnectionState.CLOSING:
            connection.enter(ConnectionState.CLOSED, code, reason)
        self._farewells.see_off(connection)

    def evict(self, connection: Connection, cause: str) -> None:
        """The peer doesn't take what it is sent: out at once, closed if that goes quickly, else aborted."""
        held = connection.sink.held_bytes
        code, reason = CloseCode.TRY_AGAIN_LATER, "slow consumer"
        if connection.closing is not None:
            return  # which has a timeout of its own
        if not self.leave(connection, code, reason, ConnectionState.CLOSING):
            connection.sink.abort()  # it had left already, and now what it was still owed doesn't go out either
            return
        self._counters.evicted[cause] += 1
        logger.warning("evicted %r as a slow consumer (%s) with %d bytes unsent", connection, cause, held)
        connection.sink.discard()
        self._farewells.close(connection, code, reason)

    def dismiss(self, connection: Connection, code: int, reason: str) -> None:
        """Close and remove without sending what waits, also if it is being closed already; returns at once."""
        if self.leave(connection, code, reason, ConnectionState.CLOSING):
            connection.sink.discard()
            self._farewells.close(connection, code, reason)
        else:
            connection.sink.discard(keeps_close=True)

    def dismiss_all(self, audience: Audience, exclude: frozenset[str], code: int, reason: str) -> None:
        """Dismiss the members of an audience; those of a user also if they are being closed already."""
        owners = [sink.owner for sink in self._watch.waiting] if audience.kind == "user" else []
        for owner in owners:
            if isinstance(owner, Connection) and owner.user_key == audience.name and owner.id not in exclude:
                self.dismiss(owner, code, reason)
        for connection in self._registry.recipients(audience, exclude):
            self.dismiss(connection, code, reason)

    def expire(self, connection: Connection) -> None:
        """The moment has come at which a connection has to be renewed, and wasn't."""
        self.dismiss(connection, CloseCode.UNAUTHENTICATED, EXPIRED)

    async def close(self, connection: Connection, code: int, reason: str) -> None:
        """Close and remove; returns when the close frame is out or the peer was given up.

        Raises:
            ValueError: If the code can't be sent in a close frame.
        """
        if not is_sendable(code):
            raise ValueError(f"close code must be 1000-1003, 1007-1014 or 3000-4999, not {code!r}")
        self.leave(connection, code, reason, ConnectionState.CLOSING)
        if not connection.sink.is_ended:
            self._farewells.close(connection, code, reason)
        if connection.closing is not None:
            await asyncio.shield(connection.closing)

    async def part(self, connection: Connection) -> None:
        """Remove without closing; return when what was handed over is out, or the peer has taken too long."""
        self.leave(connection, ABNORMAL, "")
        await connection.sink.drained()

    async def endpoint_ended(self, connection: Connection, error: BaseException | None) -> None:
        """Its endpoint is done: send what was handed over, then close, whatever the server would do."""
        await self.close(connection, CloseCode.NORMAL if error is None else _code_of(error), "")
        await connection.sink.drained()  # a close of the app's own, in another task

    async def close_all(self, code: int, reason: str) -> None:
        """Close every connection at the same time, and let nobody in any more."""
        self._is_ended = True
        if self._look is not None:
            self._look.cancel()
        for connection in self._registry.recipients(EVERYONE):
            if self.leave(connection, code, reason, ConnectionState.CLOSING):  # else what was handed over ended it
                self._farewells.close(connection, code, reason)

    def _look_around(self) -> None:
        # An endpoint that neither reads nor writes doesn't notice that its peer is gone; the server's transport does.
        # One that reads learns it from the server, after the last message, so it is given a while to come to that.
        self._look = None
        gone = {each for each in self._registry.by_id.values() if each.sink.is_lost and not each.is_read}
        for connection in gone & self._gone:
            self.lost(connection, ABNORMAL, "")
        self._gone = gone - self._gone
        if self._registry.by_id:
            self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look_around, context=Context())

    # What a connection asks.

    def before_app_send(self) -> None:
        """The app is about to send something itself: what was handed over before goes first."""
        self._dispatcher.flush()

    def observe_message(self, connection: Connection, message: str | bytes) -> Awaitable[None] | None:
        """Return what to await before the endpoint gets a message, or `None` if there is nothing.

        Hooks that may wait run in a task, because the read may be cancelled: they run on, and the message is there for
        the next read.

        Raises:
            LimitExceeded: If the message is too large, or one too many; nobody has looked into it then.
        """
        self.door.check_message(connection, message)
        if not self._hooks.has("on_message"):
            return None
        observing = self._hooks.observe("on_message", connection, message)
        if not self._hooks.may_wait("on_message"):
            return observing
        return self._tasks.begin(observing, "on_message hooks", copy_context())


def _code_of(error: BaseException) -> int:
    if isinstance(error, Exception):
        error = ungrouped(error, WebSocketException, WebSocketDisconnect)
    code = error.code if isinstance(error, WebSocketException) else CloseCode.INTERNAL_ERROR
    return code if is_sendable(code) else CloseCode.INTERNAL_ERROR


async def _accept(websocket: WebSocket, subprotocol: str | None, headers: Headers | None) -> None:
    if WebSocketState.DISCONNECTED in (websocket.client_state, websocket.application_state):
        raise ConnectionClosed(ABNORMAL, "closed before it was connected")
    if websocket.application_state is WebSocketState.CONNECTED:
        return
    try:
        await websocket.accept(plain(subprotocol) if subprotocol else websocket.scope.get(SUBPROTOCOL), headers)
    except WebSocketDisconnect as error:
        raise ConnectionClosed(error.code, error.reason) from error
    except (OSError, RuntimeError) as error:
        # uvicorn's ClientDisconnected, or a server or Starlette that says it in words.
        raise ConnectionClosed(ABNORMAL, "closed while it was accepted") from error
