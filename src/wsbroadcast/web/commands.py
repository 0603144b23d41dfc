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

from typing import Any

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
from wsbroadcast.message import Message
from wsbroadcast.node.core import Core
from wsbroadcast.publication import POSITION_TEXT
from wsbroadcast.web.access import Access

MAX_ID_CHARACTERS = 64
"""The longest `id` of a command, as text."""

Answer = dict[str, Any]

# What a client is told of; of a group of them the first counts that is named first here.
_ANSWERED = (PermissionDenied, InvalidChannel, LimitExceeded, EncodeError, EngineError)


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

    def __init__(
        self, core: Core, access: Access, outage: Outage, *, include_sender: bool, may_publish: bool, may_roam: bool
    ) -> None:
        self._core = core
        self._access = access
        self._outage = outage
        self._include_sender = include_sender
        # Of clients that speak events: whether they publish, and whether that is to other channels than the path's.
        self._may_publish = may_publish
        self._may_roam = may_roam

    async def obey(self, connection: Connection, command: object) -> None:
        """Do what a client asks for, and answer.

        Raises:
            ConnectionClosed: If the connection has ended. A command that is denied may end it.
        """
        try:
            answer = await self._run(connection, command)
        except Exception as error:
            answer = await self._answer_to(ungrouped(error, *_ANSWERED), connection)
        await connection.send(answer | _id_of(command))

    async def obey_event(self, connection: Connection, command: object, path_channel: str | None) -> None:
        """Do what a client asks for that speaks events, and answer.

        Args:
            connection: The client's.
            command: What it has sent.
            path_channel: The channel of the router's path.

        Raises:
            ConnectionClosed: If the connection has ended. A command that is denied may end it.
        """
        try:
            answer = await self._run_event(connection, command, path_channel)
        except Exception as error:
            answer = await self._answer_to(ungrouped(error, *_ANSWERED), connection)
        if answer is not None:
            self._core.say(connection, Message.json(answer | _id_of(command)))

    async def _run_event(self, connection: Connection, command: object, path_channel: str | None) -> Answer | None:
        match command:
            case {"type": "subscribe", "channel": str() as channel}:
                since = command.get("since") if isinstance(command, dict) else None
                if since is not None and not isinstance(since, str):
                    return error_answer("invalid_command", f'since is "last", or a text: {POSITION_TEXT}')
                await self._subscribe_since(
                    connection, check_channel(channel), since or None, _id_of(command).get("id")
                )
                return None
            case {"type": "publish", "channel": str() as channel, "data": data}:
                name = check_channel(channel)
                if not self._may_publish or (name != path_channel and not self._may_roam):
                    raise PermissionDenied("not allowed")
                await self._check_publish(connection, name)
                message = Message.json(data)
                exclude = () if self._include_sender else (connection,)
                await self._core.broadcast(self._core.publications(message, name, exclude=exclude))
                return {"type": "published", "channel": name}
        return await self._run(connection, command)

    async def _subscribe_since(self, connection: Connection, channel: str, since: str | None, id_: object) -> None:
        if self._access._authorize is None and channel not in connection.channels:
            raise PermissionDenied("not allowed")

        async def check() -> None:
            if self._access._authorize is not None:
                await self._access._check(connection, "subscribe", channel)

        await check()
        try:
            await self._core.subscribe_if(connection, channel, since, check, id_)
        except ConfigurationError as error:  # the broker forbids us the name
            raise EngineError(str(error)) from error

    async def _answer_to(self, error: Exception, connection: Connection) -> Answer:
        match error:
            case PermissionDenied():
                return await self._access._denied(connection, error)
            case InvalidChannel():
                return error_answer("invalid_channel", error.rule)
            case LimitExceeded():
                return error_answer("limit_exceeded", str(error))
            case EncodeError():
                return error_answer("invalid_data", "the data can't be sent, or is too large")
            case EngineError():
                self._outage.log("a client's command was not carried out: %s", error)
                return error_answer("unavailable", "try again later")
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
        return error_answer("invalid_command", "expected a type, subscribe, unsubscribe or publish, and a channel")

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
        await self._check_publish(connection, channel)
        exclude = () if self._include_sender else (connection,)
        message = {"type": "message", "channel": channel, "data": data}
        await self._core.broadcast(self._core.publications(message, channel, exclude=exclude))

    async def _check_publish(self, connection: Connection, channel: str) -> None:
        if self._access._authorize is not None:
            await self._access._check(connection, "publish", channel)
        elif channel not in connection.channels:
            raise PermissionDenied("not allowed")


def error_answer(code: str, text: str) -> Answer:
    """Make the answer that says why something was not done."""
    return {"type": "error", "code": code, "text": text}


def _id_of(command: object) -> Answer:
    match command:
        case {"id": str() as found} if len(found) <= MAX_ID_CHARACTERS:
            return {"id": found}
        case {"id": int() as found} if abs(found) < 10**MAX_ID_CHARACTERS:
            return {"id": found}
    return {}
