"""The forms of the Centrifuge client protocol: read and written as others do it, and nothing worse than `Malformed`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.support.centrifuge import CLASSES, MESSAGES, ProtoField, as_dict, as_runtime, behind_lengths, replies_of
from wsbroadcast.protocols.centrifuge.codec import (
    JSON,
    MAX_COMMANDS,
    PROTOBUF,
    Codec,
    Malformed,
    NotJSON,
    is_json,
)
from wsbroadcast.protocols.centrifuge.schema import SHAPES, Kind

TYPES = {"u32": "UINT32", "u64": "UINT64", "i32": "INT32", "i64": "INT64", "s64": "SINT64", "str": "STRING"} | {
    "bool": "BOOL",
    "raw": "BYTES",
}
LIMITS = {
    "u32": (0, 2**32 - 1),
    "u64": (0, 2**64 - 1),
    "i32": (-(2**31), 2**31 - 1),
    "i64": (-(2**63), 2**63 - 1),
    "s64": (-(2**63), 2**63 - 1),
}


# What messages there are.


def _json(depth: int = 3) -> st.SearchStrategy[bytes]:
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=depth,
    )
    return st.builds(lambda value, ascii_: json.dumps(value, ensure_ascii=ascii_).encode(), values, st.booleans())


JSON_PAYLOADS = _json()
ANY_BYTES = st.binary(max_size=40)


def _values(each: ProtoField, payloads: st.SearchStrategy[bytes], depth: int, most: int) -> st.SearchStrategy[Any]:
    if each.type not in TYPES:
        single: st.SearchStrategy[Any] = messages(each.type, payloads, depth - 1, most)
    elif limits := LIMITS.get(each.type):
        single = st.sampled_from([0, 1, 127, 128, 300, limits[0], limits[1]]) | st.integers(*limits)
    else:
        single = {"bool": st.booleans(), "str": st.text(max_size=20), "raw": payloads}[each.type]
    if each.is_map:
        return st.dictionaries(st.text(max_size=5), single, max_size=most)
    return st.lists(single, max_size=3) if each.is_repeated else single


def messages(
    name: str, payloads: st.SearchStrategy[bytes], depth: int = 4, most: int = 3
) -> st.SearchStrategy[dict[str, Any]]:
    """A message, nested so deep at most, with so much in a map at most."""
    fields = [each for each in MESSAGES[name] if each.type in TYPES or depth > 0]
    return st.fixed_dictionaries({}, optional={each.name: _values(each, payloads, depth, most) for each in fields})


def one_of(name: str, payloads: st.SearchStrategy[bytes], most: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """A command or a reply as it is used: an id, and one method."""
    inner = [each for each in MESSAGES[name] if each.type not in TYPES]
    used = st.one_of([st.fixed_dictionaries({each.name: messages(each.type, payloads, 3, most)}) for each in inner])
    return st.builds(lambda id_, method: {"id": id_, **method}, st.integers(0, 2**32 - 1), used)


def without_zeros(name: str, message: dict[str, Any]) -> dict[str, Any]:
    return as_dict(name, as_runtime(name, message))


# The table.


def test_the_table_is_that_of_the_protocol() -> None:
    seen: set[tuple[str, str]] = set()

    def compare(theirs: str, ours: str) -> None:
        if (theirs, ours) in seen:
            return
        seen.add((theirs, ours))
        fields = MESSAGES[theirs]
        assert list(SHAPES[ours].by_name) == [each.name for each in fields]
        for each in fields:
            field = SHAPES[ours].by_name[each.name]
            assert (field.number, field.is_repeated, field.is_map) == (each.number, each.is_repeated, each.is_map)
            if each.type in TYPES:
                assert field.kind is Kind[TYPES[each.type]]
            else:
                compare(each.type, field.message)

    compare("Command", "Command")
    compare("Reply", "Reply")
    assert {theirs for theirs, _ in seen} == set(MESSAGES)
    assert {ours for _, ours in seen} == set(SHAPES)


# As Protobuf's own runtime does it.


@given(st.lists(one_of("Command", ANY_BYTES) | messages("Command", ANY_BYTES), min_size=1, max_size=4))
def test_protobuf_commands_are_read_as_by_its_runtime(commands: list[dict[str, Any]]) -> None:
    frame = behind_lengths(*(as_runtime("Command", each) for each in commands))
    assert PROTOBUF.decode(frame) == [without_zeros("Command", each) for each in commands]


# A map's order is nobody's business, so there is no more than one thing in it here.
@given(one_of("Reply", ANY_BYTES, most=1) | messages("Reply", ANY_BYTES, most=1))
def test_protobuf_replies_are_written_as_by_its_runtime(reply: dict[str, Any]) -> None:
    made = as_runtime("Reply", reply)
    written = PROTOBUF.encode(reply)
    assert written == behind_lengths(made)
    assert replies_of(PROTOBUF.join([written, PROTOBUF.ping, written])) == [
        as_dict("Reply", made),
        {},
        as_dict("Reply", made),
    ]


@pytest.mark.parametrize("name", sorted(MESSAGES))
@settings(max_examples=20)
@given(data=st.data())
def test_every_message_goes_there_and_back(name: str, data: st.DataObject) -> None:
    top, way = _a_way_to(name)
    message = data.draw(messages(name, ANY_BYTES, 2))
    for each in reversed(way):
        message = _around(each, message)
    made = as_runtime(top, message)
    if top == "Command":
        assert PROTOBUF.decode(behind_lengths(made)) == [as_dict(top, made)]
    else:
        assert replies_of(PROTOBUF.encode(message)) == [as_dict(top, made)]


def _around(each: ProtoField, message: dict[str, Any]) -> dict[str, Any]:
    if each.is_map:
        return {each.name: {"a": message}}
    return {each.name: [message] if each.is_repeated else message}


def _a_way_to(name: str) -> tuple[str, list[ProtoField]]:
    # From a command or a reply to a message, by the fields that lead there.
    for top in ("Command", "Reply"):
        ways: dict[str, list[ProtoField]] = {top: []}
        todo = [top]
        while todo:
            here = todo.pop(0)
            for each in MESSAGES[here]:
                if each.type in MESSAGES and each.type not in ways:
                    ways[each.type] = [*ways[here], each]
                    todo.append(each.type)
        if name in ways:
            return top, ways[name]
    raise AssertionError(f"nothing leads to {name}")


def _mutated(frame: bytes, changes: list[tuple[int, int, int]]) -> bytes:
    data = bytearray(frame)
    for at, what, byte in changes:
        at %= len(data) + 1
        if what == 0:
            data.insert(at, byte)
        elif what == 1:
            del data[at : at + 1]
        else:
            data[at : at + 1] = bytes((byte,))
    return bytes(data)


@settings(max_examples=300)
@given(
    st.binary(max_size=60)
    | st.builds(
        _mutated,
        one_of("Command", ANY_BYTES).map(lambda each: as_runtime("Command", each).SerializeToString()),
        st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2), st.integers(0, 255)), max_size=4),
    )
)
def test_protobuf_is_read_as_by_its_runtime_or_not_at_all(data: bytes) -> None:
    frame = bytes((len(data) & 0x7F | 0x80, len(data) >> 7)) + data
    assume(len(data) < 1 << 14)
    try:
        (command,) = PROTOBUF.decode(frame)
    except Malformed:
        return
    try:
        made = CLASSES["Command"].FromString(data)
    except DecodeError:
        pytest.fail("read although the runtime doesn't")
    assert without_zeros("Command", command) == as_dict("Command", made)


def _field(number: int, wire: int, value: bytes) -> bytes:
    return bytes((number << 3 | wire,)) + value


def _framed(*data: bytes) -> bytes:
    whole = b"".join(data)
    assert len(whole) < 128
    return bytes((len(whole),)) + whole


BAD_PROTOBUF = {
    "empty frame": b"",
    "length without an end": b"\x80",
    "length of 11 bytes": b"\x80" * 10 + b"\x00",
    "length beyond the frame": b"\x02\x08",
    "length of 2^63": b"\xff" * 8 + b"\x7f",
    "tag without an end": _framed(b"\x88"),
    "field number 0": _framed(b"\x00\x01"),
    "field number 2^29": _framed(b"\x80\x80\x80\x80\x10\x01"),
    "varint cut off": _framed(_field(1, 0, b"\x80")),
    "varint of 11 bytes": _framed(_field(1, 0, b"\x80" * 10 + b"\x01")),
    "varint of 70 bits": _framed(_field(1, 0, b"\xff" * 9 + b"\x7f")),
    "varint of 65 bits that nobody knows": _framed(_field(3, 0, b"\xff" * 9 + b"\x03")),
    "id of 2^32": _framed(_field(1, 0, b"\x80\x80\x80\x80\x10")),
    "field longer than its message": _framed(_field(5, 2, b"\x05\x0a\x01a")),
    "inner field longer than its message": _framed(_field(5, 2, b"\x02\x0a\x01"), b"a"),
    "fixed number cut off": _framed(_field(14, 1, b"1234567")),
    "short fixed number cut off": _framed(_field(14, 5, b"123")),
    "start of a group": _framed(_field(14, 3, b"")),
    "end of a group": _framed(_field(14, 4, b"")),
    "wire type 6": _framed(_field(14, 6, b"")),
    "wire type 7": _framed(_field(14, 7, b"")),
    "string that isn't UTF-8": _framed(_field(5, 2, b"\x03\x0a\x01\xff")),
    "surrogate in UTF-8": _framed(_field(5, 2, b"\x05\x0a\x03\xed\xa0\x80")),
    "key of a map that isn't UTF-8": _framed(_field(4, 2, b"\x05\x32\x03\x0a\x01\xff")),
    "entry of a map with a third field": _framed(_field(4, 2, b"\x05\x32\x03\x1a\x01a")),
    "key of a map that is a number": _framed(_field(4, 2, b"\x04\x32\x02\x08\x01")),
    "second command broken": _framed(b"") + b"\x01\x08",
    "int32 of 2^31": _framed(_field(10, 2, b"\x06\x38\x80\x80\x80\x80\x08")),
}


@pytest.mark.parametrize("frame", BAD_PROTOBUF.values(), ids=BAD_PROTOBUF)
def test_protobuf_that_is_wrong_is_malformed(frame: bytes) -> None:
    with pytest.raises(Malformed):
        PROTOBUF.decode(frame)


def test_protobuf_in_a_text_frame_is_malformed() -> None:
    with pytest.raises(Malformed):
        PROTOBUF.decode("\x00")


def test_protobuf_that_comes_twice_is_merged() -> None:
    two = _field(5, 2, b"\x03\x0a\x01a") + _field(5, 2, b"\x05\x0a\x01b\x18\x01")
    assert PROTOBUF.decode(_framed(b"\x08\x01", two, b"\x08\x02")) == [
        {"id": 2, "subscribe": {"channel": "b", "recover": True}}
    ]
    assert as_dict("Command", CLASSES["Command"].FromString(b"\x08\x01" + two + b"\x08\x02")) == {
        "id": 2,
        "subscribe": {"channel": "b", "recover": True},
    }


def test_protobuf_of_a_later_version_is_skipped() -> None:
    unknown = [_field(14, 0, b"\x05"), _field(14, 1, b"12345678"), _field(14, 5, b"1234"), _field(14, 2, b"\x01a")]
    empty = _field(7, 2, b"\x00")
    # 15 is taken, and 3 of a command is not in use.
    skipped = b"".join(bytes((3 << 3 | each[0] & 7,)) + each[1:] for each in unknown)
    other_type = _field(1, 2, b"\x01a")
    assert PROTOBUF.decode(_framed(skipped, other_type, empty)) == [{"publish": {}}]


def _nested(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        data = b"\x32" + _size(len(data)) + data
    data = b"\x6a" + _size(len(data)) + data
    data = b"\x2a" + _size(len(data)) + data
    return _size(len(data)) + data


def _size(size: int) -> bytes:
    return bytes((size & 0x7F | 0x80, size >> 7)) if size >= 128 else bytes((size,))


def test_protobuf_is_nested_as_deep_as_its_runtime_reads_it() -> None:
    assert PROTOBUF.decode(_nested(98))
    CLASSES["Command"].FromString(_nested(98)[2:])
    with pytest.raises(Malformed):
        PROTOBUF.decode(_nested(99))
    with pytest.raises(DecodeError):
        CLASSES["Command"].FromString(_nested(99)[2:])
    with pytest.raises(Malformed):
        PROTOBUF.decode(_nested(5000))


# JSON.


def _as_json(name: str, message: dict[str, Any], spaces: str) -> str:
    members = []
    for each in MESSAGES[name]:
        if each.name not in message:
            continue
        value = message[each.name]
        if each.is_map:
            text = "{" + ",".join(json.dumps(key) + ":" + _one_as_json(each, value[key], spaces) for key in value) + "}"
        elif each.is_repeated:
            text = "[" + f"{spaces},".join(_one_as_json(each, inner, spaces) for inner in value) + "]"
        else:
            text = _one_as_json(each, value, spaces)
        members.append(f'"{each.name}"{spaces}:{spaces}{text}{spaces}')
    return "{" + spaces + ",".join(members) + "}"


def _one_as_json(each: ProtoField, value: Any, spaces: str) -> str:
    if each.type == "raw":
        return str(value.decode())
    return json.dumps(value) if each.type in TYPES else _as_json(each.type, value, spaces)


@given(
    st.lists(one_of("Command", JSON_PAYLOADS) | messages("Command", JSON_PAYLOADS, 2), min_size=1, max_size=4),
    st.sampled_from(["", " ", "\t", " \r "]),
    st.sampled_from(["", "\n"]),
)
def test_json_commands_are_read(commands: list[dict[str, Any]], spaces: str, end: str) -> None:
    assert JSON.decode("\n".join(_as_json("Command", each, spaces) for each in commands) + end) == commands


@given(one_of("Reply", JSON_PAYLOADS) | messages("Reply", JSON_PAYLOADS, 2))
def test_json_replies_are_written(reply: dict[str, Any]) -> None:
    written = JSON.encode(reply)
    assert b"\n" not in written
    read = json.loads(written)
    assert _without_what_is_always_there("Reply", read) == _of_json("Reply", without_zeros("Reply", reply))
    assert JSON.join([written, JSON.ping]) == written + b"\n{}"


def _of_json(name: str, message: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(_as_json(name, message, "")))


def _without_what_is_always_there(name: str, read: Any) -> dict[str, Any]:
    # Reads the JSON of a client; what is zero goes.
    found: dict[str, Any] = {}
    for each in MESSAGES[name]:
        if each.name not in read:
            continue
        value = read[each.name]
        if each.type == "raw":
            found[each.name] = value
        elif each.type not in TYPES and each.is_map:
            value = {key: _without_what_is_always_there(each.type, inner) for key, inner in value.items()}
        elif each.type not in TYPES and each.is_repeated:
            value = [_without_what_is_always_there(each.type, inner) for inner in value]
        elif each.type not in TYPES:
            found[each.name] = _without_what_is_always_there(each.type, value)
        if value and each.name not in found:
            found[each.name] = value
    return found


ALWAYS: dict[str, dict[str, Any]] = {
    '{"id":1,"error":{"code":0,"message":""}}': {"id": 1, "error": {}},
    '{"id":1,"connect":{"client":""}}': {"id": 1, "connect": {}},
    '{"id":1,"connect":{"client":"c","expires":true,"ttl":0}}': {"id": 1, "connect": {"client": "c", "expires": True}},
    '{"id":1,"subscribe":{}}': {"id": 1, "subscribe": {"epoch": "", "offset": 0, "publications": []}},
    '{"id":1,"subscribe":{"expires":true,"ttl":0}}': {"id": 1, "subscribe": {"expires": True}},
    '{"id":1,"unsubscribe":{}}': {"id": 1, "unsubscribe": {}},
    '{"id":1,"publish":{}}': {"id": 1, "publish": {}},
    '{"id":1,"presence":{"presence":{}}}': {"id": 1, "presence": {}},
    '{"id":1,"presence_stats":{"num_clients":0,"num_users":0}}': {"id": 1, "presence_stats": {}},
    '{"id":1,"history":{"epoch":"e","publications":[],"offset":0}}': {"id": 1, "history": {"epoch": "e"}},
    '{"id":1,"rpc":{}}': {"id": 1, "rpc": {"data": None}},
    '{"id":1,"refresh":{"client":"c","expires":true,"ttl":0}}': {
        "id": 1,
        "refresh": {"client": "c", "expires": True, "ttl": 0},
    },
    '{"id":1,"sub_refresh":{"expires":true,"ttl":0}}': {"id": 1, "sub_refresh": {"expires": True}},
    '{"push":{"channel":"a","join":{"info":{"user":"","client":""}}}}': {
        "push": {"channel": "a", "join": {"info": {}}}
    },
    '{"push":{"channel":"a","unsubscribe":{"code":0,"reason":""}}}': {"push": {"channel": "a", "unsubscribe": {}}},
    '{"push":{"disconnect":{"code":0,"reason":""}}}': {"push": {"disconnect": {}}},
    "{}": {},
}


@pytest.mark.parametrize("line", ALWAYS)
def test_json_has_what_clients_look_for_without_asking(line: str) -> None:
    assert JSON.encode(ALWAYS[line]).decode() == line
    assert replies_of(PROTOBUF.encode(ALWAYS[line])) == [without_zeros("Reply", _without_none(ALWAYS[line]))]


def _without_none(message: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in message.items()
        if value is not None
    }


def test_a_payload_stays_what_it_was() -> None:
    (command,) = JSON.decode('{"id":1,"publish":{"channel":"é","data": {"b" : [1.0,  1e2,"\\u00e9é"], "b":null } }}')
    assert command["publish"]["data"] == '{"b" : [1.0,  1e2,"\\u00e9é"], "b":null }'.encode()
    written = JSON.encode({"push": {"channel": "é", "pub": {"data": command["publish"]["data"], "offset": 2**53}}})
    assert (
        written.decode()
        == '{"push":{"channel":"é","pub":{"data":{"b" : [1.0,  1e2,"\\u00e9é"], "b":null },"offset":9007199254740992}}}'
    )


def test_a_payload_of_several_lines_is_put_into_one() -> None:
    data = json.dumps({"a": "\n"}, indent=2).encode()
    assert data.count(b"\n") == 2
    assert JSON.encode({"push": {"message": {"data": data}}}) == b'{"push":{"message":{"data":{  "a": "\\n"}}}}'
    assert replies_of(PROTOBUF.encode({"push": {"message": {"data": data}}})) == [{"push": {"message": {"data": data}}}]


@pytest.mark.parametrize("payload", [b"{", b"\xff", b"hello", b"NaN", b"[Infinity]", b"1 2", b'"\\ud800"', b"[" * 5000])
def test_what_is_no_json_is_not_sent_to_json_clients(payload: bytes) -> None:
    assert not is_json(payload)
    with pytest.raises(NotJSON):
        JSON.encode({"push": {"channel": "a", "pub": {"data": payload}}})
    assert payload in PROTOBUF.encode({"push": {"channel": "a", "pub": {"data": payload}}})


@pytest.mark.parametrize("codec", [JSON, PROTOBUF], ids=["json", "protobuf"])
def test_a_field_that_the_protocol_does_not_know_is_a_mistake(codec: Codec) -> None:
    with pytest.raises(KeyError):
        codec.encode({"id": 1, "subscribe": {"recovred": True}})


BAD_JSON: dict[str, str | bytes] = {
    "empty frame": "",
    "line end": "\n",
    "two line ends": "{}\n\n",
    "empty line between": "{}\n\n{}",
    "line end first": "\n{}",
    "binary": b"{}",
    "two objects in a line": "{}{}",
    "cut off": '{"id":1,"subscribe":{"channel":"a"',
    "command over two lines": '{"id":1,\n"subscribe":{}}',
    "list": "[]",
    "null": "null",
    "number": "1",
    "text": '"a"',
    "NaN": '{"id":1,"rpc":{"data":NaN}}',
    "single quotes": "{'id':1}",
    "deep": '{"id":1,"rpc":{"data":' + "[" * 20_000 + "]" * 20_000 + "}}",
    "lone surrogate in a name": '{"id":1,"subscribe":{"channel":"\\ud800"}}',
    "lone surrogate in a payload": '{"id":1,"rpc":{"data":"\\udc00"}}',
    "lone surrogate": "\ud800",
    "control character": '{"id":1,"subscribe":{"channel":"\x01"}}',
    "number of 5,000 digits": '{"x":' + "9" * 5000 + "}",
    "id of -1": '{"id":-1}',
    "id of 2^32": '{"id":4294967296}',
    "id with a point": '{"id":1.0}',
    "id as text": '{"id":"1"}',
    "id true": '{"id":true}',
    "offset of 2^64": '{"id":1,"subscribe":{"offset":18446744073709551616}}',
    "offset of -1": '{"id":1,"subscribe":{"offset":-1}}',
    "limit of 2^31": '{"id":1,"history":{"limit":2147483648}}',
    "flag of 2^63": '{"id":1,"connect":{"flag":9223372036854775808}}',
    "method as a list": '{"id":1,"subscribe":[]}',
    "method as text": '{"id":1,"subscribe":"a"}',
    "channel as a number": '{"id":1,"subscribe":{"channel":1}}',
    "recover as a number": '{"id":1,"subscribe":{"recover":1}}',
    "recover as text": '{"id":1,"subscribe":{"recover":"true"}}',
    "headers as a list": '{"id":1,"connect":{"headers":[]}}',
    "header as a number": '{"id":1,"connect":{"headers":{"a":1}}}',
    "header null": '{"id":1,"connect":{"headers":{"a":null}}}',
    "subs with a text": '{"id":1,"connect":{"subs":{"a":"b"}}}',
    "nodes as an object": '{"id":1,"subscribe":{"tf":{"nodes":{}}}}',
    "node as text": '{"id":1,"subscribe":{"tf":{"nodes":["a"]}}}',
    "second command broken": '{"id":1,"connect":{}}\n{"id":2',
}


@pytest.mark.parametrize("frame", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_wrong_is_malformed(frame: str | bytes) -> None:
    with pytest.raises(Malformed) as caught:
        JSON.decode(frame)
    assert len(str(caught.value)) < 80  # it says what was expected, and nothing of what came


def test_json_of_a_later_version_is_skipped() -> None:
    assert JSON.decode('{"id":1,"x":{"y":[1]},"subscribe":{"channel":"a","z":null,"token":null},"rpc":null}') == [
        {"id": 1, "subscribe": {"channel": "a"}}
    ]


def test_a_payload_may_be_null() -> None:
    assert JSON.decode('{"id":1,"rpc":{"data":null}}') == [{"id": 1, "rpc": {"data": b"null"}}]


def test_the_last_of_a_name_counts() -> None:
    assert JSON.decode('{"id":1,"rpc":{"data":1},"rpc":{"data":2,"data":3},"id":4}') == [
        {"id": 4, "rpc": {"data": b"3"}}
    ]


@pytest.mark.parametrize("frame", ["{}\n" * MAX_COMMANDS, b"\x00" * MAX_COMMANDS], ids=["json", "protobuf"])
def test_a_frame_has_so_many_commands(frame: str | bytes) -> None:
    codec = JSON if isinstance(frame, str) else PROTOBUF
    assert codec.decode(frame) == [{}] * MAX_COMMANDS
    with pytest.raises(Malformed):
        codec.decode(frame + frame[: len(frame) // MAX_COMMANDS])  # type: ignore[operator]


@settings(max_examples=300)
@given(
    st.builds(
        lambda frame, changes: _mutated(frame.encode(), changes).decode(errors="replace"),
        one_of("Command", JSON_PAYLOADS).map(lambda each: _as_json("Command", each, "")),
        st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2), st.integers(0, 127)), max_size=4),
    )
    | st.text(st.characters(exclude_categories=[]), max_size=60)
)
@example('{"id":1,"rpc":{"data":{"\\"":"}"}}}')
def test_json_is_read_as_by_others_or_not_at_all(frame: str) -> None:
    try:
        commands = JSON.decode(frame)
    except Malformed:
        return
    lines = frame.removesuffix("\n").split("\n")
    assert [_of_json("Command", each) for each in commands] == [_known("Command", json.loads(line)) for line in lines]


def _known(name: str, read: Any) -> Any:
    # What a reader sees of JSON that has members which the protocol doesn't know, or null.
    found = {}
    for each in MESSAGES[name]:
        if each.name not in read or (read[each.name] is None and each.type != "raw"):
            continue
        value = read[each.name]
        if each.type in TYPES:
            found[each.name] = value
        elif each.is_map:
            found[each.name] = {key: _known(each.type, inner) for key, inner in value.items()}
        else:
            found[each.name] = [_known(each.type, i) for i in value] if each.is_repeated else _known(each.type, value)
    return found
