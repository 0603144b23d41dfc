"""Every way in and every way out: who is registered, and what follows when somebody comes or goes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from contextvars import Context, copy_context
from time import monotonic

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.close_codes import ABNORMAL, CloseCode, check_sendable
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
from wsbroadcast.node.admission import EXPIRED, Admission, Joining, Lease
from wsbroadcast.node.ages import Ages
from wsbroadcast.node.continuity import Continuity
from wsbroadcast.node.demand import Demand
from wsbroadcast.node.departures import Announcements, Departures, EndpointGuard, code_of
from wsbroadcast.options import Limits
from wsbroadcast.protocols import events
from wsbroadcast.publication import plain as plain_protocol
from wsbroadcast.text import plain
from wsbroadcast.transports import Ended, closed_error
from wsbroadcast.transports.exit_stack import exit_stack_of
from wsbroadcast.transports.websocket import WebSocketTransport
from wsbroadcast.types import Headers

CLOSED = "the manager is closed: `start` or `async with manager` runs it again"
"""What an error says after `aclose`."""

SUBPROTOCOL = "wsbroadcast.subprotocol"
"""Where in its scope the subprotocol stands that a WebSocket is accepted with if `connect` names none."""

ROUTER = "wsbroadcast.router"
"""Is in its scope where the WebSocket is a router's, whose clients' messages reach others without code of the app's."""

SPEAKS = "wsbroadcast.speaks"
"""Where in its scope the protocol stands that its client speaks, unless that is `plain`."""

# How often sockets are looked for that are gone without anybody noticing: one look for all connections.
_LOOK_SECONDS = 5.0


class Membership:
    """Keeps connections from their registration to their end.

    Leaving is synchronous and happens once, whatever noticed first; what takes time follows in tasks of its own. Before
    the registry changes, what was handed over for its present state is delivered.
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
    ) -> None:
        self.core = core
        """Does what its connections are told to do."""
        self.manager = core.manager
        """Whose connections these are."""
        self._registry = registry
        self._dispatcher = dispatcher
        self._slow_consumers = slow_consumers
        self._hooks = hooks
        self._counters = slow_consumers.counters
        self._tasks = tasks
        self._departures = Departures(tasks)
        self._announcements = Announcements(hooks, tasks, self._leave_channel)
        self.continuity = continuity
        """Where its connections are in histories."""
        self.demand = Demand(engine, registry, continuity.tails)
        """What the engine and the tails are asked for."""
        # Set when everybody was sent away: nobody comes in any more.
        self._is_ended = False
        # The next look for sockets that are gone, while there are connections.
        self._look: asyncio.TimerHandle | None = None
        self.sinks: Counter[str] = Counter()
        """How many connections there are of each kind of sink."""
        self.refused: Counter[str] = Counter()
        """How many aren't on the fast path, by the reason."""
        # Those whose socket was gone at the last look.
        self._gone: set[Connection] = set()
        self.admission = Admission(limits, slow_consumers.counters, self._make_room)
        """Who may come in, and what they may do there."""
        age = limits.max_connection_age
        self._ages = None if age is None else Ages(age, self._too_old)

    # In.

    async def join(self, websocket: WebSocket, joining: Joining) -> Connection:
        """Accept and register; what `ConnectionManager.connect` promises."""
        if is_known(websocket) and (known := await self._known(websocket, joining)) is not None:
            return known
        self._check_running()
        lease = await self.admission.admit(websocket, joining)
        audiences = self.demand.audiences(joining.user_key, joining.channels)
        connection: Connection | None = None
        try:
            # Before it is accepted, so that messages arrive as soon as the peer sees that it is.
            if audiences:
                await self.demand.hold(audiences)
            try:
                if self.admission.drains_until is not None:
                    await self.admission.refuse_draining(websocket)
                await _accept(websocket, joining.subprotocol, joining.headers)
                self._check_running()
                if self.admission.drains_until is not None:
                    await self.admission.refuse_draining(websocket)
                # Another task may have connected it.
                if is_known(websocket) and (known := await self._known(websocket, joining)) is not None:
                    lease.release()
                    return known
                connection = self._make(websocket, joining, lease)
                await self._enter(connection, joining, websocket)
            finally:
                if audiences:
                    self.demand.release(audiences)
        except BaseException:
            if connection is None:  # else the lease is the connection's, and goes with its socket
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

    async def _enter(self, connection: Connection, joining: Joining, websocket: WebSocket) -> None:
        self._dispatcher.flush()
        self._registry.add(connection)
        since = self.continuity.enter(connection, joining)
        self._counters.connects += 1
        self._count(connection, 1)
        if (stack := exit_stack_of(websocket.scope)) is not None:
            stack.push_async_exit(EndpointGuard(self.endpoint_ended, connection))
        self._look_later()
        if self._ages is not None:
            self._ages.begin(connection)
        try:
            if joining.expires_at is not None:
                connection.renew(joining.expires_at)
            await self._announcements.connected(connection, joining.channels)
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
                    "the WebSocket is connected already, as another user or as nobody: disconnect it first"
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
        """Subscribe to those of the channels it isn't in yet; if a hook refuses one, to that one and the rest not.

        Args:
            connection: Which.
            channels: Their names.
            since: Since when it wants what it missed in some of them; of one that it is in already it has missed
                nothing.
            recovers: Whether it is sent that; else the caller says when, by `recover`, also for those it is in.

        Raises:
            LimitExceeded: If they are too many, before it is subscribed to any.
        """
        self.admission.check_channels(len(connection.channels.union(channels)), connection)
        async with self.demand.holding([Audience("channel", channel) for channel in channels]):
            for channel in channels:
                self._dispatcher.flush()  # which may end this very connection, so before looking at it
                if not connection.is_open:
                    raise closed_error(connection)
                wanted = {each: since[each] for each in since if each == Audience("channel", channel)}
                if channel in connection.channels:
                    if not recovers:  # who wants nothing that was before goes on getting what comes
                        self.continuity.hold(
                            connection, {each: wanted[each] for each in wanted if wanted[each] is not NOW}
                        )
                    continue
                self.admission.check_channels(len(connection.channels) + 1, connection)  # others may subscribe it, too
                self._registry.subscribe(connection, channel)
                self.continuity.hold(connection, wanted)
                await self._announcements.subscribed(connection, channel)
                if wanted and recovers:
                    await self._recover_or_leave(connection, channel, wanted)
                if not connection.is_open:
                    raise closed_error(connection)

    async def _recover_or_leave(self, connection: Connection, channel: str, since: SinceByAudience) -> None:
        try:
            await self.continuity.recover(connection, since)
        except BaseException:  # cancelled: else it would be a member that waits for its beginning, and gets nothing
            if self._leave_channel(connection, channel):
                self._announcements.unsubscribed_soon(connection, [channel])
            raise

    async def unsubscribe(self, connection: Connection, channels: tuple[str, ...]) -> None:
        """Unsubscribe from those of the channels it is in."""
        for channel in channels:
            if self._leave_channel(connection, channel):
                await self._announcements.unsubscribed(connection, channel)

    def unsubscribe_all(self, audience: Audience, channels: tuple[str, ...]) -> None:
        """Unsubscribe the members of an audience at once; hooks are told in tasks."""
        for connection in self._registry.recipients(audience):
            left = [channel for channel in channels if self._leave_channel(connection, channel)]
            self._announcements.unsubscribed_soon(connection, left)

    def _leave_channel(self, connection: Connection, channel: str) -> bool:
        self._dispatcher.flush()  # which may end this very connection, so before looking at it
        if channel not in connection.channels or not connection.is_open:
            return False
        self.continuity.left_channel(connection, channel)
        if self._registry.unsubscribe(connection, channel):
            self.demand.left((Audience("channel", channel),))
        self._slow_consumers.wake()  # as when one leaves
        return True

    def _count(self, connection: Connection, more: int) -> None:
        transport = connection._transport
        self.sinks[connection._sink.kind] += more
        if transport.fast_path_refused:
            self.refused[transport.fast_path_refused] += more

    # Out.

    def leave(
        self, connection: Connection, code: int, reason: str, state: ConnectionState = ConnectionState.CLOSED
    ) -> bool:
        """Take a connection out of the registry; return whether it was there."""
        self._dispatcher.flush()
        last = self._registry.remove(connection)
        if last is None:
            return False
        self.continuity.left(connection)
        self.demand.left(last)
        self._slow_consumers.wake()  # the crowd that a broadcaster waits for has changed
        self._counters.disconnects += 1
        self._counters.connection_seconds.observe(monotonic() - connection._opened_at)
        self._count(connection, -1)
        connection._enter(state, code, reason)
        if self._ages is not None:
            self._ages.left()
        if state is ConnectionState.CLOSED and not connection._sink.is_ended:
            self._departures.release(connection)  # `disconnect`: what becomes of the socket is up to the app
        self._announcements.disconnected(connection)
        return True

    def lost(self, connection: Connection, code: int, reason: str) -> None:
        """The peer is gone."""
        connection._sink.end()
        self.leave(connection, code, reason)
        self._departures.release_when_freed(connection)

    def evict(self, connection: Connection, cause: str) -> None:
        """The peer doesn't take what it is sent: out at once, closed if that goes quickly, else aborted."""
        held = connection._sink.held_bytes
        code, reason = CloseCode.TRY_AGAIN_LATER, "slow consumer"
        if self._departures.closing(connection) is not None:
            return  # which has a timeout of its own
        if not self.leave(connection, code, reason, ConnectionState.CLOSING):
            connection._sink.abort()  # it had left already, and now what it was still owed doesn't go out either
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
        """A connection that knows where it is has no room for what comes after a place: it gets it later."""
        return self.continuity.fall_back(connection, audience, offset)

    def dismiss(self, connection: Connection, code: int, reason: str) -> None:
        """Close and remove without sending what waits, also if it is being closed already; returns at once."""
        if self.leave(connection, code, reason, ConnectionState.CLOSING):
            connection._sink.discard()
            self._departures.close(connection, code, reason)
        else:
            connection._sink.discard(keeps_close=True)

    def dismiss_all(self, audience: Audience, exclude: frozenset[str], code: int, reason: str) -> None:
        """Dismiss the members of an audience; those of a user also if they are being closed already."""
        transports = [sink.owner for sink in self._slow_consumers.waiting] if audience.kind == "user" else []
        for owner in (transport.owner for transport in transports if isinstance(transport, WebSocketTransport)):
            if isinstance(owner, Connection) and owner._user_key == audience.name and owner.id not in exclude:
                self.dismiss(owner, code, reason)
        for connection in self._registry.recipients(audience, exclude):
            self.dismiss(connection, code, reason)

    def _make_room(self, user_key: str) -> None:
        # Its oldest connection goes, and gives its place back now, not when its socket is freed: it may be dead.
        oldest = self._departures.oldest_of(user_key)
        if oldest is not None:
            self.dismiss(oldest, CloseCode.REPLACED, "a newer connection took its place")
            self._departures.release(oldest)

    def expiring(self, connection: Connection, expires_at: float, seconds: float) -> None:
        """A connection ends in so many seconds, unless it is renewed: tell a client of events."""
        if connection.is_open:
            self.continuity.say(connection, events.expiring(expires_at, seconds))

    def expire(self, connection: Connection) -> None:
        """The moment has come at which a connection has to be renewed, and wasn't."""
        self.dismiss(connection, CloseCode.UNAUTHENTICATED, EXPIRED)

    async def close(self, connection: Connection, code: int, reason: str) -> None:
        """Close and remove; returns when the close frame is out or the peer was given up.

        Raises:
            ValueError: If the code can't be sent in a close frame.
        """
        check_sendable(code)
        self.leave(connection, code, reason, ConnectionState.CLOSING)
        if not connection._sink.is_ended:
            self._departures.close(connection, code, reason)
        if (closing := self._departures.closing(connection)) is not None:
            await asyncio.shield(closing)

    async def part(self, connection: Connection) -> None:
        """Remove without closing; return when what was handed over is out, or the peer has taken too long."""
        self.leave(connection, ABNORMAL, "")
        await connection._sink.drained()

    async def endpoint_ended(self, connection: Connection, error: BaseException | None) -> None:
        """Its endpoint is done: send what was handed over, then close, whatever the server would do."""
        await self.close(connection, CloseCode.NORMAL if error is None else code_of(error), "")
        await connection._sink.drained()  # a close of the app's own, in another task

    async def close_all(self, code: int, reason: str) -> None:
        """Close every connection at the same time, and let nobody in any more."""
        self._is_ended = True
        if self._ages is not None:
            self._ages.end()
        for connection in self._registry.recipients(EVERYONE):
            self.send_away(connection, code, reason)

    def send_away(self, connection: Connection, code: int, reason: str) -> None:
        """Send what was handed over before, then close and remove; returns at once. One that has left is let be."""
        if self.leave(connection, code, reason, ConnectionState.CLOSING):  # else what was handed over ended it
            self._departures.close(connection, code, reason)

    def _too_old(self, connection: Connection) -> None:
        self.send_away(connection, CloseCode.SERVICE_RESTART, "max_connection_age")

    def turn_away(self, until: float) -> None:
        """Refuse newcomers from now on, also those that are being authenticated.

        Args:
            until: When everybody who is here will be closed, by the event loop's clock; for `Retry-After`.
        """
        for refusing in self.admission.drain(until):
            self._tasks.spawn(refusing, "refusal")

    async def seen_off(self, seconds: float) -> int:
        """Wait until the sockets of all that are being closed are freed; then cut off the others, and count them."""
        return await self._departures.seen_off(seconds)

    def _look_around(self) -> None:
        # An endpoint that neither reads nor writes doesn't notice that its peer is gone; the server's transport does.
        # One that reads learns it from the server, after the last message, so it is given a while to come to that.
        self._look = None
        gone = {each for each in self._registry.by_id.values() if each._sink.is_lost and not self._will_be_told(each)}
        for connection in gone & self._gone:
            self.lost(connection, ABNORMAL, "")
        self._gone = gone - self._gone
        if self._registry.by_id:
            self._look_later()

    def _will_be_told(self, connection: Connection) -> bool:
        # Of a request behind which another one was sent, uvicorn forgets to tell.
        return connection._transport.is_read and not connection._sink.is_stream

    def _look_later(self) -> None:
        # One timer for all: a hook that a look begins may connect somebody before that look's end.
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look_around, context=Context())

    # What a transport tells and asks.

    def app_closes(self, connection: Connection, code: int, reason: str) -> None:
        """The app is about to close the socket itself."""
        self.leave(connection, code, reason, ConnectionState.CLOSING)

    def app_closed(self, connection: Connection) -> None:
        """The app's own close is out, or has failed."""
        if connection.state is ConnectionState.CLOSING:
            connection._enter(ConnectionState.CLOSED, CloseCode.NORMAL)
        self._departures.release_when_freed(connection)

    def is_closing(self, connection: Connection) -> bool:
        """Tell whether we are closing the connection, or have closed it and wait for its socket."""
        return self._departures.closing(connection) is not None

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
        # uvicorn's ClientDisconnected, or a server or Starlette that says it in words.
        raise ConnectionClosed(ABNORMAL, "closed while it was accepted") from error
