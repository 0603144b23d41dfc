"""The manager and the connection as FastAPI dependencies."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Never

from fastapi import Depends, WebSocket
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute, Mount, Router
from starlette.types import Scope
from starlette.websockets import WebSocketDisconnect

from wsbroadcast.close_codes import CloseCode, is_sendable
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import ConfigurationError, ConnectionClosed, PermissionDenied, ungrouped
from wsbroadcast.logs import about, logger
from wsbroadcast.manager import ConnectionManager, core_of
from wsbroadcast.signatures import no_dependency
from wsbroadcast.web.access import Access, Authenticate, choose_access, end_quietly
from wsbroadcast.web.inbound import CONNECTS
from wsbroadcast.web.routing import Endpoint


async def get_manager(connection: HTTPConnection) -> ConnectionManager:
    """Return the manager that is bound to the app. It works on HTTP routes and on WebSocket routes.

    A manager is bound to an app by its `lifespan`, by a router of `create_router`, or by `bind`. A mounted app, whose
    lifespan nobody runs, has the managers of its own routers and those that were bound to it. If there are none, it has
    those of the outermost app.

    Replace it in tests through `app.dependency_overrides[get_manager]`.

    Raises:
        ConfigurationError: If no manager is bound, or more than one.
    """
    managers = managers_of(connection.scope)
    if len(managers) > 1:
        raise ConfigurationError(
            f"{len(managers)} ConnectionManagers are bound to this app: name one, for example with "
            "Annotated[ConnectionManager, Depends(get_chat)] and a function that returns it, or with "
            "connection_dependency(chat)"
        )
    if not managers:
        raise ConfigurationError(_UNBOUND_MOUNT if is_mounted(connection.scope) else _UNBOUND)
    return managers[0]


_UNBOUND = (
    "no ConnectionManager is bound to this app: call manager.bind(app), or let it run with the app, by "
    "FastAPI(lifespan=manager.lifespan), by manager.lifespan(app) inside a lifespan of yours, or by a router of "
    "create_router(manager) that is included before the app starts. No lifespan runs in a TestClient without `with`"
)
_UNBOUND_MOUNT = (
    "no ConnectionManager is bound to this app, which is mounted in another one: a lifespan runs for the outermost app "
    "only. Call manager.bind(sub_app) with this app, or bind the manager to the outermost app"
)


@asynccontextmanager
async def _connected(
    access: Access, manager: ConnectionManager, websocket: HTTPConnection
) -> AsyncGenerator[Connection]:
    if not isinstance(websocket, WebSocket):
        raise ConfigurationError("ConnectionDep is for endpoints of WebSockets: take a ManagerDep in an HTTP endpoint")
    try:
        connection = await access._connect(manager, websocket)
    except ConnectionClosed:
        raise end_quietly(websocket) from None
    code: int = CloseCode.INTERNAL_ERROR
    reason = ""
    try:
        yield connection
        code = CloseCode.NORMAL
    except Exception as error:
        match ungrouped(error, WebSocketException, WebSocketDisconnect, HTTPException):
            case WebSocketDisconnect():
                code = CloseCode.NORMAL
            case PermissionDenied() as denied:
                code, reason = denied.code, denied.reason
            case WebSocketException() as refusal:
                code, reason = refusal.code, refusal.reason or ""
                raise refusal from refusal.__cause__  # FastAPI understands it, but not a group that holds it
            case HTTPException():  # FastAPI would make a response of it that reaches nobody
                logger.error(
                    "an endpoint raised %r, but clients of WebSockets don't see it: %s",
                    error,
                    _RAISE_INSTEAD,
                    extra=about("endpoint.failed"),
                )
                raise
            case _:
                raise
    finally:
        if connection.is_open:
            await core_of(manager).close(connection, code if is_sendable(code) else CloseCode.INTERNAL_ERROR, reason)


ManagerDep = Annotated[ConnectionManager, Depends(get_manager)]
"""The app's manager, as the type of a parameter."""


@no_dependency("it makes one, so call it once: Depends(connection_dependency(…))")
def connection_dependency(
    manager: ConnectionManager | None = None,
    *,
    access: Access | None = None,
    authenticate: Authenticate | None = None,
    allowed_origins: Iterable[str] | None = None,
    **moved: Never,
) -> Callable[..., AsyncIterator[Connection]]:
    """Make a dependency like `get_connection`, the one of `ConnectionDep`, with checks of its own.

    Make it once: `Member = Annotated[Connection, Depends(connection_dependency(authenticate=current_user))]`.

    Args:
        manager: Where connections are registered; by default the manager that is bound to the app.
        access: An `Access`, which has more options and may be shared.
        authenticate: A FastAPI dependency that returns who the client is; see `Access`.
        allowed_origins: The pages that may connect; see `Access`.
        moved: Nothing: these options have moved to `Access`.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    chosen_access = choose_access(access, authenticate, None, allowed_origins, moved)

    async def get_given() -> ConnectionManager | None:  # `async`: otherwise each handshake would need a thread
        return manager

    chosen = Depends(get_manager if manager is None else get_given)

    async def get_connection(
        websocket: HTTPConnection, manager: Annotated[ConnectionManager, chosen]
    ) -> AsyncIterator[Connection]:
        """Accept and register the WebSocket of an endpoint, and remove it when the endpoint ends, for any reason.

        If the endpoint returns, the connection is closed with 1000; if it raises `WebSocketException`, with its code;
        if it raises `PermissionDenied`, with 1008; if it fails, with 1011. A peer that is gone is not an error here:
        `WebSocketDisconnect` ends the endpoint quietly.
        """
        async with _connected(chosen_access, manager, websocket) as connection:
            yield connection

    setattr(get_connection, CONNECTS, True)
    return get_connection


get_connection = connection_dependency()
"""Accepts and registers the WebSocket of an endpoint, and removes it when that ends. `ConnectionDep` uses it."""

ConnectionDep = Annotated[Connection, Depends(get_connection)]
"""The endpoint's connection, accepted and registered, as the type of a parameter.

Only pages of the server's own origin may connect; `connection_dependency` can allow others. An endpoint that returns
closes the connection with 1000. One that raises `PermissionDenied` closes it with 1008, `WebSocketException` with its
own code, anything else with 1011. A peer that is gone is not an error. An `ExceptionGroup`, as a task group raises,
counts as the error in it, if there are no others in it."""


_RAISE_INSTEAD = "raise PermissionDenied(text), or WebSocketException(code, reason)"

# Which managers belong to the app that a request came to.


def managers_of(scope: Scope) -> tuple[ConnectionManager, ...]:
    """Return the managers that are bound to the app of a request, or else to the outermost app around it.

    A lifespan binds a manager, but a mounted app gets no lifespan. So a manager also counts as bound if the app has
    included its router or was given its lifespan.
    """
    app, outermost = scope["app"], scope["router"]
    if bound := _bound(app.router):
        return bound
    for manager in dict.fromkeys(_carried(app.router)):
        manager.bind(app)
    return _bound(app.router) or _bound(outermost) or tuple(dict.fromkeys(_carried(outermost)))


def is_mounted(scope: Scope) -> bool:
    """Return whether the app of a request is mounted in another one."""
    return scope["app"].router is not scope["router"]


def _bound(router: Any) -> tuple[ConnectionManager, ...]:
    managers: tuple[ConnectionManager, ...] = getattr(router, "wsbroadcast_managers", ())
    return managers


def _carried(router: Any) -> Iterator[ConnectionManager]:
    for method in (router.lifespan_context, *_endpoints(router.routes)):
        owner = getattr(method, "__self__", None)
        if isinstance(owner, ConnectionManager):
            yield owner
        elif isinstance(owner, Endpoint):
            yield owner.manager


def _endpoints(routes: Iterable[BaseRoute]) -> Iterator[Any]:
    for route in routes:
        # An older FastAPI copies the routes of an included router. A newer one keeps the router.
        router = route.app if isinstance(route, Mount) else getattr(route, "original_router", None)
        if isinstance(router, Router):  # but not an app: its managers are its own
            yield from _endpoints(router.routes)
        else:
            yield getattr(route, "endpoint", None)
