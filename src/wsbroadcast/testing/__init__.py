"""For tests of apps: a client, and nodes that fail on request. For tests of engines: contracts that every engine keeps.

The contracts need pytest and pytest-asyncio. They are imported only when they are used.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from wsbroadcast.testing.cluster import Cluster
from wsbroadcast.testing.peer import Peer, Refused

if TYPE_CHECKING:
    from wsbroadcast.testing.contract import EngineContract
    from wsbroadcast.testing.history import HistoryContract
    from wsbroadcast.testing.nodes import Node, Recorder
    from wsbroadcast.testing.outages import BrokerContract
    from wsbroadcast.testing.presence import PresenceContract

_LAZY = {
    "BrokerContract": "outages",
    "EngineContract": "contract",
    "HistoryContract": "history",
    "Node": "nodes",
    "PresenceContract": "presence",
    "Recorder": "nodes",
}

if find_spec("pytest") is not None:
    import pytest

    pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _LAZY.values()))


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BrokerContract",
    "Cluster",
    "EngineContract",
    "HistoryContract",
    "Node",
    "Peer",
    "PresenceContract",
    "Recorder",
    "Refused",
]
