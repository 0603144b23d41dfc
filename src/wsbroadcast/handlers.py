"""Handlers: functions of the app that are called with clients' messages of a type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.signatures import annotated, check_named, is_coroutine_function
from wsbroadcast.typed.message_types import MessageTypes, shown

F = TypeVar("F", bound=Callable[..., object])


class Handler:
    """A function that handles the messages of a type.

    Args:
        types: The type, or union of types.
        function: `async def` or `def`. A `def` runs in a thread, as FastAPI's endpoints do.

    Raises:
        ConfigurationError: If the function has no parameter for the message, or its parameters can't be read.
    """

    def __init__(self, types: MessageTypes[Any], function: Callable[..., Any]) -> None:
        self.function = function
        """The function."""
        self.name = getattr(function, "__qualname__", None) or repr(function)
        """Its name, for errors and logs."""
        self.is_coroutine_function = is_coroutine_function(function)
        """Whether it runs in the event loop. Otherwise it runs in a thread."""
        try:
            hints = get_type_hints(annotated(function), include_extras=True)
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError, NameError) as error:
            raise ConfigurationError(f"the parameters of {self.name} can't be read: {error}") from error
        check_named(f"the parameters of {self.name} are given by name", parameters.values())
        self.message = _message_of(parameters, hints, types, self.name)
        """The name of the parameter for the message."""
        self.connection = next((each for each in parameters if _is_connection(hints.get(each))), None)
        """The name of the parameter that is annotated as a `Connection`; `None` if there is none."""
        self.channel = "channel" if _is_text(hints.get("channel")) and self.message != "channel" else None
        """`"channel"` if a parameter has this name and is annotated as a text; else `None`."""
        ours = (self.message, self.connection, self.channel)
        self.others: Mapping[str, inspect.Parameter] = {
            name: each.replace(annotation=hints.get(name, each.annotation), kind=each.KEYWORD_ONLY)
            for name, each in parameters.items()
            if name not in ours
        }
        """The parameters that FastAPI fills in. Their annotations are resolved: none is a string."""

    def arguments(self, message: object, connection: Connection | None, channel: str | None) -> dict[str, Any]:
        """Return the arguments that FastAPI doesn't fill in."""
        given = {self.message: message}
        if self.connection is not None:
            given[self.connection] = connection
        if self.channel is not None:
            given[self.channel] = channel
        return given


def _message_of(
    parameters: Mapping[str, inspect.Parameter], hints: Mapping[str, Any], types: MessageTypes[Any], name: str
) -> str:
    wanted = set(map(_key, types.members))
    for each in parameters:
        if each in hints and wanted <= set(map(_key, _members(hints[each]))):
            return each
    for each in parameters:
        if each not in hints or hints[each] is Any or hints[each] is object:
            return each
    what = shown(types.annotation)
    raise ConfigurationError(f"no parameter of {name} is the message: annotate one as {what}, as in (message: {what})")


def _members(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _key(member: Any) -> Any:
    return get_args(member)[0] if get_origin(member) is Annotated else member


def _is_connection(hint: object) -> bool:
    return hint is Connection or get_origin(hint) is Connection


def _is_text(hint: Any) -> bool:
    return hint is str or (get_origin(hint) in (Union, UnionType) and set(get_args(hint)) == {str, type(None)})


class Handlers:
    """The handlers of a manager, by the type of their messages."""

    def __init__(self) -> None:
        self._handlers: dict[Any, Handler] = {}
        self._checks: list[Callable[[Handler], None]] = []

    def add(self, annotation: Any, function: Callable[..., Any]) -> None:
        """Add a handler for a type, or for each type of a union.

        Raises:
            ConfigurationError: If a type has a handler already, or an existing router can't call this one.
        """
        types: MessageTypes[Any] = MessageTypes.of(annotation, "the type of manager.on")
        for member in types.members:
            if member in self._handlers:
                before = self._handlers[member].name
                raise ConfigurationError(
                    f"messages of type {shown(member)} are handled by {before} already: a type has one handler"
                )
        handler = Handler(types, function)
        for check in self._checks:
            check(handler)
        self._handlers |= dict.fromkeys(types.members, handler)

    def get(self, member: Any) -> Handler | None:
        """Return the handler for messages of a type; `None` if there is none."""
        return self._handlers.get(member)

    def check_each(self, check: Callable[[Handler], None]) -> None:
        """Call a function with each handler, also with those that are added later.

        Raises:
            ConfigurationError: If the function raises it.
        """
        for handler in dict.fromkeys(self._handlers.values()):
            check(handler)
        self._checks.append(check)


class HasHandlers:
    """The decorator of a manager that makes handlers."""

    _handlers: Handlers

    def on(self, types: Any) -> Callable[[F], F]:
        """Let a function handle the messages of a type that clients of routers send: `@manager.on(Say)`.

        ```
        @manager.on(Say)
        async def said(message: Say, connection: Connection, channel: str) -> None:
            await manager.broadcast(Said(text=message.text, by=connection.user), channel=channel)
        ```

        The function is called on each router whose `receives` has the type. Such a message isn't broadcast. Messages of
        one client are handled one after the other. A `def` function runs in a thread. What it returns is ignored.

        The function gets the message in the parameter that is annotated with the type, and the client's connection in
        one that is annotated as `Connection`. The parameter `channel` is the channel that the client published to, or
        `None`. FastAPI fills in all others: `Depends(…)`, and `Header`, `Cookie`, `Query` and `Path` of the handshake.
        A dependency that yields ends when the function has ended.

        If the function raises `PermissionDenied` or `CallError`, the client is answered with its code. Any other error
        is logged and counted, and answered with `failed`. The connection stays open.

        Args:
            types: A type, or a union of types that one function handles.

        Raises:
            ConfigurationError: If a type has a handler already, or the function can't be called with its messages.
        """
        if inspect.isroutine(types):
            raise ConfigurationError("name the type of the messages: write @manager.on(Say)")

        def add(function: F) -> F:
            self._handlers.add(types, function)
            return function

        return add
