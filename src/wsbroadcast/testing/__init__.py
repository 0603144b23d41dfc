"""For tests of apps: a client, and nodes that fail as they are told to. For tests of engines: what a right one does.

Wants pytest, and the contracts of engines pytest-asyncio.
"""

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in ("contract", "history", "nodes", "outages")))

from wsbroadcast.testing.cluster import Cluster  # noqa: E402
from wsbroadcast.testing.contract import EngineContract  # noqa: E402  # pytest wants to know before
from wsbroadcast.testing.history import HistoryContract  # noqa: E402
from wsbroadcast.testing.nodes import Node, Recorder  # noqa: E402
from wsbroadcast.testing.outages import BrokerContract  # noqa: E402
from wsbroadcast.testing.peer import Peer, Refused  # noqa: E402

__all__ = ["BrokerContract", "Cluster", "EngineContract", "HistoryContract", "Node", "Peer", "Recorder", "Refused"]
