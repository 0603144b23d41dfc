"""WebSocket broadcasting for FastAPI: the ConnectionManager of the tutorials, as a library."""

from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import CloseCode, should_reconnect
from wsbroadcast.connection import Connection, ConnectionState
from wsbroadcast.counters import EngineStats, Stats
from wsbroadcast.engines.base import Engine, Gap, Health, Publication, Receiver
from wsbroadcast.engines.memory import MemoryEngine
from wsbroadcast.engines.supervisor import Timing
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
from wsbroadcast.publisher import Publisher
from wsbroadcast.web.dependencies import (
    ConnectionDep,
    ManagerDep,
    connection_dependency,
    get_connection,
    get_manager,
)
from wsbroadcast.web.fast_path import FastPath
from wsbroadcast.web.identity import Handshake, Identity
from wsbroadcast.web.routing import create_router, create_routes
from wsbroadcast.web.tokens import TokenFrom

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
    "EngineStats",
    "EngineUnavailable",
    "FastPath",
    "Gap",
    "Handshake",
    "Health",
    "Hook",
    "Identity",
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
    "Publisher",
    "Receiver",
    "SlowConsumer",
    "Stats",
    "Timing",
    "TokenFrom",
    "WSBroadcastError",
    "__version__",
    "connection_dependency",
    "create_router",
    "create_routes",
    "get_connection",
    "get_manager",
    "should_reconnect",
]
