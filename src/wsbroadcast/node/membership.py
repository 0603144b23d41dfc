"""All ways in which connections are registered and removed, and what follows from it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from contextvars import Context, copy_context
from time import monotonic

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.close_codes import ABNORMAL, EXPIRED, CloseCode, check_sendable
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection, ConnectionState, Operations, find_known, is_known
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.delivery.slow_consumers import SlowConsumers
from wsbroadcast.engines.contract import Engine
from wsbroadcast.exceptions import ConnectionClosed, LifecycleError, PermissionDenied
from wsbroadcast.history import NOW, NOWHERE, SinceByAudience
from wsbroadcast.hooks import HookChain
from wsbroadcast.logs import about, logger
from wsbroadcast.node.admission import Admission, Joining, Lease
from wsbroadcast.node.ages import Ages
from wsbroadcast.node.continuity import Continuity, FoundByAudience
from wsbroadcast.node.demand import Demand
from wsbroadcast.node.departures import Announcements, Departures, EndpointGuard, code_of
from wsbroadcast.node.presence import NodePresence
from wsbroadcast.options import Limits
from wsbroadcast.publication import plain as plain_protocol
from wsbroadcast.text import plain
from wsbroadcast.transports import SPEAKS, Ended, closed_error
from wsbroadcast.transports.exit_stack import exit_stack_of
from wsbroadcast.transports.websocket import WebSocketTransport
from wsbroadcast.types import Headers

CLOSED = "the manager is closed: `start` or `async with manager` runs it again"
"""The text of errors after `aclose`."""

SUBPROTOCOL = "wsbroadcast.subprotocol"
"""The key in a WebSocket's scope for the subprotocol that it is accepted with if `connect` names none."""

ROUTER = "wsbroadcast.router"
"""This key is in the scope of a router's WebSocket. Messages of its clients reach others without code of the app."""

# How often, in seconds, all connections are checked for sockets that are gone without anybody noticing.
_LOOK_SECONDS = 5.0


class Membership:
    """Keeps connections from their registration to their end.

    A connection leaves once, in one synchronous step, whatever noticed its end first. What takes time follows in tasks.
    Before the registry changes, what was handed over for its present state is delivered.
    """

    def __init__(
        self,
        core: Operations,
        registry: Registry[Connection],
        dispatcher: Dispatcher[Connection],
        slow_consumers: SlowConsumers,
        hooks: HookChain,
        tasks: Tasks,
        engine: Engine,
        limits: Limits,
        continuity: Continuity,
        presence: NodePresence | None = None,
    ) -> None:
        self.core = core
        """The operations that methods of connections call."""
        self.manager = core.manager
        """The manager of these connections."""
        self._registry = registry
        self._dispatcher = dispatcher
        self._slow_consumers = slow_consumers
        self._hooks = hooks
        self._counters = slow_consumers.counters
        self._tasks = tasks
        self._departures = Departures(tasks)
        # Bound once: a method that is bound for each connection is 64 bytes more for each.
        self._endpoint_ended = self.endpoint_ended
        self._presence = presence
        self._announcements = Announcements(hooks, tasks, self._leave_channel)
        self.continuity = continuity
        """The positions of the connections in histories."""
        self.demand = Demand(engine, registry, continuity.tails)
        """The audiences that the engine and the tails are asked for."""
        # Set once all connections were closed. No new connection is taken then.
        self._is_ended = False
        # The timer of the next check for sockets that are gone, while there are connections.
        self._look: asyncio.TimerHandle | None = None
        self.sinks: Counter[str] = Counter()
        """How many connections there are of each kind of sink."""
        self.refused: Counter[str] = Counter()
        """How many connections aren't on the fast path, by the reason."""
        # The connections whose socket was gone at the last check.
        self._gone: set[Connection] = set()
        self.admission = Admission(limits, slow_consumers.counters, self._make_room)
        """Applies the limits."""
        age = limits.max_connection_age
        self._ages = None if age is None else Ages(age, self._too_old)

    # Coming in.

    async def join(self, websocket: WebSocket, joining: Joining) -> Connection:
        """Accept and register a WebSocket. It promises what `ConnectionManager.connect` does."""
        if is_known(websocket) and (known := await self._known(websocket, joining)) is not None:
            return known
        self._check_running()
        lease = await self.admission.admit(websocket, joining)
        audiences = self.demand.audiences(joining.user_key, joining.channels)
        connection: Connection | None = None
        try:
            # Done before the WebSocket is accepted, so that messages arrive as soon as the client sees that it is.
            if audiences:
                await self.demand.hold(audiences)
            try:
                if self.admission.drains_until is not None:
                    await self.admission.refuse_draining(websocket)
                await _accept(websocket, joining.subprotocol, joining.headers)
                self._check_running()
                if self.admission.drains_until is not None:
                    await self.admission.refuse_draining(websocket)
                # Another task may have connected it meanwhile.
                if is_known(websocket) and (known := await self._known(websocket, joining)) is not None:
                    lease.release()
                    return known
                found = await self.continuity.locate(websocket, joining)
                connection = self._make(websocket, joining, lease)
                await self._enter(connection, joining, websocket, found)
            finally:
                if audiences:
                    self.demand.release(audiences)
        except BaseException:
            if connection is None:  # else the connection has the lease until its socket is freed
                lease.release()
            raise
        return connection

    def _make(self, websocket: WebSocket, joining: Joining, lease: Lease) -> Connection:
        connection = Connection(
            WebSocketTransport(websocket, self._slow_consumers, self, websocket.scope.get(SPEAKS, plain_protocol)),
            user=joining.user,
            user_key=joining.user_key,
            channels=joining.channels,
            info=joining.info,
        )
        self._departures.hold(connection, lease)
        self.admission.inbound.begin(connection, is_routers=ROUTER in websocket.scope)
        return connection

    async def _enter(
        self, connection: Connection, joining: Joining, websocket: WebSocket, found: FoundByAudience | None
    ) -> None:
        self._dispatcher.flush()
        self._registry.add(connection)
        since = self.continuity.enter(connection, joining, found)
        self._counters.connects += 1
        self._count(connection, 1)
        if (stack := exit_stack_of(websocket.scope)) is not None:
            stack.push_async_exit(EndpointGuard(self._endpoint_ended, connection))
        self._look_later()
        if self._ages is not None:
            self._ages.begin(connection)
        try:
            if joining.expires_at is not None:
                connection.renew(joining.expires_at)
            await self._announcements.connected(connection, joining.channels)
            if self._presence is not None:
                self._presence.online(connection)
            if since:
                await self.continuity.recover(connection, since)
            if not connection.is_open:
                raise closed_error(connection)
        except PermissionDenied as denied:
            await self.close(connection, CloseCode.POLICY_VIOLATION, str(denied))
            raise
        except BaseException:
            self.leave(connection, CloseCode.INTERNAL_ERROR, "")
            raise

    async def _known(self, websocket: WebSocket, joining: Joining) -> Connection | None:
        known = find_known(websocket, self.manager)
        if known is None:
            return None
        if isinstance(known, Ended):
            raise closed_error(known)
        if known.is_open:
            if joining.user_key is not None and joining.user_key != known._user_key:
                raise ValueError(
                    "the WebSocket is connected already, as another user or without one: disconnect it first"
                )
            if joining.expires_at is not None:
                known.renew(joining.expires_at)
            await self.subscribe(known, joining.channels, joining.since)
            return known
        if known._sink.is_ended:
            raise closed_error(known)
        known._transport.give_back()
        return None

    def _check_running(self) -> None:
        if self._is_ended:
            raise LifecycleError(CLOSED)

    async def subscribe(
        self,
        connection: Connection,
        channels: tuple[str, ...],
        since: SinceByAudience = NOWHERE,
        *,
        recovers: bool = True,
    ) -> None:
        """Subscribe a connection to those channels that it isn't in yet.

        If a hook refuses a channel, the connection is subscribed neither to that channel nor to those after it.

        Args:
            connection: The connection.
            channels: The names of the channels.
            since: The places in some of them after which it wants what it missed. In a channel that it is in already it
                has missed nothing.
            recovers: Whether it is sent what it missed. If not, the caller calls `recover`, also for channels that it
                is in already.

        Raises:
            LimitExceeded: If the channels are too many. It isn't subscribed to any of them then.
        """
        self.admission.check_channels(len(connection.channels.union(channels)), connection)
        async with self.demand.holding([Audience("channel", channel) for channel in channels]):
            for channel in channels:
                self._dispatcher.flush()  # it may end this very connection, so it comes before the check
                if not connection.is_open:
                    raise closed_error(connection)
                wanted = {each: since[each] for each in since if each == Audience("channel", channel)}
                if channel in connection.channels:
                    if not recovers:  # a connection that wants nothing older goes on getting what comes
                        self.continuity.hold(
                            connection, {each: wanted[each] for each in wanted if wanted[each] is not NOW}
                        )
                    continue
                self.admission.check_channels(
                    len(connection.channels) + 1, connection
                )  # other tasks may subscribe it, too
                if recovers and not wanted and self.continuity.tells_of_subscriptions(connection):
                    wanted = {Audience("channel", channel): NOW}
                with self.continuity.opening(connection, wanted if recovers else ()):
                    self._registry.subscribe(connection, channel)
                    self.continuity.hold(connection, wanted)
                    await self._announcements.subscribed(connection, channel)
                    if self._presence is not None:
                        self._presence.came(connection, channel)
                    if wanted and recovers:
                        await self._recover_or_leave(connection, channel, wanted)
                if not connection.is_open:
                    raise closed_error(connection)

    async def _recover_or_leave(self, connection: Connection, channel: str, since: SinceByAudience) -> None:
        try:
            await self.continuity.recover(connection, since)
        except BaseException:  # if this was cancelled, it would stay in the channel, and wait for its first message
            if self._leave_channel(connection, channel):
                self._announcements.unsubscribed_soon(connection, [channel])
            raise

    async def unsubscribe(self, connection: Connection, channels: tuple[str, ...]) -> None:
        """Unsubscribe a connection from those of the channels that it is in."""
        for channel in channels:
            if self._leave_channel(connection, channel):
                await self._announcements.unsubscribed(connection, channel)

    def unsubscribe_all(self, audience: Audience, channels: tuple[str, ...]) -> None:
        """Unsubscribe all connections of an audience at once. Hooks are called in tasks."""
        for connection in self._registry.recipients(audience):
            left = [channel for channel in channels if self._leave_channel(connection, channel)]
            self._announcements.unsubscribed_soon(connection, left)

    def _leave_channel(self, connection: Connection, channel: str) -> bool:
        self._dispatcher.flush()  # it may end this very connection, so it comes before the check
        if channel not in connection.channels or not connection.is_open:
            return False
        self.continuity.left_channel(connection, channel)
        if self._presence is not None:
            self._presence.went(connection, channel, is_final=True)
        if self._registry.unsubscribe(connection, channel):
            self.demand.left((Audience("channel", channel),))
        self._slow_consumers.wake()  # the crowd has changed, as when a connection leaves
        return True

    def _count(self, connection: Connection, more: int) -> None:
        transport = connection._transport
        self.sinks[connection._sink.kind] += more
        if transport.fast_path_refused:
            self.refused[transport.fast_path_refused] += more

    # Leaving.

    def leave(
        self,
        connection: Connection,
        code: int,
        reason: str,
        state: ConnectionState = ConnectionState.CLOSED,
        *,
        is_final: bool = False,
    ) -> bool:
        """Take a connection out of the registry; return whether it was there.

        Args:
            connection: The connection.
            code: The close code for `Connection.close_code`.
            reason: The close reason.
            state: The state afterwards.
            is_final: Whether it leaves on purpose, so that its user is gone at once. If not, it may come back.
        """
        self._dispatcher.flush()
        last = self._registry.remove(connection)
        if last is None:
            return False
        self.continuity.left(connection)
        self.demand.left(last)
        self._slow_consumers.wake()  # a broadcaster may wait for the crowd, which has changed
        self._counters.disconnects += 1
        self._counters.connection_seconds.observe(monotonic() - connection._opened_at)
        self._count(connection, -1)
        connection._enter(state, code, reason)
        if self._presence is not None:
            self._presence.gone(connection, is_final=is_final)
        if self._ages is not None:
            self._ages.left()
        if state is ConnectionState.CLOSED and not connection._sink.is_ended:
            self._departures.release(connection)  # after `disconnect`, the app itself ends the socket
        self._announcements.disconnected(connection)
        return True

    def lost(self, connection: Connection, code: int, reason: str) -> None:
        """Take note that the peer is gone."""
        connection._sink.end()
        self.leave(connection, code, reason)
        self._departures.release_when_freed(connection)

    def evict(self, connection: Connection, cause: str) -> None:
        """Remove a peer that doesn't take what it is sent. It is closed if that is quick, else aborted."""
        held = connection._sink.held_bytes
        code, reason = CloseCode.TRY_AGAIN_LATER, "slow consumer"
        if self._departures.closing(connection) is not None:
            return  # its close has its own timeout
        if not self.leave(connection, code, reason, ConnectionState.CLOSING):
            connection._sink.abort()  # it had left already, and what still waits for it can't be sent either
            return
        self._counters.evicted[cause] += 1
        logger.warning(
            "evicted %r as a slow consumer (%s) with %d bytes unsent",
            connection,
            cause,
            held,
            extra=about("connection.evicted", connection=connection.id, reason=cause, bytes=held),
        )
        connection._sink.discard()
        self._departures.close(connection, code, reason)

    def fall_back(self, connection: Connection, audience: Audience, offset: int) -> bool:
        """Send a connection later what comes after an offset, because its backlog has no room now."""
        return self.continuity.fall_back(connection, audience, offset)

    def dismiss(self, connection: Connection, code: int, reason: str) -> None:
        """Close and remove a connection at once, without sending what waits. It may be closing already."""
        if self.leave(connection, code, reason, ConnectionState.CLOSING, is_final=True):
            connection._sink.discard()
            self._departures.close(connection, code, reason)
        else:
            connection._sink.discard(keeps_close=True)

    def dismiss_all(self, audience: Audience, exclude: frozenset[str], code: int, reason: str) -> None:
        """Dismiss all connections of an audience; those of a user also if they are being closed already."""
        transports = [sink.owner for sink in self._slow_consumers.waiting] if audience.kind == "user" else []
        for owner in (transport.owner for transport in transports if isinstance(transport, WebSocketTransport)):
            if isinstance(owner, Connection) and owner._user_key == audience.name and owner.id not in exclude:
                self.dismiss(owner, code, reason)
        for connection in self._registry.recipients(audience, exclude):
            self.dismiss(connection, code, reason)

    def _make_room(self, user_key: str) -> None:
        # The user's oldest connection is closed. It gives its place back now, not when its socket is freed, because the
        # peer may be dead.
        oldest = self._departures.oldest_of(user_key)
        if oldest is not None:
            self.dismiss(oldest, CloseCode.REPLACED, "a newer connection took its place")
            self._departures.release(oldest)

    def expiring(self, connection: Connection, expires_at: float, seconds: float) -> None:
        """Tell a client of events that its connection expires in so many seconds, unless it is renewed."""
        if connection.is_open:
            clients = self.continuity.clients
            clients.say(connection, clients.speaker(connection).expiring(connection, expires_at, seconds))

    def expire(self, connection: Connection) -> None:
        """Close a connection that has expired and wasn't renewed."""
        self.dismiss(connection, CloseCode.UNAUTHENTICATED, EXPIRED)

    async def close(self, connection: Connection, code: int, reason: str, *, is_final: bool = True) -> None:
        """Close and remove a connection; return when the close frame is out, or the peer was given up.

        Raises:
            ValueError: If the code can't be sent in a close frame.
        """
        check_sendable(code)
        self.leave(connection, code, reason, ConnectionState.CLOSING, is_final=is_final)
        if not connection._sink.is_ended:
            self._departures.close(connection, code, reason)
        if (closing := self._departures.closing(connection)) is not None:
            await asyncio.shield(closing)

    async def part(self, connection: Connection) -> None:
        """Remove a connection without closing it; return when all that was handed over is out, or after a timeout."""
        self.leave(connection, ABNORMAL, "")
        await connection._sink.drained()

    async def endpoint_ended(self, connection: Connection, error: BaseException | None) -> None:
        """Take note that the endpoint has ended: send what was handed over, then close before the server does."""
        await self.close(connection, CloseCode.NORMAL if error is None else code_of(error), "", is_final=False)
        await connection._sink.drained()  # the app may be closing it in another task

    async def close_all(self, code: int, reason: str) -> None:
        """Close all connections at the same time, and take no new ones."""
        self._is_ended = True
        if self._ages is not None:
            self._ages.end()
        for connection in self._registry.recipients(EVERYONE):
            self.send_away(connection, code, reason)

    def send_away(self, connection: Connection, code: int, reason: str) -> None:
        """Send what was handed over before, then close and remove a connection. It returns at once."""
        if self.leave(connection, code, reason, ConnectionState.CLOSING):  # else it had left, or sending ended it
            self._departures.close(connection, code, reason)

    def _too_old(self, connection: Connection) -> None:
        self.send_away(connection, CloseCode.SERVICE_RESTART, "max_connection_age")

    def turn_away(self, until: float) -> None:
        """Refuse new connections from now on, also those that are being authenticated.

        Args:
            until: When all connections will be closed, in seconds of the event loop's clock; for `Retry-After`.
        """
        for refusing in self.admission.drain(until):
            self._tasks.spawn(refusing, "refusal")

    async def seen_off(self, seconds: float) -> int:
        """Wait at most so many seconds until the sockets of closing connections are freed.

        Returns:
            int: How many connections were cut off then.
        """
        return await self._departures.seen_off(seconds)

    def _look_around(self) -> None:
        # An endpoint that neither reads nor writes doesn't notice that its peer is gone, but the server's transport
        # does. An endpoint that reads is told by the server, after the last message, so it gets some time for that.
        self._look = None
        gone = {each for each in self._registry.by_id.values() if each._sink.is_lost and not self._will_be_told(each)}
        for connection in gone & self._gone:
            self.lost(connection, ABNORMAL, "")
        self._gone = gone - self._gone
        if self._registry.by_id:
            self._look_later()

    def _will_be_told(self, connection: Connection) -> bool:
        # If another request was sent after this one, uvicorn doesn't tell that the peer is gone.
        return connection._transport.is_read and not connection._sink.is_stream

    def _look_later(self) -> None:
        # There is only one timer. A hook that runs in a check may connect somebody before the check ends.
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look_around, context=Context())

    # For transports.

    def app_closes(self, connection: Connection, code: int, reason: str) -> None:
        """Take note that the app is about to close the WebSocket itself."""
        self.leave(connection, code, reason, ConnectionState.CLOSING, is_final=True)

    def app_closed(self, connection: Connection) -> None:
        """Take note that the app's own close is out, or has failed."""
        if connection.state is ConnectionState.CLOSING:
            connection._enter(ConnectionState.CLOSED, CloseCode.NORMAL)
        self._departures.release_when_freed(connection)

    def is_closing(self, connection: Connection) -> bool:
        """Tell whether the connection is being closed here, or was closed and its socket isn't freed yet."""
        return self._departures.closing(connection) is not None

    def before_app_send(self) -> None:
        """Send what was handed over before, because the app is about to send something itself."""
        self._dispatcher.flush()

    def observe_message(self, connection: Connection, message: str | bytes) -> Awaitable[None] | None:
        """Return what to await before the endpoint gets a message; `None` if there is nothing.

        Hooks that may wait run in a task, because the read may be cancelled. They go on then, and the next read gets
        the message.

        Raises:
            LimitExceeded: If the message is too large, or if there are too many. No hook has seen it then.
        """
        self.admission.check_message(connection, message)
        return self.observe_again(connection, message) if self._hooks.has("on_message") else None

    def observe_again(self, connection: Connection, message: str | bytes) -> Awaitable[None]:
        """Return what to await before the endpoint gets a message that was counted already."""
        observing = self._hooks.observe("on_message", connection, message)
        if not self._hooks.may_wait("on_message"):
            return observing
        return self._tasks.begin(observing, "on_message hooks", copy_context())


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
        # uvicorn raises ClientDisconnected; other servers and Starlette raise other errors.
        raise ConnectionClosed(ABNORMAL, "closed while it was accepted") from error
