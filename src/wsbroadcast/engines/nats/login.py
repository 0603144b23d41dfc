"""Logging in to a server of NATS, by nats-py."""

from __future__ import annotations

import asyncio
import re
import ssl
from inspect import iscoroutinefunction
from typing import Any

from wsbroadcast.engines.broker.link import (
    Host,
)
from wsbroadcast.engines.nats.protocol import REFUSAL
from wsbroadcast.engines.nats.target import Target
from wsbroadcast.exceptions import ConfigurationError, MissingDependency

# What a server refuses without closing the connection.
_DENIED = re.compile(r"-ERR 'Permissions Violation for (Publish|Subscription) to \"([^\"]+)\"")

# Shares of the time that one server may take, where there are others to try.
_TRIES = 3

try:
    from nats import errors
    from nats.aio.client import Client
    from nats.aio.transport import TcpTransport
except ImportError as error:
    raise MissingDependency('the NATS engine needs nats-py: pip install "wsbroadcast[nats]"') from error

_TASKS = ("_reading_task", "_ping_interval_task", "_flusher_task")
_STREAMS = ("_io_reader", "_io_writer")
_OVERRIDDEN = ("_process_info", "_read_loop")
if (
    not all(iscoroutinefunction(getattr(Client, name, None)) for name in _OVERRIDDEN)
    or not vars(Client()).keys() >= {"_transport", *_TASKS}
    or not vars(TcpTransport()).keys() >= {*_STREAMS}  # type: ignore[no-untyped-call]
):
    raise MissingDependency('the NATS engine needs another nats-py, 2.10 for example: pip install "wsbroadcast[nats]"')


class Login(Client):
    """One attempt to be let in by one server.

    Args:
        target: How to get in.
        host: Where.
        timeout: Seconds for each step of it.
    """

    def __init__(self, target: Target, host: Host, timeout: float) -> None:
        super().__init__()
        self._target = target
        self._host = host
        self._timeout = timeout
        self.info: dict[str, Any] = {}
        """What the server says of itself."""

    async def run(self) -> bytes:
        """Connect and sign in; return what was read from `writer` since then. Nothing else is done with it here.

        Raises:
            ConfigurationError: If the server refuses us, or offers no TLS where we need it.
            Exception: Any other means that it can't be reached now.
        """
        options = {"name": "wsbroadcast", "tls_hostname": self._host.tls_hostname} | dict(self._target.options)
        try:
            await self.connect(
                f"nats://{self._host}",
                allow_reconnect=False,
                connect_timeout=self._timeout,  # type: ignore[arg-type]  # asyncio takes any number
                error_cb=_raise,
                **options,
            )
        except Exception as error:
            refusal = self._refusal(error)
            if refusal is None:
                raise
            raise refusal from None  # who knows what a driver's error repeats
        return await self._let_go()

    @property
    def writer(self) -> asyncio.StreamWriter | None:
        """The connection, as far as there is one."""
        return self._transport._io_writer if isinstance(self._transport, TcpTransport) else None

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if self._target.must_encrypt:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise ConfigurationError(f"nats at {self._host} offers no TLS: write nats:// if it may be without")
            info["tls_required"] = True  # nats-py encrypts only then, and would send the password in plain text
        self.info = info
        await super()._process_info(info, initial_connection)

    async def _read_loop(self) -> None:
        # nats-py reads nothing behind the PONG: a task that starts at once would do so before we have cancelled it.
        pass

    async def _let_go(self) -> bytes:
        for name in _TASKS:
            getattr(self, name).cancel()
        reader, writer = (getattr(self._transport, name) for name in _STREAMS)
        if reader.at_eof() or writer.transport.is_closing():
            raise ConnectionError("the server closed the connection")
        reader.feed_eof()
        read: bytes = await reader.read()  # what it has: after an end there is nothing to wait for
        return read

    def _refusal(self, error: Exception) -> ConfigurationError | None:
        # What trying again doesn't mend.
        who = f"nats at {self._host}"
        if isinstance(error, ConfigurationError):
            return error
        if isinstance(error, ssl.SSLCertVerificationError):
            return ConfigurationError(f"{who} has a certificate that can't be trusted: {error.verify_message}")
        if isinstance(error, OSError):
            if error.filename is None:
                return None
            return ConfigurationError(f"{who} needs {error.filename!r:.200}, which can't be read: {error.strerror}")
        if isinstance(error, errors.Error):
            return ConfigurationError(f"{who} refuses {self._target.who}") if REFUSAL.search(str(error)) else None
        return ConfigurationError(f"nats-py can make nothing of {self._target.who}") if self._target.signs else None


async def _raise(error: Exception) -> None:
    # So that nats-py neither tries again nor logs.
    raise error
