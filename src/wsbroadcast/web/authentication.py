"""Running a FastAPI dependency in a scope of its own, which is closed before the WebSocket lives on."""

# No postponed annotations here: FastAPI reads them, and `dependency` is a local name.

from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin
from weakref import WeakKeyDictionary, proxy

from fastapi import Depends, WebSocket, params
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIWebSocketRoute
from starlette.types import Message, Receive, Send
from starlette.websockets import WebSocketState

from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.membership import SUBPROTOCOL
from wsbroadcast.web.tokens import FIRST_MESSAGE, TokenFrom

_RESULT = "wsbroadcast.authenticated"


class Authenticator:
    """Resolves a dependency, and those it depends on, like an endpoint whose only work that is.

    When it returns, that endpoint has ended: what the dependencies `yield`ed is finished, a database session is back
    in its pool. `app.dependency_overrides` holds.

    Args:
        dependency: A dependency as in `Depends(…)`, the `Depends` or `Security` itself, or an `Annotated` with one.

    Raises:
        ConfigurationError: If it is none of them, or wants a `Request`.
    """

    def __init__(self, dependency: Callable[..., Any] | params.Depends) -> None:
        self._depends = _depends_of(dependency)
        if not callable(self._depends.dependency):
            raise ConfigurationError(f"authenticate is a dependency, as in Depends(…), not {dependency!r:.200}")
        if isinstance(self._depends.dependency, TokenFrom):  # any text would be a user
            raise ConfigurationError(
                "authenticate is a TokenFrom, which finds a token and doesn't check it: pass a function that takes "
                "token: Annotated[str, Depends(TokenFrom(…))] and returns whose it is"
            )
        route = self._make_route(self, "/")  # what FastAPI has to say about it, it says now
        _check_parameters(route.dependant)
        # By app, because each has overrides of its own, and by path parameters, which a dependency may ask for.
        self._routes: WeakKeyDictionary[Any, dict[tuple[str, ...], APIWebSocketRoute]] = WeakKeyDictionary()

    async def __call__(self, websocket: WebSocket) -> Any:
        """Return what the dependency returns.

        It sees the same WebSocket: one that it accepts is accepted, what it leaves in `websocket.state` stays there.
        One that is accepted already it may accept again, to no effect.

        Raises:
            Exception: What the dependency raises, also while it is finished.
        """
        websocket.scope.setdefault("state", {})  # before the copy, so that both have the same
        scope = dict(websocket.scope)
        # The app's handlers would answer an exception in here, and nobody would know. Without them it comes out.
        scope.pop("starlette.exception_handlers", None)
        is_accepted = websocket.application_state is WebSocketState.CONNECTED
        receive, send = _from_the_beginning(websocket) if is_accepted else (websocket.receive, websocket.send)
        await self._route(websocket).handle(scope, receive, send)
        websocket.scope.update((key, scope[key]) for key in (SUBPROTOCOL, FIRST_MESSAGE) if key in scope)
        return scope.get(_RESULT)

    def _route(self, websocket: WebSocket) -> APIWebSocketRoute:
        app = websocket.scope.get("app", self)
        routes = self._routes.setdefault(app, {})
        names = tuple(websocket.path_params)
        if names not in routes:
            routes[names] = self._make_route(app, "".join(f"/{{{name}}}" for name in names) or "/")
        return routes[names]

    def _make_route(self, app: Any, path: str) -> APIWebSocketRoute:
        async def keep(websocket: WebSocket, result: Annotated[Any, self._depends]) -> None:
            websocket.scope[_RESULT] = result

        overrides = proxy(app) if hasattr(app, "dependency_overrides") else None  # plain Starlette has none
        return APIWebSocketRoute(path, keep, dependency_overrides_provider=overrides)


def _depends_of(dependency: Any) -> params.Depends:
    # `CurrentUser = Annotated[User, Depends(current_user)]` is how apps name theirs. It can be called, and would make a
    # user of whatever a client writes into the query.
    if get_origin(dependency) is Annotated:
        found = [each for each in get_args(dependency) if isinstance(each, params.Depends)]
        if len(found) != 1 or found[0].dependency is None:
            raise ConfigurationError(f"authenticate is {dependency!r:.200}, which needs one Depends(…) with a function")
        return found[0]
    return dependency if isinstance(dependency, params.Depends) else Depends(dependency)


def _check_parameters(dependant: Dependant) -> None:
    # FastAPI has no `Request` to give for a WebSocket, and calls without it.
    for each in dependant.dependencies:
        if each.request_param_name is not None:
            raise ConfigurationError(
                f"authenticate runs for a WebSocket, and {each.call!r:.200} wants a Request: take an HTTPConnection, "
                "which serves both, or a WebSocket; TokenFrom finds tokens"
            )
        _check_parameters(each)


def _from_the_beginning(websocket: WebSocket) -> tuple[Receive, Send]:
    # What Starlette expects of a WebSocket that is new to it: first the connect event, and an accept before messages.
    is_begun = False

    async def receive() -> Message:
        nonlocal is_begun
        if is_begun:
            return await websocket.receive()
        is_begun = True
        return {"type": "websocket.connect"}

    async def send(event: Message) -> None:
        if event["type"] != "websocket.accept":
            await websocket.send(event)

    return receive, send
