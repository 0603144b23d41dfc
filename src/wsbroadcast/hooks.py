"""Hooks: functions of the app that run around events, and the chain that runs them."""

from __future__ import annotations

import asyncio
import inspect
import re
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from inspect import iscoroutinefunction
from types import FunctionType, MethodType
from typing import Any, Literal, TypeVar, get_args

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import Timed, Unfinished, finished, name_if_it_blocked
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import ConfigurationError, PermissionDenied, ungrouped
from wsbroadcast.logs import about, logger
from wsbroadcast.message import Message
from wsbroadcast.publication import Gap
from wsbroadcast.signatures import check_callable, may_return_none, without_parentheses
from wsbroadcast.stats import Counters
from wsbroadcast.tracing import Tracing
from wsbroadcast.types import Guard

HookEvent = Literal[
    "on_connect",
    "on_disconnect",
    "on_message",
    "on_subscribe",
    "on_unsubscribe",
    "on_broadcast",
    "on_deliver",
    "on_gap",
    "on_joined",
    "on_left",
    "on_error",
]

# The events that a hook may refuse by raising PermissionDenied.
_REFUSABLE = {"on_connect", "on_subscribe", "on_message"}

# How Python words the error of a call whose arguments don't fit.
_MISFIT = re.compile(r"positional argument|keyword argument|keyword-only argument")

# How deep broadcasts may nest that hooks of broadcasts make. A hook that answers its own broadcasts would never end.
_MAX_DEPTH = 8
_depth: ContextVar[int] = ContextVar("wsbroadcast_hook_depth", default=0)
_delivery: ContextVar[Delivery | None] = ContextVar("wsbroadcast_delivery", default=None)


Encode = Callable[[object, "str | None"], Message]
"""Makes a message from a value and a key."""


class HoldBack:
    """The type of `HOLD_BACK`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "HOLD_BACK"

    def __reduce__(self) -> str:
        return "HOLD_BACK"  # a copy is the same object


HOLD_BACK = HoldBack()
"""An `on_broadcast` hook returns it so that nobody gets the message."""


class Delivery:
    """One broadcast on its way to this node's recipients, as an `on_deliver` hook sees it."""

    __slots__ = ("_encode", "_instead", "_is_running", "_meant", "audience", "is_replay", "message", "recipients")

    def __init__(
        self,
        message: Message,
        audience: Audience,
        recipients: list[Connection],
        encode: Encode = Message.of,
        *,
        is_replay: bool = False,
    ) -> None:
        self.message = message
        """What was broadcast."""
        self.audience = audience
        """The audience that it was broadcast to."""
        self.recipients = recipients
        """The connections that will get the message. A hook may remove some, or assign a shorter list. Each connection
        gets it once. A connection that a hook adds gets nothing: it isn't in the audience, or it is excluded. If a
        recipient is no `Connection`, such as a WebSocket, that is a `TypeError`, and nobody gets the message."""
        self.is_replay = is_replay
        """Whether this is a replay to one connection, which was away or behind when the others got the message."""
        self._meant = {id(recipient): recipient for recipient in recipients}
        # Whether its hooks run now.
        self._is_running = False
        self._instead: dict[str, Message] = {}
        self._encode = encode

    def replace(self, connection: Connection, message: object) -> None:
        """Give one recipient another message instead.

        A `Message` with a key of its own keeps it; anything else gets the key of the broadcast.

        Raises:
            EncodeError: If the other message can't be sent.
            TypeError: If `connection` is not a Connection.
        """
        self._check(connection)
        self._instead[connection.id] = _in_place_of(self.message, message, self._encode)

    def _settle(self) -> None:
        """Keep each recipient once that the hooks have left, and drop those that they have added.

        Raises:
            TypeError: If one of them is not a connection. Nobody gets the message then.
        """
        if not isinstance(self.recipients, Iterable):
            raise TypeError(f"Delivery.recipients is a list of connections, not {type(self.recipients).__name__}")
        left = {id(recipient): recipient for recipient in self.recipients}
        for recipient in left.values():
            self._check(recipient)
        self.recipients = [recipient for recipient in left.values() if id(recipient) in self._meant]

    def _check(self, recipient: object) -> None:
        if id(recipient) not in self._meant and not isinstance(recipient, Connection):
            raise TypeError(f"a recipient of an on_deliver hook is a Connection, not {type(recipient).__name__}")

    def _parts(self) -> list[tuple[Message, list[Connection]]]:
        """Return each message with the connections that get it."""
        if not self._instead:
            return [(self.message, self.recipients)]
        same = [recipient for recipient in self.recipients if recipient.id not in self._instead]
        others = [recipient for recipient in self.recipients if recipient.id in self._instead]
        return [(self.message, same), *((self._instead[other.id], [other]) for other in others)]


class _Nothing(Awaitable[None]):
    """What the methods of `Hook` itself return. It can be awaited, as in `await super().on_connect(…)`."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


NOTHING = _Nothing()


class Hook:
    """Code of yours around the events of a manager. Override the methods that you need; the others cost nothing.

    Each method may be `def` or `async def`. Hooks run in the order in which they were given. A hook may broadcast, and
    may disconnect the connection that it is about.

    `on_broadcast` and `on_deliver` fail closed: if one raises, or is cut off by the timeout, nobody gets the message,
    and the caller sees the error. With a broker `on_deliver` runs on each node after the call: there the node's clients
    don't get the message, and the error is in the node's log. All others fail open: the error is counted, logged and
    passed to `on_error`, and everything goes on.

    `on_connect`, `on_subscribe` and `on_message` may refuse what they see: they raise `PermissionDenied` or return
    `False`. The error may come out of a task group. They also refuse if they can't be called with their arguments, or
    return a generator, or a coroutine because an `await` is missing: nobody knows then what they would have said.
    """

    def on_connect(self, connection: Connection) -> Guard:
        """A connection was accepted and registered. If it is refused, it is closed with 1008."""
        return NOTHING

    def on_disconnect(self, connection: Connection) -> object:
        """A connection ended in any way. It runs once for each that `on_connect` saw. `close_code` says how."""
        return NOTHING

    def on_message(self, connection: Connection, message: str | bytes) -> Guard:
        """A client sent a message. It runs before the endpoint gets the message, in whichever way it reads.

        The endpoint's `receive` raises a `PermissionDenied` of this hook. A POST has no connection, so it isn't seen
        here.
        """
        return NOTHING

    def on_subscribe(self, connection: Connection, channel: str) -> Guard:
        """A connection was subscribed to a channel, also by `connect`.

        A refusal takes the subscription back. `subscribe` raises it; `connect` closes with 1008.
        """
        return NOTHING

    def on_unsubscribe(self, connection: Connection, channel: str) -> object:
        """A connection left a channel, also because the connection ended."""
        return NOTHING

    def on_broadcast(self, message: Message, audience: Audience) -> object:
        """A broadcast is about to go out. It runs once, on the node where `broadcast` was called.

        Returns:
            What to send instead of the message, `HOLD_BACK` to send nothing, or `None` to send it unchanged. A
            `Message` with a key of its own keeps it; anything else gets the key of the broadcast. Annotate such a hook
            with `-> Message | HoldBack`. If it is annotated to return something or `None`, a warning names it when it
            is added, because it may have been written to hold back by `None`.
        """
        return NOTHING

    def on_deliver(self, delivery: Delivery) -> object:
        """A broadcast is about to reach this node's recipients. It runs once on each node, and for each replay."""
        return NOTHING

    def on_gap(self, gap: Gap) -> object:
        """The engine was cut off from its broker. Messages from other nodes may be missing. Never with `memory://`."""
        return NOTHING

    def on_joined(self, channel: str, user: str) -> object:
        """A member joined a channel: before, it wasn't there on any node. It runs on one node, where it joined.

        Connections without a user don't count here, unless each connection is a member.

        Args:
            channel: A channel with presence.
            user: The user's id as text; with `Presence(by="connection")` the id of the connection.
        """
        return NOTHING

    def on_left(self, channel: str, user: str) -> object:
        """A member left a channel: it isn't there on any node any more. It runs on one node, where it left."""
        return NOTHING

    def on_error(self, error: Exception, where: str) -> object:
        """A hook failed. `where` names the event and the hook."""
        return NOTHING


# The type of the function of each event.
_OfConnection = TypeVar("_OfConnection", bound=Callable[[Connection], object])
_ConnectGuard = TypeVar("_ConnectGuard", bound=Callable[[Connection], Guard])
_MessageGuard = TypeVar("_MessageGuard", bound=Callable[[Connection, str | bytes], Guard])
_ChannelGuard = TypeVar("_ChannelGuard", bound=Callable[[Connection, str], Guard])
_OfChannel = TypeVar("_OfChannel", bound=Callable[[Connection, str], object])
_OfBroadcast = TypeVar("_OfBroadcast", bound=Callable[[Message, Audience], object])
_OfDelivery = TypeVar("_OfDelivery", bound=Callable[[Delivery], object])
_OfGap = TypeVar("_OfGap", bound=Callable[[Gap], object])
_OfMember = TypeVar("_OfMember", bound=Callable[[str, str], object])
_OfError = TypeVar("_OfError", bound=Callable[[Exception, str], object])

M = TypeVar("M", bound=Callable[..., Any])

# The names of the arguments with which the function of each event is called.
_ARGUMENTS: Mapping[HookEvent, tuple[str, ...]] = {
    event: tuple(inspect.signature(getattr(Hook, event)).parameters)[1:] for event in get_args(HookEvent)
}


class Uncalled(ConfigurationError):
    """Raised when a hook can't be called with the arguments of its event. What it would have said isn't known."""


class HookChain:
    """The hooks of one manager, by event, and the rules by which they run."""

    def __init__(self, timeout: float, counters: Counters) -> None:
        self.timeout = timeout
        """Seconds after which a hook is cancelled."""
        self.blocked_seconds = 1.0
        """A hook that blocks the event loop for this many seconds is named in the log."""
        self.tracing: Tracing | None = None
        """Traces the broadcasts of the manager; `None` if nothing does."""
        self._counters = counters
        self._waiting: set[str] = set()
        self._functions: dict[str, tuple[Callable[..., Any], ...]] = dict.fromkeys(get_args(HookEvent), ())

    def add(self, hook: Hook) -> None:
        """Append a hook. Only the methods that it overrides are called.

        Raises:
            ConfigurationError: If it is not a `Hook`, or a method can't be called with the arguments of its event.
        """
        if not isinstance(hook, Hook):
            raise ConfigurationError(f"a hook is an instance of Hook, not {hook!r}")
        for event in get_args(HookEvent):
            if getattr(type(hook), event) is not getattr(Hook, event):
                self.add_function(event, getattr(hook, event))
        for name in dir(type(hook)):
            if not hasattr(Hook, name) and (meant := get_close_matches(name, get_args(HookEvent), 1, 0.8)):
                logger.warning(
                    "%s.%s is never called: did you mean %s?",
                    type(hook).__qualname__,
                    name,
                    meant[0],
                    extra=about("hook.misnamed", hook=name),
                )

    def add_function(self, event: HookEvent, function: M) -> M:
        """Append a function, `async def` or `def`, for one event.

        Raises:
            ConfigurationError: If the function can't be called with the arguments of the event.
        """
        check_callable(function, _ARGUMENTS[event], f"the hook for {event}")
        if event == "on_broadcast" and may_return_none(function):
            logger.warning(
                "on_broadcast hook %s may return None, which sends the message unchanged: to hold it back, "
                "return HOLD_BACK",
                _name(function),
                extra=about("hook.may_return_none", hook=_name(function)),
            )
        self._functions[event] = (*self._functions[event], function)
        if not isinstance(function, (FunctionType, MethodType)) or iscoroutinefunction(function):
            self._waiting.add(event)
        return function

    def has(self, event: HookEvent) -> bool:
        """Tell whether there is a hook for an event."""
        return bool(self._functions[event])

    def may_wait(self, event: HookEvent) -> bool:
        """Tell whether a hook of an event may wait for something. Plain functions are expected not to wait."""
        return event in self._waiting

    async def observe(self, event: HookEvent, *args: object, deadline: float | None = None) -> None:
        """Run the hooks of an event that observe. An error of one doesn't stop the others.

        Args:
            event: What happened.
            args: The arguments of the hooks.
            deadline: When hooks are cut off at the latest, in seconds of the event loop's clock. Several calls may
                share one. After the deadline a hook still runs until it first waits.

        Raises:
            PermissionDenied: If a hook refuses, can't be called, or returns a coroutine that nobody awaits. The hooks
                after it don't run.
        """
        for function in self._functions[event]:
            try:
                result = await self._call(event, function, args, deadline)
                if result is False and event in _REFUSABLE:
                    raise PermissionDenied("not allowed")
            except Exception as error:
                bare = ungrouped(error, PermissionDenied)
                if event in _REFUSABLE and isinstance(bare, PermissionDenied):
                    raise bare from bare.__cause__  # without the exception group that it may have come in
                await self._report(error, f"{event} hook {_name(function)}")
                if event in _REFUSABLE and _says_nothing(error):  # it might have refused
                    raise PermissionDenied("not allowed") from error

    async def transform(self, message: Message, audience: Audience, encode: Encode = Message.of) -> Message | None:
        """Run the `on_broadcast` hooks. Each gets the message that the one before has returned.

        Returns:
            Message | None: What to send; `None` if a hook holds it back.

        Raises:
            Exception: If a hook raises. It is the hook's own error, or a `TimeoutError` if it was cut off.
        """
        for function in self._functions["on_broadcast"]:
            with _nested("on_broadcast"), self._counted():
                result = await self._call_traced("on_broadcast", function, (message, audience))
                if isinstance(result, HoldBack):
                    self._counters.vetoed += 1
                    return None
                if result is not None:
                    message = _in_place_of(message, result, encode)
        return message

    async def deliver(self, delivery: Delivery) -> None:
        """Run the `on_deliver` hooks.

        Raises:
            Exception: If a hook raises. It is the hook's own error, or a `TimeoutError` if it was cut off.
        """
        token = _delivery.set(delivery)
        delivery._is_running = True
        try:
            for function in self._functions["on_deliver"]:
                with _nested("on_deliver"), self._counted():
                    # A replay is to one connection, and there are no spans for single connections.
                    call = self._call if delivery.is_replay else self._call_traced
                    await call("on_deliver", function, (delivery,))
                    delivery._settle()
        finally:
            delivery._is_running = False
            _delivery.reset(token)

    async def _call_traced(self, event: str, function: Callable[..., Any], args: tuple[object, ...]) -> Any:
        if self.tracing is None:
            return await self._call(event, function, args)
        with self.tracing.hook(event, _name(function)):
            return await self._call(event, function, args)

    async def _call(
        self, event: str, function: Callable[..., Any], args: tuple[object, ...], deadline: float | None = None
    ) -> Any:
        name = f"{event} hook {_name(function)}"
        task = asyncio.current_task()
        cancelling = 0 if task is None else task.cancelling()
        limit: asyncio.Timeout | None = None
        try:
            started = time.perf_counter()
            try:
                result = function(*args)
            except TypeError as error:
                if error.__traceback__ is None or error.__traceback__.tb_next is None:  # the arguments don't fit
                    raise Uncalled(f"{name} can't be called: {error}") from error
                raise
            finally:
                name_if_it_blocked(name, started, self.blocked_seconds)
            if isinstance(result, Awaitable):
                self._waiting.add(event)  # a plain function that returns an awaitable
                timed = Timed(result, name, self.blocked_seconds)
                if task is None:  # called by `broadcast_nowait` in a plain callback, where nothing can wait
                    result = await timed
                else:
                    ends = asyncio.get_running_loop().time() + self.timeout
                    async with asyncio.timeout_at(ends if deadline is None else min(ends, deadline)) as limit:
                        result = await timed
            return result if result is None else finished(result, f"what the {name} returned")
        except TimeoutError as error:
            if limit is None or not limit.expired():
                raise  # the hook's own error
            raise TimeoutError(f"{name} was cut off after {self.timeout:g} s") from error
        except asyncio.CancelledError as error:
            if task is not None and task.cancelling() > cancelling:
                raise
            raise RuntimeError(f"{name} was cancelled from within") from error

    @contextmanager
    def _counted(self) -> Generator[None]:
        try:
            yield
        except Exception:
            self._counters.hook_errors += 1
            raise

    async def _report(self, error: Exception, where: str) -> None:
        self._counters.hook_errors += 1
        logger.error("%s failed", where, exc_info=error, extra=about("hook.failed", hook=where))
        for function in self._functions["on_error"]:
            try:
                await self._call("on_error", function, (error, where))
            except Exception:
                self._counters.hook_errors += 1
                logger.exception(
                    "on_error hook %s failed",
                    _name(function),
                    extra=about("hook.failed", hook=f"on_error hook {_name(function)}"),
                )


def _says_nothing(error: Exception) -> bool:
    # Whether a guard gave no answer: it, or the function that its decorator wraps, could not be called; or nobody
    # awaited it.
    is_misfit = isinstance(error, TypeError) and _MISFIT.search(str(error)) is not None
    return is_misfit or isinstance(error, (Unfinished, Uncalled))


@contextmanager
def _nested(event: str) -> Generator[None]:
    depth = _depth.get()
    if depth >= _MAX_DEPTH:
        raise RuntimeError(
            f"an {event} hook broadcasts from within itself, {depth} deep; let it pass its own messages unchanged"
        )
    token = _depth.set(depth + 1)
    try:
        yield
    finally:
        _depth.reset(token)


def is_delivering() -> bool:
    """Return whether the caller runs inside an `on_deliver` hook."""
    delivery = _delivery.get()
    return delivery is not None and delivery._is_running  # a task that a hook started may go on after the hook


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _in_place_of(message: Message, result: object, encode: Encode) -> Message:
    # A hook's message instead of another one. It has its own key, or else that of the other.
    keeps_key = isinstance(result, Message) and result.key is not None
    return encode(result, None if keeps_key else message.key)


# The hook decorators of a manager.


class HookDecorators:
    """The decorators of a manager, such as `@manager.on_connect`. A function gets what the method of `Hook` gets."""

    hooks: HookChain

    @without_parentheses
    def on_connect(self, function: _ConnectGuard) -> _ConnectGuard:
        """Run `function(connection)` after a connection was accepted and registered."""
        return self.hooks.add_function("on_connect", function)

    @without_parentheses
    def on_disconnect(self, function: _OfConnection) -> _OfConnection:
        """Run `function(connection)` once after a connection ended."""
        return self.hooks.add_function("on_disconnect", function)

    @without_parentheses
    def on_message(self, function: _MessageGuard) -> _MessageGuard:
        """Run `function(connection, message)` before the endpoint gets a message of a client."""
        return self.hooks.add_function("on_message", function)

    @without_parentheses
    def on_subscribe(self, function: _ChannelGuard) -> _ChannelGuard:
        """Run `function(connection, channel)` after a connection was subscribed to a channel."""
        return self.hooks.add_function("on_subscribe", function)

    @without_parentheses
    def on_unsubscribe(self, function: _OfChannel) -> _OfChannel:
        """Run `function(connection, channel)` after a connection left a channel."""
        return self.hooks.add_function("on_unsubscribe", function)

    @without_parentheses
    def on_broadcast(self, function: _OfBroadcast) -> _OfBroadcast:
        """Run `function(message, audience)` before each broadcast. It may return another message, or `HOLD_BACK`."""
        return self.hooks.add_function("on_broadcast", function)

    @without_parentheses
    def on_deliver(self, function: _OfDelivery) -> _OfDelivery:
        """Run `function(delivery)` before each broadcast reaches this node's recipients."""
        return self.hooks.add_function("on_deliver", function)

    @without_parentheses
    def on_gap(self, function: _OfGap) -> _OfGap:
        """Run `function(gap)` when messages from other nodes may be missing."""
        return self.hooks.add_function("on_gap", function)

    @without_parentheses
    def on_joined(self, function: _OfMember) -> _OfMember:
        """Run `function(channel, user)` when a member joined a channel; see `Hook.on_joined`."""
        return self.hooks.add_function("on_joined", function)

    @without_parentheses
    def on_left(self, function: _OfMember) -> _OfMember:
        """Run `function(channel, user)` when a member left a channel; see `Hook.on_left`."""
        return self.hooks.add_function("on_left", function)

    @without_parentheses
    def on_error(self, function: _OfError) -> _OfError:
        """Run `function(error, where)` when a hook failed."""
        return self.hooks.add_function("on_error", function)
