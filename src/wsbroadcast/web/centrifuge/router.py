"""The router of the Centrifuge protocol, and the endpoint behind its path."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

from fastapi import APIRouter, params
from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocket, WebSocketState

from wsbroadcast.audience import EVERYONE, Audience, check_channel, user_key
from wsbroadcast.close_codes import ABNORMAL, CloseCode
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import (
    ConfigurationError,
    ConnectionClosed,
    LifecycleError,
    LimitExceeded,
    kind_of,
)
from wsbroadcast.history import NOW, Since
from wsbroadcast.manager import ConnectionManager, core_of
from wsbroadcast.node.admission import Joining
from wsbroadcast.node.event_clients import SPEAKER
from wsbroadcast.node.membership import ROUTER, SUBPROTOCOL
from wsbroadcast.options import check_positive
from wsbroadcast.protocols.centrifuge.codec import JSON, PROTOBUF, Codec, Message
from wsbroadcast.protocols.centrifuge.codes import Disconnect, Disconnected, Failed, text_of
from wsbroadcast.protocols.centrifuge.session import Command, Session, Subscription
from wsbroadcast.protocols.centrifuge.speech import Names
from wsbroadcast.protocols.centrifuge.tokens import CentrifugeTokens
from wsbroadcast.transports import SPEAKS
from wsbroadcast.transports.refusal import refuse
from wsbroadcast.web.access import Access, Authenticate, Authorize, choose_access
from wsbroadcast.web.authentication import MAX_SUBPROTOCOLS, Handshake
from wsbroadcast.web.centrifuge.client import GRACE_SECONDS, Client, Clients
from wsbroadcast.web.centrifuge.commands import Commands, OnSend
from wsbroadcast.web.centrifuge.identity import ChannelsOf, Identified, Identities
from wsbroadcast.web.centrifuge.subscriptions import since_of

# A client first asks its app for a token, which may take a while.
_CONNECT_SECONDS = 25.0

# How long a client that was told why it may not come in has to close, before it is closed.
_LEAVE_SECONDS = 5.0


class Endpoint:
    """Serves clients of the router, from their handshake to their end."""

    def __init__(
        self, manager: ConnectionManager, access: Access, identities: Identities, clients: Clients, commands: Commands
    ) -> None:
        self._manager = manager
        self._core = core_of(manager)
        self._access = access
        self._identities = identities
        self._clients = clients
        self._commands = commands

    async def open(self, websocket: WebSocket) -> None:
        """Serve one client."""
        codec = _codec_of(websocket)
        speech = self._clients.speech(codec)
        client = Client(self._clients, Session(codec), speech)
        websocket.scope.update({ROUTER: True, SPEAKS: speech, SPEAKER: client})
        async with AsyncExitStack() as stack:
            try:
                connection, rest = await self._connect(websocket, client, stack)
            except (ConnectionClosed, WebSocketException, LifecycleError):
                return  # gone, or refused and told so
            except Disconnected as error:
                self._clients.count(error.code)
                await refuse(websocket, 403, error.code, error.reason)
                return
            except BaseException:
                await refuse(websocket, 500, CloseCode.INTERNAL_ERROR, "")
                raise
            await self._serve(connection, client, rest, stack)

    # In.

    async def _connect(
        self, websocket: WebSocket, client: Client, stack: AsyncExitStack
    ) -> tuple[Connection, list[Message]]:
        async with self._core.handshake(websocket):
            await _accept(websocket)
            await self._access._check_origin(websocket)
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    frame = await self._receive(websocket)
            except TimeoutError:
                raise Disconnected(Disconnect.NORMAL, "no connect came in time") from None
            message, *rest = client.session.commands(frame)
            command = client.session.command(message)
            assert command is not None  # the first message isn't a pong
            client.connect = command
            try:
                return await self._join(websocket, client, command, rest, stack), rest
            except (Disconnected, ConnectionClosed, WebSocketException, LifecycleError):
                raise
            except Exception as error:
                await self._answer(websocket, client, command, error)
                raise ConnectionClosed(CloseCode.POLICY_VIOLATION, "not let in") from None

    async def _receive(self, websocket: WebSocket) -> str | bytes:
        try:
            event = await websocket.receive()
        except (OSError, RuntimeError):
            raise ConnectionClosed(ABNORMAL, "") from None
        if event["type"] == "websocket.disconnect":
            raise ConnectionClosed(event.get("code") or ABNORMAL, event.get("reason") or "")
        frame: str | bytes = event["bytes"] if event.get("text") is None else event["text"]
        size = len(frame if isinstance(frame, bytes) else frame.encode("utf-8", "surrogatepass"))
        try:
            self._clients.membership.admission.inbound.check_size(size, websocket.scope.get("client"))
        except LimitExceeded as error:
            await refuse(websocket, 403, error.code, error.reason)
            raise ConnectionClosed(error.code, error.reason) from None
        return frame

    async def _join(
        self, websocket: WebSocket, client: Client, command: Command, rest: list[Message], stack: AsyncExitStack
    ) -> Connection:
        request = command.request
        identity = await self._identities.identify(websocket, request)
        handshake = Handshake(websocket, identity.user, identity.info)
        channels = {**await self._identities.channels(handshake, request.get("data", b"")), **identity.channels}
        joining = self._joining(client, identity, channels, request)
        # The client may subscribe in the same frame. Then the broker is asked for all channels in one round trip.
        demand = self._clients.membership.demand
        if audiences := demand.audiences(joining.user_key, joining.channels):
            audiences += self._commands.subscriptions.wanted(client, rest, joining.user_key)
            await stack.enter_async_context(demand.holding(audiences))
        return await self._core.connect(websocket, lambda: joining)

    def _joining(
        self, client: Client, identity: Identified, channels: dict[str, Subscription], request: Any
    ) -> Joining:
        client.shown = identity.shown
        expires_at = identity.expires_at
        if identity.is_refreshed and expires_at is not None:
            client.expires_at = expires_at
            expires_at += GRACE_SECONDS
        names = self._clients.names
        key = None if identity.user is None else user_key(identity.user)
        audiences = [names.audience(channel, key) for channel in channels]
        joined = tuple(each.name for each in audiences if each.kind == "channel")
        joining = Joining.of(identity.user, joined, identity.info, expires_at=expires_at)
        own = [Audience("user", joining.user_key)] if joining.user_key is not None else []
        for audience in (*own, EVERYONE):
            if (named := names.of(audience)) is not None:
                channels[named] = Subscription(is_server_side=True)
        client.given = channels
        since: dict[Audience, Since] = {}
        for channel, known in request.get("subs", {}).items():
            if channel in channels and (wanted := since_of(known)) is not NOW:
                since[names.audience(channel, joining.user_key)] = wanted
        return joining._replace(since=since)

    async def _answer(self, websocket: WebSocket, client: Client, command: Command, error: Exception) -> None:
        # The client closes as soon as it has read the answer.
        failed = self._commands.failed(error)
        if isinstance(failed, Disconnected):
            raise failed
        assert isinstance(failed, Failed)
        self._clients.count(failed.code)
        payload = client.speech.codec.encode({"id": command.id, "error": failed.error})
        content = {"text": payload.decode()} if client.speech.codec.form == "text" else {"bytes": payload}
        with suppress(OSError, RuntimeError, TimeoutError, ConnectionClosed, WebSocketException):
            async with asyncio.timeout(_LEAVE_SECONDS):
                await websocket.send({"type": "websocket.send", **content})
                while websocket.client_state is WebSocketState.CONNECTED:
                    await self._receive(websocket)
        await refuse(websocket, 403, Disconnect.NORMAL, text_of(Disconnect.NORMAL))

    # After connecting.

    async def _serve(self, connection: Connection, client: Client, rest: list[Message], stack: AsyncExitStack) -> None:
        try:
            await self._tell_joins(connection, client)
            await self._obey(connection, client, rest, len(rest))
            await stack.aclose()
            while True:
                client.is_busy = False
                frame = await connection.receive()
                client.is_busy = True
                messages = client.session.commands(frame)
                await self._obey(connection, client, messages, len(messages) - 1)
        except (ConnectionClosed, LifecycleError):
            pass
        except Disconnected as error:
            self._clients.count(error.code)
            await connection.close(error.code, error.reason)
        finally:
            client.end()
            if connection.is_open:
                await connection.close(CloseCode.INTERNAL_ERROR)

    async def _tell_joins(self, connection: Connection, client: Client) -> None:
        for channel in list(client.given):
            await self._commands.subscriptions.tell_joins(connection, client, channel, is_asked=False)

    async def _obey(self, connection: Connection, client: Client, messages: list[Message], uncounted: int) -> None:
        self._count(connection, uncounted)
        at = 0
        while at < len(messages):
            command = client.session.command(messages[at])
            if command is not None and command.method == "subscribe":
                several = list(client.session.subscribes(messages[at:]))
                await self._commands.subscriptions.subscribe(connection, client, several)
                at += len(several)
            else:
                if command is not None:
                    await self._commands.obey(connection, client, command)
                at += 1
            await self._core.ease(connection)

    def _count(self, connection: Connection, commands: int) -> None:
        # A command counts as much as a frame. The frame itself was counted when it came.
        try:
            for _ in range(commands):
                self._clients.membership.admission.check_message(connection, "")
        except LimitExceeded as error:
            raise Disconnected(Disconnect.TOO_MANY_REQUESTS, error.reason) from None


async def _accept(websocket: WebSocket) -> None:
    try:
        await websocket.accept(websocket.scope.get(SUBPROTOCOL))
    except (OSError, RuntimeError) as error:
        raise ConnectionClosed(ABNORMAL, "closed while it was accepted") from error


def _codec_of(websocket: WebSocket) -> Codec:
    offered = websocket.scope.get("subprotocols", [])[:MAX_SUBPROTOCOLS]
    for codec in (PROTOBUF, JSON):
        if codec.subprotocol in offered:
            websocket.scope[SUBPROTOCOL] = codec.subprotocol
            return codec
    query = websocket.query_params
    return PROTOBUF if PROTOBUF.name in (query.get("format"), query.get("cf_protocol")) else JSON


def create_centrifuge_router(
    manager: ConnectionManager,
    path: str = "/connection/websocket",
    *,
    tokens: CentrifugeTokens | None = None,
    channels: ChannelsOf | None = None,
    user_channel: str | None = "#{user}",
    everyone_channel: str | None = None,
    shows_joins: bool = False,
    on_send: OnSend | None = None,
    pong_timeout: float = 10.0,
    authenticate: Authenticate | None = None,
    authorize: Authorize | None = None,
    allowed_origins: Iterable[str] | None = None,
    access: Access | None = None,
    dependencies: Sequence[params.Depends] | None = None,
) -> APIRouter:
    """Make a router that serves clients of the Centrifuge protocol, in JSON and in Protobuf.

    A client is a `Connection` like any other: it is in `connections`, runs hooks, and has a backlog, a policy and an
    end. It gets what is broadcast to its channels. Recovery comes from `history=`. Presence, and who joins and leaves,
    comes from channels with `Presence(by="connection")`. Calls go to `@manager.method`.

    The token that a client connects with says who it is: `tokens` reads it, or it takes the place of what the
    `TokenFrom` of `authenticate` finds. For a client without a token, `authenticate` decides by the handshake. A client
    may subscribe if `authorize` allows it, or if it has a token for the channel that `tokens` reads.

    Args:
        manager: The manager that keeps the connections.
        path: The path of the endpoint.
        tokens: Reads tokens with the claims of Centrifugo.
        channels: The channels that a client is put into when it connects: names; a dict of names and of what the client
            is told with each; or a function `(handshake, data)` that returns one of these.
        user_channel: The channel in which a client gets what is broadcast to its user. Each user has its own. `None`
            sends these messages without a channel.
        everyone_channel: The same for what is broadcast to everyone.
        shows_joins: Whether all subscribers of a channel with presence are told who joins and leaves. Otherwise only
            those that ask for it are told. `authorize` is asked about `presence`.
        on_send: `on_send(connection, data)` is called with what a client sends without wanting an answer.
        pong_timeout: Seconds within which a client must answer a ping. `ClientTiming.ping_interval` says how often it
            is sent one.
        authenticate: A FastAPI dependency that returns who the client is; see `Access`.
        authorize: Decides what a connection may do with a channel; see `Access`. Without it a client can subscribe only
            by tokens.
        allowed_origins: The pages that may connect; see `Access`.
        access: An `Access` in place of these three.
        dependencies: FastAPI dependencies that run first.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    if not isinstance(manager, ConnectionManager):
        raise ConfigurationError(f"a router needs its manager first, not {kind_of(manager)}")
    if user_channel is not None and (
        not isinstance(user_channel, str) or user_channel.count("{user}") != 1 or user_channel == "{user}"
    ):
        raise ConfigurationError(
            f'user_channel is a text with {{user}} and other text in it, such as "#{{user}}", not {user_channel!r:.80}'
        )
    names = Names(user_channel, everyone_channel)
    if everyone_channel is not None and names.is_users(check_channel(everyone_channel)):
        raise ConfigurationError(f"everyone_channel {everyone_channel!r:.80} is also one of user_channel: change it")
    check_positive("pong_timeout", pong_timeout)
    access = choose_access(access, authenticate, authorize, allowed_origins, {})
    core = core_of(manager)
    identities = Identities(access, tokens, channels)
    clients = Clients(core, names, pong_timeout)
    commands = Commands(clients, access, identities, shows_joins=shows_joins, on_send=on_send)
    endpoint = Endpoint(manager, access, identities, clients, commands)
    router = APIRouter(lifespan=manager.lifespan)
    router.add_api_websocket_route(path, endpoint.open, name="wsbroadcast.centrifuge", dependencies=dependencies)
    return router
