"""The types of the messages to an audience, and how a message is checked before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import from_json

from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.exceptions import ConfigurationError, EncodeError, kind_of, shorten
from wsbroadcast.history import USERS
from wsbroadcast.message import Enveloped, Message, to_json_bytes
from wsbroadcast.options import longest_match
from wsbroadcast.publication import NOBODY, Publication, Publications, publications_of
from wsbroadcast.typed.message_types import MessageTypes, shown
from wsbroadcast.typed.mistakes import Invalid

# So many audiences' types are remembered. Beyond this number the memory is emptied.
_REMEMBERED = 8192

Encode = Callable[[object], Message]
"""Makes a message from a value, and checks its size."""


class SendRules:
    """Which types the messages to an audience must have.

    Args:
        sends: An annotation for all channels, or a dict of annotations by pattern, `USERS` and `EVERYONE`.

    Raises:
        ConfigurationError: If it makes no sense, or something can't be sent as JSON.
    """

    def __init__(self, sends: Any) -> None:
        self._channels: dict[str, MessageTypes[Any]] = {}
        self._users: MessageTypes[Any] | None = None
        self._everyone: MessageTypes[Any] | None = None
        self._known: dict[Audience, MessageTypes[Any] | None] = {}
        for pattern, annotation in (sends if isinstance(sends, Mapping) else {"*": sends}).items():
            self.add(pattern, annotation)

    def add(self, pattern: object, annotation: Any) -> MessageTypes[Any]:
        """Set the types of messages to the channels of a pattern, to `USERS`, or to `EVERYONE`.

        Raises:
            ConfigurationError: If they have other types already, or the annotation makes no sense.
        """
        types = sendable(annotation, "sends")
        before = self._at(pattern)
        if before is not None and before.annotation != types.annotation:
            raise ConfigurationError(
                f"messages to {pattern!r:.80} have two types by sends: {shown(before.annotation)}, and "
                f"{shown(types.annotation)}; write one union, or patterns that differ"
            )
        if pattern is USERS:
            self._users = types
        elif pattern == EVERYONE:
            self._everyone = types
        elif isinstance(pattern, str) and pattern:
            self._channels[pattern] = types
        else:
            raise ConfigurationError(
                'sends is a type for all channels, or a dict of types by pattern, such as {"room:*": Said}, not a type '
                f"for {kind_of(pattern)}"
            )
        self._known.clear()
        return types

    def about(self, channel: str | Audience) -> MessageTypes[Any] | None:
        """Return the types for all channels of a pattern, if one rule holds for all of them, or for `EVERYONE`."""
        return self.of(channel if isinstance(channel, Audience) else Audience("channel", channel))

    def _at(self, pattern: object) -> MessageTypes[Any] | None:
        if pattern is USERS:
            return self._users
        if pattern == EVERYONE:
            return self._everyone
        return self._channels.get(pattern) if isinstance(pattern, str) else None

    def of(self, audience: Audience) -> MessageTypes[Any] | None:
        """Return the types of messages to an audience; `None` for any. If several patterns fit, the longest counts."""
        try:
            return self._known[audience]
        except KeyError:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            types = self._known[audience] = self._find(audience)
            return types

    def _find(self, audience: Audience) -> MessageTypes[Any] | None:
        match audience.kind:
            case "channel":
                return longest_match(self._channels, audience.name)
            case "user":
                return self._users
            case "everyone":
                return self._everyone
        return None


def sendable(annotation: Any, name: str) -> MessageTypes[Any]:
    """Return the types in an annotation, if they can be sent as JSON.

    Raises:
        ConfigurationError: If they can't be sent.
    """
    types: MessageTypes[Any] = MessageTypes.of(annotation, name)
    types.check_sendable()
    return types


def typed_publications(
    rules: SendRules | None,
    message: object,
    as_: Any,
    audiences: tuple[Audience, ...],
    encode: Encode,
    exclude: frozenset[str] = NOBODY,
    exclude_users: frozenset[str] = NOBODY,
    *,
    key: str | None = None,
) -> Publications:
    """Return the publications of a broadcast, after checking the message by its types.

    Args:
        rules: The types by audience.
        message: What is broadcast.
        as_: The type that it is converted to first; `None` for none.
        audiences: The audiences of the broadcast.
        encode: Makes the message if no types are known, and checks its size.
        exclude: Ids of connections that don't get it.
        exclude_users: Users who don't get it.
        key: The key for slow consumers under the policy `conflate`.

    Raises:
        EncodeError: If it isn't of these types. Then nothing is sent.
    """
    value, as_types = message, None
    key = _key_of(message, key)
    if as_ is not None:
        as_types = sendable(as_, "as_")
        value = checked(as_types, message, "as_")
    made: dict[int, Message] = {}
    publications: list[Publication] = []
    for publication in publications_of(Message(b""), audiences, exclude, exclude_users):
        types = None if rules is None else rules.of(publication.audience)
        written = made.get(id(types))
        if written is None:
            if types is not None:
                written = encode(typed_message(types, value, key, publication.audience))
            else:
                written = encode(message if as_types is None else as_types.write(value, key))
            made[id(types)] = written
        publications.append(publication.with_message(written))
    return tuple(publications)


def typed_message(types: MessageTypes[Any], value: object, key: str | None, audience: Audience) -> Message:
    """Return a message that was checked and written by its types.

    Raises:
        EncodeError: If it isn't of these types.
    """
    where = audience.kind if audience.kind == "everyone" else f"{audience.kind} {shorten(audience.name)}"
    return types.write(checked(types, value, f"sends for {where}"), _key_of(value, key))


def typed_envelope(types: MessageTypes[Any], message: Message, audience: Audience) -> Message:
    """Return a message that a client's command has published, after checking the data in its object by the types.

    Raises:
        EncodeError: If the message isn't such an object, or its data isn't of these types.
    """
    envelope = from_json(message.payload) if message.form == "json" else None
    if not isinstance(envelope, dict) or "data" not in envelope:
        raise EncodeError(
            "what a client publishes by a command has its data in an object, under data: keep that object around it"
        )
    data = typed_message(types, Message.json(envelope["data"]), None, audience)
    return Enveloped(to_json_bytes(envelope | {"data": from_json(data.payload)}), "json", key=message.key)


def _key_of(value: object, key: str | None) -> str | None:
    return value.key if key is None and isinstance(value, Message) else key


def checked(types: MessageTypes[Any], value: object, name: str) -> Any:
    """Return a value as one of some types. For a `Message` its JSON is read.

    Raises:
        EncodeError: If it isn't of these types.
    """
    try:
        if not isinstance(value, Message):
            return types.check(value)
        if value.form == "json":
            return types.read(value.payload)
    except Invalid as invalid:
        if unloaded := next((each for each in invalid.mistakes if each["type"] == "get_attribute_error"), None):
            where = ".".join(map(str, unloaded["loc"]))
            raise EncodeError(
                f"{where} of {type(value).__name__} can't be loaded while it is sent: a row expires at a commit, and a "
                "session that is closed or async loads nothing by itself; refresh the row before, load what it refers "
                "to in the query, or make the session with expire_on_commit=False"
            ) from invalid
        raise EncodeError(f"by {name} a message is {shown(types.annotation)}: {invalid.text}") from invalid
    raise EncodeError(f"by {name} a message is {shown(types.annotation)}, not {value.form}")
