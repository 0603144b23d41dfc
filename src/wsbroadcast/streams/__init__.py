"""Streams: output of a model or an agent that outlives the request, the tab, and the node that shows it."""

from wsbroadcast.streams.entries import EndState, State, StreamEntry
from wsbroadcast.streams.ledger import StreamStatus
from wsbroadcast.streams.run import Run, StreamLimits

__all__ = ["EndState", "Run", "State", "StreamEntry", "StreamLimits", "StreamStatus"]
