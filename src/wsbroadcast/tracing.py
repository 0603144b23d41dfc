"""The interface of tracing. `wsbroadcast.telemetry.otel` implements it."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import Protocol

from wsbroadcast.publication import Publication, Publications

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def is_traceparent(text: object) -> bool:
    """Return whether something is a `traceparent` of W3C Trace Context, version 00."""
    return isinstance(text, str) and _TRACEPARENT.fullmatch(text) is not None


def is_untraced(publications: Publications) -> bool:
    """Return whether no span has been made for a broadcast yet."""
    return bool(publications) and publications[0].traceparent is None


class Tracing(Protocol):
    """Makes spans. It isn't called while nothing is traced."""

    def publishing(self, publications: Publications) -> AbstractContextManager[object]:
        """Trace one broadcast, and write its `traceparent` into its publications."""

    def delivering(self, publication: Publication) -> AbstractContextManager[object]:
        """Trace a node's delivery of a publication that has a `traceparent`."""

    def hook(self, event: str, name: str) -> AbstractContextManager[object]:
        """Trace a hook of a broadcast or of a delivery."""
