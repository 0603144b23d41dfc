"""Subscribes clients of the Centrifuge protocol, and unsubscribes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from wsbroadcast.audience import Audience, check_channel
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import (
    ConfigurationError,
    ConnectionClosed,
    EngineError,
    InvalidChannel,
    PermissionDenied,
)
from wsbroadcast.history import NOW, Offset, Since
from wsbroadcast.protocols.centrifuge.codec import Message
from wsbroadcast.protocols.centrifuge.codes import Disconnect, Disconnected, ErrorCode, Failed
from wsbroadcast.protocols.centrifuge.keys import InvalidToken
from wsbroadcast.protocols.centrifuge.session import Command, Subscription
from wsbroadcast.protocols.centrifuge.speech import Fields, info_of, json_bytes, member_info
from wsbroadcast.protocols.centrifuge.tokens import CentrifugeTokens, ExpiredToken, ForeignToken
from wsbroadcast.publication import Position
from wsbroadcast.web.access import Access
from wsbroadcast.web.authentication import Handshake
from wsbroadcast.web.centrifuge.client import Asked, Client, Clients, ttl_of

# For at most so many channels the broker is asked before it is known whether the client may subscribe.
_MOST_WANTED = 100

Fail = Callable[[Connection, Client, Command, Exception], None]
"""Answers a command with an error; raises an error that ends the connection."""


class Subscriptions:
    """Carries out the commands of clients about subscriptions.

    Args:
        clients: What the clients share.
        access: Decides what they may do.
        tokens: Reads tokens of subscriptions; `None` if there are none.
        shows_joins: Whether each subscriber of a channel with presence is told who joins and leaves.
        fail: Answers commands that are not done.
    """

    def __init__(
        self, clients: Clients, access: Access, tokens: CentrifugeTokens | None, *, shows_joins: bool, fail: Fail
    ) -> None:
        self._clients = clients
        self._core = clients.core
        self._access = access
        self._tokens = tokens
        self._shows_joins = shows_joins
        self._fail = fail

    def wanted(self, client: Client, messages: list[Message], user_key: str | None) -> list[Audience]:
        """Return the channels that a client that hasn't connected yet may be about to subscribe to."""
        found = []
        for command in islice(client.session.subscribes(messages), _MOST_WANTED):
            with suppress(Failed, InvalidChannel):
                audience = self._clients.names.audience(command.channel, user_key)
                found.append(Audience.channel(audience.name) if audience.kind == "channel" else audience)
        return found

    async def subscribe(self, connection: Connection, client: Client, commands: Iterable[Command]) -> None:
        """Subscribe a client to several channels. The broker is asked for all of them at once."""
        asked: list[Asked] = []
        for command in commands:
            try:
                asked.append(await self._read(connection, client, command, len(asked)))
            except Exception as error:
                self._fail(connection, client, command, error)
        try:
            async with self._clients.membership.demand.holding([each.audience for each in asked]):
                for each in asked:
                    try:
                        await self._subscribe(connection, client, each)
                    except Exception as error:
                        self._fail(connection, client, each.command, error)
        except ConnectionClosed:
            raise
        except Exception as error:  # the broker can't be reached, or doesn't allow a name: no subscription was begun
            why = EngineError(str(error)) if isinstance(error, ConfigurationError) else error
            for each in asked:
                self._fail(connection, client, each.command, why)

    async def _read(self, connection: Connection, client: Client, command: Command, before: int) -> Asked:
        request, channel = command.request, command.channel
        if request.get("type"):
            raise Failed(ErrorCode.NOT_AVAILABLE, "subscriptions of this type are not supported")
        if request.get("tf"):
            raise Failed(ErrorCode.BAD_REQUEST, "filters are not supported")
        audience = self._clients.names.audience(channel, connection._user_key)
        asked = Asked(command, audience, Subscription())
        if audience.kind != "channel":
            return asked
        check_channel(channel)
        if channel not in connection.channels:
            count = len(connection.channels) + before + 1
            self._clients.membership.admission.check_channels(count, connection)
        if token := request.get("token"):
            asked.subscription = self._granted(connection, channel, token)
            asked.is_granted = True
        else:
            await self._check(connection, channel)
        return asked

    def _granted(self, connection: Connection, channel: str, token: str) -> Subscription:
        if self._tokens is None:
            raise Failed(ErrorCode.PERMISSION_DENIED, "tokens of subscriptions are not taken here")
        try:
            found = self._tokens.subscription(token, channel=channel, user=connection._user_key, client=connection.id)
        except ExpiredToken:
            raise Failed(ErrorCode.TOKEN_EXPIRED) from None
        except ForeignToken:
            raise Disconnected(Disconnect.INVALID_TOKEN) from None
        except InvalidToken:
            raise Failed(ErrorCode.PERMISSION_DENIED) from None
        info, data = json_bytes(found.info), json_bytes(found.data)
        return Subscription(info=info, data=data, expires_at=found.expires_at)

    async def _check(self, connection: Connection | Handshake, channel: str) -> None:
        if self._access._authorize is not None:
            await self._access._check(connection, "subscribe", channel)
        elif channel not in connection.channels:
            raise PermissionDenied("not allowed")

    async def _subscribe(self, connection: Connection, client: Client, asked: Asked) -> None:
        membership, channel = self._clients.membership, asked.command.channel
        continuity, audience = membership.continuity, asked.audience
        client.forget(channel)
        client.session.subscriptions.pop(channel, None)  # the new one takes its place
        with continuity.opening(connection, (audience,)):
            continuity.hold(connection, {audience: NOW})
            try:
                if audience.kind == "channel":
                    await membership.subscribe(connection, (channel,), {audience: NOW}, recovers=False)
                    if not asked.is_granted:
                        # Again: if the right was taken away meanwhile, there was nothing yet to unsubscribe.
                        await self._check(connection, channel)
                since = since_of(asked.command.request)
                continuity.hold(connection, {audience: since})
                await continuity.recover(connection, {audience: since}, asked)
                if asked.failure is not None:
                    raise asked.failure
            except BaseException:
                if audience.kind == "channel":
                    await membership.unsubscribe(connection, (channel,))
                raise
            is_asked = bool(asked.command.request.get("join_leave"))
            await self.tell_joins(connection, client, channel, is_asked=is_asked)
        client.expire_later(connection, channel, asked.subscription.expires_at)

    async def tell_joins(self, connection: Connection, client: Client, channel: str, *, is_asked: bool) -> None:
        """Tell a client who joins and leaves a channel, itself first, if it asks for that and may know it."""
        if not (is_asked or self._shows_joins) or not connection.is_open:
            return
        if channel not in connection.channels:  # it stands for its user: without presence it hears only of itself
            self._tell_own_join(connection, client, channel, info_of(client.seen(connection)))
            return
        rules = self._core.presence_rules
        presence = None if rules is None else rules.of(channel)
        if presence is None or presence.by != "connection":
            return
        if self._access._authorize is not None:
            try:
                await self._access._check(connection, "presence", channel)
            except PermissionDenied:
                return
        known = self._core.life.node.presence
        if known is None or channel not in connection.channels:
            return
        self._tell_own_join(
            connection, client, channel, member_info(connection.id, known.info_of(connection, presence))
        )
        known.watches.follow(connection, channel, presence, self._clients.teller(client.session.codec))

    def _tell_own_join(self, connection: Connection, client: Client, channel: str, info: Fields) -> None:
        self._core.say(connection, client.push(channel, "join", {"info": info}))

    async def unsubscribe(self, connection: Connection, client: Client, command: Command) -> Fields:
        """Unsubscribe a client. Channels it isn't in are ignored."""
        channel = command.channel
        client.forget(channel)
        client.session.subscriptions.pop(channel, None)
        if channel in connection.channels:
            await self._clients.membership.unsubscribe(connection, (channel,))
        return {}

    async def refresh(self, connection: Connection, client: Client, command: Command) -> Fields:
        """Let a subscription go on with another token."""
        channel, token = command.channel, command.request.get("token", "")
        if not channel or not token:
            raise Failed(ErrorCode.BAD_REQUEST, "sub_refresh needs a channel and a token")
        subscription = client.session.subscriptions.get(channel)
        if subscription is None or channel not in connection.channels:
            raise Failed(ErrorCode.PERMISSION_DENIED, "not subscribed")
        try:
            found = self._granted(connection, channel, token)
        except Failed as failed:
            is_expired = failed.code is ErrorCode.TOKEN_EXPIRED
            raise Disconnected(Disconnect.SUBSCRIPTION_EXPIRED if is_expired else Disconnect.INVALID_TOKEN) from None
        subscription.info, subscription.expires_at = found.info, found.expires_at
        client.expire_later(connection, channel, found.expires_at)
        return ttl_of(found.expires_at)


def since_of(request: Mapping[str, Any]) -> Since:
    """Return the position after which a client wants what it missed. Without an epoch, that of the history counts."""
    if not request.get("recover"):
        return NOW
    epoch, offset = request.get("epoch", ""), request.get("offset", 0)
    return Position(epoch, offset) if epoch else Offset(offset)
