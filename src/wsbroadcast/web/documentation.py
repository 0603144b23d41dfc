"""Sockets in FastAPI's own `/docs`: routes that are in an app's OpenAPI, but answer nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Annotated, Any, Self

from fastapi import APIRouter, Body, params
from fastapi.routing import APIRoute
from pydantic import GetJsonSchemaHandler, PydanticUserError
from pydantic_core import CoreSchema
from pydantic_core.core_schema import tuple_schema
from starlette.responses import Response
from starlette.routing import Match, compile_path
from starlette.types import Scope

from wsbroadcast.documents.schemas import one_of
from wsbroadcast.protocols import schemas as frames
from wsbroadcast.protocols.events import SUBPROTOCOL
from wsbroadcast.protocols.schemas import Schema
from wsbroadcast.typed.sockets import SocketInfo

_WEBSOCKET = f"""A WebSocket, which can't be tried from here. A client sends what stands under *Request body*, and is
sent what stands under `1XX`, frame by frame, each as JSON.

With the subprotocol `{SUBPROTOCOL}` each frame has a `type`: what is broadcast is the `data` of a `message`, and what a
client publishes is the `data` of a `publish`. Other clients send and are sent the bare messages."""

_REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "Refused: the body says why, in plain text"},
    "503": {"description": "There is no room now, or the broker can't be reached"},
}

_TEXT = {"type": "string"}

_EVENTS = {
    "type": "string",
    "description": "The data of each event is what was broadcast. With `events=1` it is one of the `messages` that a "
    "long poll is answered with.",
}

SINCE = {
    "name": "since",
    "in": "query",
    "schema": _TEXT,
    "description": "The position of the last message that was seen.",
}
"""The parameter of a URL that asks for what was missed."""


class DocumentationRoute(APIRoute):
    """A route that is in an app's documentation, but answers nothing. Requests go to other routes of its path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match no request."""
        return Match.NONE, {}


def unique_id(route: APIRoute) -> str:
    """Return a name for an operation of a router. An app's own way of naming might need tags, and it has none."""
    return re.sub(r"\W", "_", f"{route.name}{route.path_format}_{'_'.join(sorted(route.methods or ())).lower()}")


def document(router: APIRouter, path: str, body: Any, dependencies: Sequence[params.Depends], **more: Any) -> None:
    """Add an operation to the OpenAPI of a router.

    Args:
        router: The router.
        path: The path of the operation.
        body: The type of what a client sends; `None` for nothing.
        dependencies: Dependencies whose parameters are documented as well.
        more: Options of `add_api_route`.
    """

    def endpoint() -> None: ...

    names = list(compile_path(path)[2])
    fields: dict[str, Any] = dict.fromkeys(names, str)
    if body is not None:
        # The name is shown as the title. No parameter of a path has this name.
        fields["what_a_client_sends"] = Annotated[body, Body()]
    parameters = [Parameter(name, Parameter.KEYWORD_ONLY, annotation=each) for name, each in fields.items()]
    endpoint.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    router.add_api_route(
        path,
        endpoint,
        dependencies=dependencies,
        response_class=Response,
        generate_unique_id_function=unique_id,
        route_class_override=DocumentationRoute,
        **more,
    )


def document_websocket(
    router: APIRouter, path: str, socket: SocketInfo, dependencies: Sequence[params.Depends]
) -> None:
    """Add a WebSocket to the OpenAPI of a router.

    It is documented under its path plus a fragment, which no request has: the app may have a page at the same path.
    """
    document(
        router,
        f"{path}#websocket",
        _described(socket, _said),
        dependencies,
        methods=["GET"],
        name="wsbroadcast",
        summary="WebSocket",
        description=_WEBSOCKET,
        status_code=101,
        response_description="The connection is open",
        responses={"1XX": {"model": _described(socket, _told), "description": "What a client is sent"}} | _REFUSED,
        openapi_extra={"parameters": [SINCE]},
    )


def document_http(
    router: APIRouter,
    path: str,
    socket: SocketInfo,
    query: list[dict[str, Any]],
    dependencies: Sequence[params.Depends],
) -> None:
    """Add what a path serves over HTTP to the OpenAPI of a router: events, long poll, and what clients POST.

    Args:
        router: The router.
        path: The path.
        socket: The types of what goes over it.
        query: The parameters of a GET.
        dependencies: Dependencies whose parameters are documented as well.
    """
    document(
        router,
        path,
        None,
        dependencies,
        methods=["GET"],
        name="wsbroadcast_events",
        summary="Listen by server-sent events, or by long poll",
        response_description="What is broadcast to the channel",
        responses={
            200: {"model": _described(socket, _polled), "content": {"text/event-stream": {"schema": _EVENTS}}},
            **_REFUSED,
        },
        openapi_extra={"parameters": query},
    )
    document(
        router,
        path,
        _described(socket, _posted),
        dependencies,
        methods=["POST"],
        name="wsbroadcast_command",
        summary="Publish, or call a method",
        response_description="The result",
        responses={
            200: {"model": _described(socket, _answered)},
            "4XX": {"model": _described(socket, _failed), "description": "It was not done"},
            "5XX": {"model": _described(socket, _failed), "description": "It may have been done"},
        },
    )


# Types whose schema is made together with the document: by then a manager may have more methods.


class _Described:
    # A type whose JSON Schema is made by a function, from the types of a socket.
    def __init__(self, socket: SocketInfo, describe: Callable[[SocketInfo, _Types], Schema]) -> None:
        self._socket = socket
        self._describe = describe

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return self._describe(self._socket, _Types(self._socket, handler))

    def __deepcopy__(self, memo: object) -> Self:
        # FastAPI copies the responses that a route declares.
        return self


class _Types:
    # The types of a socket, as schemas of the document that is being made.
    def __init__(self, socket: SocketInfo, handler: GetJsonSchemaHandler) -> None:
        self._socket = socket
        self._handler = handler

    def _schema(self, types: CoreSchema) -> Schema:
        # As an item of a tuple: otherwise the handler would take it for a part of the type that it belongs to.
        try:
            found: Schema = self._handler(tuple_schema([types]))["prefixItems"][0]
        except PydanticUserError:  # a method's type has no schema; the rest of the app's documentation still works
            return {"description": "A type without a JSON Schema."}
        return found

    @property
    def receives(self) -> Schema:
        types = self._socket.receives
        return frames.untyped(self._socket.accepts) if types is None else self._schema(types.adapter.core_schema)

    @property
    def sends(self) -> Schema:
        if self._socket.sends is None:
            return {}
        every = dict.fromkeys([self._socket.sends, *self._socket.others()])
        return one_of([self._schema(types.adapter.core_schema) for types in every])

    @property
    def calls(self) -> list[Schema]:
        found = []
        for name, method in sorted(self._socket.methods.items()):
            arguments = self._schema(method.arguments.__pydantic_core_schema__)
            needs_any = bool(self._handler.resolve_ref_schema(arguments).get("required"))
            found.append(frames.call({"const": name}, arguments, needs_any=needs_any))
        return found

    @property
    def results(self) -> list[Schema]:
        methods = [method for _, method in sorted(self._socket.methods.items())]
        return [
            frames.result({} if method.result is None else self._schema(method.result.core_schema))
            for method in methods
        ]

    @property
    def published(self) -> list[Schema]:
        return frames.published(is_typed=self._socket.receives is not None)


def _described(socket: SocketInfo, describe: Callable[[SocketInfo, _Types], Schema]) -> Any:
    return Annotated[Any, _Described(socket, describe)]


def _said(socket: SocketInfo, types: _Types) -> Schema:
    commands = [*types.calls, *frames.commands().values()]
    if not socket.takes_publish:
        return _group(SUBPROTOCOL, commands)
    commands = [frames.publish(types.receives), *commands]
    plain = [types.receives]
    if socket.inbound == "commands":
        plain = [each for each in commands if each["title"] in ("publish", "subscribe", "unsubscribe")]
    return {"anyOf": [_group("plain", plain), _group(SUBPROTOCOL, commands)]}


def _told(socket: SocketInfo, types: _Types) -> Schema:
    plain = [types.sends]
    told = [*frames.events(types.sends).values(), *frames.answers().values(), *types.results, frames.error()]
    if socket.takes_publish:
        plain.append(frames.error())
        told += types.published
    return {"anyOf": [_group("plain", plain), _group(SUBPROTOCOL, told)]}


def _polled(socket: SocketInfo, types: _Types) -> Schema:
    return frames.polled(types.sends)


def _posted(socket: SocketInfo, types: _Types) -> Schema:
    publish = [frames.publish(types.receives, is_posted=True)] if socket.takes_posted_publish else []
    return _any_of([*publish, *types.calls])


def _answered(socket: SocketInfo, types: _Types) -> Schema:
    return _any_of([*(types.published if socket.takes_posted_publish else ()), *types.results])


def _failed(socket: SocketInfo, types: _Types) -> Schema:
    return frames.error()


def _any_of(schemas: list[Schema]) -> Schema:
    return {"anyOf": schemas} if schemas else {"type": "object"}


def _group(title: str, schemas: list[Schema]) -> Schema:
    return {"title": title, "anyOf": schemas}
