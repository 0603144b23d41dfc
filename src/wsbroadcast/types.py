"""Types of public signatures."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypedDict, TypeVar, Unpack, overload

from starlette.websockets import WebSocket

from wsbroadcast.audience import UNSET, Audience, Unset, UserId
from wsbroadcast.concurrency import AwaitableContext
from wsbroadcast.engines.contract import Health
from wsbroadcast.history import Page, Recovery, Since, SinceOption
from wsbroadcast.message import Message
from wsbroadcast.options import ExpiresAt
from wsbroadcast.publication import Gap, Position, Receipt
from wsbroadcast.stats import Stats

if TYPE_CHECKING:  # a program that only publishes needs no more of it
    from starlette.applications import Starlette

C = TypeVar("C")

Users = UserId | Iterable[UserId]
"""One user or several."""

Headers = Iterable[tuple[bytes, bytes]]
"""Those of a response."""


Guard = bool | None | Awaitable[bool | None]
"""What a hook returns that may refuse something: `False` refuses."""

To = Audience | Iterable[Audience]
"""One audience or several."""


class Excludable(Protocol):
    """What else than a connection may be left out of a broadcast: a listener of `ConnectionManager.listen`."""

    _listens: bool

    @property
    def id(self) -> str: ...  # noqa: D102


class PublisherOptions(TypedDict, total=False):
    """What every broadcast takes beside the message and whom it is for."""

    exclude_users: Users
    """Users whose connections don't get it."""
    key: str | None
    """What the message is the newest of, for slow consumers under the policy `conflate`."""


class PublisherTransactionOptions(PublisherOptions, total=False):
    """What `Publisher.broadcast` takes."""

    transaction: object
    """On Postgres, a database connection or session: the message is sent when its transaction commits."""
    idempotency_key: str | None
    """Names the message in its audiences, so that nobody gets it twice if it is broadcast again."""


class BroadcastOptions(PublisherOptions, Generic[C], total=False):
    """What every broadcast of a manager takes, which has connections of its own."""

    exclude: C | WebSocket | Excludable | Iterable[C | WebSocket | Excludable]
    """Connections or WebSockets that don't get it."""


class TransactionOptions(BroadcastOptions[C], total=False):
    """What `broadcast` takes."""

    transaction: object
    """On Postgres, a database connection or session: the message is sent when its transaction commits."""
    idempotency_key: str | None
    """Names the message in its audiences, so that nobody gets it twice if it is broadcast again."""


class Manager(Protocol[C]):
    """Everything public of the manager that a connection belongs to; see `ConnectionManager`.

    The class itself can't be named below the modules that it is built from.
    """

    hooks: Any

    @property
    def connections(self) -> list[C]: ...  # noqa: D102
    @property
    def active_connections(self) -> list[WebSocket]: ...  # noqa: D102

    async def start(self) -> None: ...  # noqa: D102
    async def aclose(self) -> None: ...  # noqa: D102
    async def drain(self, over: float = 5.0) -> None: ...  # noqa: D102
    @property
    def is_draining(self) -> bool: ...  # noqa: D102
    def lifespan(self, app: Starlette) -> AbstractAsyncContextManager[None]: ...  # noqa: D102
    def bind(self, app: Starlette) -> None: ...  # noqa: D102
    def stats(self) -> Stats: ...  # noqa: D102
    async def health(self) -> Health: ...  # noqa: D102

    def connect(  # noqa: D102
        self,
        websocket: WebSocket,
        *,
        user: UserId | None = None,
        channels: Iterable[str] = (),
        info: Any = None,
        subprotocol: str | None = None,
        headers: Headers | None = None,
        expires_at: ExpiresAt = None,
        since: SinceOption = None,
    ) -> AwaitableContext[C]: ...
    def handshake(self, websocket: WebSocket) -> AbstractAsyncContextManager[None]: ...  # noqa: D102
    def disconnect(self, websocket: WebSocket | C) -> Awaitable[None]: ...  # noqa: D102
    async def close(self, websocket: WebSocket | C, code: int = ..., reason: str = "") -> None: ...  # noqa: D102
    async def close_user(  # noqa: D102
        self,
        user: UserId,
        *,
        code: int = ...,
        reason: str = "",
        exclude: C | WebSocket | Iterable[C | WebSocket] = (),
    ) -> Receipt: ...
    async def unsubscribe_user(self, user: UserId, *channels: str) -> Receipt: ...  # noqa: D102
    async def subscribe(  # noqa: D102
        self, connection: WebSocket | C, *channels: str, since: SinceOption = None
    ) -> Recovery | None: ...
    async def unsubscribe(self, connection: WebSocket | C, *channels: str) -> None: ...  # noqa: D102

    @overload
    async def broadcast(
        self, message: object, *, channel: str = ..., **options: Unpack[TransactionOptions[C]]
    ) -> Receipt: ...
    @overload
    async def broadcast(
        self, message: object, *, user: UserId, **options: Unpack[TransactionOptions[C]]
    ) -> Receipt: ...
    @overload
    async def broadcast(
        self, message: object, *, channels: Iterable[str], **options: Unpack[TransactionOptions[C]]
    ) -> Receipt: ...
    @overload
    async def broadcast(self, message: object, *, to: To, **options: Unpack[TransactionOptions[C]]) -> Receipt: ...

    @overload
    async def broadcast_local(
        self, message: object, *, channel: str = ..., **options: Unpack[BroadcastOptions[C]]
    ) -> Receipt: ...
    @overload
    async def broadcast_local(
        self, message: object, *, user: UserId, **options: Unpack[BroadcastOptions[C]]
    ) -> Receipt: ...
    @overload
    async def broadcast_local(
        self, message: object, *, channels: Iterable[str], **options: Unpack[BroadcastOptions[C]]
    ) -> Receipt: ...
    @overload
    async def broadcast_local(self, message: object, *, to: To, **options: Unpack[BroadcastOptions[C]]) -> Receipt: ...

    @overload
    def broadcast_nowait(
        self, message: object, *, channel: str = ..., **options: Unpack[BroadcastOptions[C]]
    ) -> Receipt: ...
    @overload
    def broadcast_nowait(self, message: object, *, user: UserId, **options: Unpack[BroadcastOptions[C]]) -> Receipt: ...
    @overload
    def broadcast_nowait(
        self, message: object, *, channels: Iterable[str], **options: Unpack[BroadcastOptions[C]]
    ) -> Receipt: ...
    @overload
    def broadcast_nowait(self, message: object, *, to: To, **options: Unpack[BroadcastOptions[C]]) -> Receipt: ...

    @overload
    def broadcast_soon(
        self, message: object, *, channel: str = ..., **options: Unpack[BroadcastOptions[C]]
    ) -> None: ...
    @overload
    def broadcast_soon(self, message: object, *, user: UserId, **options: Unpack[BroadcastOptions[C]]) -> None: ...
    @overload
    def broadcast_soon(
        self, message: object, *, channels: Iterable[str], **options: Unpack[BroadcastOptions[C]]
    ) -> None: ...
    @overload
    def broadcast_soon(self, message: object, *, to: To, **options: Unpack[BroadcastOptions[C]]) -> None: ...

    @overload
    def broadcast_threadsafe(
        self, message: object, *, channel: str = ..., **options: Unpack[BroadcastOptions[C]]
    ) -> Receipt: ...
    @overload
    def broadcast_threadsafe(
        self, message: object, *, user: UserId, **options: Unpack[BroadcastOptions[C]]
    ) -> Receipt: ...
    @overload
    def broadcast_threadsafe(
        self, message: object, *, channels: Iterable[str], **options: Unpack[BroadcastOptions[C]]
    ) -> Receipt: ...
    @overload
    def broadcast_threadsafe(self, message: object, *, to: To, **options: Unpack[BroadcastOptions[C]]) -> Receipt: ...

    def listen(  # noqa: D102
        self,
        *channels: str,
        user: UserId | None = None,
        since: SinceOption = None,
        size: int = 1024,
        policy: Literal["raise", "drop_oldest"] = "raise",
    ) -> AbstractAsyncContextManager[Any]: ...
    async def position(  # noqa: D102
        self, channel: str | Unset = UNSET, *, user: UserId | Unset = UNSET, everyone: bool = False
    ) -> Position: ...
    async def history(  # noqa: D102
        self,
        channel: str | Unset = UNSET,
        *,
        user: UserId | Unset = UNSET,
        everyone: bool = False,
        since: Since | str | None = None,
        limit: int | None = None,
    ) -> Page: ...
    async def forget(  # noqa: D102
        self, channel: str | Unset = UNSET, *, user: UserId | Unset = UNSET, everyone: bool = False
    ) -> None: ...

    async def send(self, connection: WebSocket | C, message: object) -> None: ...  # noqa: D102
    async def send_personal_message(self, message: object, websocket: WebSocket | C) -> None: ...  # noqa: D102

    def on_connect(self, function: Callable[[C], Guard], /) -> Any: ...  # noqa: D102
    def on_disconnect(self, function: Callable[[C], object], /) -> Any: ...  # noqa: D102
    def on_message(self, function: Callable[[C, str | bytes], Guard], /) -> Any: ...  # noqa: D102
    def on_subscribe(self, function: Callable[[C, str], Guard], /) -> Any: ...  # noqa: D102
    def on_unsubscribe(self, function: Callable[[C, str], object], /) -> Any: ...  # noqa: D102
    def on_broadcast(self, function: Callable[[Message, Audience], object], /) -> Any: ...  # noqa: D102
    def on_deliver(self, function: Callable[[Any], object], /) -> Any: ...  # noqa: D102
    def on_gap(self, function: Callable[[Gap], object], /) -> Any: ...  # noqa: D102
    def on_error(self, function: Callable[[Exception, str], object], /) -> Any: ...  # noqa: D102

    def method(self, name: str) -> Callable[[Any], Any]: ...  # noqa: D102
