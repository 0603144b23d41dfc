"""The engine of apps that have NATS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import parse_qsl

from wsbroadcast.engines import URL
from wsbroadcast.engines.broker import DEFAULT_TIMING, MAX_MESSAGE_BYTES, truth
from wsbroadcast.engines.broker.history import KeepingEngine
from wsbroadcast.engines.broker.names import DEFAULT_PREFIX
from wsbroadcast.engines.nats.jetstream import StorageKind, Stream
from wsbroadcast.engines.nats.link import NATSLink
from wsbroadcast.engines.nats.target import NATS_PORT, Target
from wsbroadcast.engines.nats.upkeep import Keeping
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.history import HistoryRules
from wsbroadcast.options import Timing

# Options that a URL can hold.
_TEXTS = {"history_replicas", "history_storage", "name", "nkeys_seed", "prefix", "tls_hostname", "user_credentials"}
_SWITCHES = {"fail_fast", "tls_handshake_first"}

# Of the time for an answer, what JetStream gets for its own: when it says nothing, the connection isn't lost for that.
_ACK_SHARE = 0.7


class NATSEngine(KeepingEngine):
    """Links nodes through NATS; what has a history is kept by its JetStream, and nothing else needs one.

    An audience is a subject, `prefix.channel.news`; a channel may hold `*`, `>` and `.`, which mean nothing in it. The
    user we connect as needs the permission to publish and to subscribe to `prefix.>`.

    What one node publishes arrives everywhere in its order. NATS promises nothing about the order of what several nodes
    publish to one audience at the same time: it may differ between receiving nodes.
    What is kept comes in one order everywhere.

    A history needs nats-server 2.11 with JetStream, and the permission to publish to `prefix:keep.>`,
    `$JS.API.STREAM.*.prefix-history`, `$JS.API.STREAM.MSG.GET.prefix-history` and `$JS.API.DIRECT.GET.prefix-history`.
    The first node that keeps something makes the stream.

    Args:
        servers: Servers of one NATS, such as `nats://localhost:4222`, or several, in one text with commas or in a list;
            the others of a cluster are found by themselves. `tls://` refuses a server without TLS.
        prefix: What all subjects begin with; apps that share a NATS take one each.
        fail_fast: Whether `start` raises if no server can be reached, instead of beginning degraded.
        max_message_bytes: The largest payload that is taken from NATS, in bytes. What NATS takes itself is its setting
            `max_payload`, 1 MiB by default.
        timing: How long to wait for a server.
        history_storage: Where the stream of the histories is kept if there is none yet: `memory`, or `file`, which a
            restart of the server leaves alone.
        history_replicas: On how many servers of a cluster it is kept then.
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
        history_storage: StorageKind = "memory",
        history_replicas: int = 1,
        **options: Any,
    ) -> None:
        self._target = Target.parse(servers, options)
        self._stream = Stream(prefix=prefix, storage=history_storage, replicas=history_replicas)
        self._keeping: Keeping | None = None
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

        In the query stand `prefix`, `fail_fast`, `history_storage`, `history_replicas`, and of nats-py's options
        `name`, `nkeys_seed`, `tls_handshake_first`, `tls_hostname` and `user_credentials`. A user without a password is
        a token.

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
        replicas = options.get("history_replicas", "")
        if replicas.isdecimal():
            options["history_replicas"] = int(replicas[:9])
        return cls(servers, **options)

    def keep(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        """Say what is kept, before `start`; without rules, learn it from others."""
        super().keep(rules, only_publishes=only_publishes)
        self._keeping = Keeping(
            stream=self._stream,
            rules=None if only_publishes else rules,
            who=f"nats at {self.address}",
            ack_timeout=_ACK_SHARE * self._timing.request_timeout,
        )

    @property
    def rules(self) -> HistoryRules | None:
        """What is kept, as `keep` was told, else as others say, or have said while they were there."""
        return self.told_rules if self._keeping is None or self.told_rules is not None else self._keeping.learned

    def new_link(self) -> NATSLink:
        """Make a link that isn't open yet."""
        return NATSLink(self._target, self._timing.connect_timeout, self._keeping)
