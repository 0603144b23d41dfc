"""The messages of the Centrifuge client protocol: their fields, with the numbers that Protobuf gives them. No I/O.

Both codecs read and write by this table. A message is a dict in the shape of the JSON protocol, with one exception: a
payload (`BYTES`) is always `bytes`. In a JSON frame it is a value of JSON, in a Protobuf frame it is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

MAX_COMMANDS = 4096
"""The most commands in one frame. The shortest useful command takes 17 bytes of JSON, so a frame of 64 KiB has room for
fewer of them. Empty commands could be 65,536."""

Message = dict[str, Any]
"""A message: its fields, by their names in JSON."""


class Malformed(Exception):
    """Raised for a frame that can't be read. The text says what was expected, but nothing of what came."""


class Kind(Enum):
    """The kind of value that a field holds."""

    UINT32 = "uint32"
    UINT64 = "uint64"
    INT32 = "int32"
    INT64 = "int64"
    SINT64 = "sint64"
    BOOL = "bool"
    STRING = "string"
    BYTES = "bytes"
    MESSAGE = "message"


_LIMITS = {
    Kind.UINT32: (0, 2**32 - 1),
    Kind.UINT64: (0, 2**64 - 1),
    Kind.INT32: (-(2**31), 2**31 - 1),
    Kind.INT64: (-(2**63), 2**63 - 1),
    Kind.SINT64: (-(2**63), 2**63 - 1),
}


@dataclass(frozen=True)
class Field:
    """One field of a message."""

    name: str
    number: int
    kind: Kind
    message: str = ""
    """The name of the message that it holds, for `MESSAGE`."""
    is_repeated: bool = False
    is_map: bool = False
    """Whether it is a map from strings to values of this kind."""
    is_always: bool = False
    """Whether it is in JSON even if it is zero or empty. In Protobuf such a field is always left out."""
    goes_with: str = ""
    """The flag that makes it appear in JSON even if it is zero."""

    @cached_property
    def limits(self) -> tuple[int, int] | None:
        """The smallest and the largest value of an integer; `None` for other kinds."""
        return _LIMITS.get(self.kind)

    @cached_property
    def is_varint(self) -> bool:
        """Whether Protobuf writes it as a varint: an integer or a bool."""
        return self.kind is Kind.BOOL or self.limits is not None

    @cached_property
    def is_message(self) -> bool:
        """Whether it holds one message. An empty message isn't the same as none."""
        return self.kind is Kind.MESSAGE and not (self.is_repeated or self.is_map)

    @cached_property
    def zero(self) -> object:
        """Its value if it is missing."""
        if self.is_repeated:
            return []
        if self.is_map or self.is_message:
            return {}
        return 0 if self.limits else {Kind.BOOL: False, Kind.STRING: "", Kind.BYTES: b""}[self.kind]


class Shape:
    """The fields of a message."""

    def __init__(self, fields: tuple[Field, ...], *, has_payloads: bool) -> None:
        self.by_name: Mapping[str, Field] = {each.name: each for each in fields}
        self.by_number: Mapping[int, Field] = {each.number: each for each in fields}
        self.in_json = tuple(each for each in fields if each.is_always or each.goes_with)
        """The fields that may be in JSON although they are zero."""
        self.has_payloads = has_payloads
        """Whether it has a payload, or holds a message that has one."""

    def present(self, message: Mapping[str, Any]) -> list[tuple[Field, Any]]:
        """Return the fields of a message that are neither zero nor empty, in the order of their numbers.

        Raises:
            KeyError: If it has a field that the protocol doesn't know.
        """
        by_name = self.by_name
        found = [(by_name[name], value) for name, value in message.items()]
        found.sort(key=_by_number)
        return [(each, value) for each, value in found if value or (value is not None and each.is_message)]


def _by_number(found: tuple[Field, Any]) -> int:
    return found[0].number


UINT32, UINT64, INT32, INT64 = Kind.UINT32, Kind.UINT64, Kind.INT32, Kind.INT64
SINT64, BOOL, STRING, BYTES = Kind.SINT64, Kind.BOOL, Kind.STRING, Kind.BYTES


def _one(name: str, number: int, message: str) -> Field:
    return Field(name, number, Kind.MESSAGE, message)


def _many(name: str, number: int, message: str, *, is_always: bool = False) -> Field:
    return Field(name, number, Kind.MESSAGE, message, is_repeated=True, is_always=is_always)


def _map(name: str, number: int, message: str = "", *, is_always: bool = False) -> Field:
    return Field(name, number, Kind.MESSAGE if message else STRING, message, is_map=True, is_always=is_always)


def _always(name: str, number: int, kind: Kind) -> Field:
    return Field(name, number, kind, is_always=True)


def _ttl(number: int) -> Field:
    return Field("ttl", number, UINT32, goes_with="expires")


_TABLE: dict[str, tuple[Field, ...]] = {
    # What clients send, and the answers.
    "Command": (
        Field("id", 1, UINT32),
        _one("connect", 4, "ConnectRequest"),
        _one("subscribe", 5, "SubscribeRequest"),
        _one("unsubscribe", 6, "ChannelRequest"),
        _one("publish", 7, "PublishRequest"),
        _one("presence", 8, "ChannelRequest"),
        _one("presence_stats", 9, "ChannelRequest"),
        _one("history", 10, "HistoryRequest"),
        _one("ping", 11, "Empty"),
        _one("send", 12, "Data"),
        _one("rpc", 13, "RPCRequest"),
        _one("refresh", 14, "RefreshRequest"),
        _one("sub_refresh", 15, "SubRefreshRequest"),
    ),
    "Reply": (
        Field("id", 1, UINT32),
        _one("error", 2, "Error"),
        _one("push", 4, "Push"),
        _one("connect", 5, "ConnectResult"),
        _one("subscribe", 6, "SubscribeResult"),
        _one("unsubscribe", 7, "Empty"),
        _one("publish", 8, "Empty"),
        _one("presence", 9, "PresenceResult"),
        _one("presence_stats", 10, "PresenceStatsResult"),
        _one("history", 11, "HistoryResult"),
        _one("ping", 12, "Empty"),
        _one("rpc", 13, "Data"),
        _one("refresh", 14, "RefreshResult"),
        _one("sub_refresh", 15, "SubRefreshResult"),
    ),
    "Push": (
        Field("id", 1, INT64),
        Field("channel", 2, STRING),
        _one("pub", 4, "Publication"),
        _one("join", 5, "Info"),
        _one("leave", 6, "Info"),
        _one("unsubscribe", 7, "Unsubscribe"),
        _one("message", 8, "Data"),
        _one("subscribe", 9, "Subscribe"),
        _one("connect", 10, "Connect"),
        _one("disconnect", 11, "Disconnect"),
        _one("refresh", 12, "Refresh"),
    ),
    "Error": (_always("code", 1, UINT32), _always("message", 2, STRING), Field("temporary", 3, BOOL)),
    # Parts of several messages. Protobuf doesn't send names, so one shape can serve several of its messages.
    "Empty": (),
    "Data": (Field("data", 1, BYTES),),
    "Info": (_one("info", 1, "ClientInfo"),),
    "ChannelRequest": (Field("channel", 1, STRING),),
    "ClientInfo": (
        _always("user", 1, STRING),
        _always("client", 2, STRING),
        Field("conn_info", 3, BYTES),
        Field("chan_info", 4, BYTES),
    ),
    "Publication": (
        Field("data", 4, BYTES),
        _one("info", 5, "ClientInfo"),
        Field("offset", 6, UINT64),
        _map("tags", 7),
        Field("delta", 8, BOOL),
        Field("time", 9, INT64),
        Field("channel", 10, STRING),
        Field("key", 11, STRING),
        Field("removed", 12, BOOL),
        Field("score", 13, SINT64),
        Field("epoch", 14, STRING),
        Field("prev_data", 15, BYTES),
        Field("version", 16, UINT64),
    ),
    "StreamPosition": (Field("offset", 1, UINT64), Field("epoch", 2, STRING)),
    "FilterNode": (
        Field("op", 1, STRING),
        Field("key", 2, STRING),
        Field("cmp", 3, STRING),
        Field("val", 4, STRING),
        Field("vals", 5, STRING, is_repeated=True),
        _many("nodes", 6, "FilterNode"),
    ),
    "Dictionary": (Field("id", 1, STRING), Field("data", 2, BYTES), Field("data_b64", 3, STRING)),
    "KeyedItem": (Field("key", 1, STRING), Field("version", 2, UINT64)),
    "TrackBatch": (Field("signature", 1, STRING), _many("items", 2, "KeyedItem")),
    # Requests.
    "ConnectRequest": (
        Field("token", 1, STRING),
        Field("data", 2, BYTES),
        _map("subs", 3, "SubscribeRequest"),
        Field("name", 4, STRING),
        Field("version", 5, STRING),
        _map("headers", 6),
        Field("flag", 7, INT64),
        Field("dict", 8, STRING),
        Field("profile", 9, STRING),
    ),
    "SubscribeRequest": (
        Field("channel", 1, STRING),
        Field("token", 2, STRING),
        Field("recover", 3, BOOL),
        Field("epoch", 6, STRING),
        Field("offset", 7, UINT64),
        Field("data", 8, BYTES),
        Field("positioned", 9, BOOL),
        Field("recoverable", 10, BOOL),
        Field("join_leave", 11, BOOL),
        Field("delta", 12, STRING),
        _one("tf", 13, "FilterNode"),
        Field("flag", 14, INT64),
        Field("type", 15, INT32),
        Field("phase", 16, INT32),
        Field("cursor", 17, STRING),
        Field("limit", 18, INT32),
        Field("asc", 19, BOOL),
    ),
    "PublishRequest": (
        Field("channel", 1, STRING),
        Field("data", 2, BYTES),
        Field("type", 3, INT32),
        Field("key", 4, STRING),
        Field("removed", 5, BOOL),
    ),
    "HistoryRequest": (
        Field("channel", 1, STRING),
        Field("limit", 7, INT32),
        _one("since", 8, "StreamPosition"),
        Field("reverse", 9, BOOL),
    ),
    "RPCRequest": (Field("data", 1, BYTES), Field("method", 2, STRING)),
    "RefreshRequest": (Field("token", 1, STRING),),
    "SubRefreshRequest": (
        Field("channel", 1, STRING),
        Field("token", 2, STRING),
        Field("type", 3, INT32),
        _many("track", 4, "TrackBatch"),
        Field("untrack", 5, STRING, is_repeated=True),
    ),
    # Results.
    "ConnectResult": (
        _always("client", 1, STRING),
        Field("version", 2, STRING),
        Field("expires", 3, BOOL),
        _ttl(4),
        Field("data", 5, BYTES),
        _map("subs", 6, "SubscribeResult"),
        Field("ping", 7, UINT32),
        Field("pong", 8, BOOL),
        Field("session", 9, STRING),
        Field("node", 10, STRING),
        Field("time", 11, INT64),
        Field("flag", 12, INT64),
        _one("dict", 13, "Dictionary"),
    ),
    "SubscribeResult": (
        Field("expires", 1, BOOL),
        _ttl(2),
        Field("recoverable", 3, BOOL),
        Field("epoch", 6, STRING),
        _many("publications", 7, "Publication"),
        Field("recovered", 8, BOOL),
        Field("offset", 9, UINT64),
        Field("positioned", 10, BOOL),
        Field("data", 11, BYTES),
        Field("was_recovering", 12, BOOL),
        Field("delta", 13, BOOL),
        Field("id", 14, INT64),
        Field("type", 15, INT32),
        Field("phase", 16, INT32),
        Field("cursor", 17, STRING),
        _many("state", 18, "Publication"),
        Field("publish_debounce", 19, UINT32),
    ),
    "PresenceResult": (_map("presence", 1, "ClientInfo", is_always=True),),
    "PresenceStatsResult": (_always("num_clients", 1, UINT32), _always("num_users", 2, UINT32)),
    "HistoryResult": (
        _many("publications", 1, "Publication", is_always=True),
        _always("epoch", 2, STRING),
        _always("offset", 3, UINT64),
    ),
    "RefreshResult": (
        Field("client", 1, STRING),
        Field("version", 2, STRING),
        Field("expires", 3, BOOL),
        _ttl(4),
    ),
    "SubRefreshResult": (Field("expires", 1, BOOL), _ttl(2), _many("items", 3, "Publication")),
    # Pushes.
    "Unsubscribe": (_always("code", 2, UINT32), _always("reason", 3, STRING)),
    "Subscribe": (
        Field("recoverable", 1, BOOL),
        Field("epoch", 4, STRING),
        Field("offset", 5, UINT64),
        Field("positioned", 6, BOOL),
        Field("data", 7, BYTES),
    ),
    "Connect": (
        _always("client", 1, STRING),
        Field("version", 2, STRING),
        Field("data", 3, BYTES),
        _map("subs", 4, "SubscribeResult"),
        Field("expires", 5, BOOL),
        _ttl(6),
        Field("ping", 7, UINT32),
        Field("pong", 8, BOOL),
        Field("session", 9, STRING),
        Field("node", 10, STRING),
        Field("time", 11, INT64),
    ),
    "Disconnect": (_always("code", 1, UINT32), _always("reason", 2, STRING), Field("reconnect", 3, BOOL)),
    "Refresh": (Field("expires", 1, BOOL), _ttl(2)),
}


def _has_payloads(name: str, seen: frozenset[str] = frozenset()) -> bool:
    return name not in seen and any(
        each.kind is BYTES or (each.message != "" and _has_payloads(each.message, seen | {name}))
        for each in _TABLE[name]
    )


SHAPES: Mapping[str, Shape] = {name: Shape(fields, has_payloads=_has_payloads(name)) for name, fields in _TABLE.items()}
"""The shapes of all messages, by name."""
