"""The end of an endpoint, as an event: what is pushed onto its exit stack runs when the ASGI call ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from wsbroadcast.delivery.uvicorn import SERVER_RECEIVE, SERVER_SEND

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

# FastAPI's own, which ends after the `yield` dependencies and the route's exception handlers. It isn't documented, so
# it is looked at like every attribute of somebody else's; a test says whether the installed FastAPI has it.
_FASTAPI = "fastapi_middleware_astack"
# Ours, where an app is not a FastAPI.
_OURS = "wsbroadcast.exit_stack"


Exit = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], Awaitable[bool | None]]
"""Called at the end, with the error of the call if there was one."""


class Exits(list[Exit]):
    """An exit stack that costs a list: what was pushed last is called first."""

    def push_async_exit(self, exit: Exit) -> None:  # noqa: A002  # the name that `AsyncExitStack` has
        """Call it at the end."""
        self.append(exit)

    async def close(self, error: BaseException | None) -> None:
        """Call all, whatever one of them raises; raise what the first raised."""
        failure: BaseException | None = None
        while self:
            try:
                await self.pop()(None if error is None else type(error), error, None)
            except BaseException as raised:
                failure = failure or raised
        if failure is not None:
            raise failure


def exit_stack_of(scope: Mapping[str, Any]) -> AsyncExitStack | Exits | None:
    """Return the stack that ends with the ASGI call, if there is one."""
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
        """Call the app; a stack that is there already serves."""
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
    """Let the WebSocket calls of an app that is about to run have an exit stack, where they have none.

    FastAPI has one for its endpoints. A middleware that connects is outside of it.
    """
    layers = getattr(app, "middleware_stack", None)
    is_needed = not has_exit_stack(layers) or bool(getattr(app, "user_middleware", None))
    if layers is not None and is_needed and not isinstance(layers, WithExitStack):
        app.middleware_stack = WithExitStack(layers)


# Keeping the fast path where a middleware wraps `receive`.


class FastPath:
    """The outermost layer of an app, around everything that wraps `receive` (OpenTelemetry does).

    The fast path is found through the server's own `receive`; a wrapped one hides it, and `stats().fast_path_refused`
    says "receive is wrapped". Serve `asgi = FastPath(app)` instead of `app` to show it again. What a middleware does to
    each message that is sent is then left out for broadcasts, as it is on the fast path without this class.

    It also tells the manager when an endpoint has ended, where the app is not a FastAPI, which does so itself.
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
