"""TypeScript of an app's WebSockets: types for calls of the browser client."""

from __future__ import annotations

from typing import Any

from wsbroadcast.documents.emitter import Emitter, identifier
from wsbroadcast.documents.names import Names
from wsbroadcast.documents.sockets import Call, Socket, describe, sockets_of

_HEAD = "// Made by `wsbroadcast types`. Don't change it: make it anew, when the app's types have changed.\n"


def typescript(app: Any, manager: object | None = None) -> str:
    """Write a module with the types that clients of an app's WebSockets send and receive.

    For the path `/ws/{channel}` it has `WsChannelReceives` and `WsChannelSends`, from the page's point of view, for
    `connect<WsChannelReceives, WsChannelSends>("/ws/room:1")`. If there are methods, it has `Methods` too. The same app
    always gives the same text.

    Args:
        app: A FastAPI or Starlette app.
        manager: Write only the types of this manager's WebSockets; by default those of all managers.

    Raises:
        ConfigurationError: If the app has no WebSocket of a router, or a type has no JSON Schema.
    """
    sockets = sockets_of(app, manager)
    names = Names()
    emitter = Emitter(describe(sockets), names)
    parts = [_HEAD, *emitter.declarations()]
    methods: dict[int, str] = {}
    for socket in sockets:
        parts += _of_socket(socket, emitter, names)
        if socket.calls and id(socket.calls) not in methods:
            methods[id(socket.calls)] = name = names.new("Methods")
            parts.append(_of_calls(name, socket.calls, emitter))
    return "\n".join(parts)


def _of_socket(socket: Socket, emitter: Emitter, names: Names) -> list[str]:
    stem = identifier("".join(word[0].upper() + word[1:] for word in socket.words))
    stem = names.new(stem, "Receives", "Sends")
    anything = socket.info.inbound != "ignore"
    return [
        emitter.declaration(f"{stem}Receives", socket.sends or {}, f"What a page receives from {socket.path}."),
        emitter.declaration(f"{stem}Sends", socket.receives or anything, f"What a page sends to {socket.path}."),
    ]


def _of_calls(name: str, calls: dict[str, Call], emitter: Emitter) -> str:
    parts = {method: {"args": call.arguments, "result": call.result} for method, call in sorted(calls.items())}
    fields = {
        method: {"type": "object", "properties": part, "required": ["args", "result"]} for method, part in parts.items()
    }
    schema = {"type": "object", "properties": fields, "required": [*fields]}
    return emitter.declaration(name, schema, "What a page may call, by name.")
