"""The messages of the Centrifuge client protocol as Protobuf's own runtime has them: made out of field numbers here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

# A message and its fields, name=number:type, where [] is repeated and {} a map from strings.
NUMBERS = """
Error: code=1:u32 message=2:str temporary=3:bool
Command: id=1:u32 connect=4:ConnectRequest subscribe=5:SubscribeRequest unsubscribe=6:UnsubscribeRequest
    publish=7:PublishRequest presence=8:PresenceRequest presence_stats=9:PresenceStatsRequest
    history=10:HistoryRequest ping=11:PingRequest send=12:SendRequest rpc=13:RPCRequest
    refresh=14:RefreshRequest sub_refresh=15:SubRefreshRequest
Reply: id=1:u32 error=2:Error push=4:Push connect=5:ConnectResult subscribe=6:SubscribeResult
    unsubscribe=7:UnsubscribeResult publish=8:PublishResult presence=9:PresenceResult
    presence_stats=10:PresenceStatsResult history=11:HistoryResult ping=12:PingResult rpc=13:RPCResult
    refresh=14:RefreshResult sub_refresh=15:SubRefreshResult
Push: id=1:i64 channel=2:str pub=4:Publication join=5:Join leave=6:Leave unsubscribe=7:Unsubscribe
    message=8:Message subscribe=9:Subscribe connect=10:Connect disconnect=11:Disconnect refresh=12:Refresh
Dictionary: id=1:str data=2:raw data_b64=3:str
ClientInfo: user=1:str client=2:str conn_info=3:raw chan_info=4:raw
Publication: data=4:raw info=5:ClientInfo offset=6:u64 tags=7:{}str delta=8:bool time=9:i64 channel=10:str
    key=11:str removed=12:bool score=13:s64 epoch=14:str prev_data=15:raw version=16:u64
Join: info=1:ClientInfo
Leave: info=1:ClientInfo
Unsubscribe: code=2:u32 reason=3:str
Subscribe: recoverable=1:bool epoch=4:str offset=5:u64 positioned=6:bool data=7:raw
Message: data=1:raw
Connect: client=1:str version=2:str data=3:raw subs=4:{}SubscribeResult expires=5:bool ttl=6:u32 ping=7:u32
    pong=8:bool session=9:str node=10:str time=11:i64
Disconnect: code=1:u32 reason=2:str reconnect=3:bool
Refresh: expires=1:bool ttl=2:u32
ConnectRequest: token=1:str data=2:raw subs=3:{}SubscribeRequest name=4:str version=5:str headers=6:{}str
    flag=7:i64 dict=8:str profile=9:str
ConnectResult: client=1:str version=2:str expires=3:bool ttl=4:u32 data=5:raw subs=6:{}SubscribeResult
    ping=7:u32 pong=8:bool session=9:str node=10:str time=11:i64 flag=12:i64 dict=13:Dictionary
RefreshRequest: token=1:str
RefreshResult: client=1:str version=2:str expires=3:bool ttl=4:u32
SubscribeRequest: channel=1:str token=2:str recover=3:bool epoch=6:str offset=7:u64 data=8:raw positioned=9:bool
    recoverable=10:bool join_leave=11:bool delta=12:str tf=13:FilterNode flag=14:i64 type=15:i32 phase=16:i32
    cursor=17:str limit=18:i32 asc=19:bool
SubscribeResult: expires=1:bool ttl=2:u32 recoverable=3:bool epoch=6:str publications=7:[]Publication
    recovered=8:bool offset=9:u64 positioned=10:bool data=11:raw was_recovering=12:bool delta=13:bool id=14:i64
    type=15:i32 phase=16:i32 cursor=17:str state=18:[]Publication publish_debounce=19:u32
KeyedItem: key=1:str version=2:u64
TrackBatch: signature=1:str items=2:[]KeyedItem
SubRefreshRequest: channel=1:str token=2:str type=3:i32 track=4:[]TrackBatch untrack=5:[]str
SubRefreshResult: expires=1:bool ttl=2:u32 items=3:[]Publication
UnsubscribeRequest: channel=1:str
UnsubscribeResult:
PublishRequest: channel=1:str data=2:raw type=3:i32 key=4:str removed=5:bool
PublishResult:
PresenceRequest: channel=1:str
PresenceResult: presence=1:{}ClientInfo
PresenceStatsRequest: channel=1:str
PresenceStatsResult: num_clients=1:u32 num_users=2:u32
StreamPosition: offset=1:u64 epoch=2:str
HistoryRequest: channel=1:str limit=7:i32 since=8:StreamPosition reverse=9:bool
HistoryResult: publications=1:[]Publication epoch=2:str offset=3:u64
PingRequest:
PingResult:
RPCRequest: data=1:raw method=2:str
RPCResult: data=1:raw
SendRequest: data=1:raw
FilterNode: op=1:str key=2:str cmp=3:str val=4:str vals=5:[]str nodes=6:[]FilterNode
"""

_Proto = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    "u32": _Proto.TYPE_UINT32,
    "u64": _Proto.TYPE_UINT64,
    "i32": _Proto.TYPE_INT32,
    "i64": _Proto.TYPE_INT64,
    "s64": _Proto.TYPE_SINT64,
    "bool": _Proto.TYPE_BOOL,
    "str": _Proto.TYPE_STRING,
    "raw": _Proto.TYPE_BYTES,
}


class ProtoField(NamedTuple):
    """A field as `NUMBERS` has it."""

    name: str
    number: int
    type: str
    is_repeated: bool
    is_map: bool


def _field(text: str) -> ProtoField:
    name, _, rest = text.partition("=")
    number, _, type_ = rest.partition(":")
    return ProtoField(name, int(number), type_.lstrip("[]{}"), type_.startswith("[]"), type_.startswith("{}"))


def is_message(each: ProtoField) -> bool:
    """Whether it holds messages."""
    return each.type not in _TYPES


def _messages() -> dict[str, list[ProtoField]]:
    found: dict[str, list[ProtoField]] = {}
    for words in map(str.split, NUMBERS.replace("\n    ", " ").strip().splitlines()):
        found[words[0].removesuffix(":")] = [_field(word) for word in words[1:]]
    return found


MESSAGES = _messages()


def _classes() -> dict[str, type[Message]]:
    file = descriptor_pb2.FileDescriptorProto(name="made_here.proto", package="made_here", syntax="proto3")
    for name, fields in MESSAGES.items():
        made = file.message_type.add(name=name)
        for each in fields:
            _describe(made, each)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"made_here.{name}")) for name in MESSAGES}


def _describe(made: Any, each: ProtoField) -> None:
    entry = "".join(part.title() for part in each.name.split("_")) + "Entry"
    if each.is_map:
        nested = made.nested_type.add(name=entry)
        nested.options.map_entry = True
        _describe(nested, ProtoField("key", 1, "str", False, False))
        _describe(nested, ProtoField("value", 2, each.type, False, False))
    field = made.field.add(name=each.name, number=each.number, label=_Proto.LABEL_OPTIONAL)
    if each.is_map or each.is_repeated:
        field.label = _Proto.LABEL_REPEATED
    if each.is_map:
        field.type, field.type_name = _Proto.TYPE_MESSAGE, f".made_here.{made.name}.{entry}"
    elif each.type in _TYPES:
        field.type = _TYPES[each.type]
    else:
        field.type, field.type_name = _Proto.TYPE_MESSAGE, f".made_here.{each.type}"


CLASSES = _classes()
"""The runtime's classes by the names of the messages."""


def as_runtime(name: str, message: Mapping[str, Any]) -> Message:
    """Make of a dict a message of the runtime."""
    return _filled(name, message, CLASSES[name]())


def _filled(name: str, message: Mapping[str, Any], made: Any) -> Any:
    for each in MESSAGES[name]:
        if each.name not in message:
            continue
        value = message[each.name]
        if each.type in _TYPES and each.is_map:
            getattr(made, each.name).update(value)
        elif each.type in _TYPES and each.is_repeated:
            getattr(made, each.name).extend(value)
        elif each.type in _TYPES:
            setattr(made, each.name, value)
        elif each.is_map:
            for key, inner in value.items():
                getattr(made, each.name)[key].CopyFrom(as_runtime(each.type, inner))
        elif each.is_repeated:
            getattr(made, each.name).extend(as_runtime(each.type, inner) for inner in value)
        else:
            getattr(made, each.name).CopyFrom(as_runtime(each.type, value))
    return made


def as_dict(name: str, made: Any) -> dict[str, Any]:
    """Make of a message of the runtime a dict; what is zero isn't in it."""
    found: dict[str, Any] = {}
    for each in MESSAGES[name]:
        value = getattr(made, each.name)
        is_message = each.type not in _TYPES
        if each.is_map:
            value = {key: as_dict(each.type, value[key]) if is_message else value[key] for key in value}
        elif each.is_repeated:
            value = [as_dict(each.type, inner) if is_message else inner for inner in value]
        elif is_message:
            if made.HasField(each.name):
                found[each.name] = as_dict(each.type, value)
            continue
        if value:
            found[each.name] = value
    return found


def behind_lengths(*messages: Message) -> bytes:
    """Return a frame of messages."""
    return b"".join(_length(len(data)) + data for data in (each.SerializeToString() for each in messages))


def _length(size: int) -> bytes:
    written = b""
    while size >= 0x80:
        written += bytes((size & 0x7F | 0x80,))
        size >>= 7
    return written + bytes((size,))


def replies_of(frame: bytes) -> list[dict[str, Any]]:
    """Read a server's frame."""
    found = []
    while frame:
        size = shift = 0
        while True:
            byte, frame = frame[0], frame[1:]
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        assert size <= len(frame), "the last message is cut off"
        found.append(as_dict("Reply", CLASSES["Reply"].FromString(frame[:size])))
        frame = frame[size:]
    return found
