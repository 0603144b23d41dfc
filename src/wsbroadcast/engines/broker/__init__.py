"""What every engine with a broker shares; for people who write engines."""

from wsbroadcast.engines.broker.engine import BrokerEngine
from wsbroadcast.engines.broker.link import Inlet, Link, Parcel, reset

__all__ = ["BrokerEngine", "Inlet", "Link", "Parcel", "reset"]
