"""A broker without a socket, and an engine for it. A test tells it which faults the supervisor meets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from wsbroadcast.engines.broker import BrokerEngine, Inlet, Link, Parcel
from wsbroadcast.engines.memory import MemoryEngine
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.options import Timing
from wsbroadcast.publication import Control, Publication

QUICK = Timing(connect_timeout=0.1, request_timeout=0.1, probe_interval=0.05, max_backoff=0.02, linger=0.01)


class FakeBroker:
    """Holds links. Its attributes say how it answers them."""

    def __init__(self) -> None:
        self.links: list[FakeLink] = []
        self.opened = 0
        self.is_down = False
        """Refuses new links."""
        self.is_hung = asyncio.Event()
        """Set: answers nothing any more, to anybody."""
        self.refuses: ConfigurationError | None = None
        self.forbidden: set[str] = set()
        """Names that nobody may publish to."""
        self.refusal: Exception = PermissionError("no")
        """What that is told with."""
        self.unsubscribable: set[str] = set()
        """Names that nobody may subscribe to."""
        self.publish_seconds = 0.0
        """How long it takes to take a batch."""
        self.max_envelope_bytes = 4096
        """What it takes. Links know what it was when they were opened, and ask on demand."""
        self.loses_cancellation = False
        """A driver that goes on when it is cancelled while it connects, once."""
        self.limits_read = 0
        """How often it was asked for that."""
        self.breaks_on_open: BaseException | None = None
        """What a driver raises that fails in a way of its own, once."""
        self.on_subscribe: Callable[[Sequence[str]], Awaitable[None]] | None = None
        """Awaited with the names while the answer to a subscription is on its way."""
        self.on_unsubscribe: Callable[[Sequence[str]], Awaitable[None]] | None = None
        """The same for the end of one."""
        self.batches: list[list[Parcel]] = []
        self.subscriptions: list[list[str]] = []
        self.releases: list[list[str]] = []

    def send(self, name: str, envelope: bytes) -> None:
        for link in self.links:
            if name in link.names:
                link.arrived.put_nowait((name, envelope))

    def drop_links(self, why: str | None = "reset by the fake") -> None:
        """End all links: with an error that says why, or without one."""
        for link in list(self.links):
            link.arrived.put_nowait(None if why is None else ConnectionResetError(why))

    async def answer(self) -> None:
        if self.is_hung.is_set():
            await asyncio.Event().wait()
        await asyncio.sleep(0)

    @property
    def held(self) -> set[str]:
        """Names that a link is subscribed to, except those of the nodes' own."""
        return {name for link in self.links for name in link.names if ":node:" not in name}


class FakeLink(Link):
    def __init__(self, broker: FakeBroker) -> None:
        self.broker = broker
        self.names: set[str] = set()
        self.arrived: asyncio.Queue[tuple[str, bytes] | Exception | None] = asyncio.Queue()
        self.inlet: Inlet | None = None

    async def open(self) -> None:
        try:
            await self.broker.answer()
        except asyncio.CancelledError:
            if not self.broker.loses_cancellation:
                raise
            self.broker.is_hung.clear()
        breaks, self.broker.breaks_on_open = self.broker.breaks_on_open, None
        if breaks is not None:
            raise breaks
        if self.broker.refuses is not None:
            raise self.broker.refuses
        if self.broker.is_down:
            raise ConnectionRefusedError("nobody listens")
        self.max_envelope_bytes = self.broker.max_envelope_bytes
        self.broker.opened += 1
        self.broker.links.append(self)

    async def read(self, inlet: Inlet) -> None:
        self.inlet = inlet
        while True:
            arrived = await self.arrived.get()
            await self.broker.answer()
            if arrived is None:
                return
            if isinstance(arrived, Exception):
                raise arrived
            inlet.take(*arrived)

    async def subscribe(self, names: Sequence[str]) -> None:
        self.broker.subscriptions.append(list(names))
        await self.broker.answer()
        if self.broker.on_subscribe is not None:
            await self.broker.on_subscribe(names)
        if self.broker.unsubscribable & set(names):
            raise ConfigurationError("the fake forbids one of these names")
        self.names.update(names)

    async def unsubscribe(self, names: Sequence[str]) -> None:
        self.broker.releases.append(list(names))
        await self.broker.answer()
        if self.broker.on_unsubscribe is not None:
            await self.broker.on_unsubscribe(names)
        self.names.difference_update(names)

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | None]:
        await self.broker.answer()
        if self.broker.publish_seconds:
            await asyncio.sleep(self.broker.publish_seconds)
        self.broker.batches.append(list(parcels))
        for parcel in parcels:
            if parcel.name not in self.broker.forbidden:
                self.broker.send(*parcel)
        return [self.broker.refusal if parcel.name in self.broker.forbidden else None for parcel in parcels]

    async def read_limits(self) -> None:
        self.broker.limits_read += 1
        await self.broker.answer()
        if self.broker.is_down:
            raise ConnectionRefusedError("nobody listens")
        self.max_envelope_bytes = self.broker.max_envelope_bytes

    async def abort(self) -> None:
        if self in self.broker.links:
            self.broker.links.remove(self)


class FakeEngine(BrokerEngine):
    name = "fake"

    def __init__(
        self,
        broker: FakeBroker,
        *,
        fail_fast: bool = False,
        timing: Timing = QUICK,
        max_message_bytes: int = 16 * 1024 * 1024,
    ) -> None:
        super().__init__(address="nowhere:1", fail_fast=fail_fast, timing=timing, max_message_bytes=max_message_bytes)
        self.broker = broker

    @classmethod
    def from_url(cls, url: str) -> FakeEngine:
        raise ConfigurationError("a fake has no URL")

    def new_link(self) -> Link:
        return FakeLink(self.broker)


class FailingEngine(MemoryEngine):
    """An engine whose `publish` always raises an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def publish(self, publication: Publication | Control) -> None:
        raise self.error
