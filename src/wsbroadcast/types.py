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
from wsbroadcast.presence import Member
from wsbroadcast.publication import Gap, Position, Receipt
from wsbroadcast.stats import Stats
from wsbroadcast.streams.ledger import StreamStatus
from wsbroadcast.streams.producers import Producer
from wsbroadcast.streams.run import Run, StreamLimits

if TYPE_CHECKING:  # so that a program that only publishes doesn't need Starlette
    from starlette.applications import Starlette

C = TypeVar("C")
F = TypeVar("F", bound=Callable[[], Awaitable[object]])

Users = UserId | Iterable[UserId]
"""One user or several."""

Headers = Iterable[tuple[bytes, bytes]]
"""The headers of a response."""


Guard = bool | None | Awaitable[bool | None]
"""What a hook returns that may refuse something. `False` refuses."""

To = Audience | Iterable[Audience]
"""One audience or several."""


class Excludable(Protocol):
    """What `exclude=` takes beside connections: a listener of `ConnectionManager.listen`."""

    _listens: bool

    @property
    def id(self) -> str: ...  # noqa: D102


class PublisherOptions(TypedDict, total=False):
    """The options of every broadcast, beside the message and its audience."""

    exclude_users: Users
    """Users whose connections don't get it."""
    key: str | None
    """Under the policy `conflate`, slow consumers get only the newest of the messages with the same key."""
    as_: Any
    """The type that the message is sent as. Only the fields of this type are sent."""


class PublisherTransactionOptions(PublisherOptions, total=False):
    """The options of `Publisher.broadcast`."""

    transaction: object
    """On Postgres, a database connection or session: the message is sent when its transaction commits."""
    idempotency_key: str | None
    """A name for the message in its audiences. Nobody gets it twice if it is broadcast again under this name."""


class BroadcastOptions(PublisherOptions, Generic[C], total=False):
    """The options of every broadcast of a manager, which has connections of its own."""

    exclude: C | WebSocket | Excludable | Iterable[C | WebSocket | Excludable]
    """Connections or WebSockets that don't get it."""


class TransactionOptions(BroadcastOptions[C], total=False):
    """The options of `broadcast`."""

    transaction: object
    """On Postgres, a database connection or session: the message is sent when its transaction commits."""
    idempotency_key: str | None
    """A name for the message in its audiences. Nobody gets it twice if it is broadcast again under this name."""


class Manager(Protocol[C]):
    """The public interface of the manager that a connection belongs to; see `ConnectionManager`.

    `ConnectionManager` itself can't be imported here, because it is built from these modules.
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
    def background(self, function: F, *, once: bool = False, name: str | None = None) -> F: ...  # noqa: D102

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

    def stream(  # noqa: D102
        self,
        id: str,  # noqa: A002
        *,
        user: UserId | None = None,
        ttl: float = ...,
        limits: StreamLimits = ...,
    ) -> AbstractAsyncContextManager[Run]: ...
    async def start_stream(  # noqa: D102
        self,
        id: str,  # noqa: A002
        producer: Producer,
        *,
        user: UserId | None = None,
        ttl: float = ...,
        limits: StreamLimits = ...,
    ) -> Run: ...
    async def stop_stream(self, id: str) -> bool: ...  # noqa: A002, D102
    async def stream_status(self, id: str) -> StreamStatus | None: ...  # noqa: A002, D102
    def follow_stream(  # noqa: D102
        self,
        id: str,  # noqa: A002
        *,
        since: Position | str | None = None,
    ) -> AbstractAsyncContextManager[Any]: ...
    async def presence(self, channel: str) -> list[Member]: ...  # noqa: D102
    async def presence_count(self, channel: str) -> int: ...  # noqa: D102
    async def user_channels(self, user: UserId) -> frozenset[str]: ...  # noqa: D102
    async def is_online(self, user: UserId) -> bool: ...  # noqa: D102

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
    def on_joined(self, function: Callable[[str, str], object], /) -> Any: ...  # noqa: D102
    def on_left(self, function: Callable[[str, str], object], /) -> Any: ...  # noqa: D102
    def on_error(self, function: Callable[[Exception, str], object], /) -> Any: ...  # noqa: D102

    def method(self, name: str) -> Callable[[Any], Any]: ...  # noqa: D102
    def on(self, types: Any) -> Callable[[Any], Any]: ...  # noqa: D102
    def asyncapi(self, app: Starlette) -> dict[str, Any]: ...  # noqa: D102
