"""The router factory: an endpoint that nobody has to write."""

from collections.abc import Iterable, Sequence

from fastapi import APIRouter, params
from starlette.routing import WebSocketRoute

from wsbroadcast.manager import ConnectionManager
from wsbroadcast.web.access import Access, Authenticate, Authorize, OnDenied
from wsbroadcast.web.authentication import UserKey
from wsbroadcast.web.serving import Accepts, Endpoint, Inbound


def create_router(
    manager: ConnectionManager,
    path: str = "/ws",
    *,
    channel: str | None = None,
    inbound: Inbound = "broadcast",
    accepts: Accepts = "any",
    include_sender: bool = True,
    subprotocols: Iterable[str] = (),
    allowed_origins: Iterable[str] | None = None,
    allow_missing_origin: bool = True,
    authenticate: Authenticate | None = None,
    user_key: UserKey | None = None,
    authorize: Authorize | None = None,
    on_denied: OnDenied = "error",
    dependencies: Sequence[params.Depends] | None = None,
) -> APIRouter:
    """Make a router with one WebSocket endpoint, for `app.include_router`.

    A path parameter subscribes: every connection to `/ws/{channel}` is subscribed to the channel in its URL. What a
    client sends is broadcast to that channel, or to everyone if there is none. The router carries the manager's
    lifespan and binds it to the app, so that `ManagerDep` finds it.

    Before a connection is accepted, in this order: `dependencies` run, its origin is checked, the manager's limits say
    whether there is room, `authenticate` says who it is, and `authorize` whether it may subscribe to the path's
    channel. Who may not come in gets an HTTP response that says why.

    Args:
        manager: The manager that keeps the connections.
        path: Where the endpoint is, behind the prefix of `include_router`. The prefix may hold the parameter too.
        channel: A pattern that makes the channel from path parameters, such as `"{tenant}:{room}"`. By default it is
            the only parameter there is, of a prefix or a mount too. Clients choose it freely then; a pattern such as
            `"room:{room}"` keeps them away from other channels of yours.
        inbound: `broadcast` what clients send, obey the `commands` that they send, leave it to the `on_message` hooks
            (`handle`), or `ignore` it.
        accepts: What clients may send; anything else closes that connection with 1003, or 1007 for broken JSON.
        include_sender: Whether a client gets its own messages back.
        subprotocols: Those that the endpoint speaks; the first that a client offers is accepted.
        allowed_origins: The pages that may connect, such as `["https://app.example"]`, exact in scheme, host and port;
            `"*"` for every page. By default the server's own, which is the scheme and the `Host` of the handshake.
        allow_missing_origin: Whether a client without an `Origin` header may connect, which no browser is.
        authenticate: A FastAPI dependency that returns the user, claims or an object with an `id`, or an `Identity`;
            `None` refuses with 401. What it depends on is finished before the connection is accepted.
        user_key: Makes the user's id of what `authenticate` returned.
        authorize: `authorize(connection, action, channel)` returns whether a connection may `subscribe` to a channel
            or `publish` to it, and only `True` lets it; the channel is `None` for everyone. Before it is accepted it
            gets a `Handshake`.
        on_denied: Whether a client that may not do something gets an `error` message, or a `close` with 4403.
        dependencies: FastAPI dependencies that run first. Those that `yield` end with the connection.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    access = Access(
        allowed_origins=allowed_origins,
        allow_missing_origin=allow_missing_origin,
        authenticate=authenticate,
        user_key=user_key,
        authorize=authorize,
        on_denied=on_denied,
        subprotocols=subprotocols,
    )
    endpoint = Endpoint(
        manager, path, access, channel=channel, inbound=inbound, accepts=accepts, include_sender=include_sender
    )
    router = APIRouter(lifespan=manager.lifespan)
    router.add_api_websocket_route(path, endpoint.open, name="wsbroadcast", dependencies=dependencies)
    return router


def create_routes(
    manager: ConnectionManager,
    path: str = "/ws",
    *,
    channel: str | None = None,
    inbound: Inbound = "broadcast",
    accepts: Accepts = "any",
    include_sender: bool = True,
    subprotocols: Iterable[str] = (),
    allowed_origins: Iterable[str] | None = None,
    allow_missing_origin: bool = True,
    authenticate: Authenticate | None = None,
    user_key: UserKey | None = None,
    authorize: Authorize | None = None,
    on_denied: OnDenied = "error",
) -> list[WebSocketRoute]:
    """Make the same endpoint as routes for plain Starlette; pass `manager.lifespan` to `Starlette` yourself.

    `authenticate` is a FastAPI dependency here too.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    access = Access(
        allowed_origins=allowed_origins,
        allow_missing_origin=allow_missing_origin,
        authenticate=authenticate,
        user_key=user_key,
        authorize=authorize,
        on_denied=on_denied,
        subprotocols=subprotocols,
    )
    endpoint = Endpoint(
        manager, path, access, channel=channel, inbound=inbound, accepts=accepts, include_sender=include_sender
    )
    return [WebSocketRoute(path, endpoint.open, name="wsbroadcast")]
