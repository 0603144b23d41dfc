from __future__ import annotations

import pytest
from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocketDisconnect

import wsbroadcast
from wsbroadcast import (
    ConfigurationError,
    ConnectionClosed,
    EncodeError,
    EngineError,
    EngineUnavailable,
    InvalidChannel,
    LifecycleError,
    LimitExceeded,
    MessageTooLarge,
    MissingDependency,
    PermissionDenied,
    WSBroadcastError,
)
from wsbroadcast.exceptions import ungrouped


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (ConfigurationError, [ValueError]),
        (MissingDependency, [ConfigurationError, ImportError]),
        (InvalidChannel, [ValueError]),
        (EncodeError, [ValueError]),
        (MessageTooLarge, [EncodeError]),
        (ConnectionClosed, [WebSocketDisconnect, RuntimeError]),
        (LifecycleError, [RuntimeError]),
        (PermissionDenied, []),
        (LimitExceeded, []),
        (EngineError, []),
        (EngineUnavailable, [EngineError, OSError]),
    ],
)
def test_error_is_also_what_an_except_clause_may_name(error: type[Exception], bases: list[type[Exception]]) -> None:
    assert issubclass(error, WSBroadcastError)
    for base in bases:
        assert issubclass(error, base)


def test_every_public_error_has_the_same_root() -> None:
    public = [getattr(wsbroadcast, name) for name in wsbroadcast.__all__]
    errors = [each for each in public if isinstance(each, type) and issubclass(each, BaseException)]
    assert len(errors) == 20
    assert all(issubclass(error, WSBroadcastError) for error in errors)


def test_connection_closed_is_caught_as_the_disconnect_it_is() -> None:
    with pytest.raises(WebSocketDisconnect) as caught:
        raise ConnectionClosed(1013, "slow consumer")
    assert (caught.value.code, caught.value.reason) == (1013, "slow consumer")
    assert str(caught.value) == "connection closed with code 1013: 'slow consumer'"
    assert str(ConnectionClosed(1006)) == "connection closed with code 1006"


def test_reason_that_a_client_chose_cannot_forge_a_line_of_the_log() -> None:
    error = ConnectionClosed(4000, "a\n2026-01-01 ERROR admin logged in\x1b[2J")
    assert str(error).isprintable()
    assert error.reason.startswith("a\n")  # as it came, for who wants it


@pytest.mark.parametrize("kind", [PermissionDenied, LimitExceeded])
def test_refusals_close_a_websocket_where_nobody_catches_them(kind: type[PermissionDenied | LimitExceeded]) -> None:
    error = PermissionDenied("not you") if kind is PermissionDenied else LimitExceeded("max_connections", "not you")
    assert isinstance(error, WebSocketException)
    assert (error.code, error.reason, str(error)) == (1008, "not you", "not you")
    assert str(PermissionDenied()) == ""


def test_message_too_large_says_both_sizes() -> None:
    error = MessageTooLarge(11, 10)
    assert (error.size, error.limit) == (11, 10)
    assert str(error) == "message of 11 bytes is larger than the limit of 10 bytes"


def test_limit_exceeded_names_the_limit() -> None:
    error = LimitExceeded("connections", "1,000 connections are here already")
    assert error.limit == "connections"
    assert str(error) == "1,000 connections are here already"


def test_invalid_channel_escapes_and_cuts_what_a_client_chose() -> None:
    assert str(InvalidChannel("a\r\nb", "no")) == r"invalid channel 'a\r\nb': no"
    assert str(InvalidChannel("a" * 10_000, "no")) == f"invalid channel '{'a' * 79}…: no"
    assert InvalidChannel("a" * 10_000, "no").channel == "a" * 10_000


# Groups.

GONE, DENIED, BROKEN = ConnectionClosed(1001), PermissionDenied("no"), KeyError("broken")


def group_of(*members: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("unhandled errors in a TaskGroup", members)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GONE, GONE),
        (BROKEN, BROKEN),
        (group_of(GONE), GONE),
        (group_of(group_of(group_of(DENIED))), DENIED),
        (group_of(GONE, DENIED), DENIED),
        (group_of(DENIED, group_of(GONE)), DENIED),
        (group_of(GONE, group_of(GONE)), GONE),
    ],
)
def test_ungrouped_finds_the_error_that_a_group_stands_for(error: Exception, expected: Exception) -> None:
    assert ungrouped(error, WebSocketException, WebSocketDisconnect) is expected


@pytest.mark.parametrize("members", [(BROKEN,), (BROKEN, DENIED), (DENIED, group_of(GONE, BROKEN))])
def test_ungrouped_leaves_a_group_with_another_error_in_it(members: tuple[Exception, ...]) -> None:
    group = group_of(*members)
    assert ungrouped(group, WebSocketException, WebSocketDisconnect) is group
