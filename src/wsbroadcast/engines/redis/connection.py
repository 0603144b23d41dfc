"""One connection to a Redis server.

redis-py connects, speaks TLS and authenticates; then the transport is ours. Its own reader costs seven times as much
for each message, and it ends a connection by sending what is left in the buffers, which after a partition would arrive
late. In here nothing reconnects, tries again or runs as a task, so a call that is cancelled leaves nothing behind.
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

# Answers of a server that can't do it now, or is no longer the right one: look for it again.
_WRONG_SERVER = {"ASK", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MOVED", "READONLY", "TRYAGAIN"}

# Answers of a server that does nothing now, and is the right one.
_BUSY = {"BUSY", "MISCONF", "NOREPLICAS", "NOSCRIPT", "OOM"}

# Answers of a server that doesn't let us.
_REFUSED = {"DENIED", "NOAUTH", "NOPERM", "WRONGPASS"}

# OpenSSL's codes for a certificate that is good, for another host name or IP address.
_OTHER_NAMES = {62, 64}


class Wire(asyncio.Protocol, ABC):
    """What both kinds of connection have in common.

    Args:
        access: How to get in.
        host: Where; `None` for a unix socket.
        needs: The permissions that we need, as in `ACL SETUSER`.
        lost: Called once when the connection has ended, with the reason.
    """

    def __init__(self, access: Access, host: Host | None, needs: str, lost: Callable[[Exception], None]) -> None:
        self.where = str(host) if host else access.path
        """The server, for errors."""
        self._access = access
        self._host = host
        self.needs = needs
        """The permissions that we need, as in `ACL SETUSER`."""
        self._lost = lost
        self._replies = ReplyReader()
        # redis-py's, which knows nothing of what happens after it has authenticated.
        self._connection: Any = None
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None

    async def open(self) -> None:
        """Connect and authenticate.

        Raises:
            ConfigurationError: If the server refuses us.
            Exception: redis-py's, if it can't be reached.
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
        raise refusal  # out here, where redis-py's error isn't its context: who prints that prints the server's words

    def _refusal(self, error: RedisError) -> Exception | None:
        # Over a unix socket redis-py hides the error in another; while it connects, every error.
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
                what = (
                    "it has to hold for that name" if is_for_another else "the option ssl_ca_certs names whom to trust"
                )
                return ConfigurationError(f"Redis at {self.where} {why}: {what}")
        return None

    async def _greet(self, connection: Any) -> None:
        # redis-py calls this when there is a socket, before it authenticates. No public name leads to the transport.
        transport = getattr(connection._writer, "transport", None)
        if hasattr(transport, "set_protocol"):  # by name: uvloop's transports are not asyncio's classes
            self._transport = cast(asyncio.Transport, transport)
            no_linger(self._transport)
            await connection.on_connect()

    async def drop(self) -> None:
        """End it now; nothing that is still in a buffer is sent. Idempotent."""
        self._end(ConnectionAbortedError(f"the connection to {self.where} was dropped"))
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)  # else it says when collected that it wasn't closed

    def explain(self, error: Exception) -> Exception:
        """Say what an error of the server means to us; a `ConnectionError` means that it is the wrong one by now."""
        code = error.code if isinstance(error, ErrorReply) else ""
        text = str(error).partition(", with args")[0]  # of an unknown command they are repeated, a password too
        if code in _WRONG_SERVER or "max number of clients" in text:
            return ConnectionError(f"Redis at {self.where} answers {text}")
        if code in _REFUSED or not code:
            user = f"the user {self._access.user!r}"
            return ConfigurationError(f"Redis at {self.where} refuses {user} ({text}), who needs {self.needs}")
        if code in _BUSY:
            return EngineUnavailable(f"Redis at {self.where} answers {text}; nothing was sent")
        return EngineError(f"Redis at {self.where} answers {text}")

    # What the transport calls.

    def data_received(self, data: bytes) -> None:
        """Take every reply that is complete now."""
        try:
            for reply in self._replies.feed(data):
                self._take(reply)
        except Exception as error:  # not Redis, or an error of ours: what comes next can't be understood
            self._end(error)

    def connection_lost(self, error: Exception | None) -> None:
        """End it."""
        self._end(error or ConnectionResetError(f"Redis at {self.where} closed the connection"))

    @abstractmethod
    def _take(self, reply: Reply) -> None:
        """Take one reply."""

    @abstractmethod
    def _refuse(self, error: Exception) -> None:
        """Tell everybody who waits for answers that none will come, or none but this."""

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
    """Commands and their answers, in the same order."""

    def __init__(self, access: Access, host: Host | None, needs: str, lost: Callable[[Exception], None]) -> None:
        super().__init__(access, host, needs, lost)
        # How many answers each question has, and who waits for them; the oldest first. Who was cancelled stays, because
        # the answers come all the same.
        self._questions: deque[tuple[int, asyncio.Future[list[Reply]]]] = deque()
        # To the oldest question.
        self._answers: list[Reply] = []

    async def ask(self, *commands: bytes) -> list[Reply]:
        """Send commands in one go; return their answers, errors too. Questions needn't wait for each other.

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
                answered.exception()  # looked at, in case who waits is being cancelled


class Subscriber(Wire):
    """Subscriptions, and what is published to them.

    Args:
        access: How to get in.
        host: Where; `None` for a unix socket.
        needs: The permissions that we need, as in `ACL SETUSER`.
        lost: Called once when the connection has ended, with the reason.
        is_sharded: Use the commands of sharded pub/sub.
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
        """Where messages go."""
        # The call that waits for confirmations.
        self._waiting: asyncio.Future[None] | None = None
        # Which confirmations are to come: of each command those of its names, or one error for all of them.
        self._awaited = b""
        self._unconfirmed: deque[set[bytes]] = deque()
        # The first of these errors.
        self._first_error: ErrorReply | None = None
        self._pong = asyncio.Event()

    async def subscribe(self, groups: Iterable[Sequence[str]]) -> None:
        """Subscribe to groups of names, with one command for each group; return when each name is confirmed.

        Raises:
            ConfigurationError: If the server forbids a name, when every other group is answered too.
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
                # Before somebody reads only the probe is subscribed, and other nodes try the same name.
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
            # Something between us and Redis has reconnected and subscribed again.
            self.inlet.missed("the broker confirmed a subscription again")
        elif kind == self._unsubscribe:
            raise ConnectionResetError(f"Redis at {self.where} ended a subscription")  # its slot moved, in a cluster

    def _end_command(self) -> None:
        # Not at the first error: what the others are answered would be taken for answers to the next question.
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
            self._waiting.exception()  # looked at, in case who waits is being cancelled
