"""What clients may ask for in JSON: to subscribe, to unsubscribe and to publish.

```
{"type": "subscribe", "channel": "news"}            → {"type": "subscribed", "channel": "news"}
{"type": "unsubscribe", "channel": "news"}          → {"type": "unsubscribed", "channel": "news"}
{"type": "publish", "channel": "news", "data": 42}  → {"type": "published", "channel": "news"}
anything that isn't done                            → {"type": "error", "code": "forbidden", "text": "not allowed"}
```

Every command gets one answer; if it has an `id`, the answer has it too. What is published reaches the channel as
`{"type": "message", "channel": "news", "data": 42}`, so that nobody can make it look like an answer.
"""

from __future__ import annotations

from wsbroadcast.audience import check_channel
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import (
    ConfigurationError,
    EncodeError,
    EngineError,
    InvalidChannel,
    LimitExceeded,
    PermissionDenied,
    ungrouped,
)
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.node.core import Core
from wsbroadcast.protocols.commands import Answer, ErrorCode, Refused, error_answer, id_of
from wsbroadcast.web.access import Access
from wsbroadcast.web.authentication import Handshake

# What a client is told of; of a group of them the first counts that is named first here.
_ANSWERED = (Refused, PermissionDenied, InvalidChannel, LimitExceeded, EncodeError, EngineError)


class Outage:
    """Logs once a minute that clients find the broker out of reach: they say much, and it is all one trouble."""

    def __init__(self) -> None:
        self._throttle = Throttle()

    def log(self, text: str, *arguments: object) -> None:
        """Log a warning, if there was none in the last minute."""
        if self._throttle.is_due("outage"):
            logger.warning(text, *arguments, extra=about("client.unavailable"))


class Commands:
    """Obeys the commands of a router's clients.

    Without `authorize` a client may publish to the channels that its connection is subscribed to by the path or by the
    app, and subscribe to no others. With it, every subscribe and every publish is asked for, so that a right that was
    taken back is gone with the next command; a subscribe twice, before it is done and after. To unsubscribe is
    everybody's right.
    """

    def __init__(self, core: Core, access: Access, outage: Outage, *, include_sender: bool) -> None:
        self._core = core
        self._access = access
        self._outage = outage
        self._include_sender = include_sender

    async def obey(self, connection: Connection, command: object) -> None:
        """Do what a client asks for, and answer.

        Raises:
            ConnectionClosed: If the connection has ended. A command that is denied may end it.
        """
        try:
            answer = await self._run(connection, command)
        except Exception as error:
            answer = await self.answer_to(error, connection)
        await connection.send(answer | id_of(command))

    async def answer_to(self, error: Exception, connection: Connection | Handshake) -> Answer:
        """Return the answer for what went wrong with a command.

        Raises:
            Exception: What nobody is told.
            ConnectionClosed: If the connection was closed for it.
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
                await self._publish(connection, check_channel(channel), data)
                return {"type": "published", "channel": channel}
        return error_answer(
            ErrorCode.INVALID_COMMAND, "expected a type, subscribe, unsubscribe or publish, and a channel"
        )

    async def _subscribe(self, connection: Connection, channel: str) -> None:
        if self._access._authorize is None:
            if channel not in connection.channels:
                raise PermissionDenied("not allowed")
            return  # it is in there
        await self._access._check(connection, "subscribe", channel)
        try:
            await connection.subscribe(channel)
        except ConfigurationError as error:  # the broker forbids us the name
            raise EngineError(str(error)) from error
        try:  # again: while it was subscribed, who took the right back found nothing to unsubscribe
            await self._access._check(connection, "subscribe", channel)
        except BaseException:  # also if nobody can say just now
            await connection.unsubscribe(channel)
            raise

    async def _publish(self, connection: Connection, channel: str, data: object) -> None:
        await self.check_publish(connection, channel)
        exclude = () if self._include_sender else (connection,)
        message = {"type": "message", "channel": channel, "data": data}
        await self._core.broadcast(self._core.publications(message, channel, exclude=exclude))

    async def check_publish(self, connection: Connection, channel: str) -> None:
        """Check that a client may publish to a channel.

        Raises:
            PermissionDenied: If it may not.
        """
        if self._access._authorize is not None:
            await self._access._check(connection, "publish", channel)
        elif channel not in connection.channels:
            raise PermissionDenied("not allowed")
