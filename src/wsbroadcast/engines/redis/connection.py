"""One connection to a Redis server.

redis-py connects, speaks TLS and authenticates. After that this module has the transport. redis-py's own reader takes
seven times as long for each message. And when redis-py closes a connection, what is left in buffers is still sent;
after a network partition that would arrive late. Nothing here reconnects, tries again or runs as a task, so a cancelled
call leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from wsbroadcast.engines.broker.health import is_bug
from wsbroadcast.engines.broker.link import Host, Inlet, no_linger, reset
from wsbroadcast.engines.redis.protocol import ErrorReply, Reply, ReplyReader, pack
from wsbroadcast.engines.redis.target import (
    Access,
    AuthenticationError,
    AuthorizationError,
    DataError,
    RedisError,
    ResponseError,
    unreal,
)
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable

# Answers of a server that is no longer the right one, or not ready: find the right server again.
_WRONG_SERVER = {"ASK", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MOVED", "READONLY", "TRYAGAIN"}

# Answers of the right server, if it can't do anything now.
_BUSY = {"BUSY", "MISCONF", "NOREPLICAS", "NOSCRIPT", "OOM"}

# Answers of a server that refuses the user.
_REFUSED = {"DENIED", "NOAUTH", "NOPERM", "WRONGPASS"}

# OpenSSL's codes for a certificate that is valid, but for another host name or IP address.
_OTHER_NAMES = {62, 64}


class Wire(asyncio.Protocol, ABC):
    """The base of both kinds of connection.

    Args:
        access: How to connect and log in.
        host: The server's address; `None` for a unix socket.
        needs: The permissions that the user needs, as in `ACL SETUSER`.
        lost: Called once when the connection has ended, with the reason.
    """

    def __init__(self, access: Access, host: Host | None, needs: str, lost: Callable[[Exception], None]) -> None:
        self.where = str(host) if host else access.path
        """The server, for errors."""
        self._access = access
        self._host = host
        self.needs = needs
        """The permissions that the user needs, as in `ACL SETUSER`."""
        self._lost = lost
        self._replies = ReplyReader()
        # redis-py's connection. It isn't used any more after it has authenticated.
        self._connection: Any = None
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None

    async def open(self) -> None:
        """Connect and authenticate.

        Raises:
            ConfigurationError: If the server refuses the user or the options.
            Exception: An error of redis-py, if the server can't be reached.
        """
        self._access.load_certificates()
        self._connection = self._access.connection(self._host)
        self._connection.redis_connect_func = self._greet
        try:
            await self._connection.connect()
        except RedisError as error:
            refusal = self._refusal(error)
            if refusal is None:
                raise
        else:
            if self._transport is None:
                raise unreal(self._connection)
            self._transport.set_protocol(self)
            return
        raise refusal  # raised here, so that redis-py's error, which repeats the server's words, isn't its context

    def _refusal(self, error: RedisError) -> Exception | None:
        # redis-py hides the error in another one while it connects, and over a unix socket always.
        for each in (error, error.__cause__, error.__context__):
            if isinstance(each, Exception) and is_bug(each):
                return each
            if isinstance(each, DataError):
                return ConfigurationError(f"redis-py refuses the options: {each}")
            if isinstance(each, (AuthenticationError, AuthorizationError, ResponseError)):
                return self.explain(each)
            if isinstance(each, ssl.SSLCertVerificationError):
                why = f"has a certificate that isn't trusted ({each.verify_message})"
                is_for_another = each.verify_code in _OTHER_NAMES
                what = "it has to name that host" if is_for_another else "give the option ssl_ca_certs a CA to trust"
                return ConfigurationError(f"Redis at {self.where} {why}: {what}")
        return None

    async def _greet(self, connection: Any) -> None:
        # redis-py calls this once there is a socket, before it authenticates. There is no public way to the transport.
        transport = getattr(connection._writer, "transport", None)
        if hasattr(transport, "set_protocol"):  # uvloop's transports are not of asyncio's classes
            self._transport = cast(asyncio.Transport, transport)
            no_linger(self._transport)
            await connection.on_connect()

    async def drop(self) -> None:
        """End the connection now. Nothing that is still in a buffer is sent. It may be called twice."""
        self._end(ConnectionAbortedError(f"the connection to {self.where} was dropped"))
        if self._connection is not None:
            await self._connection.disconnect(
                nowait=True
            )  # else redis-py warns, when it is garbage-collected, that it wasn't closed

    def explain(self, error: Exception) -> Exception:
        """Return the exception for an error reply: a `ConnectionError` if this is no longer the right server."""
        code = error.code if isinstance(error, ErrorReply) else ""
        text = str(error).partition(", with args")[0]  # an unknown command's arguments are repeated, also a password
        if code in _WRONG_SERVER or "max number of clients" in text:
            return ConnectionError(f"Redis at {self.where} answers {text}")
        if code in _REFUSED or not code:
            user = f"the user {self._access.user!r}"
            if isinstance(error, AuthenticationError):
                return ConfigurationError(f"Redis at {self.where} refuses {user} ({text}): check user and password")
            return ConfigurationError(f"Redis at {self.where} refuses {user} ({text}), who needs {self.needs}")
        if code in _BUSY:
            return EngineUnavailable(f"Redis at {self.where} answers {text}; nothing was sent")
        return EngineError(f"Redis at {self.where} answers {text}")

    # For the transport.

    def data_received(self, data: bytes) -> None:
        """Take all replies that are complete now."""
        try:
            for reply in self._replies.feed(data):
                self._take(reply)
        except Exception as error:  # this isn't Redis, or a bug of ours: the rest can't be understood
            self._end(error)

    def connection_lost(self, error: Exception | None) -> None:
        """End the connection."""
        self._end(error or ConnectionResetError(f"Redis at {self.where} closed the connection"))

    @abstractmethod
    def _take(self, reply: Reply) -> None:
        """Take one reply."""

    @abstractmethod
    def _refuse(self, error: Exception) -> None:
        """Tell all callers that wait for answers that none will come, except this error."""

    def _write(self, commands: bytes) -> None:
        if self._error is not None:
            raise self._error
        assert self._transport is not None
        self._transport.write(commands)

    def _end(self, error: Exception) -> None:
        if self._transport is not None:
            reset(self._transport)
        if self._error is None:
            self._error = error
            self._refuse(error)
            self._lost(error)


class Asker(Wire):
    """A connection for commands. Answers come in the order of the commands."""

    def __init__(self, access: Access, host: Host | None, needs: str, lost: Callable[[Exception], None]) -> None:
        super().__init__(access, host, needs, lost)
        # How many answers each question has, and the future of its caller; the oldest first. A cancelled one stays,
        # because its answers still come.
        self._questions: deque[tuple[int, asyncio.Future[list[Reply]]]] = deque()
        # The answers to the oldest question so far.
        self._answers: list[Reply] = []

    async def ask(self, *commands: bytes) -> list[Reply]:
        """Send commands in one go; return their answers, also errors. A second question needn't wait for the first.

        Raises:
            Exception: If the connection is lost.
        """
        self._write(b"".join(commands))
        answered: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        self._questions.append((len(commands), answered))
        return await answered

    def _take(self, reply: Reply) -> None:
        if not self._questions:
            raise ValueError(f"Redis at {self.where} sent an answer that nobody asked for")
        self._answers.append(reply)
        if len(self._answers) == self._questions[0][0]:
            _, answered = self._questions.popleft()
            answers, self._answers = self._answers, []
            if not answered.done():
                answered.set_result(answers)

    def _refuse(self, error: Exception) -> None:
        while self._questions:
            _, answered = self._questions.popleft()
            if not answered.done():
                answered.set_exception(error)
                answered.exception()  # marked as retrieved, in case the caller is being cancelled


class Subscriber(Wire):
    """A connection for subscriptions, and for what is published to them.

    Args:
        access: How to connect and log in.
        host: The server's address; `None` for a unix socket.
        needs: The permissions that the user needs, as in `ACL SETUSER`.
        lost: Called once when the connection has ended, with the reason.
        is_sharded: Whether to use the commands of sharded pub/sub.
    """

    def __init__(
        self,
        access: Access,
        host: Host | None,
        needs: str,
        lost: Callable[[Exception], None],
        *,
        is_sharded: bool = False,
    ) -> None:
        super().__init__(access, host, needs, lost)
        letter = b"s" if is_sharded else b""
        self._message = letter + b"message"
        self._subscribe = letter + b"subscribe"
        self._unsubscribe = letter + b"unsubscribe"
        self.inlet: Inlet | None = None
        """Takes the messages; `None` until somebody reads."""
        # The future of the call that waits for confirmations.
        self._waiting: asyncio.Future[None] | None = None
        # The confirmations that are still to come. Each command gets one for each name, or one error for all names.
        self._awaited = b""
        self._unconfirmed: deque[set[bytes]] = deque()
        # The first error among them.
        self._first_error: ErrorReply | None = None
        self._pong = asyncio.Event()

    async def subscribe(self, groups: Iterable[Sequence[str]]) -> None:
        """Subscribe to groups of names, with one command for each group; return when all names are confirmed.

        Raises:
            ConfigurationError: If the server forbids a name. It is raised once all groups are answered.
            Exception: If the connection is lost.
        """
        await self._change(self._subscribe, groups)

    async def unsubscribe(self, groups: Iterable[Sequence[str]]) -> None:
        """Unsubscribe, with one command for each group of names."""
        await self._change(self._unsubscribe, groups)

    async def ping(self) -> None:
        """Return when the server has answered."""
        self._pong.clear()
        self._write(pack("PING"))
        await self._pong.wait()

    async def _change(self, verb: bytes, groups: Iterable[Sequence[str]]) -> None:
        commands = [(verb, *dict.fromkeys(name.encode() for name in group)) for group in groups if group]  # each once
        if not commands:
            return
        self._awaited, self._first_error = verb, None
        self._unconfirmed = deque(set(command[1:]) for command in commands)
        try:
            self._write(b"".join(pack(*command) for command in commands))
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        except ErrorReply as error:
            raise self.explain(error) from None
        finally:
            self._waiting = None
            self._unconfirmed.clear()

    def _take(self, reply: Reply) -> None:
        # Every arriving message comes through here.
        if isinstance(reply, list):
            kind = reply[0]
            if kind == self._message:
                # Until somebody reads, only the probe is subscribed. Other nodes publish to the same probe.
                if self.inlet is not None:
                    self.inlet.take(cast(bytes, reply[1]).decode(), cast(bytes, reply[2]))
            elif kind == b"pong":
                self._pong.set()
            else:
                self._confirm(kind, cast(bytes, reply[1]))
        elif isinstance(reply, ErrorReply):
            if not self._unconfirmed:
                raise self.explain(reply)
            self._first_error = self._first_error or reply
            self._end_command()
        else:
            self._pong.set()  # the answer while nothing is subscribed

    def _confirm(self, kind: Reply, name: bytes) -> None:
        if kind == self._awaited and self._unconfirmed and name in self._unconfirmed[0]:
            self._unconfirmed[0].discard(name)
            if not self._unconfirmed[0]:
                self._end_command()
        elif kind == self._subscribe and self.inlet is not None:
            # A proxy between this node and Redis has reconnected and subscribed again.
            self.inlet.missed("the broker confirmed a subscription again")
        elif kind == self._unsubscribe:
            raise ConnectionResetError(f"Redis at {self.where} ended a subscription")  # in a cluster: its slot moved

    def _end_command(self) -> None:
        # The call doesn't end at the first error: the other answers would be taken for those to the next question.
        self._unconfirmed.popleft()
        if self._unconfirmed:
            return
        if self._first_error is not None:
            self._refuse(self._first_error)
        elif self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _refuse(self, error: Exception) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)
            self._waiting.exception()  # marked as retrieved, in case the caller is being cancelled
