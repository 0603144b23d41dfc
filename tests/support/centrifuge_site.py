"""A server of the Centrifuge client protocol for tests with its SDKs, and what every frame of it has to be."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self

import jwt
from fastapi import FastAPI

from tests.support.brokers import Endpoint, free_port
from tests.support.proxy import FaultProxy
from tests.support.servers import serve_here
from wsbroadcast import (
    USERS,
    CallError,
    CentrifugeTokens,
    ClientTiming,
    Connection,
    ConnectionManager,
    History,
    Presence,
    create_centrifuge_router,
)

PATH = "/connection/websocket"

SECRET = "a secret of thirty-two bytes or more"


def token(user: str = "42", *, expires_in: float | None = None, key: str = SECRET, **claims: Any) -> str:
    """Sign a token, of a connection or, with a `channel`, of a subscription."""
    expiry = {} if expires_in is None else {"exp": int(time.time() + expires_in)}
    return jwt.encode({"sub": user, **expiry, **claims}, key, "HS256")


class Site:
    """A server and a proxy in front of it. Inside `async with` it runs; clients reach it at `url`."""

    def __init__(self, engine: str = "memory://", *, ping_interval: float = 25.0, **options: Any) -> None:
        self._engine = engine
        self._ping_interval = ping_interval
        self._manager_options = {name: options.pop(name) for name in ("limits", "slow_consumer") if name in options}
        self._history = options.pop("history", {"*": History(messages=100), "short:*": History(messages=2)})
        self._options: dict[str, Any] = {
            "tokens": CentrifugeTokens(SECRET),
            "authorize": lambda *_: True,
            "shows_joins": True,
            **options,
        }
        self.endpoint = Endpoint(f"http://127.0.0.1:{free_port()}")
        self.proxy = FaultProxy(self.endpoint)
        self.manager: ConnectionManager
        self.heard: list[Any] = []
        """What clients have sent to the method `note`."""

    @property
    def url(self) -> str:
        """Where clients connect, through the proxy."""
        return f"ws://127.0.0.1:{self.proxy.port}{PATH}"

    async def __aenter__(self) -> Self:
        await self.proxy.start()
        await self.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.proxy.stop()
        await self.end()

    async def begin(self) -> None:
        """Start the server."""
        self.manager = ConnectionManager(
            self._engine,
            history={USERS: History(), **self._history},
            presence=Presence(by="connection", grace=0),
            client_timing=ClientTiming(ping_interval=self._ping_interval),
            **self._manager_options,
        )
        app = FastAPI()
        app.include_router(create_centrifuge_router(self.manager, PATH, **self._options))

        @self.manager.method("add")
        async def add(a: int, b: int) -> int:
            if a < 0:
                raise CallError("negative", "only what is there")
            return a + b

        @self.manager.method("note")
        async def note(connection: Connection, text: str) -> None:
            self.heard.append((connection.user, text))

        self._server = AsyncExitStack()
        self.endpoint.port = await self._server.enter_async_context(serve_here(app, timeout_graceful_shutdown=1))

    async def end(self) -> None:
        """Stop it."""
        await self._server.aclose()

    async def restart(self) -> None:
        """Stop and start it."""
        await self.end()
        await self.begin()


@asynccontextmanager
async def site(*arguments: Any, **options: Any) -> AsyncIterator[Site]:
    """Run a site."""
    async with Site(*arguments, **options) as found:
        yield found


# What holds for every frame, by the number of its socket: `[0, "<", "…"]` was sent to the client, `[0, ">", "…"]` by
# it, and `[0, "x", [code, reason]]` is the end.

_RESULTS = {"connect", "subscribe", "unsubscribe", "publish", "presence", "presence_stats", "history", "rpc", "refresh"}


def check_frames(frames: list[Any]) -> None:
    """Check all that a client of the JSON form was sent, in all its connections."""
    for number in {frame[0] for frame in frames}:
        _check_socket([(kind, data) for socket, kind, data in frames if socket == number])


def _check_socket(frames: list[tuple[str, Any]]) -> None:
    asked: dict[int, dict[str, Any]] = {}
    subscribed: set[str] = set()
    for kind, data in frames:
        if kind == "x":
            _check_close(*data)
            continue
        assert isinstance(data, str), "a frame that is not text"
        for line in data.split("\n"):
            found = json.loads(line)  # also refuses a blank one
            assert isinstance(found, dict)
            if kind == ">" and "id" in found:
                asked[found["id"]] = found
            elif kind == "<" and "push" in found:
                _check_push(found["push"], subscribed)
            elif kind == "<" and found:
                _check_reply(asked.pop(found["id"]), found, subscribed)


def _check_close(code: int, reason: str) -> None:
    if code >= 3000:
        assert reason, f"{code} without a reason"
        try:
            json.loads(reason)
        except ValueError:
            return
        raise AssertionError(f"the reason of {code} is JSON: {reason}")


def _check_push(push: dict[str, Any], subscribed: set[str]) -> None:
    channel = push.get("channel", "")
    kinds = push.keys() - {"channel"}
    assert len(kinds) == 1, push
    if "subscribe" in push:
        subscribed.add(channel)
    elif "message" not in push:
        assert channel in subscribed, f"a push of a channel that it isn't in: {push}"
    if "unsubscribe" in push:
        assert {"code", "reason"} <= push["unsubscribe"].keys()
        subscribed.discard(channel)


def _check_reply(command: dict[str, Any], reply: dict[str, Any], subscribed: set[str]) -> None:
    [kind] = reply.keys() - {"id"}
    if kind == "error":
        assert {"code", "message"} <= reply["error"].keys(), reply
        assert reply["error"]["message"], reply
        return
    assert kind in command, f"{reply} for {command}"
    assert isinstance(reply[kind], dict), reply
    if kind == "connect":
        assert reply["connect"]["client"], reply
        assert reply["connect"]["version"], reply
        subscribed.update(reply["connect"].get("subs", {}))
    elif kind == "subscribe":
        subscribed.add(command["subscribe"]["channel"])
    elif kind == "unsubscribe":
        subscribed.discard(command["unsubscribe"]["channel"])
    elif kind == "presence":
        assert "presence" in reply["presence"], reply
    elif kind == "history":
        assert {"publications", "offset", "epoch"} <= reply["history"].keys(), reply
