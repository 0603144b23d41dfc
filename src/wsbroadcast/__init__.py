"""WebSocket broadcasting for FastAPI: the ConnectionManager of the tutorials, as a library."""

from importlib import import_module
from typing import TYPE_CHECKING

from wsbroadcast.audience import EVERYONE, Audience, UserId
from wsbroadcast.close_codes import CloseCode, should_reconnect
from wsbroadcast.engines.contract import Engine, Health, Receiver
from wsbroadcast.engines.memory import MemoryEngine
from wsbroadcast.exceptions import (
    ConfigurationError,
    ConnectionClosed,
    EncodeError,
    EngineError,
    EngineUnavailable,
    InvalidChannel,
    Lagged,
    LifecycleError,
    LimitExceeded,
    MessageTooLarge,
    MissingDependency,
    PermissionDenied,
    StreamEnded,
    StreamExists,
    StreamNotFound,
    WSBroadcastError,
)
from wsbroadcast.history import LAST, USERS, Histories, History, Page, Recovery, SinceOption
from wsbroadcast.message import JSONDefault, Message
from wsbroadcast.options import ClientTiming, ExpiresAt, Limits, Policy, SlowConsumer, Timing
from wsbroadcast.presence import Member, Presence, Presences
from wsbroadcast.protocols.commands import ErrorCode
from wsbroadcast.publication import (
    Control,
    Dismissal,
    Forgetting,
    Gap,
    NodeMessage,
    Position,
    PresenceChange,
    Publication,
    Receipt,
    Unsubscription,
)
from wsbroadcast.publishing import Publisher
from wsbroadcast.stats import EngineStats, Stats
from wsbroadcast.streams import Run, StreamEntry, StreamLimits, StreamStatus

if TYPE_CHECKING:
    from wsbroadcast.connection import Connection, ConnectionState, Exclude
    from wsbroadcast.hooks import HOLD_BACK, Delivery, HoldBack, Hook, HookEvent
    from wsbroadcast.manager import ConnectionManager
    from wsbroadcast.methods import CallError
    from wsbroadcast.node.listening import Listener, ListenPolicy
    from wsbroadcast.node.streams import Follower
    from wsbroadcast.protocols.centrifuge.keys import InvalidToken, TokenKey
    from wsbroadcast.protocols.centrifuge.tokens import (
        CentrifugeTokens,
        ConnectionToken,
        ExpiredToken,
        ForeignToken,
        ServerSubscription,
        SubscriptionToken,
    )
    from wsbroadcast.transports.exit_stack import FastPath
    from wsbroadcast.types import Guard, Headers, Manager, To, Users
    from wsbroadcast.web.access import Access, Action, Authenticate, Authorize, OnDenied
    from wsbroadcast.web.asyncapi import create_asyncapi_router
    from wsbroadcast.web.authentication import Handshake, Identity, TokenFrom, UserKey
    from wsbroadcast.web.centrifuge.commands import OnSend
    from wsbroadcast.web.centrifuge.identity import ChannelsOf
    from wsbroadcast.web.centrifuge.router import create_centrifuge_router
    from wsbroadcast.web.client_script import create_script_router
    from wsbroadcast.web.dependencies import (
        ConnectionDep,
        ManagerDep,
        connection_dependency,
        get_connection,
        get_manager,
    )
    from wsbroadcast.web.event_commands import Accepts, Inbound
    from wsbroadcast.web.operations import create_operations_router
    from wsbroadcast.web.routing import create_router, create_routes, create_sse_router
    from wsbroadcast.web.streams import create_stream_router
    from wsbroadcast.web.ui_messages import ui_message_stream

__version__ = "0.2.0"

# Imported when they are used first: a program that only publishes needs neither Starlette nor FastAPI.
_LAZY = {
    "connection": ("Connection", "ConnectionState", "Exclude"),
    "hooks": ("HOLD_BACK", "Delivery", "HoldBack", "Hook", "HookEvent"),
    "manager": ("ConnectionManager",),
    "methods": ("CallError",),
    "node.listening": ("ListenPolicy", "Listener"),
    "node.streams": ("Follower",),
    "protocols.centrifuge.keys": ("InvalidToken", "TokenKey"),
    "protocols.centrifuge.tokens": (
        "CentrifugeTokens",
        "ConnectionToken",
        "ExpiredToken",
        "ForeignToken",
        "ServerSubscription",
        "SubscriptionToken",
    ),
    "transports.exit_stack": ("FastPath",),
    "types": ("Guard", "Headers", "Manager", "To", "Users"),
    "web.access": ("Access", "Action", "Authenticate", "Authorize", "OnDenied"),
    "web.asyncapi": ("create_asyncapi_router",),
    "web.authentication": ("Handshake", "Identity", "TokenFrom", "UserKey"),
    "web.centrifuge.commands": ("OnSend",),
    "web.centrifuge.identity": ("ChannelsOf",),
    "web.centrifuge.router": ("create_centrifuge_router",),
    "web.client_script": ("create_script_router",),
    "web.dependencies": ("ConnectionDep", "ManagerDep", "connection_dependency", "get_connection", "get_manager"),
    "web.event_commands": ("Accepts", "Inbound"),
    "web.operations": ("create_operations_router",),
    "web.routing": ("create_router", "create_routes", "create_sse_router"),
    "web.streams": ("create_stream_router",),
    "web.ui_messages": ("ui_message_stream",),
}
_MODULES = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "EVERYONE",
    "HOLD_BACK",
    "LAST",
    "USERS",
    "Accepts",
    "Access",
    "Action",
    "Audience",
    "Authenticate",
    "Authorize",
    "CallError",
    "CentrifugeTokens",
    "ChannelsOf",
    "ClientTiming",
    "CloseCode",
    "ConfigurationError",
    "Connection",
    "ConnectionClosed",
    "ConnectionDep",
    "ConnectionManager",
    "ConnectionState",
    "ConnectionToken",
    "Control",
    "Delivery",
    "Dismissal",
    "EncodeError",
    "Engine",
    "EngineError",
    "EngineStats",
    "EngineUnavailable",
    "ErrorCode",
    "Exclude",
    "ExpiredToken",
    "ExpiresAt",
    "FastPath",
    "Follower",
    "ForeignToken",
    "Forgetting",
    "Gap",
    "Guard",
    "Handshake",
    "Headers",
    "Health",
    "Histories",
    "History",
    "HoldBack",
    "Hook",
    "HookEvent",
    "Identity",
    "Inbound",
    "InvalidChannel",
    "InvalidToken",
    "JSONDefault",
    "Lagged",
    "LifecycleError",
    "LimitExceeded",
    "Limits",
    "ListenPolicy",
    "Listener",
    "Manager",
    "ManagerDep",
    "Member",
    "MemoryEngine",
    "Message",
    "MessageTooLarge",
    "MissingDependency",
    "NodeMessage",
    "OnDenied",
    "OnSend",
    "Page",
    "PermissionDenied",
    "Policy",
    "Position",
    "Presence",
    "PresenceChange",
    "Presences",
    "Publication",
    "Publisher",
    "Receipt",
    "Receiver",
    "Recovery",
    "Run",
    "ServerSubscription",
    "SinceOption",
    "SlowConsumer",
    "Stats",
    "StreamEnded",
    "StreamEntry",
    "StreamExists",
    "StreamLimits",
    "StreamNotFound",
    "StreamStatus",
    "SubscriptionToken",
    "Timing",
    "To",
    "TokenFrom",
    "TokenKey",
    "Unsubscription",
    "UserId",
    "UserKey",
    "Users",
    "WSBroadcastError",
    "__version__",
    "connection_dependency",
    "create_asyncapi_router",
    "create_centrifuge_router",
    "create_operations_router",
    "create_router",
    "create_routes",
    "create_script_router",
    "create_sse_router",
    "create_stream_router",
    "get_connection",
    "get_manager",
    "should_reconnect",
    "ui_message_stream",
]
