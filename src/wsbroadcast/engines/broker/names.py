"""The names of audiences at the broker."""

from __future__ import annotations

import re
from urllib.parse import quote

from wsbroadcast.audience import Audience
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.text import plain

DEFAULT_PREFIX = "wsbroadcast"
"""The default beginning of all names of an app. Apps that share a broker need different ones."""

_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,32}")

# How many names are remembered, because each broadcast needs one. Past this many, all are dropped.
_REMEMBERED = 8192


# These characters are written as they are.
_PLAIN = re.compile(r"[A-Za-z0-9_~:@/-]+")


def quoted(text: str) -> str:
    """Quote a text as a part of a name. It has no character that is special to a broker, and each text has its own."""
    return text if _PLAIN.fullmatch(text) else quote(text, safe=":@/-_~").replace(".", "%2E")


class AudienceNames:
    """The names of audiences at one broker. No two audiences share one, whatever characters they have.

    A name is `prefix`, the kind of the audience and, except for everyone, its name. All but letters, digits and
    `-_~:@/` is percent-encoded (RFC 3986). So no `*`, `>` or `.` reaches the broker, and no channel leaves its prefix.

    Args:
        prefix: 1 to 32 letters, digits, `-` and `_`.
        separator: What the broker puts between the parts of a name.

    Raises:
        ConfigurationError: If the prefix breaks the rule.
    """

    def __init__(self, prefix: str = DEFAULT_PREFIX, separator: str = ":") -> None:
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise ConfigurationError(f"prefix must be 1 to 32 letters, digits, - or _, not {prefix!r:.80}")
        self._start = plain(prefix) + separator
        self._separator = separator
        self._names: dict[Audience, str] = {}

    def of(self, audience: Audience) -> str:
        """Return the name of an audience."""
        name = self._names.get(audience)
        if name is None:
            name = self._start + audience.kind
            if audience.name:
                name += self._separator + quoted(audience.name)
            if len(self._names) >= _REMEMBERED:
                self._names.clear()
            self._names[audience] = name
        return name

    def for_logs(self, name: str) -> str:
        """Return a name for logs. It doesn't say which user it is."""
        of_user = f"{self._start}user{self._separator}"
        return f"{of_user}…" if name.startswith(of_user) else name

    def of_node(self, node: str) -> str:
        """Return the name under which a node sends messages to itself."""
        return f"{self._start}node{self._separator}{node}"
