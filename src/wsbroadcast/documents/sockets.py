"""Finds the WebSockets of an app, and the types that their routers declare."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.routing import Host, Mount, compile_path

from wsbroadcast.documents.names import words_of
from wsbroadcast.documents.schemas import Definitions, Schema, Wanted, one_of, schemas_of
from wsbroadcast.exceptions import ConfigurationError, kind_of
from wsbroadcast.methods import Method
from wsbroadcast.typed.message_types import MessageTypes
from wsbroadcast.typed.sockets import SocketInfo


class Call(NamedTuple):
    """The schemas of a method."""

    arguments: Schema
    """The schema of an object with the arguments by name."""
    result: Schema
    """The schema of the result."""


@dataclass(slots=True)
class Socket:
    """One path by which clients connect, with the schemas of its messages."""

    path: str
    """The path, with all prefixes and mounts."""
    info: SocketInfo
    """What its router declares."""
    receives: Schema | None = None
    """The schema of what clients send; `None` if it isn't declared."""
    sends: Schema | None = None
    """The schema of what clients are sent; `None` if it isn't declared."""
    calls: dict[str, Call] = field(default_factory=dict)
    """The schemas of the methods that its clients may call."""

    @property
    def parameters(self) -> list[str]:
        """The parameters of its path."""
        return re.findall(r"\{(\w+)\}", self.path)

    @property
    def words(self) -> list[str]:
        """The words of its path, of which names are made."""
        return words_of(self.path)


def sockets_of(app: Any, manager: object | None = None) -> list[Socket]:
    """Return the WebSockets of an app that routers have made, in the order of its routes.

    WebSockets of the app's own endpoints are left out, because their messages aren't known.

    Args:
        app: A FastAPI or Starlette app, or anything with `routes`.
        manager: Return only the WebSockets of this manager; by default those of all managers.

    Raises:
        ConfigurationError: If it is no app, or has no such WebSocket.
    """
    routes = getattr(app, "routes", None)
    if not isinstance(routes, Iterable):
        raise ConfigurationError(f"expected a FastAPI or Starlette app, not {kind_of(app)}")
    found: dict[tuple[str, int], Socket] = {}
    for path, route in _flat(routes, ""):
        info = getattr(getattr(getattr(route, "endpoint", None), "__self__", None), "socket", None)
        if isinstance(info, SocketInfo) and (manager is None or info.manager is manager):
            found.setdefault((path, id(info)), Socket(path, info))
    if not found:
        whose = "a router" if manager is None else "a router of this manager"
        raise ConfigurationError(
            f"the app has no socket of {whose}: write app.include_router(create_router(manager, …))"
        )
    return [*found.values()]


def _flat(routes: Iterable[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for route in routes:
        # Newer versions of FastAPI keep an included router as one route. Its own routes have the prefix in their paths.
        contexts: Callable[[], Iterable[Any]] | None = getattr(route, "effective_route_contexts", None)
        if contexts is not None:
            yield from _flat((each.starlette_route or each for each in contexts()), prefix)
        elif isinstance(route, Mount):
            yield from _flat(route.routes or (), prefix + route.path)
        elif isinstance(route, Host):
            yield from _flat(route.routes or (), prefix)
        else:
            yield compile_path(prefix)[1] + getattr(route, "path_format", ""), route


def describe(sockets: list[Socket], ref_template: str = "#/$defs/{model}") -> Definitions:
    """Give sockets their schemas, and return the definitions to which these refer.

    Raises:
        ConfigurationError: If a type has no JSON Schema.
    """
    managers = {id(socket.info.manager): socket.info.methods for socket in sockets}
    wanted = [each for socket in sockets for each in _messages(socket)]
    wanted += [each for methods in managers.values() for name in methods for each in _call(name, methods[name])]
    schemas, definitions = schemas_of(wanted, ref_template)
    each = iter(schemas)
    for socket in sockets:
        socket.receives = None if socket.info.receives is None else next(each)
        if socket.info.sends is not None:
            socket.sends = one_of([next(each) for _ in _sent(socket.info.sends, socket.info)])
    calls = {
        owner: {
            name: Call(_arguments(next(each), definitions), {} if methods[name].result is None else next(each))
            for name in methods
        }
        for owner, methods in managers.items()
    }
    for socket in sockets:
        socket.calls = calls[id(socket.info.manager)]
    return definitions


def _messages(socket: Socket) -> Iterator[Wanted]:
    info = socket.info
    if info.receives is not None:
        yield Wanted(info.receives.adapter, "validation", f"receives of {socket.path}")
    if info.sends is not None:
        for types in _sent(info.sends, info):
            yield Wanted(types.adapter, "serialization", f"sends of {socket.path}")


def _sent(sends: MessageTypes[Any], info: SocketInfo) -> list[MessageTypes[Any]]:
    # The types of what is sent to the channel of the path, to the user, and to everyone.
    return [*dict.fromkeys([sends, *info.others()])]


def _call(name: str, method: Method) -> Iterator[Wanted]:
    yield Wanted(method.arguments, "validation", f"the arguments of method {name!r}")
    if method.result is not None:
        yield Wanted(method.result, "serialization", f"the result of method {name!r}")


def _arguments(schema: Schema, definitions: Definitions) -> Schema:
    # Only this method uses the model of its arguments, so nothing else refers to it, and its titles say nothing.
    found = definitions.pop(schema["$ref"].rpartition("/")[2]) if "$ref" in schema else schema
    fields = {
        name: {key: value for key, value in each.items() if key != "title"}
        for name, each in found["properties"].items()
    }
    return {**{key: value for key, value in found.items() if key != "title"}, "properties": fields}
