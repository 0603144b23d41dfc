"""The end of an endpoint: what is pushed onto its exit stack runs when the ASGI call ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from wsbroadcast.delivery.uvicorn import SERVER_RECEIVE, SERVER_SEND

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

# FastAPI's own exit stack, which ends after the `yield` dependencies and the route's exception handlers. It isn't
# documented, so it may be missing; a test shows whether the installed FastAPI has it.
_FASTAPI = "fastapi_middleware_astack"
# Our own exit stack, for an app that is not a FastAPI.
_OURS = "wsbroadcast.exit_stack"


Exit = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], Awaitable[bool | None]]
"""Called at the end, with the error of the call, if there was one."""


class Exits(list[Exit]):
    """An exit stack that costs only a list. What was pushed last is called first."""

    def push_async_exit(self, exit: Exit) -> None:  # noqa: A002  # the name that `AsyncExitStack` has
        """Call a function at the end."""
        self.append(exit)

    async def close(self, error: BaseException | None) -> None:
        """Call all functions, even if one of them raises; then raise the first error."""
        failure: BaseException | None = None
        while self:
            try:
                await self.pop()(None if error is None else type(error), error, None)
            except BaseException as raised:
                failure = failure or raised
        if failure is not None:
            raise failure


def exit_stack_of(scope: Mapping[str, Any]) -> AsyncExitStack | Exits | None:
    """Return the exit stack that ends with the ASGI call; `None` if there is none."""
    stack = scope.get(_FASTAPI)
    if stack is None:
        stack = scope.get(_OURS)
    return stack if isinstance(stack, (AsyncExitStack, Exits)) else None


def has_exit_stack(app: object) -> bool:
    """Tell whether one of the layers of an app gives its calls an exit stack."""
    while app is not None:
        if isinstance(app, WithExitStack) or getattr(app, "context_name", None) == _FASTAPI:
            return True
        app = getattr(app, "app", None)
    return False


class WithExitStack:
    """An ASGI app whose WebSocket calls have an exit stack."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app. If there is an exit stack already, that is used."""
        if scope["type"] != "websocket" or _OURS in scope:
            await self.app(scope, receive, send)
            return
        exits = scope[_OURS] = Exits()
        error: BaseException | None = None
        try:
            await self.app(scope, receive, send)
        except BaseException as raised:
            error = raised
            raise
        finally:
            await exits.close(error)


def give_exit_stack(app: Any) -> None:
    """Give the WebSocket calls of an app an exit stack, before it runs, unless they have one.

    FastAPI has one for its endpoints. A middleware that connects is outside of that.
    """
    layers = getattr(app, "middleware_stack", None)
    is_needed = not has_exit_stack(layers) or bool(getattr(app, "user_middleware", None))
    if layers is not None and is_needed and not isinstance(layers, WithExitStack):
        app.middleware_stack = WithExitStack(layers)


# Keeping the fast path if a middleware wraps `receive`.


class FastPath:
    """The outermost layer of an app, around all middleware that wraps `receive`, such as OpenTelemetry's.

    The fast path is found through the server's own `receive`. If that is wrapped, it isn't found, and
    `stats().fast_path_refused` says "receive is wrapped". Then serve `asgi = FastPath(app)` instead of `app`. The
    middleware doesn't see broadcasts then, as it never does on the fast path, so it can't change them.

    It also tells the manager when an endpoint has ended, if the app is not a FastAPI, which tells that itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._app = WithExitStack(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Remember the server's `receive` and `send` in the scope of a WebSocket."""
        if scope["type"] == "websocket":
            scope[SERVER_RECEIVE] = receive
            scope[SERVER_SEND] = send  # a wrapper outside of this layer must not be skipped
        await self._app(scope, receive, send)
