"""WebSocket broadcasting for FastAPI: the ConnectionManager of the tutorials, as a library."""

from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import CloseCode, should_reconnect
from wsbroadcast.connection import Connection, ConnectionState
from wsbroadcast.counters import Stats
from wsbroadcast.engines.base import Engine, Gap, Health, Publication, Receiver
from wsbroadcast.engines.memory import MemoryEngine
from wsbroadcast.exceptions import (
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
from wsbroadcast.hooks import Delivery, Hook
from wsbroadcast.manager import ConnectionManager
from wsbroadcast.message import Message
from wsbroadcast.options import Limits, SlowConsumer
from wsbroadcast.web.dependencies import ConnectionDep, ManagerDep, get_connection, get_manager
from wsbroadcast.web.fast_path import FastPath
from wsbroadcast.web.routing import create_router, create_routes

__version__ = "0.1.0"

__all__ = [
    "Audience",
    "CloseCode",
    "ConfigurationError",
    "Connection",
    "ConnectionClosed",
    "ConnectionDep",
    "ConnectionManager",
    "ConnectionState",
    "Delivery",
    "EncodeError",
    "Engine",
    "EngineError",
    "EngineUnavailable",
    "FastPath",
    "Gap",
    "Health",
    "Hook",
    "InvalidChannel",
    "LifecycleError",
    "LimitExceeded",
    "Limits",
    "ManagerDep",
    "MemoryEngine",
    "Message",
    "MessageTooLarge",
    "MissingDependency",
    "PermissionDenied",
    "Publication",
    "Receiver",
    "SlowConsumer",
    "Stats",
    "WSBroadcastError",
    "__version__",
    "create_router",
    "create_routes",
    "get_connection",
    "get_manager",
    "should_reconnect",
]
