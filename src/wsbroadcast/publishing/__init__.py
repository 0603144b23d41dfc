"""Publisher: broadcasts from a program that holds no connections, async or not."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload
from weakref import finalize

from wsbroadcast.asking import KnowsHistory, Question
from wsbroadcast.audience import UNSET, Audience, Unset, UserId, audiences_of, check_stream_id, user_keys
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.concurrency import LoopThread, running_loop
from wsbroadcast.engines import URL, create_engine
from wsbroadcast.engines.contract import (
    Engine,
    Health,
    KeepsHistory,
    keeps_history,
    publish_all_nowait,
    publish_in,
)
from wsbroadcast.engines.memory import MemoryEngine
from wsbroadcast.exceptions import ConfigurationError, LifecycleError
from wsbroadcast.history import (
    Appended,
    Histories,
    HistoryRules,
    check_key,
)
from wsbroadcast.message import JSONDefault, Message, check_json_default
from wsbroadcast.options import Limits, check_positive
from wsbroadcast.publication import (
    NOBODY,
    Control,
    Dismissal,
    Publications,
    Receipt,
    Unsubscription,
    publications_of,
)
from wsbroadcast.publishing.host import CLOSED, HasEnded, Host, State
from wsbroadcast.signatures import no_dependency
from wsbroadcast.streams.ledger import Known, StreamStatus
from wsbroadcast.streams.producers import DEFAULT_TTL, END_SECONDS, StreamOptions, end_by
from wsbroadcast.streams.run import Run, StreamLimits
from wsbroadcast.tracing import Tracing
from wsbroadcast.types import PublisherOptions, PublisherTransactionOptions, To, Users

if TYPE_CHECKING:  # a program that only publishes needs no pydantic
    from wsbroadcast.typed.sends import SendRules

T = TypeVar("T")

_LIMITS = Limits()


_Publish = Callable[[Host], Coroutine[Any, Any, dict[Audience, Appended]]]


def _receipt(appended: dict[Audience, Appended]) -> Receipt:
    positions = {audience: each.position for audience, each in appended.items()}
    return Receipt(0, positions, is_repeat=bool(appended) and all(each.is_repeat for each in appended.values()))


def _abandon(states: dict[int, State]) -> None:
    if (state := states.get(os.getpid())) is not None:
        state.leave()


async def _stop(host: Host, id_: str) -> bool:
    return await (await host.producers()).stop(id_)


async def _find(host: Host, id_: str) -> Known | None:
    return await (await host.producers()).find(id_)


class PublishedStream:
    """What `Publisher.stream` returns: `with` or `async with` gives the `Run`.

    Args:
        publisher: The publisher that carries the stream.
        options: The options of the stream.
    """

    def __init__(self, publisher: Publisher, options: StreamOptions) -> None:
        self._publisher = publisher
        self._options = options
        self._run: Run
        self._host: Host

    async def __aenter__(self) -> Run:
        self._is_abandoned = False
        try:
            await self._publisher._run(self._start)
        except BaseException:
            self._abandon()
            raise
        return self._run

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        end = partial(self._end, error=error)
        if self._host.loop is asyncio.get_running_loop():
            await end(self._host)
        else:
            with suppress(HasEnded):  # the end of the host has ended the run
                await asyncio.wrap_future(self._host.submit(end))
        return error is not None and self._run.was_ended_elsewhere(error)

    def __enter__(self) -> Run:
        self._is_abandoned = False
        try:
            self._publisher._run_threadsafe(self._start, "with", "async with")
        except BaseException:
            self._abandon()
            raise
        return self._run

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        with suppress(HasEnded):  # the end of the host has ended the run
            self._host.submit(partial(self._end, error=error)).result()
        return error is not None and self._run.was_ended_elsewhere(error)

    async def _start(self, host: Host) -> None:
        self._run, self._host = await (await host.producers()).start(self._options), host
        if self._is_abandoned:
            self._run.end("lost")

    def _abandon(self) -> None:
        # The block was interrupted before it began, for example by a signal. The run may have begun in another thread.
        self._is_abandoned = True
        if hasattr(self, "_run"):
            with suppress(RuntimeError):  # the event loop is closed
                self._host.loop.call_soon_threadsafe(self._run.end, "lost")

    async def _end(self, host: Host, error: BaseException | None) -> None:
        if error is None:
            self._run.end("done")
        else:
            end_by(self._run, error)
        await self._run.wait_written(END_SECONDS)


@no_dependency("make one at the top of a module, and return it from a function of yours")
class Publisher(KnowsHistory):
    """Broadcasts to the connections of other processes: from a Celery task, a cron job, a management command, a script.

    Making one does no I/O, so you can make it at import time. It connects when it is used first.

    An async program uses it in its event loop. Several event loops may use it one after another, even if one ends
    without closing it. `broadcast_threadsafe` and `with` run it in a thread of its own, with one event loop. A second
    event loop that uses it while the first one runs moves it there too. In that thread any number of threads and event
    loops may use it, until it is closed. A forked process connects by itself.

    `broadcast_nowait` is refused while it runs in a thread of its own: a program that wants both has two publishers.
    No call is made twice, and each one returns or raises.

    Args:
        engine: The URL of a broker, the same as that of the app's ConnectionManager; or an engine of its own.
        limits: The limits; only `max_outbound_bytes` matters here.
        json_default: Called with an object that JSON doesn't know, such as a numpy array; returns what is written
            instead.
        start_timeout: Seconds that a call waits for the first connection. If there is none by then, the call raises
            `EngineUnavailable`. The publisher goes on connecting.
        history: What is kept, the same as in the app's ConnectionManager. Without it, the publisher reads from the
            broker what an app has stored there. What it publishes before any app has run is not kept.
        sends: The type of what is broadcast, the same as in the app's ConnectionManager.

    Raises:
        ConfigurationError: If an option or the URL makes no sense; or if the URL is `memory://`, which reaches only
            this process.
    """

    def __init__(
        self,
        engine: URL | Engine,
        *,
        limits: Limits = _LIMITS,
        json_default: JSONDefault | None = None,
        start_timeout: float = 2.25,
        history: Histories | None = None,
        sends: Any = None,
    ) -> None:
        if not isinstance(limits, Limits):
            raise ConfigurationError("limits must be a Limits(…)")
        check_positive("start_timeout", start_timeout)
        check_json_default(json_default)
        self._json_default = json_default
        self._engine = create_engine(engine)
        if isinstance(self._engine, MemoryEngine):
            raise ConfigurationError(
                "memory:// reaches this process only, where a Publisher has no connections: give it, and the "
                "ConnectionManager, the URL of a broker, such as redis://localhost"
            )
        self._rules = None if history is None else HistoryRules(history)
        if self._rules is not None or isinstance(self._engine, KeepsHistory):
            keeps_history(self._engine).keep(self._rules, only_publishes=True)
        self.tracing: Tracing | None = None
        """Traces its broadcasts; `None` if nothing does. `wsbroadcast.telemetry.otel.trace` sets it."""
        self._limits = limits
        self._sends: SendRules | None = None
        if sends is not None:
            from wsbroadcast.typed.sends import SendRules  # and with it pydantic, which takes long to import

            self._sends = SendRules(sends)
        self._start_timeout = start_timeout
        # By process id. A forked process neither uses what it inherits, nor lets it be collected. A collected transport
        # would leave the selector, which is the parent's as well (epoll(7): the interest list is shared).
        self._states = {os.getpid(): State()}
        finalize(self, _abandon, self._states).atexit = False

    # Messages.

    @overload
    async def broadcast(
        self, message: object, *, channel: str = ..., **options: Unpack[PublisherTransactionOptions]
    ) -> Receipt: ...
    @overload
    async def broadcast(
        self, message: object, *, user: UserId, **options: Unpack[PublisherTransactionOptions]
    ) -> Receipt: ...
    @overload
    async def broadcast(
        self, message: object, *, channels: Iterable[str], **options: Unpack[PublisherTransactionOptions]
    ) -> Receipt: ...
    @overload
    async def broadcast(
        self, message: object, *, to: To, **options: Unpack[PublisherTransactionOptions]
    ) -> Receipt: ...
    async def broadcast(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        channels: Iterable[str] | Unset = UNSET,
        to: To | Unset = UNSET,
        exclude_users: Users = (),
        key: str | None = None,
        as_: Any = None,
        transaction: object = None,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """Send a message to every connection of an audience, on all nodes; to everyone if none is named.

        Returns once the broker has taken it. Connections receive it at most once, in the order in which the broker
        took the messages of the audience.

        Args:
            message: `str` becomes a text frame, `bytes` a binary one. Anything else is sent as JSON.
            channel: The channel whose subscribers get it.
            user: The user whose connections get it.
            channels: Several channels. A connection that is in several of them gets it once.
            to: An `Audience` or several: `Audience.channel("x")`, `Audience.user(5)`, `EVERYONE`.
            exclude_users: A user, or several, whose connections don't get it.
            key: Under the policy `conflate`, a newer message with the same key replaces this one in a backlog.
            as_: The type that the message is sent as; see `ConnectionManager.broadcast`.
            transaction: On Postgres, your database connection or session: the message is sent when its transaction
                commits, and never if it is rolled back.
            idempotency_key: Names this message in each of its audiences. All of them need a history. If you repeat the
                call with the same key because you don't know its outcome, nobody gets the message twice.

        Returns:
            Receipt: The positions of the message, where it is kept.

        Raises:
            EncodeError: If the message can't be sent as text, bytes or JSON, or isn't of its type. Nobody gets it.
            ValueError: If `channel` (`InvalidChannel`), `user` or `to` is not valid. `None` is an error, never
                "everyone".
            EngineUnavailable: If the broker can't be reached, takes no messages now, or no longer lets us publish: then
                nothing was sent. Also if it doesn't answer within 2 s: then `may_have_been_sent` is true. Of several
                audiences, some may have been sent it: those in `positions`.
            EngineError: If the broker refuses this very message. A retry doesn't help.
            ConfigurationError: If the broker refuses us when we connect: a wrong password, a missing permission. Also
                if the engine can't publish inside a transaction, or not in this one; or if an `idempotency_key` is
                given for an audience without a history.
            LifecycleError: If the publisher is closed.
            Exception: What the driver of the transaction raises.
        """
        publications = self._publications(message, key, channel, user, channels, to, exclude_users, as_)
        if transaction is not None:  # it belongs to this event loop, even if our own connection lives elsewhere
            if self._state().is_closed:
                raise LifecycleError(CLOSED)
            if idempotency_key is not None:
                check_key(idempotency_key, self._rules, (), transaction)
            with self._traced(publications):
                await publish_in(self._engine, transaction, publications, self._rules)
            return Receipt(0)
        with self._traced(publications):
            return _receipt(await self._run(lambda host: host.publish(publications, idempotency_key)))

    @overload
    def broadcast_nowait(
        self, message: object, *, channel: str = ..., **options: Unpack[PublisherOptions]
    ) -> Receipt: ...
    @overload
    def broadcast_nowait(self, message: object, *, user: UserId, **options: Unpack[PublisherOptions]) -> Receipt: ...
    @overload
    def broadcast_nowait(
        self, message: object, *, channels: Iterable[str], **options: Unpack[PublisherOptions]
    ) -> Receipt: ...
    @overload
    def broadcast_nowait(self, message: object, *, to: To, **options: Unpack[PublisherOptions]) -> Receipt: ...
    def broadcast_nowait(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        channels: Iterable[str] | Unset = UNSET,
        to: To | Unset = UNSET,
        exclude_users: Users = (),
        key: str | None = None,
        as_: Any = None,
    ) -> Receipt:
        """Send a message like `broadcast`, without awaiting anything: for hot loops and plain callbacks.

        If the broker doesn't take it, that is logged.

        Raises:
            EngineUnavailable: If the broker is known to be out of reach, or too many messages wait for it.
            EncodeError: As for `broadcast`.
            LifecycleError: If the publisher doesn't run in this event loop, because it isn't started, or because
                threads or other event loops use it too.
        """
        publications = self._publications(message, key, channel, user, channels, to, exclude_users, as_)
        loop, host = running_loop(), self._state().host
        if loop is None:
            raise LifecycleError("no event loop runs here: use `broadcast_threadsafe`")
        if host is not None and host.loop is not loop and not host.has_ended:
            raise LifecycleError("the publisher runs in another event loop, or a thread of its own: await `broadcast`")
        if host is None or not host.is_started:
            raise LifecycleError("the publisher isn't started in this event loop: await `start` or `broadcast` first")
        rules = self._engine.rules if isinstance(self._engine, KeepsHistory) else None
        with self._traced(publications):
            publish_all_nowait(self._engine, publications, rules)
        return Receipt(0)

    @overload
    def broadcast_threadsafe(
        self, message: object, *, channel: str = ..., **options: Unpack[PublisherOptions]
    ) -> Receipt: ...
    @overload
    def broadcast_threadsafe(
        self, message: object, *, user: UserId, **options: Unpack[PublisherOptions]
    ) -> Receipt: ...
    @overload
    def broadcast_threadsafe(
        self, message: object, *, channels: Iterable[str], **options: Unpack[PublisherOptions]
    ) -> Receipt: ...
    @overload
    def broadcast_threadsafe(self, message: object, *, to: To, **options: Unpack[PublisherOptions]) -> Receipt: ...
    def broadcast_threadsafe(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        channels: Iterable[str] | Unset = UNSET,
        to: To | Unset = UNSET,
        exclude_users: Users = (),
        key: str | None = None,
        as_: Any = None,
    ) -> Receipt:
        """Send a message like `broadcast`, from a thread without an event loop, such as a plain program.

        Blocks until the broker has taken it. Raises what `broadcast` raises.

        Raises:
            LifecycleError: If the publisher is closed, or the call comes from the event loop that it runs in.
        """
        publications = self._publications(message, key, channel, user, channels, to, exclude_users, as_)
        call: _Publish = partial(Host.publish, publications=publications)
        with self._traced(publications):
            return _receipt(self._run_threadsafe(call, "broadcast_threadsafe", "broadcast"))

    async def close_user(self, user: UserId, *, code: int = CloseCode.UNAUTHENTICATED, reason: str = "") -> Receipt:
        """Close every connection of a user, on all nodes; see `ConnectionManager.close_user`.

        Raises:
            ValueError: If the user is not an id, or the code can't be sent.
            EngineError: If the broker doesn't take it, mostly `EngineUnavailable`.
            LifecycleError: If the publisher is closed.
        """
        return await self._control(Dismissal.of_user(user, code, reason))

    async def unsubscribe_user(self, user: UserId, *channels: str) -> Receipt:
        """Unsubscribe every connection of a user from channels, on all nodes; see `ConnectionManager`.

        Raises:
            InvalidChannel: If a name breaks a rule.
            ValueError: If the user is not an id, or no channel is named.
            EngineError: If the broker doesn't take it, mostly `EngineUnavailable`.
            LifecycleError: If the publisher is closed.
        """
        return await self._control(Unsubscription.of_user(user, channels))

    async def _ask(self, question: Question[T]) -> T:
        return await self._run(lambda host: host.ask(question))

    # Streams.

    def stream(
        self,
        id: str,  # noqa: A002  # what the field calls it
        *,
        user: UserId | None = None,
        ttl: float = DEFAULT_TTL,
        limits: StreamLimits = StreamLimits(),  # noqa: B008  # frozen
    ) -> PublishedStream:
        """Produce a stream from a worker, like `ConnectionManager.stream`: in `async with` or in `with`.

        ```
        with publisher.stream("run:42", user=7) as run:
            for token in model(prompt):
                run.append(token)
        ```

        `run.append` may be called in any thread, but only in one at a time.

        Args:
            id: Its name, which viewers ask for.
            user: The user whose stream it is.
            ttl: For how many seconds it is kept after its end, at most a day.
            limits: How much one run may produce.

        Raises:
            StreamExists: If a stream of this id is being produced already.
            ConfigurationError: If an option makes no sense, or the engine can't carry streams.
            ValueError: If the id breaks a rule for names, or `user` is not an id.
            EngineUnavailable: If the broker can't be reached at the beginning.
            LifecycleError: If the publisher is closed; or if `with` is used in the event loop that it runs in.
        """
        return PublishedStream(self, StreamOptions(id, user, ttl, limits))

    async def stop_stream(self, id: str) -> bool:  # noqa: A002  # what the field calls it
        """Stop a stream, on any node; return whether there was one to stop. See `ConnectionManager.stop_stream`."""
        name = check_stream_id(id)
        return await self._run(lambda host: _stop(host, name))

    async def stream_status(self, id: str) -> StreamStatus | None:  # noqa: A002  # what the field calls it
        """Return the status of a stream; `None` if there is none. See `ConnectionManager.stream_status`."""
        name = check_stream_id(id)
        known = await self._run(lambda host: _find(host, name))
        return None if known is None or known.is_over else known.status

    async def health(self) -> Health:
        """Return whether messages reach the broker and come back."""
        return await self._run(lambda host: host.health())

    # Start and end.

    async def start(self) -> None:
        """Connect, unless that was done. Each `start` needs its own `aclose`; only the last `aclose` ends it.

        A broker that can't be reached is not an error yet, unless the engine is set to fail fast.

        Raises:
            ConfigurationError: If the broker refuses us.
            EngineError: If the engine fails in a way that no broker causes; `EngineUnavailable` if it is set to fail
                fast.
        """
        with self._counted_start():
            await self._run(lambda host: host.start())

    async def aclose(self) -> None:
        """Disconnect. The publisher stays closed until the next `start`, even if that start fails.

        Idempotent. Does nothing while `start` was called more often than `aclose`.
        """
        host = self._close()
        if host is not None and host.loop is asyncio.get_running_loop():
            await host.wait_ended()
        elif host is not None:
            await asyncio.to_thread(host.join)

    def close(self) -> None:
        """Disconnect like `aclose`, from a thread without an event loop. Blocks until it is done.

        Raises:
            LifecycleError: If the call comes from the event loop that the publisher runs in.
        """
        self._check_not_here("close", "aclose")
        host = self._close()
        if host is not None:
            host.join()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        self._check_not_here("with", "async with")
        with self._counted_start():
            self._run_threadsafe(lambda host: host.start(), "with", "async with")
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Publisher {self._engine.name}>"

    # Internal.

    def _publications(
        self,
        message: object,
        key: str | None,
        channel: object,
        user: object,
        channels: object,
        to: object,
        exclude_users: object,
        as_: Any,
    ) -> Publications:
        audiences = audiences_of(channel, user, channels, to)
        users = user_keys(exclude_users) if exclude_users != () else NOBODY
        if as_ is None and self._sends is None:
            return publications_of(self._encode(message, key), audiences, exclude_users=users)
        from wsbroadcast.typed.sends import typed_publications

        encode = partial(self._encode, key=key)
        return typed_publications(self._sends, message, as_, audiences, encode, exclude_users=users, key=key)

    def _encode(self, message: object, key: str | None) -> Message:
        return Message.of(message, key, json_default=self._json_default)._within(self._limits.max_outbound_bytes)

    def _traced(self, publications: Publications) -> AbstractContextManager[object]:
        return nullcontext() if self.tracing is None else self.tracing.publishing(publications)

    async def _control(self, control: Control) -> Receipt:
        await self._run(lambda host: host.publish((control,)))
        return Receipt(0)

    def _state(self) -> State:
        process = os.getpid()
        if process not in self._states:
            parent = list(self._states.values())[-1]
            self._states.setdefault(process, State(parent))  # atomic: another thread may do the same now
        return self._states[process]

    async def _run(self, call: Callable[[Host], Coroutine[Any, Any, T]]) -> T:
        here = asyncio.get_running_loop()
        while True:
            host = self._find_host(here)
            with suppress(HasEnded):  # the call was not made
                if host.loop is here:
                    return await call(host)
                return await asyncio.wrap_future(host.submit(call))

    def _run_threadsafe(self, call: Callable[[Host], Coroutine[Any, Any, T]], name: str, instead: str) -> T:
        while True:
            self._check_not_here(name, instead)
            host = self._find_host(None)
            with suppress(HasEnded):  # the call was not made
                future = host.submit(call)
                try:
                    return future.result()
                finally:
                    del future  # an error would hold this frame, which holds the future, which holds the error

    def _find_host(self, here: asyncio.AbstractEventLoop | None) -> Host:
        # Find the host for calls from an event loop, or from none. Only a host with a thread of its own serves other
        # event loops than its own, because any other loop may end without telling anybody.
        state = self._state()
        with state.lock:
            if state.is_closed:
                raise LifecycleError(CLOSED)
            state.leave_ended()
            if state.host is not None and state.host.thread is None and state.host.loop is not here:
                state.is_shared = True
                state.leave()
            new_host = partial(Host, self._engine, state.left, self._start_timeout, self._json_default)
            if state.host is None and (here is None or state.is_shared):
                thread = LoopThread("wsbroadcast publisher", new_host)
                state.host = thread.made
                state.host.thread = thread
            elif state.host is None:
                state.host = new_host()
            return state.host

    def _check_not_here(self, name: str, instead: str) -> None:
        host = self._state().host
        if host is not None and host.loop is running_loop():
            raise LifecycleError(f"{name} would block the event loop that the publisher runs in: use `{instead}`")

    @contextmanager
    def _counted_start(self) -> Generator[None]:
        # Counted first, so that a concurrent `aclose` does not see itself as the last one.
        state = self._state()
        with state.lock:
            state.is_closed = False
            state.count(+1)
        try:
            yield
        except BaseException:
            with state.lock:
                state.count(-1)
            raise

    def _close(self) -> Host | None:
        # Count one start less. After the last one, return the host that is ending now.
        state = self._state()
        with state.lock:
            if state.count(-1) or state.is_closed:
                return None
            state.is_closed, state.is_shared = True, False
            host = None if state.host is None or state.host.has_ended else state.host
            state.leave()
            return host
