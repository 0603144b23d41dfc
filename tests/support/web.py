"""Apps around a manager, in each possible way, and what a `TestClient` sees of their ends."""

# No postponed annotations: FastAPI reads them, and the dependency is local.

from collections.abc import Callable
from inspect import signature
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.testclient import TestClient, WebSocketDenialResponse, WebSocketTestSession

from wsbroadcast import Access, Connection, ConnectionManager, connection_dependency, create_router, create_routes

MakeApp = Callable[..., Any]


def with_access(options: dict[str, Any]) -> dict[str, Any]:
    """Put the options of an `Access` into one, if there are some that nothing else takes."""
    rights = {name: options.pop(name) for name in signature(Access).parameters if name in options}
    few = rights.keys() <= {"authenticate", "authorize", "allowed_origins"}
    return options | (rights if few else {"access": Access(**rights)})


def router_app(manager: ConnectionManager, path: str = "/ws", *, prefix: str = "", **options: Any) -> FastAPI:
    """Make an app of `create_router`."""
    app = FastAPI()
    app.include_router(create_router(manager, path, **with_access(options)), prefix=prefix)
    return app


def dependency_app(manager: ConnectionManager, path: str = "/ws", **options: Any) -> FastAPI:
    """Make an app of `connection_dependency`, whose endpoint broadcasts what it reads."""
    app = FastAPI(lifespan=manager.lifespan)
    member = connection_dependency(**with_access(options))

    @app.websocket(path)
    async def endpoint(connection: Annotated[Connection, Depends(member)]) -> None:
        async for message in connection:
            await connection.manager.broadcast(message)

    return app


def starlette_app(manager: ConnectionManager, path: str = "/ws", **options: Any) -> Starlette:
    """Make an app of `create_routes`."""
    return Starlette(routes=create_routes(manager, path, **with_access(options)), lifespan=manager.lifespan)


EVERY_APP = pytest.mark.parametrize("make_app", [router_app, dependency_app, starlette_app])


def denied(client: TestClient, path: str = "/ws", **headers: str) -> WebSocketDenialResponse:
    """Return the HTTP response with which a handshake is refused."""
    with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect(path, headers=headers):
        pass
    return caught.value


def admitted(client: TestClient, path: str = "/ws", **headers: str) -> None:
    """Connect, which must succeed, and leave."""
    with client.websocket_connect(path, headers=headers):
        pass


def close_of(socket: WebSocketTestSession) -> tuple[int, str]:
    """Read until the server closes; return the code and the reason."""
    while (message := socket.receive())["type"] != "websocket.close":
        pass
    return message["code"], message["reason"]
