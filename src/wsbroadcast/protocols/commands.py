"""The commands of clients that speak events: they are read here, and answers are written. No I/O.

A command is an object of JSON with a `type`. `Session.read` returns what is to be done, or raises `Refused`, which has
an answer with a code. The code that has the connection, or the POST, carries the command out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any, Literal, TypeAlias

from pydantic_core import to_json

from wsbroadcast.history import MAX_KEY_BYTES
from wsbroadcast.publication import POSITION_TEXT

MAX_ID_CHARACTERS = 200
"""The longest `id` of a command, in characters. The name of a channel fits."""

MAX_CALLS = 16
"""How many calls of one connection may run at once."""

MAX_TOKEN_CHARACTERS = 8192
"""The longest token, in characters. Longer ones are rejected."""

Answer = dict[str, Any]
"""The answer to a command."""


class ErrorCode(StrEnum):
    """Why a command was not done: the `code` of an `error`."""

    INVALID_COMMAND = "invalid_command"
    """No such command is known. Sending it again doesn't help."""
    INVALID_CHANNEL = "invalid_channel"
    """The channel's name breaks a rule."""
    INVALID_DATA = "invalid_data"
    """The data can't be sent here, or is too large. If the server knows its type, `errors` says what doesn't fit."""
    INVALID_ARGUMENTS = "invalid_arguments"
    """The arguments of a call don't fit. `errors` says where."""
    UNKNOWN_METHOD = "unknown_method"
    """There is no method of this name."""
    UNAUTHENTICATED = "unauthenticated"
    """The token is not valid. The connection stays as it was."""
    FORBIDDEN = "forbidden"
    """The client may not do this."""
    NOT_SUPPORTED = "not_supported"
    """The server isn't set up for this."""
    LIMIT_EXCEEDED = "limit_exceeded"
    """It would go past a limit."""
    UNAVAILABLE = "unavailable"
    """The broker can't be reached. Try again later. A publication may have been sent nevertheless."""
    TIMEOUT = "timeout"
    """A call took too long and was cancelled. What it had done by then is done."""
    FAILED = "failed"
    """The server has made a mistake. It is in the server's log."""


class Refused(Exception):
    """Raised for a command that isn't done. It has the answer."""

    def __init__(self, code: ErrorCode | str, text: str, **more: Any) -> None:
        self.answer = error_answer(code, text, **more)
        """The answer to the command."""
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Get what is published to a channel."""

    channel: str
    since: str | None


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Stop getting what is published to a channel."""

    channel: str


@dataclass(frozen=True, slots=True)
class Watch:
    """Be told who is in a channel, or stop being told."""

    channel: str
    begins: bool


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish to a channel; to everyone, if the channel is `None`."""

    channel: str | None
    data: Any
    encoding: Literal["base64"] | None = None
    idempotency_key: str | None = None
    client: str | None = None

    def key_of(self, user_key: str | None) -> str | None:
        """Return the key under which it is remembered. It has the user's name, so nobody can use up another user's key.

        Raises:
            Refused: If it has a key, but neither a user nor a `client`.
        """
        if self.idempotency_key is None:
            return None
        if user_key is None and self.client is None:
            raise Refused(
                ErrorCode.INVALID_COMMAND,
                "an idempotency_key of a client without a user needs client, a random text of 16 to 64 characters that "
                "it keeps",
            )
        whose = ["user", user_key] if user_key is not None else ["client", self.client]
        return sha256(to_json([*whose, self.idempotency_key])).hexdigest()


@dataclass(frozen=True, slots=True)
class Call:
    """Call a method."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Refresh:
    """Go on with another token."""

    token: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask whether the connection is alive."""


@dataclass(frozen=True, slots=True)
class Pong:
    """Say that the client is alive. It isn't answered."""


Command: TypeAlias = Subscribe | Unsubscribe | Watch | Publish | Call | Refresh | Ping | Pong
"""Everything that a client may ask for."""


class Session:
    """What one client may ask for, and how many of its calls run.

    Args:
        path_channel: The channel of the path; `None` if the path names none.
        publishes: Where the client may publish: only to the channel of the path (`path`); also to everyone if the path
            names no channel (`path_or_everyone`); anywhere (`anywhere`); or nowhere (`nowhere`).
    """

    def __init__(
        self, path_channel: str | None, publishes: Literal["nowhere", "path", "path_or_everyone", "anywhere"]
    ) -> None:
        self._path_channel = path_channel
        self._publishes = publishes
        self.calls = 0
        """How many of its calls are running."""

    def read(self, command: object) -> Command:
        """Return what a client asks for. Its calls are counted by `begun` and `ended`.

        Raises:
            Refused: If it is not a command, or may not be done.
        """
        if not isinstance(command, dict):
            raise Refused(ErrorCode.INVALID_COMMAND, "a command is an object with a type")
        kind = command.get("type")
        reader = _READERS.get(kind) if isinstance(kind, str) else None
        if reader is None:
            raise Refused(ErrorCode.INVALID_COMMAND, f"a command has a type, one of {', '.join(_READERS)}")
        found = reader(command)
        if isinstance(found, Publish):
            return self._allowed(found)
        if isinstance(found, Watch) and not found.channel:
            return Watch(self._path(), found.begins)
        if isinstance(found, Call) and self.calls >= MAX_CALLS:
            raise Refused(ErrorCode.LIMIT_EXCEEDED, f"{MAX_CALLS} calls run already")
        return found

    def _path(self) -> str:
        if self._path_channel is None:
            raise Refused(ErrorCode.INVALID_COMMAND, "presence needs a channel here")
        return self._path_channel

    def _allowed(self, publish: Publish) -> Publish:
        channel = self._path_channel if publish.channel is None else publish.channel
        if channel is None and self._publishes == "anywhere":
            raise Refused(ErrorCode.INVALID_COMMAND, "to publish needs a channel here")
        is_path = channel == self._path_channel and (channel is not None or self._publishes == "path_or_everyone")
        if self._publishes == "nowhere" or not (is_path or self._publishes == "anywhere"):
            raise Refused(ErrorCode.FORBIDDEN, "not allowed")
        return Publish(channel, publish.data, publish.encoding, publish.idempotency_key, publish.client)

    def begun(self) -> None:
        """Count a call that has begun."""
        self.calls += 1

    def ended(self) -> None:
        """Count a call that has ended."""
        self.calls -= 1


def _text(command: Mapping[str, Any], name: str, most: int, least: int = 1) -> str:
    value = command.get(name)
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise Refused(ErrorCode.INVALID_COMMAND, f"{name} is a text of {least} to {most:,} characters")
    return value


def _channel(command: Mapping[str, Any]) -> str:
    channel = command.get("channel")
    if not isinstance(channel, str):
        raise Refused(ErrorCode.INVALID_COMMAND, "channel is a text")
    return channel


def _subscribe(command: Mapping[str, Any]) -> Subscribe:
    since = command.get("since")
    if since is not None and not isinstance(since, str):
        raise Refused(ErrorCode.INVALID_COMMAND, f'since is "last", or a text: {POSITION_TEXT}')
    return Subscribe(_channel(command), since or None)


def _presence(command: Mapping[str, Any]) -> Watch:
    begins = command.get("watch", True)
    if not isinstance(begins, bool):
        raise Refused(ErrorCode.INVALID_COMMAND, "watch is true or false")
    return Watch("" if command.get("channel") is None else _channel(command), begins)


def _publish(command: Mapping[str, Any]) -> Publish:
    if "data" not in command:
        raise Refused(ErrorCode.INVALID_COMMAND, "to publish needs data")
    encoding = command.get("encoding")
    if encoding not in (None, "base64") or (encoding and not isinstance(command["data"], str)):
        raise Refused(ErrorCode.INVALID_COMMAND, "encoding is base64 with data that is a text, or missing")
    channel = None if command.get("channel") is None else _channel(command)
    key = None if command.get("idempotency_key") is None else _text(command, "idempotency_key", MAX_KEY_BYTES)
    client = None if command.get("client") is None else _text(command, "client", 64, 16)
    return Publish(channel, command["data"], "base64" if encoding else None, key, client)


def _call(command: Mapping[str, Any]) -> Call:
    arguments = command.get("args", {})
    if not isinstance(arguments, dict):
        raise Refused(ErrorCode.INVALID_COMMAND, "args is an object: the arguments by their names")
    return Call(_text(command, "name", 200), arguments)


def _refresh(command: Mapping[str, Any]) -> Refresh:
    return Refresh(_text(command, "token", MAX_TOKEN_CHARACTERS))


_READERS: dict[str, Callable[[Mapping[str, Any]], Command]] = {
    "subscribe": _subscribe,
    "unsubscribe": lambda command: Unsubscribe(_channel(command)),
    "presence": _presence,
    "publish": _publish,
    "call": _call,
    "refresh": _refresh,
    "ping": lambda command: Ping(),
    "pong": lambda command: Pong(),
}


# Answers.


def error_answer(code: ErrorCode | str, text: str, **more: Any) -> Answer:
    """Return the answer that says why something was not done."""
    return {"type": "error", "code": str(code), "text": text, **more}


def id_of(command: object) -> Answer:
    """Return the `id` of a command for its answer, if it has a valid one."""
    match command:
        case {"id": bool()}:
            return {}
        case {"id": str() as found} if len(found) <= MAX_ID_CHARACTERS:
            return {"id": found}
        case {"id": int() as found} if abs(found) < 10**MAX_ID_CHARACTERS:
            return {"id": found}
    return {}
