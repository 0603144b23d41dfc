"""Which manager belongs to the app that a request came to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from starlette.routing import BaseRoute, Mount, Router
from starlette.types import Scope

from wsbroadcast.manager import ConnectionManager
from wsbroadcast.web.serving import Endpoint


def managers_of(scope: Scope) -> tuple[ConnectionManager, ...]:
    """Return the managers that are bound to the app of a request, or else to the outermost app around it.

    A manager is bound by a lifespan, which a mounted app doesn't get. So one whose router an app has included, or whose
    lifespan it was given, counts as bound to it.
    """
    app, outermost = scope["app"], scope["router"]
    if bound := _bound(app.router):
        return bound
    for manager in dict.fromkeys(_carried(app.router)):
        manager.bind(app)
    return _bound(app.router) or _bound(outermost) or tuple(dict.fromkeys(_carried(outermost)))


def is_mounted(scope: Scope) -> bool:
    """Tell whether the app of a request is mounted in another one."""
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
        # An older FastAPI copies the routes of an included router, a newer one keeps the router.
        router = route.app if isinstance(route, Mount) else getattr(route, "original_router", None)
        if isinstance(router, Router):  # and no app, whose managers are its own
            yield from _endpoints(router.routes)
        else:
            yield getattr(route, "endpoint", None)
