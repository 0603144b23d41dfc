"""The manager and the connection as FastAPI dependencies."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, WebSocket, WebSocketException
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocketDisconnect

from wsbroadcast.close_codes import CloseCode
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import ConfigurationError, PermissionDenied
from wsbroadcast.manager import ConnectionManager


async def get_manager(connection: HTTPConnection) -> ConnectionManager:
    """Return the manager that is bound to the app; works on HTTP and on WebSocket routes.

    Replace it in tests through `app.dependency_overrides[get_manager]`.

    Raises:
        ConfigurationError: If no manager is bound.
    """
    manager = getattr(connection.app.state, "wsbroadcast_manager", None)
    if not isinstance(manager, ConnectionManager):
        raise ConfigurationError(
            "no ConnectionManager is bound to this app: use FastAPI(lifespan=manager.lifespan), include a router "
            "made by create_router(manager) before the app starts, or call manager.bind(app)"
        )
    return manager


ManagerDep = Annotated[ConnectionManager, Depends(get_manager)]
"""The app's manager, as a parameter's type."""


async def get_connection(websocket: WebSocket, manager: ManagerDep) -> AsyncIterator[Connection]:
    """Accept and register the WebSocket of an endpoint, and remove it on the way out, whatever way that is.

    An endpoint that returns closes the connection with 1000, one that raises `PermissionDenied` with 1008, one that
    fails with 1011. That the peer is gone is not an error here: `WebSocketDisconnect` ends the endpoint quietly.
    """
    try:
        connection = await manager.connect(websocket)
    except PermissionDenied as denied:  # closed already
        raise WebSocketException(CloseCode.POLICY_VIOLATION, str(denied)) from denied
    code, reason = CloseCode.INTERNAL_ERROR, ""
    try:
        yield connection
        code = CloseCode.NORMAL
    except WebSocketDisconnect:
        code = CloseCode.NORMAL
    except PermissionDenied as denied:
        code, reason = CloseCode.POLICY_VIOLATION, str(denied)
    except WebSocketException:
        manager.disconnect(connection)  # FastAPI closes it with the code the endpoint chose
        raise
    finally:
        if connection.is_open:
            await manager.close(connection, code, reason)


ConnectionDep = Annotated[Connection, Depends(get_connection)]
"""The endpoint's connection, accepted and registered, as a parameter's type."""
