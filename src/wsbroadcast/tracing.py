"""What the library asks of whoever traces broadcasts. `wsbroadcast.telemetry.otel` answers."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import Protocol

from wsbroadcast.publication import Publication, Publications

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def is_traceparent(text: object) -> bool:
    """Tell whether something is a `traceparent` of the W3C's Trace Context, version 00."""
    return isinstance(text, str) and _TRACEPARENT.fullmatch(text) is not None


def is_untraced(publications: Publications) -> bool:
    """Tell whether no span was made for a broadcast yet."""
    return bool(publications) and publications[0].traceparent is None


class Tracing(Protocol):
    """Makes spans. Nobody is asked while nothing is traced."""

    def publishing(self, publications: Publications) -> AbstractContextManager[object]:
        """Trace one broadcast, and write into its publications where it is found."""

    def delivering(self, publication: Publication) -> AbstractContextManager[object]:
        """Trace what a node does with a publication that says where its broadcast is found."""

    def hook(self, event: str, name: str) -> AbstractContextManager[object]:
        """Trace a hook of a broadcast or a delivery."""
