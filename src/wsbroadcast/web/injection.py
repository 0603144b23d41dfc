"""Runs a function with its FastAPI dependencies in a scope of its own, which ends together with the function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary, proxy

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIWebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from wsbroadcast.close_codes import CloseCode
from wsbroadcast.exceptions import ConfigurationError


class Injection:
    """Calls a function like the endpoint of a WebSocket, so that FastAPI resolves its dependencies.

    When it returns, dependencies that `yield` have ended: for example, a database session is back in its pool.
    `app.dependency_overrides` is respected.

    Args:
        endpoint: The function.
        name: What an error calls it.

    Raises:
        ConfigurationError: If it depends on something that a WebSocket doesn't have.
    """

    def __init__(self, endpoint: Callable[..., Awaitable[None]], name: str) -> None:
        self._endpoint = endpoint
        route = self._make_route(self, "/")  # so that FastAPI raises its errors now
        self.dependant: Dependant = route.dependant
        """What FastAPI knows about the function."""
        _check(route.dependant, name)
        # By app, because each app has its own overrides; and by path parameters, because a dependency may ask for them.
        self._routes: WeakKeyDictionary[Any, dict[tuple[str, ...], APIWebSocketRoute]] = WeakKeyDictionary()

    async def run(self, websocket: WebSocket, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the function.

        Args:
            websocket: The WebSocket whose app and path parameters count.
            scope: A copy of the scope, for the function and its dependencies.
            receive: For the function and its dependencies.
            send: For the function and its dependencies.

        Raises:
            Exception: What the function or a dependency raises, also after a `yield`.
        """
        # The app's handlers would answer an exception in here, and nobody would notice. Without them it comes out.
        scope.pop("starlette.exception_handlers", None)
        await self._route(websocket).handle(scope, receive, send)

    def _route(self, websocket: WebSocket) -> APIWebSocketRoute:
        app = websocket.scope.get("app", self)
        routes = self._routes.setdefault(app, {})
        names = tuple(websocket.path_params)
        if names not in routes:
            routes[names] = self._make_route(app, "".join(f"/{{{name}}}" for name in names) or "/")
        return routes[names]

    def _make_route(self, app: Any, path: str) -> APIWebSocketRoute:
        overrides = proxy(app) if hasattr(app, "dependency_overrides") else None  # plain Starlette has none
        return APIWebSocketRoute(path, self._endpoint, dependency_overrides_provider=overrides)


def begun() -> tuple[Receive, Send]:
    """Return `receive` and `send` of an open WebSocket by which nothing comes, and from which nothing goes out."""
    begin = iter(({"type": "websocket.connect"},))

    async def receive() -> Message:
        return next(begin, {"type": "websocket.disconnect", "code": CloseCode.NORMAL})

    async def send(event: Message) -> None:
        pass

    return receive, send


def _check(dependant: Dependant, name: str) -> None:
    # FastAPI has no `Request` for a WebSocket, and would call the dependency without it.
    for each in dependant.dependencies:
        if each.request_param_name is not None:
            raise ConfigurationError(
                f"{name} runs for a WebSocket, and {each.call!r:.200} wants a Request: take an HTTPConnection, which "
                "serves both, or a WebSocket; TokenFrom finds tokens"
            )
        _check(each, name)
