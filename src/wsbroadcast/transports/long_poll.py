"""Long poll: an HTTP request that is answered as soon as messages have come, or after a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
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
"""How many seconds a request waits at most."""

KEPT_SECONDS = 30.0
"""For how many seconds after the longest wait the place of a polling client is kept."""

_OWN = Audience("connection")

# How many seconds a poll that doesn't wait has for reading what was missed from a history.
_MISSED_SECONDS = 5.0

# Messages that come within so many seconds after the first one are sent together with it.
_JOIN_SECONDS = 0.03


class Collected:
    """The content of the answer to a poll.

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
        """The messages, in the form of events."""
        self._said: list[bytes] = []
        # The channels whose members the client was told.
        self._watched: set[str] = set()
        self.has_news = False
        """Whether there is something to answer with, so that the poll needn't wait longer."""
        self.position: Position | str | None = None
        """The position up to which these are all messages."""
        self.recovered: bool | None = None
        """Whether everything that was missed is among them; `None` if nothing was asked for."""
        self.reason: str | None = None
        """Why what was missed is lost."""
        self.place: str | None = None
        """The name of the client's place, for its next poll; `None` if places aren't counted."""

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
            self._hear(from_json(publication.message.payload), publication.message.payload)
            return True
        if self.is_full:
            return False
        if not isinstance(publication, Withheld):
            payload = publication.seen_by(events).payload
            self.messages.append(payload)
            self._bytes += len(payload)
            self.has_news = True
        if publication.position is not None and publication.channel == self.channel:
            self.position = publication.position
        return True

    def _hear(self, said: dict[str, Any], payload: bytes) -> None:
        if said["type"] in ("presence", "error"):  # the list of members, changes of it, or an error
            self._said.append(payload)
            self.has_news |= said["type"] == "presence" and said["channel"] in self._watched
            self._watched.add(said.get("channel", ""))
            return
        if self.channel is None or said.get("channel") != self.channel:
            return
        if said["type"] == "subscribed":
            self.recovered = said.get("recovered")
            self.reason = said.get("reason")
            self.position = said.get("position")
        elif said["type"] == "gap" and not self.is_full:
            self.recovered, self.reason = False, said["reason"]
            self.position = said.get("position")
        self.has_news |= self.recovered is False

    def answer(self) -> bytes:
        """Return the answer as JSON."""
        told: dict[str, Any] = {"position": self.position, "recovered": self.recovered}
        if self.reason is not None:
            told["reason"] = self.reason
        if self.place is not None:
            told["id"] = self.place
        return b'%b,"messages":[%b]}' % (to_json(told)[:-1], b",".join(self._said + self.messages))


class PollSink(Sink):
    """Collects the content of the answer to a poll."""

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
        """Do nothing: a poll has no backlog."""

    async def _write_close(self, turn: Close) -> None:
        await self._poll.respond(turn.code, turn.reason)


class LongPoll(Answer):
    """One polling request.

    Args:
        scope: The scope of the request.
        receive: The `receive` of the request.
        send: The `send` of the request.
        headers: The headers of every response.
        channel: The channel of its path.
        wait: For how many seconds it waits. With 0 it is answered at once, with what was missed.
        most: About how many bytes of messages an answer has.
        begin: Called with the connection once it is registered.
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
        begin: Callable[[Any], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(scope, receive, send, headers)
        self._wait = wait
        self._begin = begin
        self._collected = Collected(channel, most)
        self._is_accepted = False
        self._timeout: asyncio.Timeout | None = None
        # The position up to which everything was missed, if the poll doesn't wait for more.
        self._end: Position | None = None

    def tell(self, place: str) -> None:
        """Tell the client the name of its place, so that its next poll keeps the place."""
        self._collected.place = place

    def make_sink(self, owner: Owner, slow_consumers: SlowConsumers, speaks: Speaks) -> tuple[Sink, str]:
        """Make its sink; return it with why it isn't the fast one."""
        return PollSink(owner, slow_consumers, self), "long poll"

    async def serve(self, connection: Any) -> None:
        """Wait until the poll can be answered, or the connection has ended."""
        if self._begin is not None:
            await self._begin(connection)
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
        """Collect publications. The answer is sent soon after the first one.

        Returns:
            int: How many had no room and are lost. Those with a position aren't lost: the next poll gets them.
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
        if not (is_done or collected.has_news):
            return
        now = asyncio.get_running_loop().time()
        soon = now if is_done else now + _JOIN_SECONDS
        if not timeout.expired() and (timeout.when() or 0) > soon:
            timeout.reschedule(soon)

    async def respond(self, code: int, reason: str) -> None:
        """Send the answer once the connection has ended."""
        if code == CloseCode.NORMAL or should_reconnect(code):
            await self._answer(200, self._collected.answer())
        else:
            status = 401 if code == CloseCode.UNAUTHENTICATED else 403
            told = {"type": "close", "code": code, "reason": cut_reason(reason)}
            await self._answer(status, to_json(told))

    async def respond_with(self, event: MutableMapping[str, Any]) -> None:
        """Send nothing: only the answer is sent."""

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
