"""Logs in to a server of NATS with nats-py."""

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
    """One attempt to log in to one server.

    Args:
        target: How to log in.
        host: The server.
        timeout: Seconds for each step of the login.
    """

    def __init__(self, target: Target, host: Host, timeout: float) -> None:
        super().__init__()
        self._target = target
        self._host = host
        self._timeout = timeout
        self.info: dict[str, Any] = {}
        """What the server says of itself."""

    async def run(self) -> bytes:
        """Connect and log in; return the bytes that were read since then. nats-py doesn't touch `writer` any more.

        Raises:
            ConfigurationError: If the server refuses the login, or offers no TLS although it is required.
            Exception: Any other error means that the server can't be reached now.
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
            raise refusal from None  # the driver's error may repeat a password
        return await self._let_go()

    @property
    def writer(self) -> asyncio.StreamWriter | None:
        """The connection; `None` if there is none yet."""
        return self._transport._io_writer if isinstance(self._transport, TcpTransport) else None

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if self._target.must_encrypt:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise ConfigurationError(f"nats at {self._host} offers no TLS: write nats:// to do without")
            info["tls_required"] = True  # nats-py encrypts only then, and would send the password in plain text
        self.info = info
        await super()._process_info(info, initial_connection)

    async def _read_loop(self) -> None:
        # So nats-py reads nothing after the PONG. Its own task would, if it started at once, before it is cancelled.
        pass

    async def _let_go(self) -> bytes:
        for name in _TASKS:
            getattr(self, name).cancel()
        reader, writer = (getattr(self._transport, name) for name in _STREAMS)
        if reader.at_eof() or writer.transport.is_closing():
            raise ConnectionError("the server closed the connection")
        reader.feed_eof()
        read: bytes = await reader.read()  # all that it has; it doesn't wait, because it was told that this is the end
        return read

    def _refusal(self, error: Exception) -> ConfigurationError | None:
        # The errors for which trying again doesn't help.
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
        return ConfigurationError(f"nats-py can't use {self._target.who}") if self._target.signs else None


async def _raise(error: Exception) -> None:
    # Given to nats-py as its error callback, so that it neither tries again nor logs.
    raise error
