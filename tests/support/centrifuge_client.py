"""A client of the Centrifuge protocol in the same event loop, in either form; what payloads hold are values of JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal

import jwt
import pytest
from fastapi import FastAPI

from tests.support.asgi import App, Peer, lifespan, visit
from tests.support.centrifuge import MESSAGES, as_runtime, behind_lengths, is_message, replies_of
from wsbroadcast import ConnectionManager, History, Identity, Presence, create_centrifuge_router

Form = Literal["json", "protobuf"]
Told = dict[str, Any]

BOTH = pytest.mark.parametrize("form", ["json", "protobuf"])

PATH = "/connection/websocket"


def with_payloads(name: str, message: Mapping[str, Any], change: Callable[[Any], Any]) -> Told:
    """Change the payloads of a message, as from values to bytes."""
    changed = dict(message)
    for each in MESSAGES[name]:
        if each.name not in changed:
            continue
        value = changed[each.name]
        if each.type == "raw":
            changed[each.name] = change(value)
        elif is_message(each) and each.is_map:
            changed[each.name] = {key: with_payloads(each.type, inner, change) for key, inner in value.items()}
        elif is_message(each) and each.is_repeated:
            changed[each.name] = [with_payloads(each.type, inner, change) for inner in value]
        elif is_message(each):
            changed[each.name] = with_payloads(each.type, value, change)
    return changed


def _value_of(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except ValueError:
        return payload


class Client:
    """What one client says and is told.

    Args:
        peer: Its socket.
        form: Which form it speaks.
    """

    def __init__(self, peer: Peer, form: Form) -> None:
        self.peer = peer
        self.form = form
        self.sends: set[int] = set()
        """The ids of what it has sent that isn't answered."""
        self._told: list[Told] = []
        self._read = 0
        self._id = 0

    # What it says.

    def frame(self, *commands: Mapping[str, Any]) -> str | bytes:
        """Make a frame of commands as they are."""
        if self.form == "json":
            return "\n".join(map(json.dumps, commands))
        made = [with_payloads("Command", each, lambda value: json.dumps(value).encode()) for each in commands]
        return behind_lengths(*(as_runtime("Command", each) for each in made))

    def say(self, *commands: Mapping[str, Any]) -> None:
        """Send commands as they are, in one frame."""
        self.sends |= {each["id"] for each in commands if "send" in each and "id" in each}
        self.peer.say(self.frame(*commands))

    def begin(self, method: str, /, **request: Any) -> int:
        """Send a command; return its id."""
        self._id += 1
        self.say({"id": self._id, method: request})
        return self._id

    async def ask(self, method: str, /, **request: Any) -> Told:
        """Send a command; return the answer to it."""
        return await self.answer(self.begin(method, **request))

    async def result(self, method: str, /, **request: Any) -> Told:
        """Send a command; return its result."""
        answer = await self.ask(method, **request)
        assert method in answer, answer
        result: Told = answer[method]
        return result

    async def error(self, method: str, /, **request: Any) -> int:
        """Send a command; return the code of the error that it is answered with."""
        answer = await self.ask(method, **request)
        assert "error" in answer, answer
        assert answer["error"]["message"], answer
        assert method not in answer
        code: int = answer["error"]["code"]
        return code

    # What it is told.

    @property
    def told(self) -> list[Told]:
        """All answers and pushes so far, without pings."""
        for frame in self.peer.messages[self._read :]:
            self._read += 1
            self._told += [each for each in self._lines(frame) if each]
        return self._told

    def _lines(self, frame: str | bytes) -> list[Told]:
        if self.form == "json":
            assert isinstance(frame, str), "a JSON client gets text frames"
            return [json.loads(line) for line in frame.split("\n")]  # an empty line is an error, as in SDKs
        assert isinstance(frame, bytes), "a Protobuf client gets binary frames"
        return [with_payloads("Reply", each, _value_of) for each in replies_of(frame)]

    async def until(self, condition: Callable[[Told], bool]) -> Told:
        """Wait until it was told something of a kind."""
        await self.peer.wait_for(lambda: any(map(condition, self.told)) or self.peer.close is not None)
        found = next(filter(condition, self.told), None)
        assert found is not None, f"closed: {self.peer.end}; told: {self.told}"
        return found

    async def answer(self, id_: int) -> Told:
        """Wait for the answer to a command."""
        return await self.until(lambda each: each.get("id") == id_)

    def pushes(self, channel: str | None = None, kind: str = "pub") -> list[Told]:
        """The pushes of a kind so far, about a channel or about none."""
        found = [each["push"] for each in self.told if "push" in each]
        return [each[kind] for each in found if each.get("channel") == channel and kind in each]

    async def wait_pushes(self, count: int, channel: str | None = None, kind: str = "pub") -> list[Told]:
        """Wait until so many pushes have come; return all."""
        await self.peer.wait_for(
            lambda: len(self.pushes(channel, kind)) >= count or self.peer.close is not None,
        )
        found = self.pushes(channel, kind)
        assert len(found) >= count, f"closed: {self.peer.end}; told: {self.told}"
        return found

    async def closed(self) -> int:
        """Wait for the close; return its code. Every SDK must understand it."""
        code = await self.peer.wait_close()
        assert self.peer.end is not None
        reason = self.peer.end[1]
        assert code < 3000 or is_understood(reason), (code, reason)
        return code


def is_understood(reason: str) -> bool:
    """Whether SDKs look at the code: a reason that is empty or JSON tells them something else."""
    if not reason or len(reason.encode()) > 123:
        return False
    try:
        json.loads(reason)
    except ValueError:
        return True
    return False


@asynccontextmanager
async def client(
    app: App, form: Form = "json", path: str = PATH, *, query: str = "", connects: bool | Mapping[str, Any] = True
) -> AsyncIterator[Client]:
    """Open a client's socket to an app, and connect unless it is told not to.

    Args:
        app: The app.
        form: Which form it speaks.
        path: Where.
        query: The query of the URL.
        connects: Whether it sends `connect`, and with what.
    """
    peer = Peer(path, subprotocols=["centrifuge-protobuf"] if form == "protobuf" else [])
    peer.scope["query_string"] = query.encode()
    async with visit(app, path, peer):
        one = Client(peer, form)
        assert peer.subprotocol == ("centrifuge-protobuf" if form == "protobuf" else None)
        if connects is not False:
            await one.result("connect", **(connects if isinstance(connects, Mapping) else {}))
        yield one


# An app for it.

SECRET = "a secret of at least thirty-two bytes"


async def somebody() -> Identity:
    """Everybody is the same user."""
    return Identity("7")


async def allowed(_connection: object, _action: str, channel: str | None) -> bool:
    """All but what begins with `no`."""
    return not (channel or "").startswith("no")


@asynccontextmanager
async def served(manager: ConnectionManager | None = None, **options: Any) -> AsyncIterator[FastAPI]:
    """An app whose users may do everything but with channels that begin with `no`."""
    manager = manager or ConnectionManager(history=History(), presence=Presence(by="connection", grace=0))
    app = FastAPI(lifespan=manager.lifespan)
    if "tokens" not in options:
        options.setdefault("authenticate", somebody)
    app.include_router(create_centrifuge_router(manager, PATH, **{"authorize": allowed, **options}))
    async with lifespan(app):
        yield app
        assert manager.connections == []
        assert manager.stats().channels == 0


def token(key: str = SECRET, /, **claims: Any) -> str:
    """Make a token of user 42."""
    return jwt.encode({"sub": "42", **claims}, key, "HS256")
