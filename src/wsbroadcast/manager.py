"""ConnectionManager: the class that every FastAPI tutorial has its readers write by hand, as a library."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeAlias, Unpack, overload

from starlette.applications import Starlette
from starlette.websockets import WebSocket

from wsbroadcast.asking import KnowsHistory, Question, T
from wsbroadcast.audience import (
    EVERYONE,
    UNSET,
    Unset,
    UserId,
    as_channels,
    check_channel,
    check_stream_id,
    user_key,
)
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.concurrency import mark_coroutine_function
from wsbroadcast.connection import Connecting, Connection, Exclude
from wsbroadcast.engines import URL, create_engine
from wsbroadcast.engines.contract import Engine, Health
from wsbroadcast.exceptions import ConfigurationError, LifecycleError, kind_of
from wsbroadcast.handlers import Handlers, HasHandlers
from wsbroadcast.history import (
    Histories,
    HistoryRules,
    Recovery,
    SinceOption,
)
from wsbroadcast.hooks import NOTHING, Hook, HookChain, HookDecorators
from wsbroadcast.message import JSONDefault, check_json_default
from wsbroadcast.methods import HasMethods, Methods
from wsbroadcast.node.admission import Joining
from wsbroadcast.node.core import Core
from wsbroadcast.node.jobs import Job
from wsbroadcast.node.listening import Listener, ListenPolicy
from wsbroadcast.node.streams import Follower
from wsbroadcast.options import ClientTiming, ExpiresAt, Limits, Policy, SlowConsumer, check_positive, check_seconds
from wsbroadcast.presence import Member, PresenceRules, Presences
from wsbroadcast.publication import Dismissal, Position, Receipt, Unsubscription
from wsbroadcast.signatures import no_dependency, without_parentheses
from wsbroadcast.stats import Counters, Stats
from wsbroadcast.streams.ledger import StreamStatus
from wsbroadcast.streams.producers import DEFAULT_TTL, Producer, StreamOptions
from wsbroadcast.streams.run import Run, StreamLimits
from wsbroadcast.transports.exit_stack import give_exit_stack
from wsbroadcast.typed.sends import SendRules
from wsbroadcast.types import BroadcastOptions, F, Headers, To, TransactionOptions, Users

_Options: TypeAlias = BroadcastOptions[Connection]
_TransactionOptions: TypeAlias = TransactionOptions[Connection]


@no_dependency(
    "take a ManagerDep",
    connect="a client would say in the query who it is; take a ConnectionDep or a connection_dependency(…), or "
    "call it in the endpoint",
)
class ConnectionManager(HookDecorators, HasMethods, HasHandlers, KnowsHistory):
    """Keeps the connections of an app and broadcasts to them.

    Making one does no I/O, so you can make it at import time. It runs in one event loop: where `start`, `async with` or
    `lifespan` begins it, or where the first connection comes in. Until then, another event loop may use it as well.

    Args:
        engine: A URL that names the engine, or an engine. `memory://` reaches only the connections of this process.
        hooks: Your code around the manager's events. It runs in this order.
        limits: How many and how large things may be, on this node.
        slow_consumer: What happens to a connection that doesn't keep up: the name of a policy, or a `SlowConsumer`.
        hook_timeout: Seconds after which a hook is cancelled.
        json_default: Called with an object that JSON doesn't know, such as a numpy array; returns what is written
            instead.
        history: What is kept, so that a connection that comes back gets what it missed: a `History` for all channels,
            or a dict by pattern, such as `{"room:*": History(messages=100, seconds=300), USERS: History()}`. `*` is any
            text. If several patterns fit, the longest one counts.
        drain: Seconds over which the connections are closed at SIGTERM or SIGINT, before the server closes all of them
            at once; see `drain`. With uvicorn it needs no code, also under gunicorn, with `--workers` or with
            `--reload`: the manager puts a signal handler before the server's. `None` leaves the signals alone.
        presence: In which channels it is known, over all nodes, who is there: a `Presence` for all channels, or a dict
            by pattern, such as `{"room:*": Presence(grace=10.0)}`.
        client_timing: How often clients of `wsbroadcast.v1` and event streams are pinged, and how soon they come back.
        sends: The type of what is broadcast to channels: a model, a dataclass, a `TypedDict`, or a union of these; or a
            dict of types by pattern, such as `{"room:*": Said | Left, USERS: Notice, EVERYONE: Notice}`. Each broadcast
            to such a channel is checked once, on the node that makes it, before anything is sent. It goes out as JSON
            with the fields of its type and no others. If several patterns fit, the longest one counts. If none fits,
            anything may be sent.

    Raises:
        ConfigurationError: If an option or the URL makes no sense; or if `history` or `presence` is set and the engine
            doesn't support it.
    """

    def __init__(
        self,
        engine: URL | Engine = "memory://",
        *,
        hooks: Iterable[Hook] = (),
        limits: Limits = Limits(),  # noqa: B008  # frozen
        slow_consumer: SlowConsumer | Policy = SlowConsumer(),  # noqa: B008  # frozen
        hook_timeout: float = 5.0,
        json_default: JSONDefault | None = None,
        history: Histories | None = None,
        drain: float | None = 5.0,
        presence: Presences | None = None,
        client_timing: ClientTiming = ClientTiming(),  # noqa: B008  # frozen
        sends: Any = None,
    ) -> None:
        if isinstance(slow_consumer, str):
            slow_consumer = SlowConsumer(policy=slow_consumer)
        if not isinstance(limits, Limits) or not isinstance(slow_consumer, SlowConsumer):
            raise ConfigurationError("limits must be a Limits(…), and slow_consumer a policy or a SlowConsumer(…)")
        if not isinstance(client_timing, ClientTiming):
            raise ConfigurationError("client_timing must be a ClientTiming(…)")
        check_positive("hook_timeout", hook_timeout)
        if drain is not None:
            check_seconds("drain", drain)
        check_json_default(json_default)
        counters = Counters()
        self.hooks = HookChain(hook_timeout, counters)
        """The hooks by event. The decorators add to it."""
        if isinstance(hooks, Hook) or not isinstance(hooks, Iterable):
            name = type(hooks).__name__ if isinstance(hooks, Hook) else "MyHook"
            raise ConfigurationError(f"hooks must be a list: write hooks=[{name}(…)]")
        for hook in hooks:
            self.hooks.add(hook)
        rules = None if history is None else HistoryRules(history)
        self._methods = Methods()
        self._handlers = Handlers()
        self._core = Core(
            self,
            create_engine(engine),
            self.hooks,
            limits,
            slow_consumer,
            json_default,
            counters,
            rules,
            drain,
            self._methods,
            client_timing,
            None if presence is None else PresenceRules(presence),
            None if sends is None else SendRules(sends),
            self._handlers,
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if name in ("_core", "hooks", "_methods", "_handlers"):
                kind = type(self).__name__
                raise LifecycleError(
                    f"{kind}.__init__ must call super().__init__() first: that makes it a ConnectionManager"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # Start and end.

    async def start(self) -> None:
        """Begin to run in this event loop. Each `start` needs its own `aclose`; only the last `aclose` ends it.

        Raises:
            LifecycleError: If it runs in another event loop, or is closed while it starts.
        """
        await self._core.life.start()

    async def aclose(self) -> None:
        """End: send what was handed over, close the connections with 1001, wait for hooks, stop the engine.

        Does nothing while `start` was called more often than `aclose`. Idempotent: a second call at the same time
        returns when the first one is done. Afterwards the manager refuses to work until it is started again.

        Raises:
            LifecycleError: If it runs in another event loop.
        """
        await self._core.life.aclose()

    async def drain(self, over: float = 5.0) -> None:
        """Send everybody to other nodes before this one ends: refuse newcomers, close the connections one by one.

        From now on handshakes are refused with 503 and `Retry-After`, and `connect` raises `LimitExceeded` with the
        limit `draining`. The connections are closed with 1012 at random moments. Each of them first gets what was sent
        to it before. Returns when all are gone. A peer that takes nothing is cut off `close_timeout` after the last
        moment.

        If a drain runs already, waits for its end. Afterwards the manager goes on refusing, until it is closed and
        started again. `aclose` ends the drain at once. On a closed manager this does nothing.

        Args:
            over: Seconds within which all are closed. A few connections take less: 50 of them are closed a second.

        Raises:
            ConfigurationError: If `over` is not a number of seconds.
            LifecycleError: If it runs in another event loop.
        """
        check_seconds("over", over)
        await self._core.drain(over)

    @property
    def is_draining(self) -> bool:
        """Whether a drain has begun since the start. It stays true when the drain is over."""
        return self._core.life.node.drain.is_begun

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @without_parentheses
    def lifespan(self, app: Starlette) -> AbstractAsyncContextManager[None]:
        """Run as long as an app: `FastAPI(lifespan=manager.lifespan)`. Routers of `create_router` bring it along."""
        return self._run_with(app)

    @asynccontextmanager
    async def _run_with(self, app: Starlette) -> AsyncGenerator[None]:
        self.bind(app)
        give_exit_stack(app)
        async with self:
            yield

    def bind(self, app: Starlette) -> None:
        """Make this the manager that `ManagerDep` and `ConnectionDep` find in an app. `lifespan` does it too.

        Apps that are mounted in this one find it as well, unless they have a manager of their own.
        """
        managers = getattr(app.state, "wsbroadcast_managers", ())
        if self not in managers:
            managers = app.state.wsbroadcast_managers = (*managers, self)
        router: Any = getattr(app, "router", None)
        if router is not None:  # a request to a mounted app knows nothing else of the app around it
            router.wsbroadcast_managers = managers

    def background(self, function: F, *, once: bool = False, name: str | None = None) -> F:
        """Run an async function in the background, from the start of the manager to its end: `@manager.background`.

        ```
        async def tick() -> None:
            while True:
                await manager.broadcast({"time": time()})
                await asyncio.sleep(1)

        manager.background(tick, once=True)
        ```

        Every process that runs the app runs the function. With `once=True` only one node of all runs it. If that node
        ends, another one takes over within 5 s; if it crashes or is cut off from the broker, within 15 s. The function
        is cancelled as soon as its node can't be sure any more that it is the one, so that no two run at the same time.
        One exception: a process that was stopped and continues later may do one last step beside its successor.

        At the manager's end the function is cancelled and waited for, at most `hook_timeout`. If it raises, that is
        logged and it runs again, after 1 s at first. When it returns, it is done: on this node, or, with `once=True`,
        until another node takes over.

        Args:
            function: An async function without arguments.
            once: Whether it runs on only one node. All nodes need the same `presence=`.
            name: Its name, the same on all nodes; by default the function's own.

        Returns:
            The function.

        Raises:
            ConfigurationError: If the engine can't tell which node is to run it, or another function has the name.
            LifecycleError: If the manager runs in another event loop.
            TypeError: If it is not an async function.
        """
        self._core.background(Job.of(function, once, name))
        return function

    # Connections.

    def connect(
        self,
        websocket: WebSocket,
        *,
        user: UserId | None = None,
        channels: Iterable[str] = (),
        info: Any = None,
        subprotocol: str | None = None,
        headers: Headers | None = None,
        expires_at: ExpiresAt = None,
        since: SinceOption = None,
    ) -> Connecting:
        """Accept a WebSocket, unless it is accepted already, and register it.

        Await it for the `Connection`, or use it with `async with`, which removes the connection when the block ends. A
        socket that is registered already keeps its user and info: it is subscribed to the channels, and expires when
        this call says so. If the call fails or is cancelled, nothing is registered.

        Args:
            websocket: The endpoint's WebSocket. Its `send` and `receive` are taken over.
            user: The user behind it. One user may have many connections.
            channels: The channels it is subscribed to from the start.
            info: Anything that you want to find again as `connection.info`.
            subprotocol: The subprotocol to accept with. The client only gets its name. For example, only routers speak
                `wsbroadcast.v1`; a connection that is made here doesn't.
            headers: Headers to accept with.
            expires_at: When it is closed with 4401 unless it is renewed (see `Connection.renew`): seconds since 1970,
                such as a token's `exp`, or a datetime with a timezone.
            since: The position after which it wants what it missed: a position of its only channel, or a dict of
                positions by channel. In a dict, `Audience.user(…)` stands for its user's messages and `EVERYONE` for
                everyone's. A position is a `Position`, its text (`str(position)`) as a client sends it back, or `LAST`
                for the newest message alone. What it missed is sent after the hooks have run and before live messages,
                as fast as the client takes it. `connection.recovered` says whether everything could be had; if not,
                nothing older is sent. With `None` nothing is replayed, and `connection.recovered` stays empty.

        Raises:
            ConnectionClosed: If the socket is closed, or its peer goes away during the call.
            InvalidChannel: If a channel name breaks a rule.
            ValueError: If `user` is not a str, int or UUID, if `expires_at` is not a valid time, if `since` is no
                position or names something that isn't joined, or if the socket is registered already as another user.
            PermissionDenied: If a hook refuses it; the socket is closed with 1008. Or if it has expired: the handshake
                is refused with 401, or a socket that is accepted already is closed with 4401.
            LimitExceeded: If it is one too many: the handshake is refused with 429, or with 503 for `max_connections`;
                a socket that is accepted already is closed with 1008 or 1013. Or if the manager drains: then it is 503,
                or 1012.
            EngineUnavailable: If the broker forbids us to subscribe. A broker that is out of reach is not an error:
                what is missed is reported as a gap.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        joining = partial(Joining.of, user, channels, info, subprotocol, headers, expires_at, since)
        return Connecting(self._core.connect(websocket, joining), self._core.part)

    def disconnect(self, websocket: WebSocket | Connection) -> Awaitable[None]:
        """Remove a connection whose peer is gone. Idempotent; the socket isn't closed.

        It is done when the call returns. You may await it, as in hand-written classes, but don't have to.

        Raises:
            LifecycleError: If called from a thread, or in another event loop; nothing has changed then.
        """
        self._core.disconnect(websocket)
        return NOTHING

    async def close(self, websocket: WebSocket | Connection, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Send what was handed over before, then close and remove. Idempotent.

        Never hangs: a peer that takes nothing for `close_timeout` is cut off.

        Args:
            websocket: What to close. One that was never connected is left alone.
            code: A code that a close frame may carry. If the server refuses it, the same plus 3000 is sent, or 1000.
            reason: Cut to 123 bytes of UTF-8.

        Raises:
            LifecycleError: If called in another event loop.
            ValueError: If the code can't be sent.
        """
        await self._core.close(websocket, code, reason)

    async def close_user(
        self,
        user: UserId,
        *,
        code: int = CloseCode.UNAUTHENTICATED,
        reason: str = "",
        exclude: Exclude = (),
    ) -> Receipt:
        """Close every connection of a user, on all nodes: after a log-out, or when rights were taken away.

        Returns once the engine has taken it. Messages that still wait for these connections are not sent. Take the
        rights away first, then close. A handshake that was authenticated before may still come in afterwards. To
        refuse it, check again in an `on_connect` hook: every later call reaches the connections for which that hook
        runs. A node that is cut off from the broker at that moment misses the call, so check again in `on_gap`, too.

        Args:
            user: The user whose connections are closed.
            code: The code they are closed with. After the default, 4401, a client doesn't come back by itself.
            reason: Cut to 123 bytes of UTF-8.
            exclude: Connections or WebSockets that stay, such as the one that asked to sign out the others.

        Raises:
            ValueError: If the user is not an id, or the code can't be sent.
            EngineError: If the broker didn't take it, mostly `EngineUnavailable`. Connections of this node were closed,
                those of other nodes not.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        return await self._core.control(Dismissal.of_user(user, code, reason, self._core.ids(exclude)))

    @asynccontextmanager
    async def handshake(self, websocket: WebSocket) -> AsyncIterator[None]:
        """Hold a place for a handshake while it is checked: `async with manager.handshake(websocket):`.

        For an endpoint that authenticates before it connects. A client that makes too many handshakes is refused before
        that costs anything, even while the engine starts. A handshake that is being authenticated counts as a
        connection already. `connect` inside the block takes over the place. If nothing took it, the place is free again
        at the end of the block. A block inside such a block shares its place.

        Raises:
            LimitExceeded: If there is no place, or the manager drains, as for `connect`. The handshake is refused.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        async with self._core.handshake(websocket):
            yield

    async def subscribe(
        self, connection: WebSocket | Connection, *channels: str, since: SinceOption = None
    ) -> Recovery | None:
        """Subscribe a connection to channels; every later broadcast to them, from any node, arrives.

        Args:
            connection: The connection, or its WebSocket.
            channels: Names of channels.
            since: The position after which it wants what it missed; see `connect`.

        Returns:
            Recovery | None: With `since` and one channel: whether it gets what it missed. For several channels,
            `connection.recovered` has the answers.

        Raises:
            ConnectionClosed: If the connection has ended.
            InvalidChannel: If a name breaks a rule; then it is subscribed to none of them.
            LimitExceeded: If it would be in more than `max_channels_per_connection`. Then it is subscribed to none of
                them, and stays connected.
            PermissionDenied: If a hook refuses a channel. It isn't subscribed to that one and those after it.
            EngineUnavailable: If the broker forbids us one of them; then it is subscribed to none of them.
            ValueError: If `since` is no position of these channels.
        """
        return await self._core.subscribe(connection, as_channels(channels), since)

    async def unsubscribe(self, connection: WebSocket | Connection, *channels: str) -> None:
        """Unsubscribe a connection from channels. Channels it isn't in are ignored.

        Raises:
            InvalidChannel: If a name breaks a rule.
        """
        await self._core.unsubscribe(connection, as_channels(channels))

    async def unsubscribe_user(self, user: UserId, *channels: str) -> Receipt:
        """Unsubscribe every connection of a user from channels, on all nodes: for example, after it has left a room.

        Returns once the engine has taken it. By then the connections of this node are unsubscribed. `on_unsubscribe`
        hooks run afterwards. Take away the right to subscribe first. What `close_user` says about handshakes, and about
        nodes that are cut off, holds here too.

        Raises:
            InvalidChannel: If a name breaks a rule.
            ValueError: If the user is not an id, or no channel is named.
            EngineError: If the broker didn't take it, mostly `EngineUnavailable`. Connections of this node are
                unsubscribed, those of other nodes not.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        return await self._core.control(Unsubscription.of_user(user, channels))

    @property
    def connections(self) -> list[Connection]:
        """The registered connections of this node, oldest first."""
        return self._core.life.node.registry.recipients(EVERYONE)

    @property
    def active_connections(self) -> list[WebSocket]:
        """The WebSockets of `connections`, as in FastAPI's tutorial. It is a new list each time: don't change it."""
        return [connection.websocket for connection in self._core.life.node.registry.recipients(EVERYONE)]

    @active_connections.setter
    def active_connections(self, value: object) -> NoReturn:
        raise ConfigurationError(
            f"{type(self).__name__} sets active_connections, but ConnectionManager keeps that list: remove the line"
        )

    # Messages.

    @overload
    async def broadcast(
        self, message: object, *, channel: str = ..., **options: Unpack[_TransactionOptions]
    ) -> Receipt: ...
    @overload
    async def broadcast(self, message: object, *, user: UserId, **options: Unpack[_TransactionOptions]) -> Receipt: ...
    @overload
    async def broadcast(
        self, message: object, *, channels: Iterable[str], **options: Unpack[_TransactionOptions]
    ) -> Receipt: ...
    @overload
    async def broadcast(self, message: object, *, to: To, **options: Unpack[_TransactionOptions]) -> Receipt: ...
    async def broadcast(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        channels: Iterable[str] | Unset = UNSET,
        to: To | Unset = UNSET,
        exclude: Exclude = (),
        exclude_users: Users = (),
        key: str | None = None,
        as_: Any = None,
        transaction: object = None,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """Send a message to every connection of an audience, on all nodes; to everyone if none is named.

        Returns once the engine has taken it. Connections receive it at most once, in the order in which the engine took
        the messages of the audience. On `memory://`, what is sent to a connection afterwards arrives after it. Over a
        broker, what goes to one connection directly, also a close, may arrive before it.

        A connection that is closed or slow never makes the call fail or wait. Only if more than half of the recipients
        on this node are behind, and still read, the call waits until that is over, at most `send_timeout` and at most
        10 s. Connections that read nothing can only hold up a tight loop, and only for a moment.

        A connection that is in several of the audiences gets it once. Pass only one of `channel`, `user`, `channels`
        and `to`.

        Args:
            message: `str` becomes a text frame, `bytes` a binary one. Anything else is sent as JSON.
            channel: The channel whose subscribers get it.
            user: The user whose connections get it.
            channels: Several channels. With an empty list nobody gets it.
            to: An `Audience` or several: `Audience.channel("x")`, `Audience.user(5)`, `EVERYONE`.
            exclude: Connections or WebSockets that don't get it.
            exclude_users: A user, or several, whose connections don't get it.
            key: Under the policy `conflate`, a newer message with the same key replaces this one in a backlog.
            as_: The type that the message is sent as, such as `PostOut`. Like a `response_model`, it takes its fields
                from a dict or from the attributes of an object such as a row, and leaves out the others.
            transaction: On Postgres, your database connection or session: the message is sent when its transaction
                commits, and never if it is rolled back.
            idempotency_key: Names this message in each of its audiences. All of them need a history. If you repeat the
                call with the same key because you don't know its outcome, nobody gets the message twice.

        Returns:
            Receipt: How many connections of this node it is for, its position, and more.

        Raises:
            EncodeError: If the message can't be sent as text, bytes or JSON, or isn't of the type that `sends` or `as_`
                says. Nobody gets it.
            ValueError: If `channel` (`InvalidChannel`), `user` or `to` is not valid. `None` is an error, never
                "everyone".
            EngineUnavailable: If the broker can't be reached, takes no messages now, or no longer lets us publish: then
                nothing was sent. Also if it doesn't answer in time: then `may_have_been_sent` is true. Of several
                audiences, some may have been sent it: those in `positions`.
            EngineError: If the broker refuses this very message. A retry doesn't help.
            ConfigurationError: If the engine can't publish inside a transaction, or not in this one; or if an
                `idempotency_key` is given for an audience without a history.
            LifecycleError: If the manager is closed, or runs in another event loop.
            Exception: What an `on_broadcast` hook raises, with `memory://` also what an `on_deliver` hook raises, or
                what the driver of the transaction raises. Nobody gets the message.
        """
        publications = self._core.publications(message, channel, user, channels, to, exclude, exclude_users, key, as_)
        return await self._core.broadcast(publications, transaction, idempotency_key, counts=True)

    @overload
    async def broadcast_local(self, message: object, *, channel: str = ..., **options: Unpack[_Options]) -> Receipt: ...
    @overload
    async def broadcast_local(self, message: object, *, user: UserId, **options: Unpack[_Options]) -> Receipt: ...
    @overload
    async def broadcast_local(
        self, message: object, *, channels: Iterable[str], **options: Unpack[_Options]
    ) -> Receipt: ...
    @overload
    async def broadcast_local(self, message: object, *, to: To, **options: Unpack[_Options]) -> Receipt: ...
    async def broadcast_local(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        channels: Iterable[str] | Unset = UNSET,
        to: To | Unset = UNSET,
        exclude: Exclude = (),
        exclude_users: Users = (),
        key: str | None = None,
        as_: Any = None,
    ) -> Receipt:
        """Send a message like `broadcast`, but only to the connections of this node. It works without the broker."""
        publications = self._core.publications(message, channel, user, channels, to, exclude, exclude_users, key, as_)
        return await self._core.broadcast_local(publications)

    @overload
    def broadcast_nowait(self, message: object, *, channel: str = ..., **options: Unpack[_Options]) -> Receipt: ...
    @overload
    def broadcast_nowait(self, message: object, *, user: UserId, **options: Unpack[_Options]) -> Receipt: ...
    @overload
    def broadcast_nowait(self, message: object, *, channels: Iterable[str], **options: Unpack[_Options]) -> Receipt: ...
    @overload
    def broadcast_nowait(self, message: object, *, to: To, **options: Unpack[_Options]) -> Receipt: ...
    def broadcast_nowait(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        channels: Iterable[str] | Unset = UNSET,
        to: To | Unset = UNSET,
        exclude: Exclude = (),
        exclude_users: Users = (),
        key: str | None = None,
        as_: Any = None,
    ) -> Receipt:
        """Send a message like `broadcast`, without awaiting anything: for hot loops and plain callbacks.

        It never waits for slow connections: the slow-consumer policy decides what happens to messages that a connection
        can't take and its backlog can't hold. If there are `on_deliver` hooks, the message waits for its turn. It keeps
        its place among the broadcasts to its audience, but what is sent to a connection directly may overtake it, and
        a hook that fails is only logged.

        Raises:
            EngineUnavailable: If the broker is known to be out of reach, or too many messages wait for it. What the
                broker refuses later is logged.
            EncodeError: If the message can't be sent as text, bytes or JSON; nobody gets it.
            LifecycleError: If called outside the event loop, or before the start of an engine that needs one; or if an
                `on_broadcast` hook has to wait for something.
        """
        publications = self._core.publications(message, channel, user, channels, to, exclude, exclude_users, key, as_)
        return self._core.broadcast_nowait(publications)

    @overload
    def broadcast_soon(self, message: object, *, channel: str = ..., **options: Unpack[_Options]) -> None: ...
    @overload
    def broadcast_soon(self, message: object, *, user: UserId, **options: Unpack[_Options]) -> None: ...
    @overload
    def broadcast_soon(self, message: object, *, channels: Iterable[str], **options: Unpack[_Options]) -> None: ...
    @overload
    def broadcast_soon(self, message: object, *, to: To, **options: Unpack[_Options]) -> None: ...
    def broadcast_soon(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        channels: Iterable[str] | Unset = UNSET,
        to: To | Unset = UNSET,
        exclude: Exclude = (),
        exclude_users: Users = (),
        key: str | None = None,
        as_: Any = None,
    ) -> None:
        """Send a message like `broadcast`, later and from anywhere: from the event loop, and from any thread.

        For code that runs in both, such as a listener for SQLAlchemy's `after_commit`. The message is encoded now. The
        messages that one thread sends this way arrive in the order of its calls. What fails later, in a hook or at the
        broker, is logged. `aclose` sends what still waits.

        Raises:
            EncodeError: If the message can't be sent as text, bytes or JSON; nobody gets it.
            EngineUnavailable: If 16 MiB wait already.
            LifecycleError: If the manager doesn't run.
        """
        publications = self._core.publications(message, channel, user, channels, to, exclude, exclude_users, key, as_)
        self._core.broadcast_soon(publications)

    @overload
    def broadcast_threadsafe(self, message: object, *, channel: str = ..., **options: Unpack[_Options]) -> Receipt: ...
    @overload
    def broadcast_threadsafe(self, message: object, *, user: UserId, **options: Unpack[_Options]) -> Receipt: ...
    @overload
    def broadcast_threadsafe(
        self, message: object, *, channels: Iterable[str], **options: Unpack[_Options]
    ) -> Receipt: ...
    @overload
    def broadcast_threadsafe(self, message: object, *, to: To, **options: Unpack[_Options]) -> Receipt: ...
    def broadcast_threadsafe(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        channels: Iterable[str] | Unset = UNSET,
        to: To | Unset = UNSET,
        exclude: Exclude = (),
        exclude_users: Users = (),
        key: str | None = None,
        as_: Any = None,
    ) -> Receipt:
        """Send a message like `broadcast`, from a thread such as a sync endpoint. Blocks until it is handed over.

        Raises:
            LifecycleError: If the manager isn't running, or the call comes from its own event loop.
        """
        publications = self._core.publications(message, channel, user, channels, to, exclude, exclude_users, key, as_)
        return self._core.broadcast_threadsafe(publications)

    async def send(self, connection: WebSocket | Connection, message: object) -> None:
        """Send a message to one connection of this node, after everything handed over before.

        If the connection is behind but still reads, the call waits for it, at most `send_timeout` and at most 10 s.

        Raises:
            ConnectionClosed: If the connection has ended.
            EncodeError: If the message can't be sent as text, bytes or JSON.
            LifecycleError: If the WebSocket was never connected to this manager.
            TypeError: If it is neither a WebSocket nor a Connection.
        """
        await self._core.send(connection, message)

    async def send_personal_message(self, message: object, websocket: WebSocket | Connection) -> None:
        """Send a message to one connection: `send` with the name and the order of arguments of FastAPI's tutorial."""
        await self._core.send(websocket, message)

    def listen(
        self,
        *channels: str,
        user: UserId | None = None,
        since: SinceOption = None,
        size: int = 1024,
        policy: ListenPolicy = "raise",
    ) -> AbstractAsyncContextManager[Listener]:
        """Receive what is broadcast to channels in this process, without a socket.

        ```
        async with manager.listen("room:1") as messages:
            async for message in messages:
                print(message.channel, message.data, message.position)
        ```

        It yields everything that is broadcast on any node after the block is entered, in the order of each channel,
        until the block or the manager ends. If a listener reads slowly, the rest is read from the history of the
        channel, where there is one. `exclude=` of a broadcast may name a listener. `on_deliver` hooks don't run for it.

        Args:
            channels: Names of channels. `*` is no pattern here.
            user: The user whose own messages are received as well.
            since: The position after which it wants what was broadcast before; see `connect`. `messages.recovered` says
                by channel whether it gets all of that. If not, it begins with what is broadcast now.
            size: How many messages of channels without a history may wait.
            policy: What happens when messages were missed, because they didn't fit or can't be read any more. With
                `raise` the iterator raises `Lagged` once, where they are missing, and can go on. With `drop_oldest` it
                just goes on.

        Raises:
            InvalidChannel: If a name breaks a rule.
            ConfigurationError: If an option makes no sense.
            ValueError: If no channel and no user is named, `user` is not an id, or `since` is no position of these
                channels.
            EngineUnavailable: If the broker forbids us one of them. A broker that is out of reach is not an error.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        if not channels and user is None:
            raise ValueError('name what to listen to: listen("news"), or listen(user=5)')
        key = None if user is None else user_key(user)
        return self._core.listen(as_channels(channels), key, since, size, policy)

    async def _ask(self, question: Question[T]) -> T:
        return await self._core.ask(question)

    # Streams.

    def stream(
        self,
        id: str,  # noqa: A002  # what the field calls it
        *,
        user: UserId | None = None,
        ttl: float = DEFAULT_TTL,
        limits: StreamLimits = StreamLimits(),  # noqa: B008  # frozen
    ) -> AbstractAsyncContextManager[Run]:
        """Produce a stream, such as the answer of a model. It outlives the request and the tab that asked for it.

        ```
        async with manager.stream("run:42", user=7) as run:
            async for token in model(prompt):
                run.append(token)
        ```

        What is appended is kept. Anybody who comes meanwhile or later gets all of it: by a route of
        `create_stream_router`, or by `follow_stream`, on any node. A stream has one end: `done` at the end of the
        block, `error` if the block raises something, `cancelled` if `stop_stream` was called, and `lost` if the task is
        cancelled, or the node ends or dies. If the node dies, others notice it within 15 seconds. A viewer that leaves
        doesn't end the stream.

        Once a run has ended, its id may be used again for another one. Nothing of one run is ever seen in another.
        After `stop_stream` the next `append` raises `StreamEnded`, which the block swallows.

        Args:
            id: Its name, which viewers ask for.
            user: The user whose stream it is. A route shows it to nobody else.
            ttl: For how many seconds it is kept after its end, at most a day.
            limits: How much one run may produce.

        Raises:
            StreamExists: If a stream of this id is being produced already, on any node.
            ConfigurationError: If an option makes no sense, or the engine can't carry streams.
            ValueError: If the id breaks a rule for names, or `user` is not an id.
            EngineUnavailable: If the broker can't be reached at the beginning. The stream survives later outages of up
                to 10 s.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        return self._core.stream(StreamOptions(id, user, ttl, limits))

    async def start_stream(
        self,
        id: str,  # noqa: A002  # what the field calls it
        producer: Producer,
        *,
        user: UserId | None = None,
        ttl: float = DEFAULT_TTL,
        limits: StreamLimits = StreamLimits(),  # noqa: B008  # frozen
    ) -> Run:
        """Produce a stream in a task of the manager, for which no request waits.

        Returns once the stream has begun. `stop_stream` cancels the task. The end of the manager cancels it too, and
        waits for it. What the producer raises is logged.

        Args:
            id: Its name; see `stream`.
            producer: Called with the `Run`: `async def answer(run)`.
            user: The user whose stream it is; see `stream`.
            ttl: For how many seconds it is kept; see `stream`.
            limits: How much it may produce; see `stream`.

        Raises:
            StreamExists: As for `stream`. The other errors are the same too.
        """
        if not callable(producer):
            raise ConfigurationError(f"producer is a function that takes the run, not {kind_of(producer)}")
        return await self._core.start_stream(StreamOptions(id, user, ttl, limits), producer)

    async def stop_stream(self, id: str) -> bool:  # noqa: A002  # what the field calls it
        """Stop a stream, on any node where it is produced; return whether there was one to stop.

        What was produced so far stays, and viewers see `cancelled` after it. If the producer is on another node, this
        takes a moment. If its node is dead, the stream becomes `lost`.

        Raises:
            ValueError: If the id breaks a rule for names.
            EngineUnavailable: If the broker can't be asked.
        """
        return await self._core.stop_stream(check_stream_id(id))

    async def stream_status(self, id: str) -> StreamStatus | None:  # noqa: A002  # what the field calls it
        """Return the status of a stream; `None` if there is no such stream, or not any more.

        Raises:
            ValueError: If the id breaks a rule for names.
            EngineUnavailable: If the broker can't be asked.
        """
        known = await self._core.find_stream(check_stream_id(id))
        return None if known is None or known.is_over else known.status

    def follow_stream(
        self,
        id: str,  # noqa: A002  # what the field calls it
        *,
        since: Position | str | None = None,
    ) -> AbstractAsyncContextManager[Follower]:
        """Watch a stream in this process: what was produced so far, then what is produced next, until its end.

        ```
        async with manager.follow_stream("run:42") as entries:
            async for entry in entries:
                print(entry.type, entry.text)
        ```

        A follower that comes late gets what was written so far as one text. So does one that reads slowly. Nothing
        comes twice, and nothing is left out. It isn't checked whose stream it is.

        Args:
            id: Its name.
            since: The `position` of the last entry that was seen. If that is of another run, an entry `reset` comes
                first, and then the whole run.

        Raises:
            StreamNotFound: If there is no such stream, or not any more.
            ValueError: If the id breaks a rule for names, or `since` is no position.
            EngineUnavailable: If the broker can't be asked.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        return self._core.follow(check_stream_id(id), None if since is None else Position.of(since))

    # Who is here.

    async def presence(self, channel: str) -> list[Member]:
        """Return who is in a channel, over all nodes. A route may return it as it is.

        A user with many connections on many nodes is one member. A member whose last connection was lost stays for
        `Presence.grace`. Connections without a user are not in the list. When a node crashes, its members are gone
        after 13 seconds at most.

        Raises:
            ConfigurationError: If the channel has no presence.
            EngineUnavailable: If the broker can't be asked.
            InvalidChannel: If the name breaks a rule.
        """
        return await (await self._core.presence()).members(check_channel(channel))

    async def presence_count(self, channel: str) -> int:
        """Return how many are in a channel, over all nodes. Each connection without a user counts as one more.

        Raises:
            ConfigurationError: If the channel has no presence.
            EngineUnavailable: If the broker can't be asked.
            InvalidChannel: If the name breaks a rule.
        """
        return await (await self._core.presence()).count(check_channel(channel))

    async def user_channels(self, user: UserId) -> frozenset[str]:
        """Return the channels with presence that a user is in, over all nodes.

        Raises:
            ConfigurationError: If no channel has presence.
            EngineUnavailable: If the broker can't be asked.
            ValueError: If the user is not an id.
        """
        return await (await self._core.presence()).channels_of(user_key(user))

    async def is_online(self, user: UserId) -> bool:
        """Tell whether a user has a connection on any node, in any channel or none.

        A user whose last connection was lost is online for the longest `Presence.grace` of all.

        Raises:
            ConfigurationError: If no channel has presence.
            EngineUnavailable: If the broker can't be asked.
            ValueError: If the user is not an id.
        """
        return await (await self._core.presence()).is_online(user_key(user))

    # Documents.

    def asyncapi(self, app: Starlette) -> dict[str, Any]:
        """Describe the sockets of this manager in an app, as AsyncAPI 3.0.

        Each router has a channel for plain clients, one for clients of `wsbroadcast.v1`, and one for HTTP if it serves
        HTTP. The document has what clients send and are sent, with the schemas of `receives` and `sends`, and the
        methods. Endpoints of your own aren't in it. It is made anew with each call, and is the same for the same app.

        Args:
            app: The app. If it is a FastAPI app, the document has its title, version and description.

        Returns:
            dict: The document, as an object of JSON.

        Raises:
            ConfigurationError: If the app has no router of this manager, or something has no JSON Schema.
        """
        from wsbroadcast.documents.asyncapi import asyncapi  # here, because few processes ever need it

        return asyncapi(app, self)

    # State.

    def stats(self) -> Stats:
        """Return what this node holds now and has counted so far.

        It may be called in any thread. It takes no longer with more connections.
        """
        return self._core.life.node.stats()

    async def health(self) -> Health:
        """Tell whether messages travel between the nodes now, and whether this node takes new connections."""
        life = self._core.life
        was_started = life.is_started
        await life.run_here()
        health = await life.engine.health()
        is_ready = was_started and not self.is_draining
        return health if is_ready else replace(health, is_ready=False)

    def __repr__(self) -> str:
        life = self._core.life
        return f"<ConnectionManager {life.engine.name}, {len(life.node.registry)} connections>"


# FastAPI, mocks and others ask whether it can be awaited.
mark_coroutine_function(ConnectionManager.connect)


def core_of(manager: ConnectionManager) -> Core:
    """Return the object that does a manager's work, even if an app overrides methods of the manager."""
    return manager._core
