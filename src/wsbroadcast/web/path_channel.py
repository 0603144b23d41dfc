"""Makes a channel from the parameters of a path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from re import Pattern
from string import Formatter
from typing import Any
from weakref import WeakSet

from starlette.routing import compile_path
from starlette.types import Scope

from wsbroadcast.audience import EVERYONE, Audience, check_channel
from wsbroadcast.exceptions import ConfigurationError, InvalidChannel
from wsbroadcast.logs import about, logger
from wsbroadcast.manager import ConnectionManager
from wsbroadcast.text import plain, text_of


class PathChannel:
    """Makes a channel from path parameters. Those of a prefix or a mount count too.

    Args:
        path: The path of the endpoint.
        pattern: A pattern such as `{tenant}:{room}`. By default the channel is the only parameter. If there are several
            and no pattern, that is an error: leaving one out silently would turn different rooms into one.

    Raises:
        ConfigurationError: If the pattern makes no sense, or is missing while the path has several parameters.
    """

    def __init__(self, path: str, pattern: str | None) -> None:
        self._path = plain(path)
        self._pattern = None if pattern is None else plain(pattern)
        # Parameters that the pattern may leave out without a warning: its author saw them.
        self._seen = set(compile_path(path)[2])
        self._fields: list[str] = []
        # The texts before, between and after the fields.
        self._texts: list[str] = []
        if self._pattern is None:
            _meant(compile_path(path)[2])
        else:
            self._parse(self._pattern)

    @property
    def everywhere(self) -> str | Audience:
        """A pattern of all channels that it can make: `*` is any text. It is `EVERYONE` if the path has no parameter.

        Parameters of a prefix aren't known here.
        """
        if self._pattern is None:
            return EVERYONE if _meant(self._seen) is None else "*"
        return "*".join(self._texts)

    def of(self, parameters: Mapping[str, Any]) -> str | None:
        """Return the channel; `None` if no parameter names one.

        Raises:
            InvalidChannel: If the name breaks a rule, or other parameters could make the same channel.
            ConfigurationError: If the pattern names something other than a parameter, or is missing while there are
                several parameters.
        """
        if self._pattern is None:
            name = _meant(parameters)
            return None if name is None else check_channel(text_of(parameters[name]))
        if not self._seen.issuperset(parameters):
            self._warn_of(parameters)
        channel, *texts = self._texts
        for number, (field, text) in enumerate(zip(self._fields, texts, strict=True), 1):
            if field not in parameters:
                raise ConfigurationError(
                    f"channel pattern {self._pattern!r} names {field!r}, which is not a path parameter"
                )
            value = text_of(parameters[field])
            channel += value + text
            # Otherwise `a` and `b:c` would make the same channel as `a:b` and `c`, which may be somebody else's.
            if number < len(texts) and (value + text).index(text) < len(value):
                raise InvalidChannel(channel, f"the parameter {field} must not hold {text!r}")
        return check_channel(channel)

    def _warn_of(self, parameters: Mapping[str, Any]) -> None:
        for name in parameters:
            if name not in self._seen and name not in self._fields:
                logger.warning(
                    "%s: the channel %r is the same for every %s, which is a parameter of a mount or a prefix: put "
                    "{%s} into the pattern if each has channels of its own",
                    *(self._path, self._pattern, name, name),
                    extra=about("channel.ignores_parameter", path=self._path, parameter=name),
                )
        self._seen.update(parameters)  # once

    def _parse(self, pattern: str) -> None:
        self._texts.append("")
        try:
            for text, field, spec, conversion in Formatter().parse(pattern):
                self._texts[-1] += text
                if field is not None:
                    if not field.isidentifier() or spec or conversion:
                        raise ValueError("may name path parameters only, such as {room}")
                    self._fields.append(field)
                    self._texts.append("")
            if not all(self._texts[1:-1]):
                raise ValueError("needs a text between two parameters, such as a colon")
        except ValueError as error:
            raise ConfigurationError(f"channel pattern {pattern!r}: {error}") from None


def _meant(parameters: Iterable[str]) -> str | None:
    # Return the parameter that is the channel if there is no pattern.
    names = list(parameters)
    if len(names) > 1:
        pattern = ":".join(f"{{{name}}}" for name in names)
        raise ConfigurationError(
            f"the path has several parameters: say which make the channel, channel='{pattern}'; those of a mount and a "
            "prefix count"
        )
    return names[0] if names else None


# Routers of one manager whose paths make the same channels, perhaps by mistake.


class Place:
    """A path whose parameter is the channel, because no pattern says otherwise.

    Warns once if another place of the manager makes the same channels: when the router is made, or, if the paths differ
    only in their prefixes, at its first connection.
    """

    def __init__(self, manager: ConnectionManager, path: str) -> None:
        self._manager = manager
        self._path = plain(path)
        # The path with the prefixes and mounts around it; `None` before the first connection.
        self._whole: str | None = None
        regex, _, parameters = compile_path(self._path)
        self._regex: Pattern[str] = regex
        others = {place._path for place in self._others() if place._regex.groups}
        if parameters and self._path not in others:
            self._warn(self._path, others, next(iter(parameters)))
        _PLACES.add(self)

    def see(self, scope: Scope, parameters: Mapping[str, Any]) -> None:
        """Look at the whole path of a connection. Only the first connection matters."""
        if self._whole is not None:
            return
        whole = self._whole = self._around(scope["path"], parameters) + self._path
        others = {place._whole for place in self._others() if place._whole is not None and not self._differs(place)}
        if whole not in others:
            self._warn(whole, others, next(iter(parameters)))

    def _others(self) -> list[Place]:
        return [place for place in _PLACES if place._manager is self._manager and place is not self]

    def _differs(self, other: Place) -> bool:
        # Whether the paths of the routers themselves differ. Then the warning came when the routers were made.
        return self._path != other._path and bool(self._regex.groups and other._regex.groups)

    def _around(self, path: str, parameters: Mapping[str, Any]) -> str:
        # The path before the router's own path, with the names of parameters in place of their values.
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
                extra=about("channel.shared", path=place),
            )


_PLACES: WeakSet[Place] = WeakSet()
