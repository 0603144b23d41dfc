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
    WSBroadcastError,
)
from wsbroadcast.history import LAST, USERS, Histories, History, Page, Recovery, SinceOption
from wsbroadcast.message import JSONDefault, Message
from wsbroadcast.options import ClientTiming, ExpiresAt, Limits, Policy, SlowConsumer, Timing
from wsbroadcast.protocols.commands import ErrorCode
from wsbroadcast.publication import (
    Control,
    Dismissal,
    Forgetting,
    Gap,
    NodeMessage,
    Position,
    Publication,
    Receipt,
    Unsubscription,
)
from wsbroadcast.publishing import Publisher
from wsbroadcast.stats import EngineStats, Stats

if TYPE_CHECKING:
    from wsbroadcast.connection import Connection, ConnectionState, Exclude
    from wsbroadcast.hooks import HOLD_BACK, Delivery, HoldBack, Hook, HookEvent
    from wsbroadcast.manager import ConnectionManager
    from wsbroadcast.methods import CallError
    from wsbroadcast.node.listening import Listener, ListenPolicy
    from wsbroadcast.transports.exit_stack import FastPath
    from wsbroadcast.types import Guard, Headers, Manager, To, Users
    from wsbroadcast.web.access import Access, Action, Authenticate, Authorize, OnDenied
    from wsbroadcast.web.authentication import Handshake, Identity, TokenFrom, UserKey
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

__version__ = "0.1.0"

# Imported when they are used first: a program that only publishes needs neither Starlette nor FastAPI.
_LAZY = {
    "connection": ("Connection", "ConnectionState", "Exclude"),
    "hooks": ("HOLD_BACK", "Delivery", "HoldBack", "Hook", "HookEvent"),
    "manager": ("ConnectionManager",),
    "methods": ("CallError",),
    "node.listening": ("ListenPolicy", "Listener"),
    "transports.exit_stack": ("FastPath",),
    "types": ("Guard", "Headers", "Manager", "To", "Users"),
    "web.access": ("Access", "Action", "Authenticate", "Authorize", "OnDenied"),
    "web.authentication": ("Handshake", "Identity", "TokenFrom", "UserKey"),
    "web.client_script": ("create_script_router",),
    "web.dependencies": ("ConnectionDep", "ManagerDep", "connection_dependency", "get_connection", "get_manager"),
    "web.event_commands": ("Accepts", "Inbound"),
    "web.operations": ("create_operations_router",),
    "web.routing": ("create_router", "create_routes", "create_sse_router"),
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
    "ClientTiming",
    "CloseCode",
    "ConfigurationError",
    "Connection",
    "ConnectionClosed",
    "ConnectionDep",
    "ConnectionManager",
    "ConnectionState",
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
    "ExpiresAt",
    "FastPath",
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
    "JSONDefault",
    "Lagged",
    "LifecycleError",
    "LimitExceeded",
    "Limits",
    "ListenPolicy",
    "Listener",
    "Manager",
    "ManagerDep",
    "MemoryEngine",
    "Message",
    "MessageTooLarge",
    "MissingDependency",
    "NodeMessage",
    "OnDenied",
    "Page",
    "PermissionDenied",
    "Policy",
    "Position",
    "Publication",
    "Publisher",
    "Receipt",
    "Receiver",
    "Recovery",
    "SinceOption",
    "SlowConsumer",
    "Stats",
    "Timing",
    "To",
    "TokenFrom",
    "Unsubscription",
    "UserId",
    "UserKey",
    "Users",
    "WSBroadcastError",
    "__version__",
    "connection_dependency",
    "create_operations_router",
    "create_router",
    "create_routes",
    "create_script_router",
    "create_sse_router",
    "get_connection",
    "get_manager",
    "should_reconnect",
]
