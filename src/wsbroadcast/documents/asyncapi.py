"""AsyncAPI 3.0 of an app's WebSockets, as JSON: https://www.asyncapi.com/docs/reference/specification/v3.0.0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from wsbroadcast.documents.draft7 import draft7
from wsbroadcast.documents.names import Names
from wsbroadcast.documents.schemas import Schema
from wsbroadcast.documents.sockets import Socket, describe, sockets_of
from wsbroadcast.protocols import schemas as frames
from wsbroadcast.protocols.events import SUBPROTOCOL

Document = dict[str, Any]
"""A JSON object."""

_REF = "#/components/schemas/{model}"

_CONTENT = {"text": "text/plain", "bytes": "application/octet-stream"}

_ABOUT = (
    f"A client that offers the subprotocol `{SUBPROTOCOL}` speaks in frames: its channel is the one whose name ends in "
    "`_events`. `receive` is what clients send, `send` is what they are sent."
)


def asyncapi(app: Any, manager: object | None = None) -> Document:
    """Describe the WebSockets of an app: their paths, what clients send and are sent, and the frames of the protocol.

    The same app always gives the same document. It is made anew with each call.

    Args:
        app: A FastAPI or Starlette app. The document has the title, version and description of a FastAPI app.
        manager: Describe only the WebSockets of this manager; by default those of all managers.

    Raises:
        ConfigurationError: If the app has no WebSocket of a router, or a type has no JSON Schema.
    """
    sockets = sockets_of(app, manager)
    definitions = describe(sockets, _REF)
    writer = _Writer()
    for socket in sockets:
        writer.write(socket)
    about = [text for text in (getattr(app, "description", ""), _ABOUT) if text]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": getattr(app, "title", None) or "Sockets",
            "version": getattr(app, "version", None) or "0.1.0",
            "description": "\n\n".join(about),
        },
        "defaultContentType": "application/json",
        "channels": writer.channels,
        "operations": writer.operations,
        "components": {
            "messages": writer.messages,
            "schemas": {name: draft7(schema) for name, schema in definitions.items()},
        },
    }


class _Writer:
    # Collects the parts of a document.
    def __init__(self) -> None:
        self.channels: Document = {}
        self.operations: Document = {}
        self.messages: Document = {}
        self.operation_names = Names()
        self._names = Names()

    def write(self, socket: Socket) -> None:
        """Add the channels of a socket."""
        name = self._names.new("_".join(socket.words), "", "_events", "_http")
        if socket.info.has_websocket:
            self._plain(name, socket)
            self._events(f"{name}_events", socket)
        if socket.info.has_http:
            self._http(f"{name}_http", socket)

    def _plain(self, name: str, socket: Socket) -> None:
        channel = _Channel(self, name, socket, "Plain messages, without the frames of the protocol.", _websocket())
        if socket.info.inbound == "commands":
            said = {**frames.commands(), "publish": frames.publish(channel.data)}
            channel.receive("", channel.frames(said[kind] for kind in ("subscribe", "unsubscribe", "publish")))
            told = [frames.subscribed(), frames.answers()["unsubscribed"]]
            told += frames.published(is_typed=socket.receives is not None)
            sent = channel.frames([*told, frames.message(socket.sends or {})])
        else:
            if socket.info.takes_publish:
                content = _CONTENT.get(socket.info.accepts)
                channel.receive("", channel.values(channel.data, "received", content))
            sent = channel.values(socket.sends or {}, "sent")
        if socket.info.takes_publish:
            sent += channel.frames([frames.error()])
        channel.send("", sent)

    def _events(self, name: str, socket: Socket) -> None:
        channel = _Channel(self, name, socket, f"Frames of `{SUBPROTOCOL}`.", _websocket(SUBPROTOCOL))
        channel.send("", channel.frames(frames.events(socket.sends or {}).values()))
        answers = {**frames.answers(), **frames.events({})}
        error = channel.frames([frames.error()])
        for kind, schema in frames.commands().items():
            answer = [answers[_ANSWERS[kind]]] if kind in _ANSWERS else []
            channel.receive(kind, channel.frames([schema]), channel.frames(answer) + error if answer else [])
        if socket.info.takes_publish:
            channel.publish(frames.publish(channel.data))
        channel.calls()

    def _http(self, name: str, socket: Socket) -> None:
        channel = _Channel(self, name, socket, "Server-sent events, long poll and commands by POST.")
        sent = channel.values(socket.sends or {}, "sent") + channel.frames(frames.events(socket.sends or {}).values())
        sent += channel.frames([frames.close(), frames.polled(socket.sends or {})])
        channel.send("", sent, {"http": {"method": "GET", "bindingVersion": "0.3.0"}})
        posted = {"http": {"method": "POST", "bindingVersion": "0.3.0"}}
        if socket.info.takes_posted_publish:
            channel.publish(frames.publish(channel.data, is_posted=True), posted)
        channel.calls(posted)


# The answers to commands.
_ANSWERS = {
    "subscribe": "subscribed",
    "unsubscribe": "unsubscribed",
    "presence": "presence",
    "refresh": "refreshed",
    "ping": "pong",
}


class _Channel:
    # One channel of a document, to which operations and messages are added.
    def __init__(self, writer: _Writer, name: str, socket: Socket, about: str, binding: Document | None = None) -> None:
        self._writer = writer
        self._name = name
        self._socket = socket
        self._names = Names()
        self._messages: Document = {}
        self._keys: dict[str, str] = {}
        channel: Document = {"address": socket.path, "description": about, "messages": self._messages}
        if socket.parameters:
            channel["parameters"] = {
                each: {"description": f"The part of the path at `{{{each}}}`."} for each in socket.parameters
            }
        if binding is not None:
            channel["bindings"] = binding
        writer.channels[name] = channel

    @property
    def data(self) -> Schema:
        """The schema of what clients publish."""
        found = self._socket.receives
        return frames.untyped(self._socket.info.accepts) if found is None else found

    def publish(self, schema: Schema, binding: Document | None = None) -> None:
        """Add the command that publishes."""
        told = [*frames.published(is_typed=self._socket.receives is not None), frames.error()]
        self.receive("publish", self.frames([schema]), self.frames(told), binding)

    def calls(self, binding: Document | None = None) -> None:
        """Add the methods."""
        for method, call in sorted(self._socket.calls.items()):
            schema = frames.call({"const": method}, call.arguments, needs_any="required" in call.arguments)
            asked = [self._add(f"call_{_key(method)}", schema)]
            told = [self._add(f"result_{_key(method)}", frames.result(call.result)), *self.frames([frames.error()])]
            self.receive(f"call_{_key(method)}", asked, told, binding)

    def values(self, schema: Schema, unnamed: str, content: str | None = None) -> list[str]:
        """Add a message for each member of a type; return their keys."""
        members = schema.get("oneOf") or schema.get("anyOf") or [schema]
        return [self._add(_name_of(each) or unnamed, each, content) for each in members]

    def frames(self, schemas: Iterable[Schema]) -> list[str]:
        """Add messages of the protocol itself, and return their keys."""
        return [self._add(schema["title"], schema) for schema in schemas]

    def _add(self, name: str, schema: Schema, content: str | None = None) -> str:
        # Two with the same name and the same schema are one message.
        payload = draft7(schema)
        message = {"name": name, "title": name, "payload": payload}
        if (about := schema.get("description")) is not None:
            message["summary"] = about
        if content is not None:
            message["contentType"] = content
        for key, wanted in self._keys.items():
            if wanted == name and self._writer.messages[f"{self._name}.{key}"] == message:
                return key
        key = self._names.new(name)
        self._keys[key] = name
        self._writer.messages[f"{self._name}.{key}"] = message
        self._messages[key] = {"$ref": f"#/components/messages/{self._name}.{key}"}
        return key

    def receive(
        self, kind: str, keys: list[str], reply: list[str] | None = None, binding: Document | None = None
    ) -> None:
        """Add what clients send, and the answers to it."""
        operation = self._operation("receive", kind, keys, binding)
        if reply:
            operation["reply"] = {"channel": operation["channel"], "messages": self._refs(reply)}

    def send(self, kind: str, keys: list[str], binding: Document | None = None) -> None:
        """Add what clients are sent."""
        self._operation("send", kind, keys, binding)

    def _operation(self, action: str, kind: str, keys: list[str], binding: Document | None) -> Document:
        operation: Document = {
            "action": action,
            "channel": {"$ref": f"#/channels/{self._name}"},
            "messages": self._refs(keys),
        }
        if binding is not None:
            operation["bindings"] = binding
        name = "_".join(part for part in (action, self._name, kind) if part)
        self._writer.operations[self._writer.operation_names.new(name)] = operation
        return operation

    def _refs(self, keys: list[str]) -> list[Document]:
        return [{"$ref": f"#/channels/{self._name}/messages/{key}"} for key in dict.fromkeys(keys)]


def _websocket(subprotocol: str | None = None) -> Document:
    binding: Document = {"method": "GET", "bindingVersion": "0.1.0"}
    if subprotocol is not None:
        header = {"type": "string", "const": subprotocol}
        binding["headers"] = {"type": "object", "properties": {"Sec-WebSocket-Protocol": header}}
    return {"ws": binding}


def _name_of(schema: Schema) -> str | None:
    return _key(schema["$ref"].rpartition("/")[2]) if "$ref" in schema else None


def _key(name: str) -> str:
    return "".join(each if each.isascii() and each.isalnum() else "_" for each in name)
