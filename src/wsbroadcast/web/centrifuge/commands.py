"""The commands of clients of the Centrifuge protocol, carried out one after another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from typing import Any

from wsbroadcast.audience import Audience
from wsbroadcast.connection import Connection
from wsbroadcast.engines.contract import keeps_history
from wsbroadcast.exceptions import (
    ConnectionClosed,
    EncodeError,
    EngineError,
    InvalidChannel,
    LimitExceeded,
    PermissionDenied,
    ungrouped,
)
from wsbroadcast.history import History, Replay
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.message import Message
from wsbroadcast.methods import CallError, InvalidArguments, Method
from wsbroadcast.protocols.centrifuge.codec import is_json
from wsbroadcast.protocols.centrifuge.codes import Disconnect, Disconnected, ErrorCode, Failed
from wsbroadcast.protocols.centrifuge.session import Command
from wsbroadcast.protocols.centrifuge.speech import Fields, info_of, json_bytes, value_of
from wsbroadcast.protocols.commands import MAX_CALLS
from wsbroadcast.publication import Position, Sender
from wsbroadcast.web.access import Access
from wsbroadcast.web.centrifuge.client import GRACE_SECONDS, VERSION, Client, Clients, ttl_of
from wsbroadcast.web.centrifuge.identity import Identities, called
from wsbroadcast.web.centrifuge.subscriptions import Subscriptions
from wsbroadcast.web.commands import Outage

OnSend = Callable[[Connection, Any], Awaitable[object] | object]
"""Called with a message to which a client wants no answer: the value of its JSON, or else bytes."""

# An answer holds at most so many bytes of publications. Clients take messages of at least 1 MiB.
_MOST_HISTORY_BYTES = 512 * 1024

Do = Callable[[Connection, Client, Command], Awaitable[Fields | None]]

# Errors that a client is told about. In a group of errors, the kind that is named first here counts.
_ANSWERED = (
    Disconnected,
    Failed,
    ConnectionClosed,
    PermissionDenied,
    InvalidChannel,
    LimitExceeded,
    EncodeError,
    EngineError,
)


class Commands:
    """Carries out the commands of a router's clients.

    Args:
        clients: What the clients share.
        access: Decides what they may do.
        identities: Find out who they are.
        shows_joins: Whether each subscriber of a channel with presence is told who joins and leaves.
        on_send: Called with messages to which they want no answer.
    """

    def __init__(
        self, clients: Clients, access: Access, identities: Identities, *, shows_joins: bool, on_send: OnSend | None
    ) -> None:
        self._clients = clients
        self._core = clients.core
        self._access = access
        self._identities = identities
        self._on_send = on_send
        self._outage = Outage()
        self._throttle = Throttle()
        self.subscriptions = Subscriptions(clients, access, identities.tokens, shows_joins=shows_joins, fail=self.fail)
        """Carries out the commands about subscriptions."""
        self._commands: dict[str, Do] = {
            "unsubscribe": self.subscriptions.unsubscribe,
            "sub_refresh": self.subscriptions.refresh,
            "publish": self._publish,
            "history": self._history,
            "presence": self._presence,
            "presence_stats": self._presence_stats,
            "refresh": self._refresh,
            "rpc": self._begin_call,
            "send": self._send,
        }

    async def obey(self, connection: Connection, client: Client, command: Command) -> None:
        """Do what a client asks for, and send the answer.

        Raises:
            ConnectionClosed: If it is gone.
            Disconnected: If it must be disconnected.
        """
        try:
            result = await self._commands[command.method](connection, client, command)
            if result is not None:
                self._say(connection, client.answer(command, result))
        except Exception as error:
            self.fail(connection, client, command, error)

    def fail(self, connection: Connection, client: Client, command: Command, error: Exception) -> None:
        """Answer a command that was not done.

        Raises:
            ConnectionClosed: If the client is gone.
            Disconnected: If the client must be disconnected.
        """
        failed = self.failed(error)
        if isinstance(failed, ConnectionClosed) and connection.is_open:
            failed = Failed(ErrorCode.INTERNAL)
        if not isinstance(failed, Failed):
            raise failed
        self._clients.count(failed.code)
        if command.id:
            self._say(connection, client.speech.say({"id": command.id, "error": failed.error}))

    def failed(self, error: Exception) -> Failed | Disconnected | ConnectionClosed:
        """Return what a client is told about an error. Mistakes of the server are logged."""
        error = ungrouped(error, *_ANSWERED)
        match error:
            case Failed() | Disconnected() | ConnectionClosed():
                return error
            case PermissionDenied():
                return Failed(ErrorCode.PERMISSION_DENIED)
            case InvalidChannel():
                return Failed(ErrorCode.BAD_REQUEST, "the channel's name breaks a rule")
            case LimitExceeded():
                return Failed(ErrorCode.LIMIT_EXCEEDED)
            case EncodeError():
                return Failed(ErrorCode.BAD_REQUEST, "the data can't be sent, or is too large")
            case EngineError():
                self._outage.log("a client's command was not carried out: %s", error)
                return Failed(ErrorCode.INTERNAL, "try again later")
        if self._throttle.is_due(type(error).__name__):  # clients may cause it again and again
            logger.error("a command of a client failed", exc_info=error, extra=about("centrifuge.failed"))
        return Failed(ErrorCode.INTERNAL)

    def _say(self, connection: Connection, message: Message) -> None:
        if connection.is_open:
            self._core.say(connection, message)

    def _audience(self, connection: Connection, command: Command) -> Audience:
        audience = self._clients.names.audience(command.channel, connection._user_key)
        return Audience.channel(audience.name) if audience.kind == "channel" else audience

    # Publishing.

    async def _publish(self, connection: Connection, client: Client, command: Command) -> Fields:
        request = command.request
        if request.get("type") or request.get("key") or request.get("removed"):
            raise Failed(ErrorCode.NOT_AVAILABLE, "publications of this type are not supported")
        data: bytes = request.get("data", b"")
        if not data:
            raise Failed(ErrorCode.BAD_REQUEST, "to publish needs data")
        audience = self._audience(connection, command)
        await self._check_publish(connection, audience, command.channel)
        message = Message(data, "json" if client.session.codec.form == "text" or is_json(data) else "binary")
        publications = self._core.publications(message, to=[audience])
        subscription = client.session.subscriptions.get(command.channel)
        sender = client.seen(connection, b"" if subscription is None else subscription.info)
        for publication in publications:
            publication.sender = sender
        await self._core.broadcast(publications)
        return {}

    async def _check_publish(self, connection: Connection, audience: Audience, channel: str) -> None:
        if self._access._authorize is not None:
            await self._access._check(connection, "publish", None if audience.kind == "everyone" else channel)
        elif audience.kind == "everyone" or (audience.kind == "channel" and channel not in connection.channels):
            raise PermissionDenied("not allowed")

    # Reading.

    async def _check_read(self, connection: Connection, audience: Audience) -> None:
        if audience.kind != "channel":
            return  # of its own user, or of everyone
        if self._access._authorize is not None:
            if audience.name not in connection.channels:
                await self._access._check(connection, "subscribe", audience.name)
        elif audience.name not in connection.channels:
            raise PermissionDenied("not allowed")

    async def _history(self, connection: Connection, client: Client, command: Command) -> Fields:
        request = command.request
        audience = self._audience(connection, command)
        await self._check_read(connection, audience)
        history = None if self._core.rules is None else self._core.rules.of(audience)
        if history is None:
            raise Failed(ErrorCode.NOT_AVAILABLE, "this channel has no history")
        since, limit, is_reverse = request.get("since"), request.get("limit", 0), request.get("reverse", False)
        if is_reverse and since is not None and not since.get("offset"):
            raise Failed(ErrorCode.BAD_REQUEST, "nothing is before offset 0")
        node = await self._core.life.run_here()
        replay = await self._read(audience, history, None if is_reverse else since, limit)
        if since is not None and since.get("epoch", replay.top.epoch) not in ("", replay.top.epoch):
            raise Failed(ErrorCode.UNRECOVERABLE_POSITION)
        found = [each for each in replay.publications if connection._user_key not in each.exclude_users]
        if since is not None:
            offset = since.get("offset", 0)
            found = [each for each in found if (each.offset < offset if is_reverse else each.offset > offset)]
        if is_reverse:
            found.reverse()
        result: list[Fields] = []
        size = 0
        for each in found:
            size += each.size
            if len(result) == limit or (result and size > _MOST_HISTORY_BYTES):
                break
            seen = await node.continuity.through_hooks(each, connection)
            if seen is not None:
                result += client.speech.publications([seen])
        return {"publications": result, "epoch": replay.top.epoch, "offset": replay.top.offset}

    async def _read(self, audience: Audience, history: History, since: Mapping[str, Any] | None, limit: int) -> Replay:
        # Read no more than is answered, as far as the engine allows it. By default SDKs ask only for the position.
        engine = keeps_history(self._core.life.engine)
        if not limit:
            (top,) = await engine.positions([audience], [history])
            return Replay(top, (), top.offset)
        epoch = "" if since is None else since.get("epoch", "")
        place = Position(epoch, since.get("offset", 0)) if since is not None and epoch else None
        return await engine.read(audience, place, history)

    async def _present(self, connection: Connection, command: Command) -> dict[str, Fields]:
        audience = self._audience(connection, command)
        rules = self._core.presence_rules
        presence = None if rules is None or audience.kind != "channel" else rules.of(audience.name)
        if presence is None or presence.by != "connection":
            raise Failed(ErrorCode.NOT_AVAILABLE, "this channel has no presence of connections")
        if self._access._authorize is not None:
            await self._access._check(connection, "presence", audience.name)
        elif audience.name not in connection.channels:
            raise PermissionDenied("not allowed")
        members = await (await self._core.presence()).members(audience.name)
        return {each.id: info_of(Sender(each.id, each.user or "", json_bytes(each.info))) for each in members}

    async def _presence(self, connection: Connection, client: Client, command: Command) -> Fields:
        return {"presence": await self._present(connection, command)}

    async def _presence_stats(self, connection: Connection, client: Client, command: Command) -> Fields:
        present = await self._present(connection, command)
        return {"num_clients": len(present), "num_users": len({each["user"] for each in present.values()})}

    # Going on with another token.

    async def _refresh(self, connection: Connection, client: Client, command: Command) -> Fields:
        if client.expires_at is None:
            raise Disconnected(Disconnect.BAD_REQUEST, "this connection has no token to refresh")
        identity = await self._identities.refreshed(connection, command.request.get("token", ""))
        if connection.is_open:
            client.expires_at = identity.expires_at
            connection.renew(None if identity.expires_at is None else identity.expires_at + GRACE_SECONDS)
        return {"client": connection.id, "version": VERSION, **ttl_of(identity.expires_at)}

    # Calling and sending.

    async def _begin_call(self, connection: Connection, client: Client, command: Command) -> None:
        method = self._core.methods.get(command.request.get("method", ""))
        if method is None:
            raise Failed(ErrorCode.METHOD_NOT_FOUND)
        if len(client.calls) >= MAX_CALLS:
            raise Failed(ErrorCode.TOO_MANY_REQUESTS, f"{MAX_CALLS} calls run already")
        calling = self._call(connection, client, command, method)
        task = self._core.life.node.tasks.begin(calling, f"call of {method.name}", copy_context())
        client.calls.add(task)
        task.add_done_callback(client.calls.discard)

    async def _call(self, connection: Connection, client: Client, command: Command, method: Method) -> None:
        timeout = self._core.client_timing.call_timeout
        deadline = None
        try:
            async with asyncio.timeout(timeout if method.is_cancellable else None) as deadline:
                result = await self._result(connection, command, method)
            self._say(connection, client.answer(command, {"data": result}))
        except InvalidArguments as error:
            self._fail_call(connection, client, command, Failed(ErrorCode.BAD_REQUEST, str(error)))
        except CallError as error:
            text = f"{error.code}: {error.text}" if error.text else error.code
            self._fail_call(connection, client, command, Failed(ErrorCode.APPLICATION, text))
        except Exception as error:
            is_late = isinstance(error, TimeoutError) and deadline is not None and deadline.expired()
            failed = Failed(ErrorCode.INTERNAL, "it took too long") if is_late else error
            self._fail_call(connection, client, command, failed)

    async def _result(self, connection: Connection, command: Command, method: Method) -> bytes:
        if self._access._authorize is not None:
            await self._access._check(connection, "call", method.name)
        data = value_of(command.request.get("data", b""))
        arguments = {} if data is None else data
        if not isinstance(arguments, dict):
            raise Failed(ErrorCode.BAD_REQUEST, "the data of a call is an object: the arguments by their names")
        result = await method.run(method.read(arguments), connection)
        return self._core.encode(Message.json(result)).payload

    def _fail_call(self, connection: Connection, client: Client, command: Command, error: Exception) -> None:
        if connection.is_open:
            try:
                self.fail(connection, client, command, error)
            except Exception:
                logger.exception("a call failed", extra=about("centrifuge.failed"))

    async def _send(self, connection: Connection, client: Client, command: Command) -> None:
        if self._on_send is not None:
            await called(self._on_send, connection, value_of(command.request.get("data", b"")))
