"""ConnectionManager: the class every FastAPI tutorial makes its readers write, as a library."""

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
from wsbroadcast.audience import EVERYONE, UNSET, Unset, UserId, as_channels, user_key
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.concurrency import mark_coroutine_function
from wsbroadcast.connection import Connecting, Connection, Exclude
from wsbroadcast.engines import URL, create_engine
from wsbroadcast.engines.contract import Engine, Health
from wsbroadcast.exceptions import ConfigurationError, LifecycleError
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
from wsbroadcast.node.listening import Listener, ListenPolicy
from wsbroadcast.options import ClientTiming, ExpiresAt, Limits, Policy, SlowConsumer, check_positive, check_seconds
from wsbroadcast.publication import Dismissal, Receipt, Unsubscription
from wsbroadcast.signatures import no_dependency, without_parentheses
from wsbroadcast.stats import Counters, Stats
from wsbroadcast.transports.exit_stack import give_exit_stack
from wsbroadcast.types import BroadcastOptions, Headers, To, TransactionOptions, Users

_Options: TypeAlias = BroadcastOptions[Connection]
_TransactionOptions: TypeAlias = TransactionOptions[Connection]


@no_dependency(
    "take a ManagerDep",
    connect="whoever connects would say in the query who it is; take a ConnectionDep or a connection_dependency(…), or "
    "call it in the endpoint",
)
class ConnectionManager(HookDecorators, HasMethods, KnowsHistory):
    """Keeps the connections of an app and broadcasts to them.

    Made without any I/O, at import time if you like. It runs in one event loop: where `start`, `async with` or
    `lifespan` begins it, or a connection comes in first. Another one may only use it before that.

    Args:
        engine: A URL that names the engine, or an engine. `memory://` reaches the connections of this process.
        hooks: Code of yours around its events, in the order in which it runs.
        limits: How much is too much.
        slow_consumer: What happens to a connection that doesn't keep up; the name of a policy, or a `SlowConsumer`.
        hook_timeout: Seconds after which a hook is cut off.
        json_default: Called with what JSON doesn't know, such as an array of numpy; returns what is written instead.
        history: What is kept, so that who comes back gets what it missed: a `History` for all channels, or a dict by
            pattern, such as `{"room:*": History(messages=100, seconds=300), USERS: History()}`. `*` is any text, and
            the longest pattern holds that fits.
        drain: Seconds over which the connections are closed at SIGTERM or SIGINT, before the server closes all of them
            at once; see `drain`. That goes by itself where the server is uvicorn, also under gunicorn, with `--workers`
            or with `--reload`: the manager puts a signal handler before the server's. `None` leaves the signals alone.
        client_timing: What clients that speak events are told to do when: pings, and how soon they come back.

    Raises:
        ConfigurationError: If an option or the URL makes no sense, or the engine can't keep anything.
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
        client_timing: ClientTiming = ClientTiming(),  # noqa: B008  # frozen
    ) -> None:
        if isinstance(slow_consumer, str):
            slow_consumer = SlowConsumer(policy=slow_consumer)
        if not isinstance(limits, Limits) or not isinstance(slow_consumer, SlowConsumer):
            raise ConfigurationError("limits is a Limits(…), slow_consumer is a policy or a SlowConsumer(…)")
        if not isinstance(client_timing, ClientTiming):
            raise ConfigurationError("client_timing is a ClientTiming(…)")
        check_positive("hook_timeout", hook_timeout)
        if drain is not None:
            check_seconds("drain", drain)
        check_json_default(json_default)
        counters = Counters()
        self.hooks = HookChain(hook_timeout, counters)
        """The hooks by event; the decorators add to it."""
        if isinstance(hooks, Hook) or not isinstance(hooks, Iterable):
            name = type(hooks).__name__ if isinstance(hooks, Hook) else "MyHook"
            raise ConfigurationError(f"hooks is a list: write hooks=[{name}(…)]")
        for hook in hooks:
            self.hooks.add(hook)
        rules = None if history is None else HistoryRules(history)
        self._methods = Methods()
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
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if name in ("_core", "hooks", "_methods"):
                kind = type(self).__name__
                raise LifecycleError(
                    f"{kind}.__init__ doesn't call super().__init__(), which makes a ConnectionManager"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # From start to end.

    async def start(self) -> None:
        """Begin to run in this event loop. Every `start` wants an `aclose`; only the last one ends it.

        Raises:
            LifecycleError: If it runs in another event loop, or is closed while it starts.
        """
        await self._core.life.start()

    async def aclose(self) -> None:
        """End: send what was handed over, close the connections with 1001, wait for hooks, stop the engine.

        Does nothing if `start` was called more often than `aclose`. Idempotent: a second call at the same time returns
        when the first has done it. Afterwards the manager refuses to work until it is started again.

        Raises:
            LifecycleError: If it runs in another event loop.
        """
        await self._core.life.aclose()

    async def drain(self, over: float = 5.0) -> None:
        """Let everybody go to another node before this one ends: refuse newcomers, close the connections one by one.

        From now on handshakes are refused with 503 and `Retry-After`, and `connect` raises `LimitExceeded` with the
        limit `draining`. The connections are closed with 1012 at random moments, each behind what was sent to it
        before. Returns when all are gone; a peer that takes nothing is cut off `close_timeout` after the last moment.

        If it drains already, waits for that. Afterwards it goes on refusing, until it is closed and started again.
        `aclose` ends it at once. Nothing is left to do for a manager that is closed.

        Args:
            over: Seconds within which all are closed. Fewer connections take less: 50 of them a second.

        Raises:
            ConfigurationError: If `over` is not a number of seconds.
            LifecycleError: If it runs in another event loop.
        """
        check_seconds("over", over)
        await self._core.drain(over)

    @property
    def is_draining(self) -> bool:
        """Whether a drain has begun, and perhaps is over, since it was started."""
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
        """Run as long as an app: `FastAPI(lifespan=manager.lifespan)`. Routers of `create_router` carry it."""
        return self._run_with(app)

    @asynccontextmanager
    async def _run_with(self, app: Starlette) -> AsyncGenerator[None]:
        self.bind(app)
        give_exit_stack(app)
        async with self:
            yield

    def bind(self, app: Starlette) -> None:
        """Make this the manager that `ManagerDep` and `ConnectionDep` find in an app; `lifespan` does it too.

        They find it in apps that are mounted in this one as well, unless such an app has one of its own.
        """
        managers = getattr(app.state, "wsbroadcast_managers", ())
        if self not in managers:
            managers = app.state.wsbroadcast_managers = (*managers, self)
        router: Any = getattr(app, "router", None)
        if router is not None:  # which is all that a request to a mounted app knows of the app around it
            router.wsbroadcast_managers = managers

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

        Await it for the `Connection`, or use it with `async with`, which removes the connection on the way out. A
        socket that is registered already stays what it is; it is subscribed to the channels, and expires when this call
        says so. If the call fails or is cancelled, nothing is registered.

        Args:
            websocket: The endpoint's WebSocket. Its `send` and `receive` are taken over.
            user: Who is behind it; one user may have many connections.
            channels: The channels it is subscribed to from the start.
            info: Whatever you want to find again as `connection.info`.
            subprotocol: The subprotocol to accept with. It is only named to the client: `wsbroadcast.v1`, for one,
                is spoken by routers alone, and not by a connection that is made here.
            headers: Headers to accept with.
            expires_at: When it is closed with 4401 unless it is renewed (see `Connection.renew`): seconds since 1970,
                such as a token's `exp`, or a datetime with a timezone.
            since: Since when it wants what it missed: a position of its only channel, or a dict of them by channel; its
                user's and everyone's messages by `Audience.user(…)` and `EVERYONE`. A position is a `Position`, its
                text (`str(position)`) as a client sends it back, or `LAST` for the newest message alone. What it missed
                is sent behind the hooks and before what is live, as fast as the client takes it.
                `connection.recovered` says whether it could be had, without a hole; if not, nothing older is sent. For
                `None` it wants nothing, and `connection.recovered` stays empty.

        Raises:
            ConnectionClosed: If the socket is closed, or its peer goes away during the call.
            InvalidChannel: If a channel name breaks a rule.
            ValueError: If `user` is not a str, int or UUID, `expires_at` is not a valid time, or `since` is no position
                or names what isn't joined; or if the socket is registered already, as another user.
            PermissionDenied: If a hook refuses it; the socket is closed with 1008. Or if it has expired; the handshake
                is refused with 401, or a socket that is accepted already closed with 4401.
            LimitExceeded: If it is one too many; the handshake is refused with 429, 503 for `max_connections`, or a
                socket that is accepted already closed with 1008 or 1013. Or if the manager drains; then it is 503, or
                1012.
            EngineUnavailable: If the broker forbids us to subscribe to it. One that is out of reach is not an error:
                what is missed is announced as a gap.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        joining = partial(Joining.of, user, channels, info, subprotocol, headers, expires_at, since)
        return Connecting(self._core.connect(websocket, joining), self._core.part)

    def disconnect(self, websocket: WebSocket | Connection) -> Awaitable[None]:
        """Remove a connection whose peer is gone. Idempotent; the socket isn't closed.

        It is done when the call returns. It may be awaited, as hand-written classes are, and need not be.

        Raises:
            LifecycleError: If called from a thread, or in another event loop; nothing has changed then.
        """
        self._core.disconnect(websocket)
        return NOTHING

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
        await self._core.close(websocket, code, reason)

    async def close_user(
        self,
        user: UserId,
        *,
        code: int = CloseCode.UNAUTHENTICATED,
        reason: str = "",
        exclude: Exclude = (),
    ) -> Receipt:
        """Close every connection of a user, on all nodes: after a log-out, or when its rights were taken back.

        Returns once the engine has taken it. What waits for these connections is not sent any more. Take back first,
        then close. A handshake that was authenticated before that may still come in after it: an `on_connect` hook that
        looks again closes this gap, because every later call reaches the connections that it runs for. A node that is
        cut off from the broker at that moment misses the call: look again in `on_gap`, too.

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
        return await self._core.control(Dismissal.of_user(user, code, reason, self._core.ids(exclude)))

    @asynccontextmanager
    async def handshake(self, websocket: WebSocket) -> AsyncIterator[None]:
        """Hold a place for a handshake while it is looked into: `async with manager.handshake(websocket):`.

        For an endpoint that authenticates before it connects: a client that makes too many handshakes is refused before
        that costs anything, also while the engine starts, and who is being authenticated counts as a connection
        already. `connect` inside the block takes the place over; at the end of the block one that wasn't taken is free
        again. A block inside such a block has the same place.

        Raises:
            LimitExceeded: If there is no place, or the manager drains, as for `connect`; the handshake is refused.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        async with self._core.handshake(websocket):
            yield

    async def subscribe(
        self, connection: WebSocket | Connection, *channels: str, since: SinceOption = None
    ) -> Recovery | None:
        """Subscribe a connection to channels; every later broadcast to them, from any node, arrives.

        Args:
            connection: Which.
            channels: Their names.
            since: Since when it wants what it missed; see `connect`.

        Returns:
            Recovery | None: Whether it gets what it missed, for `since` and one channel; of several
            `connection.recovered` has all.

        Raises:
            ConnectionClosed: If the connection has ended.
            InvalidChannel: If a name breaks a rule; then none of them is subscribed.
            LimitExceeded: If they are more than `max_channels_per_connection`; none of them is subscribed, and the
                connection stays.
            PermissionDenied: If a hook refuses a channel; that one and those after it are not subscribed.
            EngineUnavailable: If the broker forbids us one of them; none of them is subscribed.
            ValueError: If `since` is no position of these channels.
        """
        return await self._core.subscribe(connection, as_channels(channels), since)

    async def unsubscribe(self, connection: WebSocket | Connection, *channels: str) -> None:
        """Unsubscribe a connection from channels; those it isn't in are passed over.

        Raises:
            InvalidChannel: If a name breaks a rule.
        """
        await self._core.unsubscribe(connection, as_channels(channels))

    async def unsubscribe_user(self, user: UserId, *channels: str) -> Receipt:
        """Unsubscribe every connection of a user from channels, on all nodes: after it has left a room.

        Returns once the engine has taken it; those of this node are out by then. `on_unsubscribe` hooks run afterwards.
        Take the right to subscribe back first. What `close_user` says of handshakes and of nodes that are cut off holds
        here too.

        Raises:
            InvalidChannel: If a name breaks a rule.
            ValueError: If the user is not an id, or no channel is named.
            EngineError: If the broker didn't take it, mostly `EngineUnavailable`: those of this node are out, those of
                others not.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        return await self._core.control(Unsubscription.of_user(user, channels))

    @property
    def connections(self) -> list[Connection]:
        """The registered connections of this node, in the order in which they came."""
        return self._core.life.node.registry.recipients(EVERYONE)

    @property
    def active_connections(self) -> list[WebSocket]:
        """Their WebSockets, as in FastAPI's tutorial; a new list each time, which the manager keeps by itself."""
        return [connection.websocket for connection in self._core.life.node.registry.recipients(EVERYONE)]

    @active_connections.setter
    def active_connections(self, value: object) -> NoReturn:
        raise ConfigurationError(
            f"{type(self).__name__} sets active_connections, which ConnectionManager keeps by itself: remove the line"
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
        transaction: object = None,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """Send a message to every connection of an audience, on all nodes; to everyone if none is named.

        Returns once the engine has taken it. Connections receive it at most once, in the order in which the engine took
        the messages of the audience. On `memory://` nothing that is sent to a connection afterwards overtakes it; over
        a broker what goes to one connection directly, a close too, may be there first. A connection that is closed or
        slow never makes the call fail or wait; if more than half of the recipients here are behind and keep pace, it
        waits until that is no longer so, at most `send_timeout` and 10 s. Who takes nothing holds up nobody but a
        tight loop, and that for a moment.

        A connection that is in several of its audiences gets it once. Of `channel`, `user`, `channels` and `to` one may
        be given.

        Args:
            message: `str` for a text frame, `bytes` for a binary one, anything else is sent as JSON.
            channel: The channel whose subscribers get it.
            user: The user whose connections get it.
            channels: Several channels. An empty list is nobody.
            to: An `Audience` or several: `Audience.channel("x")`, `Audience.user(5)`, `EVERYONE`.
            exclude: Connections or WebSockets that don't.
            exclude_users: A user or several whose connections don't.
            key: What the message is the newest of, for slow consumers under the policy `conflate`.
            transaction: On Postgres, a database connection or session of yours: the message is sent when its
                transaction commits, and never if it is rolled back.
            idempotency_key: Names this message in each of its audiences, all of which have a history: if the call is
                made again with the same key, because its outcome wasn't known, nobody gets the message twice.

        Returns:
            Receipt: How many connections of this node it is for, and what else is known.

        Raises:
            EncodeError: If the message can't be sent as text, bytes or JSON; nobody gets it.
            ValueError: If `channel` (`InvalidChannel`), `user` or `to` is not valid. `None` is an error, never
                "everyone".
            EngineUnavailable: If the broker can't be reached, takes no messages now, or no longer lets us publish:
                nothing was sent; or if it doesn't answer in time: `may_have_been_sent` says which. Of several audiences
                some may have been sent it: those in `positions`.
            EngineError: If the broker refuses this very message: to try again doesn't help.
            ConfigurationError: If the engine can't publish inside a transaction, or in this one; or if there is an
                `idempotency_key` for an audience without a history.
            LifecycleError: If the manager is closed, or runs in another event loop.
            Exception: What an `on_broadcast` or `on_deliver` hook raises, or the driver of the transaction; nobody gets
                the message.
        """
        publications = self._core.publications(message, channel, user, channels, to, exclude, exclude_users, key)
        return await self._core.broadcast(publications, transaction, idempotency_key)

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
    ) -> Receipt:
        """Send a message like `broadcast`, to the connections of this node only; no broker is needed."""
        publications = self._core.publications(message, channel, user, channels, to, exclude, exclude_users, key)
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
    ) -> Receipt:
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
        publications = self._core.publications(message, channel, user, channels, to, exclude, exclude_users, key)
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
    ) -> None:
        """Send a message like `broadcast`, later and from anywhere: from the event loop, and from any thread.

        For listeners that run in both, such as SQLAlchemy's `after_commit`. The message is encoded now. What one thread
        sends this way arrives in the order of its calls. What fails later, such as a hook or the broker, is logged.
        `aclose` sends what waits.

        Raises:
            EncodeError: If the message can't be sent as text, bytes or JSON; nobody gets it.
            EngineUnavailable: If 16 MiB wait already.
            LifecycleError: If the manager doesn't run.
        """
        publications = self._core.publications(message, channel, user, channels, to, exclude, exclude_users, key)
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
    ) -> Receipt:
        """Send a message like `broadcast`, from a thread: a sync endpoint, a worker. Blocks until it is handed over.

        Raises:
            LifecycleError: If the manager isn't running, or the call comes from its own event loop.
        """
        publications = self._core.publications(message, channel, user, channels, to, exclude, exclude_users, key)
        return self._core.broadcast_threadsafe(publications)

    async def send(self, connection: WebSocket | Connection, message: object) -> None:
        """Send a message to one connection of this node, after everything handed over before.

        If the connection is behind, the call waits while it keeps pace, at most `send_timeout` and 10 s.

        Raises:
            ConnectionClosed: If the connection has ended.
            EncodeError: If the message can't be sent as text, bytes or JSON.
            LifecycleError: If the WebSocket was never connected to this manager.
            TypeError: If it is neither a WebSocket nor a Connection.
        """
        await self._core.send(connection, message)

    async def send_personal_message(self, message: object, websocket: WebSocket | Connection) -> None:
        """Send a message to one connection; the name and order of arguments of FastAPI's tutorial."""
        await self._core.send(websocket, message)

    def listen(
        self,
        *channels: str,
        user: UserId | None = None,
        since: SinceOption = None,
        size: int = 1024,
        policy: ListenPolicy = "raise",
    ) -> AbstractAsyncContextManager[Listener]:
        """Get what is broadcast to channels in this process, without a socket.

        ```
        async with manager.listen("room:1") as messages:
            async for message in messages:
                print(message.channel, message.data, message.position)
        ```

        Everything that is broadcast on any node after the block is entered comes, in the order of each channel, until
        the block or the manager ends. Of a channel with a history a listener that reads late gets the rest from there.
        `exclude=` of a broadcast takes a listener. `on_deliver` hooks aren't asked.

        Args:
            channels: Their names; `*` is no pattern here.
            user: Whose own messages come, too.
            since: Since when it wants what was broadcast before; see `connect`. `messages.recovered` says by channel
                whether it gets all of that; if not, it begins with what is broadcast now.
            size: How many messages of channels without a history may wait.
            policy: What happens when some were missed, because they didn't fit or can't be read any more: `raise` lets
                the iterator raise `Lagged` once, at the hole, and go on; `drop_oldest` goes on.

        Raises:
            InvalidChannel: If a name breaks a rule.
            ConfigurationError: If an option makes no sense.
            ValueError: If nothing is named, `user` is not an id, or `since` no position of these channels.
            EngineUnavailable: If the broker forbids us one of them. One that is out of reach is not an error.
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        if not channels and user is None:
            raise ValueError('name what to listen to: listen("news"), or listen(user=5)')
        key = None if user is None else user_key(user)
        return self._core.listen(as_channels(channels), key, since, size, policy)

    async def _ask(self, question: Question[T]) -> T:
        return await self._core.ask(question)

    # State.

    def stats(self) -> Stats:
        """Return what this node holds now and has counted so far."""
        return self._core.life.node.stats()

    async def health(self) -> Health:
        """Tell whether messages travel between the nodes now, and whether newcomers are taken here."""
        life = self._core.life
        was_started = life.is_started
        await life.run_here()
        health = await life.engine.health()
        is_ready = was_started and not self.is_draining
        return health if is_ready else replace(health, is_ready=False)

    def __repr__(self) -> str:
        life = self._core.life
        return f"<ConnectionManager {life.engine.name}, {len(life.node.registry)} connections>"


# FastAPI, mocks and others ask what can be awaited.
mark_coroutine_function(ConnectionManager.connect)


def core_of(manager: ConnectionManager) -> Core:
    """Return what does the work of a manager, whichever of its methods an app has overridden."""
    return manager._core
