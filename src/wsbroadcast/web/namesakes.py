"""Routers of one manager whose paths make the same channels, which nobody may have meant."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from re import Pattern
from typing import Any
from weakref import WeakSet

from starlette.routing import compile_path
from starlette.types import Scope

from wsbroadcast.manager import ConnectionManager
from wsbroadcast.text import plain

logger = logging.getLogger("wsbroadcast")


class Place:
    """Where a path parameter is the channel, without a pattern that says so.

    One warning, if another place of the manager makes the same channels: when the router is made, or, if only what is
    around their paths differs, at its first connection.
    """

    def __init__(self, manager: ConnectionManager, path: str) -> None:
        self._manager = manager
        self._path = plain(path)
        # With the prefixes and mounts around it, once somebody came.
        self._whole: str | None = None
        regex, _, parameters = compile_path(self._path)
        self._regex: Pattern[str] = regex
        others = {place._path for place in self._others() if place._regex.groups}
        if parameters and self._path not in others:
            self._warn(self._path, others, next(iter(parameters)))
        _PLACES.add(self)

    def see(self, scope: Scope, parameters: Mapping[str, Any]) -> None:
        """Look at where a connection came to; the first one tells."""
        if self._whole is not None:
            return
        whole = self._whole = self._around(scope["path"], parameters) + self._path
        others = {place._whole for place in self._others() if place._whole is not None and not self._differs(place)}
        if whole not in others:
            self._warn(whole, others, next(iter(parameters)))

    def _others(self) -> list[Place]:
        return [place for place in _PLACES if place._manager is self._manager and place is not self]

    def _differs(self, other: Place) -> bool:
        # In what was known when the routers were made, and was said then.
        return self._path != other._path and bool(self._regex.groups and other._regex.groups)

    def _around(self, path: str, parameters: Mapping[str, Any]) -> str:
        # The path up to where the router's own begins, with the names of its parameters for their values.
        ends = [end for end, character in enumerate(path) if character == "/" and self._regex.match(path[end:])]
        names = {str(value): f"{{{name}}}" for name, value in parameters.items()}
        return "/".join(names.get(part, part) for part in path[: ends[0] if ends else len(path)].split("/"))

    def _warn(self, place: str, others: set[str], parameter: str) -> None:
        if others:
            kind = next((part for part in reversed(place.partition("{")[0].split("/")) if part), "room")
            logger.warning(
                "%s and %s make the same channels, so their clients hear each other: pass channel='%s:{%s}' to one, or "
                "channel='{%s}' if that is meant",
                *(min(others), place, kind, parameter, parameter),
            )


_PLACES: WeakSet[Place] = WeakSet()
