"""Serves the AsyncAPI document of an app."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import APIRouter, params
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from wsbroadcast.exceptions import ConfigurationError, kind_of
from wsbroadcast.manager import ConnectionManager
from wsbroadcast.web.documentation import unique_id


def create_asyncapi_router(
    manager: ConnectionManager, path: str = "/asyncapi.json", *, dependencies: Sequence[params.Depends] | None = None
) -> APIRouter:
    """Make a router that serves what a manager's sockets say, as AsyncAPI 3.0; see `ConnectionManager.asyncapi`.

    Like FastAPI's own `/openapi.json`, the document is made once, when it is first asked for. Everybody may read it.

    Args:
        manager: The manager whose sockets are described.
        path: The path of the document.
        dependencies: FastAPI dependencies that run first, for example one that lets only some people read it.

    Raises:
        ConfigurationError: If `manager` isn't a manager.
    """
    if not isinstance(manager, ConnectionManager):
        raise ConfigurationError(f"a router needs its manager first, not {kind_of(manager)}")
    made: WeakKeyDictionary[Any, bytes] = WeakKeyDictionary()

    async def serve(request: Request) -> Response:
        if request.app not in made:
            made[request.app] = to_json(manager.asyncapi(request.app))
        return Response(made[request.app], media_type="application/json")

    router = APIRouter()
    router.add_api_route(
        path,
        serve,
        name="wsbroadcast_asyncapi",
        include_in_schema=False,
        dependencies=dependencies,
        generate_unique_id_function=unique_id,
    )
    return router
