"""The commands of clients in JSON: subscribe, unsubscribe and publish.

```
{"type": "subscribe", "channel": "news"}            → {"type": "subscribed", "channel": "news"}
{"type": "unsubscribe", "channel": "news"}          → {"type": "unsubscribed", "channel": "news"}
{"type": "publish", "channel": "news", "data": 42}  → {"type": "published", "channel": "news"}
anything that isn't done                            → {"type": "error", "code": "forbidden", "text": "not allowed"}
```

Every command gets one answer. If it has an `id`, the answer has it too. What is published reaches the channel as
`{"type": "message", "channel": "news", "data": 42}`, so nobody can make it look like an answer.
"""

from __future__ import annotations

from wsbroadcast.audience import Audience, Unset, check_channel
from wsbroadcast.connection import Connection, Exclude
from wsbroadcast.exceptions import (
    ConfigurationError,
    EncodeError,
    EngineError,
    InvalidChannel,
    LimitExceeded,
    MessageTooLarge,
    PermissionDenied,
    ungrouped,
)
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.message import Enveloped, Message, to_json_bytes
from wsbroadcast.node.core import Core
from wsbroadcast.protocols.commands import Answer, ErrorCode, Refused, error_answer, id_of
from wsbroadcast.publication import Publications
from wsbroadcast.web.access import Access
from wsbroadcast.web.authentication import Handshake
from wsbroadcast.web.inbound import TypedInbound

# What is put around data that is JSON already.
_ENVELOPE = b'{"type":"message","channel":%b,"data":%b}'

# Errors that a client is told about. In a group of errors, the kind that is named first here counts.
_ANSWERED = (Refused, PermissionDenied, InvalidChannel, LimitExceeded, EncodeError, EngineError)


class Outage:
    """Logs once a minute that the broker is out of reach for clients: many messages fail for the same reason."""

    def __init__(self) -> None:
        self._throttle = Throttle()

    def log(self, text: str, *arguments: object) -> None:
        """Log a warning, if there was none in the last minute."""
        if self._throttle.is_due("outage"):
            logger.warning(text, *arguments, extra=about("client.unavailable"))


class Commands:
    """Carries out the commands of a router's clients.

    Without `authorize` a client may publish to the channels that the path or the app has subscribed it to. It may
    subscribe to no others. With `authorize`, that is asked at every subscribe and every publish, so a right that was
    taken away is gone with the next command. For a subscribe it is asked twice, before and after. Everybody may
    unsubscribe.
    """

    def __init__(
        self, core: Core, access: Access, outage: Outage, *, include_sender: bool, typed: TypedInbound | None = None
    ) -> None:
        self._core = core
        self._access = access
        self._outage = outage
        self._include_sender = include_sender
        self._typed = typed

    async def obey(self, connection: Connection, command: object) -> None:
        """Do what a client asks for, and send the answer.

        Raises:
            ConnectionClosed: If the connection has ended. A denied command may end it.
        """
        try:
            answer = await self._run(connection, command)
        except Exception as error:
            answer = await self.answer_to(error, connection)
        await connection.send(answer | id_of(command))

    async def answer_to(self, error: Exception, connection: Connection | Handshake) -> Answer:
        """Return the answer for an error in a command.

        Raises:
            Exception: The error, if clients aren't told about it.
            ConnectionClosed: If the connection was closed because of it.
        """
        error = ungrouped(error, *_ANSWERED)
        match error:
            case Refused():
                return error.answer
            case PermissionDenied() if isinstance(connection, Connection):
                return await self._access._denied(connection, error)
            case PermissionDenied():
                return error_answer(ErrorCode.FORBIDDEN, str(error))
            case InvalidChannel():
                return error_answer(ErrorCode.INVALID_CHANNEL, error.rule)
            case LimitExceeded():
                return error_answer(ErrorCode.LIMIT_EXCEEDED, str(error))
            case EncodeError():
                return error_answer(ErrorCode.INVALID_DATA, "the data can't be sent, or is too large")
            case EngineError():
                self._outage.log("a client's command was not carried out: %s", error)
                return error_answer(ErrorCode.UNAVAILABLE, "try again later")
            case _:
                raise error

    async def _run(self, connection: Connection, command: object) -> Answer:
        match command:
            case {"type": "subscribe", "channel": str() as channel}:
                await self._subscribe(connection, check_channel(channel))
                return {"type": "subscribed", "channel": channel}
            case {"type": "unsubscribe", "channel": str() as channel}:
                await connection.unsubscribe(channel)
                return {"type": "unsubscribed", "channel": channel}
            case {"type": "publish", "channel": str() as channel, "data": data}:
                return await self._publish(connection, check_channel(channel), data)
        return error_answer(
            ErrorCode.INVALID_COMMAND, "expected a type, subscribe, unsubscribe or publish, and a channel"
        )

    async def _subscribe(self, connection: Connection, channel: str) -> None:
        if self._access._authorize is None:
            if channel not in connection.channels:
                raise PermissionDenied("not allowed")
            return  # it is subscribed already
        await self._access._check(connection, "subscribe", channel)
        try:
            await connection.subscribe(channel)
        except ConfigurationError as error:  # the broker doesn't allow us this name
            raise EngineError(str(error)) from error
        try:  # again: if the right was taken away meanwhile, there was nothing yet to unsubscribe
            await self._access._check(connection, "subscribe", channel)
        except BaseException:  # also if `authorize` can't answer now
            await connection.unsubscribe(channel)
            raise

    async def _publish(self, connection: Connection, channel: str, data: object) -> Answer:
        await self.check_publish(connection, channel)
        exclude = () if self._include_sender else (connection,)
        if self._typed is None and self._core.sends is None:
            envelope = to_json_bytes({"type": "message", "channel": channel, "data": data})
        else:
            if self._typed is None:
                checked = self.publications(Message.json(data), channel)
            else:
                message = self._typed.read_data(data)
                if await self._typed.handle(connection, message, channel):
                    return {"type": "handled", "channel": channel}
                checked = self._typed.publications(message, channel)
            envelope = _ENVELOPE % (to_json_bytes(channel), checked[0].message.payload)
        audience = Audience("channel", channel)
        publications = self._core.publications_to(Enveloped(envelope, "json"), audience, exclude)
        await self._core.broadcast(publications)
        return {"type": "published", "channel": channel}

    def publications(self, message: object, channel: str | Unset, exclude: Exclude = ()) -> Publications:
        """Return the publications of a message from a client, for a router without types.

        Raises:
            EncodeError: If it isn't of the type that `sends` of the manager says, which is counted; or if it is too
                large.
        """
        try:
            return self._core.publications(message, channel, exclude=exclude)
        except EncodeError as error:
            if not isinstance(error, MessageTooLarge):
                self._core.counters.invalid += 1
            raise

    async def check_publish(self, connection: Connection, channel: str) -> None:
        """Check that a client may publish to a channel.

        Raises:
            PermissionDenied: If it may not.
        """
        if self._access._authorize is not None:
            await self._access._check(connection, "publish", channel)
        elif channel not in connection.channels:
            raise PermissionDenied("not allowed")
