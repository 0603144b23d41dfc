"""The commands of clients that speak events: one after another over a WebSocket, or by POST."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Callable, Collection, Coroutine, Iterable
from contextlib import suppress
from contextvars import copy_context
from typing import Any, Literal

from wsbroadcast.audience import UNSET, check_channel, user_key
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import (
    ConfigurationError,
    ConnectionClosed,
    EngineError,
    PermissionDenied,
)
from wsbroadcast.logs import about, logger
from wsbroadcast.message import Message
from wsbroadcast.methods import CallError, InvalidArguments, Method
from wsbroadcast.node.admission import Counted
from wsbroadcast.node.core import Core
from wsbroadcast.protocols.commands import (
    MAX_CALLS,
    Answer,
    Call,
    Command,
    ErrorCode,
    Ping,
    Pong,
    Publish,
    Refresh,
    Refused,
    Session,
    Subscribe,
    Unsubscribe,
    Watch,
    error_answer,
    id_of,
)
from wsbroadcast.web.access import Access
from wsbroadcast.web.authentication import Handshake
from wsbroadcast.web.commands import Commands
from wsbroadcast.web.inbound import TypedInbound

Inbound = Literal["broadcast", "commands", "handle", "ignore"]
"""What is done with messages of clients; see `create_router`."""

Accepts = Literal["any", "text", "bytes", "json"]
"""What clients may send; see `create_router`."""

Who = Connection | Handshake
"""The client that asks: a connection, or a request without one."""

_FAILED = "a mistake of the server's"


class EventCommands:
    """Carries out the commands of a router's clients that speak events.

    A protocol changes only the form of what is sent. What `inbound` and `accepts` of the router allow stays the same.
    """

    def __init__(
        self,
        core: Core,
        access: Access,
        commands: Commands,
        *,
        inbound: Inbound,
        accepts: Accepts,
        include_sender: bool,
        typed: TypedInbound | None = None,
    ) -> None:
        self._core = core
        self._access = access
        self._commands = commands
        self._accepts = accepts
        self._include_sender = include_sender
        self._typed = typed
        # The running calls of requests, counted by whose they are. Calls of connections are counted in their sessions.
        self._calls = Counted(MAX_CALLS)
        # Whether plain clients get published text as a JSON string. Otherwise they get it as it is.
        self._is_json = accepts == "json" or inbound == "commands"
        self._publishes: Literal["nowhere", "path", "path_or_everyone", "anywhere"]
        match inbound:
            case "ignore":
                self._publishes = "nowhere"
            case "commands":
                self._publishes = "anywhere"
            case "broadcast":
                self._publishes = "path_or_everyone"
            case "handle":
                self._publishes = "path"
        # With `handle`, messages go to `on_message` hooks, which see only connections, or to handlers of types.
        self._only_handles_posts = inbound == "handle"
        self._publishes_by_post = "nowhere" if inbound == "handle" and typed is None else self._publishes

    def session(self, path_channel: str | None) -> Session:
        """Return a new session for a client of a path's channel."""
        return Session(path_channel, self._publishes)

    async def serve(self, connection: Connection, path_channel: str | None) -> None:
        """Carry out a connection's commands until it ends. Calls that still run are cancelled then.

        Raises:
            ConnectionClosed: When it has ended. A denied command may end it.
        """
        session = self.session(path_channel)
        calls: set[asyncio.Task[Answer]] = set()
        try:
            while True:
                try:
                    asked = await self._next(connection)
                except Refused as refused:
                    self._say(connection, refused.answer)
                else:
                    await self.obey(connection, session, calls, asked)
                await self._core.ease(connection)
        finally:
            for call in calls:
                call.cancel()

    async def _next(self, connection: Connection) -> object:
        if self._typed is None:
            return await connection.receive_json()
        return self._typed.read_command(await connection.receive())

    async def obey(
        self,
        connection: Connection,
        session: Session,
        calls: set[asyncio.Task[Answer]],
        asked: object,
        about: Answer | None = None,
    ) -> None:
        """Do what a connection asks for, and send the answer.

        Args:
            connection: The connection.
            session: The connection's session.
            calls: Its running calls. A new call is added to them.
            asked: What it asks for.
            about: Fields of the answer that refer to the question; by default the `id` of the command.

        Raises:
            ConnectionClosed: If it has ended.
        """
        try:
            command = session.read(asked)
            if isinstance(command, Call):
                self._begin(connection, session, calls, command, id_of(asked))
                return
            answer = await self._carry_out(connection, command, id_of(asked).get("id"))
        except Exception as error:
            answer = await self._commands.answer_to(error, connection)
        if answer is not None:
            self._say(connection, answer | (id_of(asked) if about is None else about))

    def _say(self, connection: Connection, answer: Answer) -> None:
        if connection.is_open:
            self._core.say(connection, Message.json(answer))

    async def answer(
        self,
        who: Handshake,
        channel: str | None,
        asked: object,
        exclude: Iterable[str],
        key: str | None,
        left: Callable[[], Coroutine[Any, Any, None]],
    ) -> Answer:
        """Do what a request without a connection asks for, which may be to publish or to call; return the answer.

        Args:
            who: The sender of the request, authenticated.
            channel: The channel of the request's path.
            asked: What it asks for.
            exclude: Ids of connections that don't get what it publishes.
            key: Its calls are counted under this key; `None` if it isn't known whose they are.
            left: Returns when the client has left. Then its call is cancelled.
        """
        try:
            match Session(channel, self._publishes_by_post).read(asked):
                case Publish() as publish:
                    answer = await self._publish(who, publish, () if channel is None else (channel,), exclude)
                case Call() as call:
                    answer = await self._call(who, call, key, left)
                case _:
                    raise Refused(ErrorCode.NOT_SUPPORTED, "a request can only publish or call")
        except Exception as error:
            answer = await self._commands.answer_to(error, who)
        return answer | id_of(asked)

    async def _carry_out(self, connection: Connection, command: Command, id_: object) -> Answer | None:
        match command:
            case Subscribe():
                await self._subscribe(connection, check_channel(command.channel), command.since, id_)
                return None  # the answer takes its place among the messages
            case Unsubscribe():
                await connection.unsubscribe(command.channel)
                return {"type": "unsubscribed", "channel": command.channel}
            case Watch(begins=True):
                await self._watch(connection, check_channel(command.channel), id_)
                return None  # the list of members is the answer
            case Watch():
                self._core.unwatch(connection, command.channel)
                return {"type": "unwatched", "channel": command.channel}
            case Publish():
                return await self._publish(connection, command, connection.channels)
            case Refresh():
                return await self._refresh(connection, command.token)
            case Ping():
                return {"type": "pong"}
            case Pong() | Call():
                return None

    # Subscribing.

    async def _subscribe(self, connection: Connection, channel: str, since: str | None, id_: object) -> None:
        if self._access._authorize is None and channel not in connection.channels:
            raise PermissionDenied("not allowed")

        async def check() -> None:
            if self._access._authorize is not None:
                await self._access._check(connection, "subscribe", channel)

        await check()
        try:
            await self._core.subscribe_if(connection, channel, since, check, id_)
        except ConfigurationError as error:  # the broker doesn't allow us this name
            raise EngineError(str(error)) from error

    # Presence.

    async def _watch(self, connection: Connection, channel: str, id_: object) -> None:
        if channel not in connection.channels:
            raise PermissionDenied("not in this channel")
        rules = self._core.presence_rules
        if rules is None or rules.of(channel) is None:
            raise Refused(ErrorCode.NOT_SUPPORTED, "this channel has no presence")
        if self._access._authorize is not None:
            await self._access._check(connection, "presence", channel)
        if not await self._core.watch(connection, channel, id_):
            raise PermissionDenied("not in this channel")

    # Publishing.

    async def _publish(self, who: Who, publish: Publish, own: Collection[str], exclude: Iterable[str] = ()) -> Answer:
        channel = None if publish.channel is None else check_channel(publish.channel)
        await self._check_publish(who, channel, own)
        key = publish.key_of(None if who.user is None else user_key(who.user))
        answer: Answer = {"to": "everyone"} if channel is None else {"channel": channel}
        left_out = {*exclude, who.id} if isinstance(who, Connection) and not self._include_sender else {*exclude}
        if self._typed is None:
            publications = self._commands.publications(self._message(publish), UNSET if channel is None else channel)
        else:
            if publish.encoding is not None:
                raise Refused(ErrorCode.INVALID_DATA, "what is published here is json")
            message = self._typed.read_data(publish.data)
            if await self._typed.handle(who, message, channel, publish.idempotency_key):
                return {"type": "handled", **answer}
            if self._only_handles_posts and not isinstance(who, Connection):
                raise PermissionDenied("not allowed")
            publications = self._typed.publications(message, channel)
        for publication in publications:
            publication.exclude |= left_out
        try:
            receipt = await self._core.broadcast(publications, idempotency_key=key)
        except ConfigurationError as error:
            if key is None:
                raise
            raise Refused(ErrorCode.NOT_SUPPORTED, "nothing is kept here, so idempotency_key can't be used") from error
        answer = {"type": "published", **answer}
        if receipt.position is not None:
            answer["position"] = receipt.position
        return answer | {"is_repeat": True} if receipt.is_repeat else answer

    async def _check_publish(self, who: Who, channel: str | None, own: Collection[str]) -> None:
        if self._access._authorize is not None:
            await self._access._check(who, "publish", channel)
        elif channel is not None and channel not in own:
            raise PermissionDenied("not allowed")

    def _message(self, publish: Publish) -> object:
        data = publish.data
        is_text = isinstance(data, str) and publish.encoding is None
        is_bytes = publish.encoding is not None
        if {"text": not is_text, "bytes": not is_bytes, "json": is_bytes, "any": False}[self._accepts]:
            raise Refused(ErrorCode.INVALID_DATA, f"what is published here is {self._accepts}")
        if is_bytes:
            try:
                return b64decode(data, validate=True)
            except ValueError:
                raise Refused(ErrorCode.INVALID_DATA, "the data is not base64") from None
        return Message.json(data) if self._is_json or not is_text else data

    # Going on with another token.

    async def _refresh(self, connection: Connection, token: str) -> Answer:
        try:
            expires_at = await self._access._refresh(connection, token)
        except (Refused, ConnectionClosed):
            raise
        except Exception:
            text = "authenticate failed for a new token of a client"
            logger.exception(text, extra=about("refresh.failed"))
            raise Refused(ErrorCode.FAILED, _FAILED) from None
        return {"type": "refreshed"} if expires_at is None else {"type": "refreshed", "expires_at": expires_at}

    # Calling.

    def _begin(
        self, connection: Connection, session: Session, calls: set[asyncio.Task[Answer]], call: Call, id_: Answer
    ) -> None:
        method = self._method(call)
        is_late = False

        def cut_off() -> None:
            nonlocal is_late
            is_late = True
            self._say(connection, _TIMEOUT | id_)
            if method.is_cancellable:
                task.cancel()

        def ended(task: asyncio.Task[Answer]) -> None:
            timer.cancel()
            session.ended()
            calls.discard(task)
            if not is_late and not task.cancelled():
                self._say(connection, task.result() | id_)

        session.begun()
        timer = asyncio.get_running_loop().call_later(self._core.client_timing.call_timeout, cut_off)
        task = self._start(connection, method, call)
        calls.add(task)
        task.add_done_callback(ended)

    async def _call(
        self, who: Handshake, call: Call, key: str | None, left: Callable[[], Coroutine[Any, Any, None]]
    ) -> Answer:
        method = self._method(call)
        if key is not None and not self._calls.take(key):
            raise Refused(ErrorCode.LIMIT_EXCEEDED, f"{MAX_CALLS} calls run already")
        task = self._start(who, method, call)
        if key is not None:
            task.add_done_callback(lambda _: self._calls.give_back(key))  # when it is done: a thread can't be cancelled
        leaving = self._core.life.node.tasks.begin(left(), "watch of a client that calls", copy_context())
        try:
            timeout = self._core.client_timing.call_timeout
            await asyncio.wait((task, leaving), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() and not task.cancelled() else _TIMEOUT
        finally:
            leaving.cancel()
            if method.is_cancellable:
                task.cancel()

    def _method(self, call: Call) -> Method:
        method = self._core.methods.get(call.name)
        if method is None:
            raise Refused(ErrorCode.UNKNOWN_METHOD, "there is no such method")
        return method

    def _start(self, who: Who, method: Method, call: Call) -> asyncio.Task[Answer]:
        answer = self._answer_to_call(who, method, call)
        return self._core.life.node.tasks.begin(answer, f"call of {method.name}", copy_context())

    async def _answer_to_call(self, who: Who, method: Method, call: Call) -> Answer:
        try:
            if self._access._authorize is not None:
                await self._access._check(who, "call", method.name)
            connection = who if isinstance(who, Connection) else None
            if connection is None and method.needs_connection:
                raise Refused(ErrorCode.NOT_SUPPORTED, "this method is for WebSockets: it needs the connection")
            answer = {"type": "result", "data": await method.run(method.read(call.arguments), connection)}
            self._core.encode(answer)
            return answer
        except InvalidArguments as error:
            return error_answer(ErrorCode.INVALID_ARGUMENTS, str(error), errors=error.mistakes)
        except CallError as error:
            return error_answer(error.code, error.text)
        except (Refused, PermissionDenied, EngineError, ExceptionGroup) as error:
            with suppress(Exception):
                return await self._commands.answer_to(error, who)
            return self._failed(method, error)
        except Exception as error:
            is_gone = isinstance(error, ConnectionClosed) and isinstance(who, Connection) and not who.is_open
            return {} if is_gone else self._failed(method, error)  # nobody is there to get the answer

    def _failed(self, method: Method, error: Exception) -> Answer:
        name = method.name
        logger.error("method %r failed", name, exc_info=error, extra=about("method.failed", method=name))
        return error_answer(ErrorCode.FAILED, _FAILED)


_TIMEOUT = error_answer(ErrorCode.TIMEOUT, "it took too long and was cut off")
