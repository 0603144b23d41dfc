"""WebSocket broadcasting for FastAPI: the ConnectionManager of the tutorials, as a library."""

from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import CloseCode, should_reconnect
from wsbroadcast.connection import Connection, ConnectionState
from wsbroadcast.engines.contract import Engine, Health, Receiver
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
from wsbroadcast.hooks import HOLD_BACK, Delivery, HoldBack, Hook
from wsbroadcast.manager import ConnectionManager
from wsbroadcast.message import Message
from wsbroadcast.options import Limits, SlowConsumer, Timing
from wsbroadcast.publication import Dismissal, Gap, Position, Publication
from wsbroadcast.publishing import Publisher
from wsbroadcast.stats import EngineStats, Stats
from wsbroadcast.transports.exit_stack import FastPath
from wsbroadcast.web.authentication import Handshake, Identity, TokenFrom
from wsbroadcast.web.dependencies import (
    ConnectionDep,
    ManagerDep,
    connection_dependency,
    get_connection,
    get_manager,
)
from wsbroadcast.web.routing import create_router, create_routes

__version__ = "0.1.0"

__all__ = [
    "HOLD_BACK",
    "Audience",
    "CloseCode",
    "ConfigurationError",
    "Connection",
    "ConnectionClosed",
    "ConnectionDep",
    "ConnectionManager",
    "ConnectionState",
    "Delivery",
    "Dismissal",
    "EncodeError",
    "Engine",
    "EngineError",
    "EngineStats",
    "EngineUnavailable",
    "FastPath",
    "Gap",
    "Handshake",
    "Health",
    "HoldBack",
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
    "Position",
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
