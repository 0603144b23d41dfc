"""Messages with types in a router: it reads them, and calls the functions of `manager.on`."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from functools import partial
from typing import Annotated, Any, get_args, get_origin

from fastapi import HTTPException, WebSocket, WebSocketException, params
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import WebSocketRequestValidationError
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection

from wsbroadcast.audience import UNSET, Audience
from wsbroadcast.concurrency import finished
from wsbroadcast.connection import Connection, Exclude
from wsbroadcast.exceptions import (
    ConfigurationError,
    ConnectionClosed,
    EngineError,
    PermissionDenied,
    ungrouped,
)
from wsbroadcast.handlers import Handler
from wsbroadcast.logs import about, logger
from wsbroadcast.methods import CallError
from wsbroadcast.node.core import Core
from wsbroadcast.protocols.commands import ErrorCode, Refused
from wsbroadcast.protocols.typed import TypedReader
from wsbroadcast.publication import Publications
from wsbroadcast.typed.message_types import MessageTypes
from wsbroadcast.typed.mistakes import Invalid
from wsbroadcast.web.access import denial_of
from wsbroadcast.web.authentication import Handshake
from wsbroadcast.web.injection import Injection, begun

CONNECTS = "_wsbroadcast_connects"
"""The attribute that marks a dependency that lets a connection in."""

# The scope's key for the function that is called when the dependencies of a handler are resolved.
_CALL = "wsbroadcast.call"
_WEBSOCKET = "_websocket"

_MEANT = (HTTPException, WebSocketException, WebSocketRequestValidationError, CallError, Refused, EngineError)


class TypedInbound(TypedReader):
    """Reads the messages of a router's clients, and calls their handlers.

    Args:
        core: The core of the manager.
        types: The types of what clients send.

    Raises:
        ConfigurationError: If a handler needs something that a WebSocket doesn't have. `manager.on` raises it too, for
            handlers that are added later.
    """

    def __init__(self, core: Core, types: MessageTypes[Any]) -> None:
        super().__init__(types, core.counters)
        self._core = core
        self._injections: dict[Handler, Injection] = {}
        core.handlers.check_each(self._prepare)

    def read_data(self, data: object) -> Any:
        """Return the message in the data of a command.

        Raises:
            Refused: If the data isn't of the types.
        """
        return self.read(to_json(data))  # by the rules for JSON: only there a strict model takes a date as text

    async def handle(
        self, who: Connection | Handshake, message: Any, channel: str | None, idempotency_key: str | None = None
    ) -> bool:
        """Call the handler of a message; return whether there is one.

        Raises:
            Refused: If the handler refuses or fails, or can't be called for this client.
            PermissionDenied: If the handler raises it.
            EngineError: If the handler raises it.
            ConnectionClosed: If the connection has ended.
        """
        handler = self._core.handlers.get(self.types.member_of(message))
        if handler is None:
            return False
        if idempotency_key is not None:
            raise Refused(ErrorCode.NOT_SUPPORTED, "this isn't kept, so idempotency_key can't be used")
        connection = who if isinstance(who, Connection) else None
        if connection is None and handler.connection is not None:
            raise Refused(ErrorCode.NOT_SUPPORTED, "this is for WebSockets: it needs the connection")
        try:
            await self._call(handler, who.websocket, handler.arguments(message, connection, channel))
        except Exception as error:
            raise self._meant_by(ungrouped(error, PermissionDenied, *_MEANT), handler, who) from None
        return True

    def publications(self, message: Any, channel: str | None, exclude: Exclude = ()) -> Publications:
        """Return the publications of a message that no handler takes, checked by what `sends` says about its channel.

        Raises:
            Refused: If it isn't of that type, or a validator fails.
            EncodeError: If it can't be sent, or is too large.
        """
        audience = Audience.of(UNSET if channel is None else channel, UNSET)
        written = self.types
        if self._core.sends is not None and (sends := self._core.sends.of(audience)) is not None:
            try:
                message, written = sends.check(message), sends
            except Invalid as invalid:
                raise self.refused(invalid) from None
            except Exception as error:
                raise self.failed(error) from None
        return self._core.publications_to(written.write(message), audience, exclude)

    # Calling a handler.

    async def _call(self, handler: Handler, websocket: WebSocket, arguments: dict[str, Any]) -> None:
        task = asyncio.current_task()
        cancelling = 0 if task is None else task.cancelling()
        try:
            await self._inject(handler, websocket, arguments)
        except asyncio.CancelledError as error:
            if task is not None and task.cancelling() > cancelling:
                raise
            raise RuntimeError(f"{handler.name} was cancelled from within") from error

    async def _inject(self, handler: Handler, websocket: WebSocket, arguments: dict[str, Any]) -> None:
        if (injection := self._injections.get(handler)) is None:
            await _run(handler, arguments)
            return

        async def call(found: dict[str, Any]) -> None:
            await _run(handler, arguments | found)

        scope = {**websocket.scope, _CALL: call}
        scope.setdefault("state", {})
        await injection.run(websocket, scope, *begun())

    def _meant_by(self, error: Exception, handler: Handler, who: Connection | Handshake) -> Exception:
        match denial_of(error, who):
            case PermissionDenied() | EngineError() | Refused() as told:
                return told
            case CallError() as told:
                return Refused(told.code, told.text)
            case WebSocketRequestValidationError():  # its text repeats what came
                return Refused(ErrorCode.FORBIDDEN, "the handshake lacks a parameter, or one is wrong")
            case ConnectionClosed() if isinstance(who, Connection) and not who.is_open:
                return error
        self._core.counters.hook_errors += 1
        logger.error(
            "the handler %s failed", handler.name, exc_info=error, extra=about("handler.failed", handler=handler.name)
        )
        return Refused(ErrorCode.FAILED, "a mistake of the server's")

    def _prepare(self, handler: Handler) -> None:
        if handler.others:
            self._injections[handler] = _injection(handler)


async def _run(handler: Handler, arguments: dict[str, Any]) -> None:
    if handler.is_coroutine_function:
        result = await handler.function(**arguments)
    else:
        result = await run_in_threadpool(partial(handler.function, **arguments))
        if isinstance(result, Awaitable):
            result = await result
    finished(result, f"what the handler {handler.name} returned")


# What FastAPI fills in.


def _injection(handler: Handler) -> Injection:
    for each in handler.others.values():
        if not _is_fastapis(each):
            raise ConfigurationError(
                f"{handler.name} takes {each}, which is neither the message, nor the connection, nor channel: str, nor "
                "something of FastAPI's such as Depends(…)"
            )
    parameters = dict(handler.others)
    # FastAPI fills in the WebSocket only once. If the handler has a parameter for it, that one is used.
    own = next((name for name, each in parameters.items() if _is_of(each.annotation, WebSocket)), None)
    name = own or _WEBSOCKET
    parameters[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=WebSocket)

    async def endpoint(**found: Any) -> None:
        call = found[name].scope[_CALL]
        if own is None:
            del found[name]
        await call(found)

    endpoint.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    injection = Injection(endpoint, handler.name)
    _check(injection.dependant, handler.name)
    return injection


def _is_fastapis(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    marks = [parameter.default, *(get_args(annotation)[1:] if get_origin(annotation) is Annotated else ())]
    if any(isinstance(each, (params.Depends, params.Param)) for each in marks):
        return True
    return _is_of(annotation, HTTPConnection)


def _is_of(annotation: Any, kind: type) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, kind)


def _check(dependant: Dependant, name: str) -> None:
    for each in (dependant, *dependant.dependencies):
        if getattr(each.call, CONNECTS, False):
            raise ConfigurationError(f"{name} is called for a connection: write connection: Connection, and no Depends")
        if each.background_tasks_param_name is not None:
            raise ConfigurationError(f"{name} wants BackgroundTasks, which run after a response: there is none")
        if each.body_params:
            raise ConfigurationError(f"{name} wants the body of a request: a message has none")
    for each in dependant.dependencies:
        _check(each, name)
