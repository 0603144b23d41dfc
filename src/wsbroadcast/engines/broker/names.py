"""What an audience is called at the broker."""

from __future__ import annotations

import re
from urllib.parse import quote

from wsbroadcast.audience import Audience
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.text import plain

DEFAULT_PREFIX = "wsbroadcast"
"""What all names of an app begin with; apps that share a broker take one each."""

_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,32}")

# Names are remembered, because a broadcast needs one each time; past this many, the memory is emptied.
_REMEMBERED = 8192


class AudienceNames:
    """Names at one broker, injective: no two audiences share one, whatever characters they hold.

    A name is `prefix`, the kind of the audience and, except for everyone, its name; percent-encoded (RFC 3986) but for
    letters, digits and `-_~:@/`. So `*`, `>` and `.` mean nothing to a broker, and no channel leaves its prefix.

    Args:
        prefix: Letters, digits, `-` and `_`, at most 32.
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
                name += self._separator + quote(audience.name, safe=":@/-_~").replace(".", "%2E")
            if len(self._names) >= _REMEMBERED:
                self._names.clear()
            self._names[audience] = name
        return name

    def for_logs(self, name: str) -> str:
        """Return what a log may say of a name: not which user it is."""
        of_user = f"{self._start}user{self._separator}"
        return f"{of_user}…" if name.startswith(of_user) else name

    def of_node(self, node: str) -> str:
        """Return the name under which a node sends messages to itself."""
        return f"{self._start}node{self._separator}{node}"
