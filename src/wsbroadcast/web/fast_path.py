"""Keeping the fast path where a middleware wraps `receive`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsbroadcast.delivery.uvicorn import SERVER_RECEIVE, SERVER_SEND
from wsbroadcast.exit_stack import WithExitStack

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class FastPath:
    """The outermost layer of an app, around everything that wraps `receive` (OpenTelemetry does).

    The fast path is found through the server's own `receive`; a wrapped one hides it, and `stats().fast_path_refused`
    says "receive is wrapped". Serve `asgi = FastPath(app)` instead of `app` to show it again. What a middleware does to
    each message that is sent is then left out for broadcasts, as it is on the fast path without this class.

    It also tells the manager when an endpoint has ended, where the app is no FastAPI, which does so itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._app = WithExitStack(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Remember the server's `receive` and `send` in the scope of a WebSocket."""
        if scope["type"] == "websocket":
            scope[SERVER_RECEIVE] = receive
            scope[SERVER_SEND] = send  # what wraps it outside of here is not ours to pass by
        await self._app(scope, receive, send)
