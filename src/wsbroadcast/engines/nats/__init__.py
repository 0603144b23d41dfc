"""The engine of apps that have NATS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import parse_qsl

from wsbroadcast.engines import URL
from wsbroadcast.engines.broker import DEFAULT_TIMING, MAX_MESSAGE_BYTES, BrokerEngine, truth
from wsbroadcast.engines.broker.link import Link
from wsbroadcast.engines.broker.names import DEFAULT_PREFIX
from wsbroadcast.engines.nats.link import NATSLink
from wsbroadcast.engines.nats.target import NATS_PORT, Target
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.options import Timing

# Options that a URL can hold.
_TEXTS = {"name", "nkeys_seed", "prefix", "tls_hostname", "user_credentials"}
_SWITCHES = {"fail_fast", "tls_handshake_first"}


class NATSEngine(BrokerEngine):
    """Links nodes through NATS: core NATS, no JetStream.

    An audience is a subject, `prefix.channel.news`; a channel may hold `*`, `>` and `.`, which mean nothing in it. The
    user we connect as needs the permission to publish and to subscribe to `prefix.>`.

    What one node publishes arrives everywhere in its order. NATS promises nothing about the order of what several nodes
    publish to one audience at the same time: it may differ between receiving nodes.

    Args:
        servers: Servers of one NATS, such as `nats://localhost:4222`, or several, in one text with commas or in a list;
            the others of a cluster are found by themselves. `tls://` refuses a server without TLS.
        prefix: What all subjects begin with; apps that share a NATS take one each.
        fail_fast: Whether `start` raises if no server can be reached, instead of beginning degraded.
        max_message_bytes: The largest payload that is taken from NATS, in bytes. What NATS takes itself is its setting
            `max_payload`, 1 MiB by default.
        timing: How long to wait for a server.
        options: Those of nats-py's `connect` that say who we are and how to encrypt: `user` and `password`, `token`,
            `user_credentials`, `nkeys_seed`, `nkeys_seed_str`, `signature_cb`, `user_jwt_cb`, `tls`, `tls_hostname`,
            `tls_handshake_first`, `name`.

    Raises:
        ConfigurationError: If an option makes no sense.
        MissingDependency: If a package isn't installed that they need.
    """

    name = "nats"

    def __init__(
        self,
        servers: URL | Sequence[URL] = f"nats://localhost:{NATS_PORT}",
        *,
        prefix: str = DEFAULT_PREFIX,
        fail_fast: bool = False,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        timing: Timing = DEFAULT_TIMING,
        **options: Any,
    ) -> None:
        self._target = Target.parse(servers, options)
        super().__init__(
            prefix=prefix,
            separator=".",
            address=self._target.address,
            fail_fast=fail_fast,
            max_message_bytes=max_message_bytes,
            timing=timing,
        )

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make an engine from `nats://user:password@host:4222,host:4222?prefix=…&fail_fast=true`.

        In the query stand `prefix`, `fail_fast`, and of nats-py's options `name`, `nkeys_seed`, `tls_handshake_first`,
        `tls_hostname` and `user_credentials`. A user without a password is a token.

        Raises:
            ConfigurationError: If it makes no sense.
        """
        servers, _, query = url.partition("?")
        if "#" in url or "@" in query:  # else a part of a password would be taken for an option, and named as unknown
            raise ConfigurationError("in a user or password in the URL of NATS a # is written %23, ? %3F and @ %40")
        options: dict[str, Any] = {}
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name in options:
                raise ConfigurationError(f"the URL of NATS names {name!r:.80} twice")
            options[name] = value
        for name in options.keys() - _TEXTS - _SWITCHES:
            known = ", ".join(sorted(_TEXTS | _SWITCHES))
            raise ConfigurationError(f"the URL of NATS has an option {name!r:.80}; it takes {known}")
        for name in options.keys() & _SWITCHES:
            options[name] = truth(name, options[name], "NATS")
        return cls(servers, **options)

    def new_link(self) -> Link:
        """Make a link that isn't open yet."""
        return NATSLink(self._target, self._timing.connect_timeout)
