"""The engine for apps that have NATS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import parse_qsl

from wsbroadcast.engines import URL
from wsbroadcast.engines.broker import DEFAULT_TIMING, MAX_MESSAGE_BYTES, truth
from wsbroadcast.engines.broker.names import DEFAULT_PREFIX
from wsbroadcast.engines.broker.presence import PresentEngine
from wsbroadcast.engines.contract import Receiver
from wsbroadcast.engines.nats.link import NATSLink
from wsbroadcast.engines.nats.presence import Attending
from wsbroadcast.engines.nats.streams import HistoryStream, PresenceStream, StorageKind
from wsbroadcast.engines.nats.target import NATS_PORT, Target
from wsbroadcast.engines.nats.upkeep import Keeping
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.history import HistoryRules
from wsbroadcast.options import Timing

# The options of a URL that are numbers.
_NUMBERS = {"history_replicas", "presence_replicas"}
_TEXTS = {*_NUMBERS, "history_storage", "name", "nkeys_seed", "prefix", "tls_hostname", "user_credentials"}
_SWITCHES = {"fail_fast", "tls_handshake_first"}

# The part of `request_timeout` for JetStream's answers. If one doesn't come, the connection isn't given up for that.
_ACK_SHARE = 0.7


class NATSEngine(PresentEngine):
    """Links nodes through NATS. Histories and presence need its JetStream; nothing else does.

    Each audience has a subject, such as `prefix.channel.news`. A channel's name may have `*`, `>` and `.`, which are
    not special in it. The user that connects needs the permission to publish and to subscribe to `prefix.>`.

    What one node publishes arrives everywhere in its order. If several nodes publish to one audience at the same time,
    the order may differ between receiving nodes: NATS doesn't promise more. Messages that are kept come in the same
    order everywhere.

    A history needs nats-server 2.11 with JetStream, and the permission to publish to `prefix:keep.>`,
    `$JS.API.STREAM.*.prefix-history`, `$JS.API.STREAM.MSG.GET.prefix-history` and `$JS.API.DIRECT.GET.prefix-history`.
    The first node that keeps something makes the stream.

    Presence needs the same server, and the permission to publish to `prefix:present.>`,
    `$JS.API.STREAM.*.prefix-presence` and `$JS.API.DIRECT.GET.prefix-presence`. The first node that uses it makes the
    stream.

    Args:
        servers: A server of NATS, such as `nats://localhost:4222`, or several, in one text with commas or in a list.
            The others of a cluster are found automatically. With `tls://` a server without TLS is refused.
        prefix: The beginning of all subjects. Apps that share a NATS need different prefixes.
        fail_fast: Whether `start` raises if no server can be reached. Otherwise it starts without one.
        max_message_bytes: The largest payload that is taken from NATS, in bytes. NATS itself takes as much as its
            setting `max_payload` says, by default 1 MiB.
        timing: How long to wait for a server.
        history_storage: Where a new stream of histories is kept: `memory`, or `file`, which survives a restart of the
            server.
        history_replicas: On how many servers of a cluster a new stream of histories is kept.
        presence_replicas: On how many servers of a cluster a new stream of presence is kept.
        options: Options of nats-py's `connect` for login and encryption: `user` and `password`, `token`,
            `user_credentials`, `nkeys_seed`, `nkeys_seed_str`, `signature_cb`, `user_jwt_cb`, `tls`, `tls_hostname`,
            `tls_handshake_first`, `name`.

    Raises:
        ConfigurationError: If an option makes no sense.
        MissingDependency: If the options need a package that isn't installed.
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
        presence_replicas: int = 1,
        **options: Any,
    ) -> None:
        self._target = Target.parse(servers, options)
        self._history = HistoryStream(prefix=prefix, storage=history_storage, replicas=history_replicas)
        presence = PresenceStream(prefix=prefix, storage="memory", replicas=presence_replicas)
        self._keeping: Keeping | None = None
        super().__init__(
            prefix=prefix,
            separator=".",
            address=self._target.address,
            fail_fast=fail_fast,
            max_message_bytes=max_message_bytes,
            timing=timing,
        )
        self._attending = Attending(presence, f"nats at {self.address}")

    async def start(self, receiver: Receiver) -> None:
        """Connect, and stay connected until `aclose`. A server that can't do what is needed is refused."""
        self._attending.is_wanted = self.uses_lease
        await super().start(receiver)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make an engine from `nats://user:password@host:4222,host:4222?prefix=…&fail_fast=true`.

        The query may have `prefix`, `fail_fast`, `history_storage`, `history_replicas` and `presence_replicas`, and
        nats-py's options `name`, `nkeys_seed`, `tls_handshake_first`, `tls_hostname` and `user_credentials`. A user
        without a password is taken as a token.

        Raises:
            ConfigurationError: If the URL makes no sense.
        """
        servers, _, query = url.partition("?")
        if "#" in url or "@" in query:  # else an error would name a part of a password as an unknown option
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
        for name in options.keys() & _NUMBERS:
            if options[name].isdecimal():
                options[name] = int(options[name][:9])
        return cls(servers, **options)

    def keep(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        """Say what is kept. It is called before `start`. Without rules, they are learned from other nodes."""
        super().keep(rules, only_publishes=only_publishes)
        self._keeping = Keeping(
            stream=self._history,
            rules=None if only_publishes else rules,
            who=f"nats at {self.address}",
            ack_timeout=_ACK_SHARE * self._timing.request_timeout,
        )

    @property
    def rules(self) -> HistoryRules | None:
        """What is kept: the rules given to `keep`, else the newest rules that another node has written."""
        return self.told_rules if self._keeping is None or self.told_rules is not None else self._keeping.learned

    def new_link(self) -> NATSLink:
        """Make a link that isn't open yet."""
        return NATSLink(self._target, self._timing.connect_timeout, self._keeping, self._attending)
