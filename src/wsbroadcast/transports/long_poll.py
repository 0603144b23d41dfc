"""Long poll: an HTTP request that is answered with what came, as soon as something has, or after a while."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, MutableMapping
from random import uniform
from typing import Any

from pydantic_core import from_json, to_json
from starlette.types import Receive, Scope, Send

from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import CloseCode, cut_reason, should_reconnect
from wsbroadcast.delivery.backlog import Entry
from wsbroadcast.delivery.frames import Batch, unframed
from wsbroadcast.delivery.sink import Close, Sink
from wsbroadcast.delivery.slow_consumers import Owner, SlowConsumers
from wsbroadcast.message import Message
from wsbroadcast.protocols.events import events
from wsbroadcast.publication import Frame, Position, Publication, Withheld
from wsbroadcast.publication import Protocol as Speaks
from wsbroadcast.transports.http import Answer, Header

MAX_WAIT_SECONDS = 30.0
"""The longest that a request waits."""

KEPT_SECONDS = 30.0
"""How long the place of a client that names it is kept after the longest wait."""

_OWN = Audience("connection")

# How long a poll that doesn't wait is given for what was missed, in seconds: it is read from a history.
_MISSED_SECONDS = 5.0

# What comes so soon after the first message goes with it.
_JOIN_SECONDS = 0.03


class Collected:
    """What a poll is answered with.

    Args:
        channel: The channel whose positions count.
        most: How many bytes of messages fit.
    """

    def __init__(self, channel: str | None, most: int) -> None:
        self.channel = channel
        """The channel whose positions count."""
        self._most = most
        self._bytes = 0
        self.messages: list[bytes] = []
        """As the protocol `events` writes them."""
        self.position: Position | str | None = None
        """Up to where that is everything."""
        self.recovered: bool | None = None
        """What became of what was missed; `None` if nothing was asked for."""
        self.reason: str | None = None
        """Why that is lost."""
        self.place: str | None = None
        """What the client's next poll calls its place; `None` where places aren't counted."""

    @property
    def is_full(self) -> bool:
        """Whether nothing more is taken."""
        return self._bytes >= self._most

    def reaches(self, position: Position) -> bool:
        """Tell whether everything up to a position is in it."""
        return self.position is not None and Position.of(self.position).offset >= position.offset

    def take(self, publication: Publication) -> bool:
        """Add a publication, if there is room; return whether there was."""
        if isinstance(publication, Frame):
            self._hear(from_json(publication.message.payload))
            return True
        if self.is_full:
            return False
        if not isinstance(publication, Withheld):
            payload = publication.seen_by(events).payload
            self.messages.append(payload)
            self._bytes += len(payload)
        if publication.position is not None and publication.channel == self.channel:
            self.position = publication.position
        return True

    def _hear(self, said: dict[str, Any]) -> None:
        if self.channel is None or said.get("channel") != self.channel:
            return
        if said["type"] == "subscribed":
            self.recovered = said.get("recovered")
            self.reason = said.get("reason")
            self.position = said.get("position")
        elif said["type"] == "gap" and not self.is_full:
            self.recovered, self.reason = False, said["reason"]
            self.position = said.get("position")

    def answer(self) -> bytes:
        """Return it as JSON."""
        told: dict[str, Any] = {"position": self.position, "recovered": self.recovered}
        if self.reason is not None:
            told["reason"] = self.reason
        if self.place is not None:
            told["id"] = self.place
        return b'%b,"messages":[%b]}' % (to_json(told)[:-1], b",".join(self.messages))


class PollSink(Sink):
    """Collects what a poll is answered with."""

    kind = "long_poll"
    is_stream = True

    __slots__ = ("_poll",)

    def __init__(self, owner: Owner, slow_consumers: SlowConsumers, poll: LongPoll) -> None:
        super().__init__(owner, slow_consumers, poll.respond_with, form=unframed(events))
        self._poll = poll

    def deliver(self, batch: Batch[Any]) -> None:
        """Collect the batch."""
        if self.is_ended:
            self.count_lost(batch.messages)
        elif lost := self._poll.take(batch.publications):
            self.count_lost(lost)

    def deliver_large(self, batch: Batch[Any]) -> None:
        """Collect the batch."""
        self.deliver(batch)

    def enqueue(self, entries: Iterable[Entry]) -> None:
        """Nothing waits here."""

    async def _write_close(self, turn: Close) -> None:
        await self._poll.respond(turn.code, turn.reason)


class LongPoll(Answer):
    """One request that waits.

    Args:
        scope: The request's.
        receive: Its `receive`.
        send: Its `send`.
        headers: Of every response.
        channel: The channel of its path.
        wait: For how long it waits, in seconds; with 0 it is answered with what was missed.
        most: How many bytes of messages it is answered with, about.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: Iterable[Header],
        channel: str | None,
        wait: float,
        most: int,
    ) -> None:
        super().__init__(scope, receive, send, headers)
        self._wait = wait
        self._collected = Collected(channel, most)
        self._is_accepted = False
        self._timeout: asyncio.Timeout | None = None
        # Up to where everything was missed, if it doesn't wait for more.
        self._end: Position | None = None

    def tell(self, place: str) -> None:
        """Tell the client what its next poll calls its place, so that it keeps it."""
        self._collected.place = place

    def make_sink(self, owner: Owner, slow_consumers: SlowConsumers, speaks: Speaks) -> tuple[Sink, str]:
        """Make its sink; return it with why it isn't the fast one."""
        return PollSink(owner, slow_consumers, self), "long poll"

    async def serve(self, connection: Any) -> None:
        """Wait until it can be answered, or the connection has ended."""
        seconds = self._wait * uniform(0.9, 1.0)  # noqa: S311  # no secret
        if not self._wait:
            recovery = connection.recovered.get(self._collected.channel)
            if recovery is None or not recovery.recovered:
                return
            self._end, seconds = recovery.position, _MISSED_SECONDS
        try:
            async with asyncio.timeout(seconds) as self._timeout:
                self._hurry()
                await connection.wait_closed()
        except TimeoutError:
            pass

    def take(self, publications: Iterable[Publication]) -> int:
        """Collect publications; the answer goes out soon after the first. Return how many found no room, for ever.

        What has a position comes with the next poll.
        """
        lost = 0
        for publication in publications:
            is_taken = self._collected.take(publication)
            lost += not is_taken and publication.position is None
        self._hurry()
        return lost

    def _hurry(self) -> None:
        timeout, collected = self._timeout, self._collected
        if timeout is None:
            return
        is_done = collected.is_full or (self._end is not None and collected.reaches(self._end))
        if not (is_done or collected.messages or collected.recovered is False):
            return
        now = asyncio.get_running_loop().time()
        soon = now if is_done else now + _JOIN_SECONDS
        if not timeout.expired() and (timeout.when() or 0) > soon:
            timeout.reschedule(soon)

    async def respond(self, code: int, reason: str) -> None:
        """Answer, when the connection has ended."""
        if code == CloseCode.NORMAL or should_reconnect(code):
            await self._answer(200, self._collected.answer())
        else:
            status = 401 if code == CloseCode.UNAUTHENTICATED else 403
            told = {"type": "close", "code": code, "reason": cut_reason(reason)}
            await self._answer(status, to_json(told))

    async def respond_with(self, event: MutableMapping[str, Any]) -> None:
        """Nothing but the answer is written."""

    async def _answer(self, status: int, body: bytes) -> None:
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            *self._headers,
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _say(self, event: MutableMapping[str, Any]) -> None:
        match event["type"]:
            case "websocket.accept":
                self._is_accepted = True
            case "websocket.send":
                text = event.get("text")
                self.take((Publication(Message.of(event["bytes"] if text is None else text), _OWN),))
            case "websocket.close" if self._is_accepted:
                await self.respond(event.get("code") or CloseCode.NORMAL, event.get("reason") or "")
            case "websocket.close":
                await self._answer(403, b"")
            case "websocket.http.response.start":
                headers = [*event["headers"], *self._headers]
                await self._send({"type": "http.response.start", "status": event["status"], "headers": headers})
            case "websocket.http.response.body":
                body, more = event.get("body", b""), event.get("more_body", False)
                await self._send({"type": "http.response.body", "body": body, "more_body": more})
