"""The manager and the connection as FastAPI dependencies."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, WebSocket, WebSocketException
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocketDisconnect

from wsbroadcast.close_codes import CloseCode, is_sendable
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import ConfigurationError, PermissionDenied
from wsbroadcast.manager import ConnectionManager


async def get_manager(connection: HTTPConnection) -> ConnectionManager:
    """Return the manager that is bound to the app; works on HTTP and on WebSocket routes.

    Replace it in tests through `app.dependency_overrides[get_manager]`.

    Raises:
        ConfigurationError: If no manager is bound, or more than one.
    """
    managers = getattr(connection.app.state, "wsbroadcast_managers", ())
    if len(managers) > 1:
        raise ConfigurationError(
            f"{len(managers)} ConnectionManagers are bound to this app: say which, for example with "
            "Annotated[ConnectionManager, Depends(lambda: chat)]"
        )
    if not managers:
        raise ConfigurationError(
            "no ConnectionManager is bound to this app: use FastAPI(lifespan=manager.lifespan), include a router "
            "made by create_router(manager) before the app starts, or call manager.bind(app)"
        )
    manager: ConnectionManager = managers[0]
    return manager


ManagerDep = Annotated[ConnectionManager, Depends(get_manager)]
"""The app's manager, as a parameter's type."""


async def get_connection(websocket: WebSocket, manager: ManagerDep) -> AsyncIterator[Connection]:
    """Accept and register the WebSocket of an endpoint, and remove it on the way out, whatever way that is.

    An endpoint that returns closes the connection with 1000, one that raises `WebSocketException` with its code, one
    that raises `PermissionDenied` with 1008, one that fails with 1011. That the peer is gone is not an error here:
    `WebSocketDisconnect` ends the endpoint quietly.
    """
    try:
        connection = await manager.connect(websocket)
    except PermissionDenied as denied:  # closed already
        raise WebSocketException(CloseCode.POLICY_VIOLATION, str(denied)) from denied
    code: int = CloseCode.INTERNAL_ERROR
    reason = ""
    try:
        yield connection
        code = CloseCode.NORMAL
    except WebSocketDisconnect:
        code = CloseCode.NORMAL
    except PermissionDenied as denied:
        code, reason = CloseCode.POLICY_VIOLATION, str(denied)
    except WebSocketException as error:
        code, reason = error.code, error.reason or ""
        raise
    finally:
        if connection.is_open:
            await manager.close(connection, code if is_sendable(code) else CloseCode.INTERNAL_ERROR, reason)


ConnectionDep = Annotated[Connection, Depends(get_connection)]
"""The endpoint's connection, accepted and registered, as a parameter's type."""
