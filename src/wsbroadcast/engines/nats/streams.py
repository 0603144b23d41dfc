"""The streams of an app in JetStream: their names, and the settings that they must have."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from wsbroadcast.engines.nats.jetstream import NOBODY, Refused
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.history import HistoryRules

StorageKind = Literal["memory", "file"]
"""Where JetStream keeps a stream."""

MAX_REPLICAS = 5
"""The largest number of servers that JetStream keeps one stream on."""

# Errors for which trying again may help: no leader yet, a cluster that isn't complete.
_PASSING = frozenset({10004, 10007, 10008, 10009, 10164})

# Errors that JetStream is off, for this account or at all.
_OFF = frozenset({10039, 10076})

_NANOSECONDS = 10**9

# The shortest age and window that JetStream takes, and the window that it has by default, in seconds.
_LEAST_AGE = 0.1
_WINDOW = 120.0

_NEEDED_VERSION = (2, 11)


@dataclass(frozen=True, kw_only=True)
class Stream(ABC):
    """A stream of an app: where it is made, and the settings that it must have.

    Args:
        prefix: The beginning of the app's names.
        storage: Where a new stream is kept.
        replicas: On how many servers a new stream is kept.

    Raises:
        ConfigurationError: If storage or replicas make no sense.
    """

    what: ClassVar[str]
    """The end of its name, and the beginning of the engine's options for it."""
    purpose: ClassVar[str]
    """What errors say that it is for."""

    prefix: str
    storage: StorageKind
    replicas: int

    def __post_init__(self) -> None:
        if self.storage not in get_args(StorageKind):
            raise ConfigurationError(f"{self.what}_storage of NATS is memory or file, not {self.storage!r:.80}")
        if type(self.replicas) is not int or not 1 <= self.replicas <= MAX_REPLICAS:
            raise ConfigurationError(f"{self.what}_replicas of NATS is 1 to {MAX_REPLICAS}, not {self.replicas!r:.80}")

    @property
    def name(self) -> str:
        """The name of the stream."""
        return f"{self.prefix}-{self.what}"

    @property
    @abstractmethod
    def root(self) -> str:
        """What the names begin with under which it keeps; no prefix of another app is like this."""

    @property
    @abstractmethod
    def permissions(self) -> Sequence[str]:
        """The names to which the user must be allowed to publish."""

    def owns(self, name: str) -> bool:
        """Tell whether a name belongs to this stream."""
        return name.startswith(self.root) or (name.startswith("$JS.API.") and name.endswith(f".{self.name}"))

    def denial(self, who: str, user: str, subject: str) -> ConfigurationError:
        """Make the error for a user that may not ask JetStream."""
        *others, last = (f"'{name}'" for name in self.permissions)
        return ConfigurationError(
            f"{who} doesn't let {user} publish to {subject!r:.120}: {self.purpose} needs publish on "
            f"{', '.join(others)} and {last}"
        )

    def refusal(self, refused: Refused, who: str) -> Exception:
        """Return the error for a server that refuses the stream; `refused` itself if trying again may help."""
        if refused.number in _PASSING:
            return refused
        if refused.code == NOBODY or refused.number in _OFF:
            return ConfigurationError(
                f"{who} can't keep {self.purpose}, because JetStream is off: write jetstream {{}} into the server's "
                f"configuration, enable it for the account, or leave {self.what}= out"
            )
        return ConfigurationError(
            f"{who} refuses the stream {self.name}, which is to be kept in {self.storage} on {self.replicas} of its "
            f"servers: {refused} (error {refused.number})"
        )

    def check_version(self, version: object, who: str) -> None:
        """Check that a server can read many messages at once, and can keep each message for its own time.

        Raises:
            ConfigurationError: If the server is too old.
        """
        found = re.match(r"v?(\d+)\.(\d+)", str(version))
        if found is not None and (int(found[1]), int(found[2])) < _NEEDED_VERSION:
            raise ConfigurationError(
                f"{who} is a nats-server {version!s:.20}, and {self.purpose} needs 2.11: update it, or leave "
                f"{self.what}= out"
            )

    def _checked(self, config: Mapping[str, Any], unfit: Mapping[str, object]) -> None:
        # Raises an error if the settings of an existing stream don't fit.
        common: dict[str, object] = {
            f"doesn't take {self.root}>": f"{self.root}>" not in config.get("subjects", ()),
            "hasn't the retention limits": config.get("retention") != "limits",
            "is sealed": config.get("sealed"),
            "acknowledges nothing": config.get("no_ack"),
        }
        for what, is_unfit in {**common, **unfit}.items():
            if is_unfit:
                raise ConfigurationError(
                    f"the stream {self.name} of JetStream {what}: change it, or remove it, so that it is made anew"
                )

    def _made(self, **more: Any) -> dict[str, Any]:
        # The configuration of a new stream.
        return {
            "name": self.name,
            "subjects": [f"{self.root}>"],
            "retention": "limits",
            "storage": self.storage,
            "num_replicas": self.replicas,
            **more,
        }


class HistoryStream(Stream):
    """The stream of histories."""

    what = "history"
    purpose = "a history"

    @property
    def root(self) -> str:
        """What the names begin with under which it keeps."""
        return f"{self.prefix}:keep."

    @property
    def permissions(self) -> Sequence[str]:
        """To which names one has to be allowed to publish."""
        api = (f"$JS.API.{what}.{self.name}" for what in ("STREAM.*", "STREAM.MSG.GET", "DIRECT.GET"))
        return (f"{self.root}>", *api)

    def new(self, rules: HistoryRules) -> dict[str, Any]:
        """Return the configuration of a new stream."""
        kept = self._least(rules)
        window = min(kept["max_age"], int(_WINDOW * _NANOSECONDS))
        return self._made(discard="old", **self._fixed(), **kept, duplicate_window=window)

    def changes(self, config: Mapping[str, Any], rules: HistoryRules) -> dict[str, Any]:
        """Return the settings of an existing stream that have to change. Its limits are only raised, never lowered.

        Raises:
            ConfigurationError: If it has settings that don't fit.
        """
        self._checked(
            config,
            {
                "refuses what is more than it keeps of a subject": config.get("discard_new_per_subject"),
                "forbids to purge it, so that nothing can be forgotten": config.get("deny_purge"),
            },
        )
        wanted = self._fixed() | {
            limit: least
            for limit, least in self._least(rules).items()
            if 0 < config.get(limit, 0) < least  # else it has no such limit, or it is high enough
        }
        return {key: value for key, value in wanted.items() if config.get(key) != value}

    def shortfall(self, config: Mapping[str, Any]) -> str:
        """Say how an existing stream is kept less safely than a new one would be; empty if it isn't."""
        if self.storage == "file" and config.get("storage") != "file":
            return "it is kept in memory, not in files"
        replicas = config.get("num_replicas", 1)
        return f"it is kept on {replicas} servers, not on {self.replicas}" if replicas < self.replicas else ""

    def _fixed(self) -> dict[str, Any]:
        republish = {"src": f"{self.root}>", "dest": f"{self.prefix}.>"}
        return {"republish": republish, "allow_direct": True, "allow_msg_ttl": True}

    def _least(self, rules: HistoryRules) -> dict[str, int]:
        # One message more than is replayed, because the message at a position proves that position. A quarter longer
        # than a position is remembered, because a record that is written again every quarter must outlive it.
        messages = max((each.messages for each in rules.all), default=0) + 1
        seconds = max(_LEAST_AGE, *(1.25 * each.remember for each in rules.all), _LEAST_AGE)
        return {"max_msgs_per_subject": messages, "max_age": int(seconds * _NANOSECONDS)}


class PresenceStream(Stream):
    """The stream of presence. It is in memory: if it is lost, the nodes write everything again."""

    what = "presence"
    purpose = "presence"

    @property
    def root(self) -> str:
        """What the names begin with under which it keeps."""
        return f"{self.prefix}:present."

    @property
    def permissions(self) -> Sequence[str]:
        """To which names one has to be allowed to publish."""
        return (f"{self.root}>", f"$JS.API.STREAM.*.{self.name}", f"$JS.API.DIRECT.GET.{self.name}")

    def new(self) -> dict[str, Any]:
        """Return the configuration of a new stream. If it is full, it refuses messages and drops no older ones."""
        return self._made(discard="new", **self._fixed())

    def changes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of an existing stream that have to change.

        Raises:
            ConfigurationError: If it has settings that don't fit.
        """
        drops = [limit for limit in ("max_age", "max_msgs_per_subject") if config.get(limit, -1) > 0]
        is_small = config.get("max_msgs", -1) > 0 or config.get("max_bytes", -1) > 0
        self._checked(
            config,
            {
                f"has a {' and a '.join(drops)}, so that it drops who is still there": drops,
                "is limited and discards what is old, so that it drops who is still there": is_small
                and config.get("discard") != "new",
                "forbids to purge it, so that it only grows": config.get("deny_purge"),
            },
        )
        return {key: value for key, value in self._fixed().items() if config.get(key) != value}

    def _fixed(self) -> dict[str, Any]:
        # Each entry of a channel's log is sent to the nodes that are in the channel. `*` before `log` is the epoch.
        republish = {"src": f"{self.root}*.log.*", "dest": f"{self.prefix}.channel.{{{{wildcard(2)}}}}"}
        return {"republish": republish, "allow_direct": True, "allow_msg_ttl": True, "allow_rollup_hdrs": True}
