"""What clients of the Centrifuge protocol are sent: publications and pushes, each encoded once for all. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic_core import from_json, to_json

from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.message import Message
from wsbroadcast.protocols.centrifuge.codec import Codec, NotJSON
from wsbroadcast.protocols.centrifuge.codes import ErrorCode, Failed, closing
from wsbroadcast.publication import NOTHING, Frame, Publication, Sender, Withheld
from wsbroadcast.stats import Counters

Fields = dict[str, Any]
"""A message of the protocol in the shape of its JSON. Payloads are bytes."""


class Names:
    """The channels in which clients get what is sent to their user and to everyone.

    Args:
        user_channel: A pattern such as `#{user}`; `None` for no such channel.
        everyone_channel: The name; `None` for no such channel.
    """

    def __init__(self, user_channel: str | None, everyone_channel: str | None) -> None:
        self._before, self._after = ("", "") if user_channel is None else user_channel.split("{user}")
        self.has_users = user_channel is not None
        """Whether there is a channel for each user."""
        self.everyone = everyone_channel
        """The channel for everyone; `None` if there is none."""

    def of(self, audience: Audience) -> str | None:
        """Return the channel of an audience; `None` if it has none."""
        if audience.kind == "channel":
            return audience.name
        if audience.kind == "user" and self.has_users:
            return f"{self._before}{audience.name}{self._after}"
        return self.everyone if audience.kind == "everyone" else None

    def audience(self, channel: str, user_key: str | None) -> Audience:
        """Return the audience that a channel stands for, for a client of a user.

        Raises:
            Failed: If it is the channel of another user.
        """
        if channel == self.everyone:
            return EVERYONE
        if self.has_users and user_key is not None and channel == self.of(Audience("user", user_key)):
            return Audience("user", user_key)
        if self.is_users(channel):
            raise Failed(ErrorCode.PERMISSION_DENIED)
        return Audience("channel", channel)

    def is_users(self, channel: str) -> bool:
        """Return whether a channel is that of a user."""
        return self.has_users and channel.startswith(self._before) and channel.endswith(self._after)


class Speech:
    """Writes publications for clients of one form of the protocol.

    Args:
        codec: The codec of the form.
        names: The channels that stand for users and everyone.
        counters: Count publications that clients of this form can't be sent: bytes that are not JSON.
    """

    has_positions = True
    """A connection that is behind may be sent the rest later."""

    def __init__(self, codec: Codec, names: Names, counters: Counters) -> None:
        self.codec = codec
        """The codec of the form."""
        self._names = names
        self._counters = counters
        self.ping = self._message(codec.ping)
        """The message for a ping."""

    def __call__(self, publication: Publication) -> Message:
        """Return what a client gets for a publication."""
        if isinstance(publication, Frame):
            return publication.message
        if isinstance(publication, Withheld):
            return NOTHING
        channel = self._names.of(publication.audience)
        try:
            if channel is None:
                return self.say({"push": {"message": {"data": self.data(publication.message)}}})
            return self.say({"push": {"channel": channel, "pub": self.publication(publication)}})
        except NotJSON:
            self._counters.dropped["not_json"] += 1
            return NOTHING

    def say(self, fields: Mapping[str, Any]) -> Message:
        """Return a reply or a push."""
        return self._message(self.codec.encode(fields))

    def join(self, messages: Sequence[Message]) -> Message:
        """Return several messages as one."""
        return messages[0] if len(messages) == 1 else self._message(self.codec.join(each.payload for each in messages))

    closing = staticmethod(closing)

    def _message(self, payload: bytes) -> Message:
        return Message(payload, self.codec.form)

    def publication(self, publication: Publication) -> Fields:
        """Return the fields of a publication."""
        fields: Fields = {"data": self.data(publication.message)}
        if publication.sender is not None:
            fields["info"] = info_of(publication.sender)
        if publication.position is not None:
            fields["offset"] = publication.offset
        return fields

    def publications(self, publications: Iterable[Publication]) -> list[Fields]:
        """Return the fields of the publications that clients of this form can be sent."""
        found = []
        for each in publications:
            try:
                fields = self.publication(each)
                self.codec.encode({"push": {"pub": fields}})
            except NotJSON:
                self._counters.dropped["not_json"] += 1
            else:
                found.append(fields)
        return found

    def data(self, message: Message) -> bytes:
        """Return the payload of a message. A text becomes a string of JSON, for all clients.

        Raises:
            NotJSON: If this is the JSON form and the payload is empty, which isn't JSON.
        """
        if not message.payload and message.form != "text" and self.codec.form == "text":
            raise NotJSON("an empty payload is not JSON")
        return to_json(message.payload.decode()) if message.form == "text" else message.payload


def info_of(sender: Sender) -> Fields:
    """Return the `ClientInfo` of a client."""
    fields: Fields = {"client": sender.client, "user": sender.user}
    if sender.info:
        fields["conn_info"] = sender.info
    if sender.channel_info:
        fields["chan_info"] = sender.channel_info
    return fields


def member_info(client: str, seen: bytes) -> Fields:
    """Return the `ClientInfo` of a member, from what presence has kept."""
    found = from_json(seen)
    info = found.get("info")
    return info_of(Sender(client, found.get("user") or "", b"" if info is None else to_json(info)))


def json_bytes(value: object) -> bytes:
    """Return a claim of a token as a payload; empty for none."""
    return b"" if value is None else to_json(value)


def value_of(payload: bytes) -> Any:
    """Return what a client has sent: the value of its JSON, the bytes if they aren't JSON, or `None` for nothing."""
    if not payload:
        return None
    try:
        return from_json(payload, allow_inf_nan=False)
    except ValueError:
        return payload
