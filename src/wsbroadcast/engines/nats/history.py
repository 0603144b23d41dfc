"""Histories in NATS. A stream of JetStream keeps and numbers what is published, and sends it to the nodes.

An envelope that is to be kept is published under `prefix:keep.channel.news`. The stream takes it there and publishes it
again as `prefix.channel.news`. Headers have its number in the stream, and the number before it under this name. These
numbers are the offsets.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from secrets import token_urlsafe
from typing import Any, Protocol

from wsbroadcast.engines.broker.history import new_epoch
from wsbroadcast.engines.broker.link import NOWHERE, Entry, Inlet, KeptParcel, Parcel, Place, Stretch
from wsbroadcast.engines.nats.jetstream import API, IN_PROCESS, Answers, Refused, Round
from wsbroadcast.engines.nats.protocol import Answer, chain, head_of, pub, request, request_with, sub
from wsbroadcast.engines.nats.upkeep import EXPECTED, Keeping, Mark, Upkeep
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable, MessageTooLarge
from wsbroadcast.history import Appended, History
from wsbroadcast.publication import Position

# The ids of subscriptions on the wire. Those of audiences are numbers.
_INBOX, _EPOCH, _FORGOTTEN, _RULES = b"inbox", b"epoch", b"forgotten", b"rules"

# How many audiences one question for positions has at most. JetStream takes 1,024 names, and each audience needs two.
_AUDIENCES = 500

# Seconds until a question is asked again, because a replica is behind or another node appends the same key just now;
# and how often it is asked.
_PAUSE = 0.01
_KEY_TRIES = 50

# Added to the epoch in the position of what was kept before the history was removed. No history has such an epoch.
_FORMER = "-former"

_PLAIN_KEY = re.compile(r"[!-~]{1,128}")

_Result = Exception | Appended | None


class Conversation(Protocol):
    """The connection."""

    lost: asyncio.Future[Exception]

    def send(self, commands: Sequence[bytes]) -> None:
        """Write commands. If the connection is lost, raise the reason."""


class Log:
    """The stream of histories, as one link uses it.

    Args:
        keeping: How the engine keeps.
        talk: The connection.
        denial: Makes the error for a name to which the server doesn't let this user publish.
    """

    def __init__(self, keeping: Keeping, talk: Conversation, denial: Callable[[str], ConfigurationError]) -> None:
        self._keeping = keeping
        self._talk = talk
        prefix = keeping.stream.prefix
        self._cut = len(prefix) + 1
        # A line in the headers of everything that our stream sends.
        self._sign = f"\r\nNats-Stream: {keeping.stream.name}\r\n".encode()
        self._inbox = f"{prefix}.inbox.{token_urlsafe(9)}"
        self._answers = Answers(self._inbox, denial)
        talk.lost.add_done_callback(lambda lost: self._answers.lose(lost.result()))
        self._api = API(keeping.stream, keeping.who, self._answers, talk.send)
        self._subject = self._api.subject
        self._upkeep = Upkeep(keeping, self._api, talk.lost)

    async def open(self, version: object) -> None:
        """Find the stream, or make it for the rules. Without rules, only find out whether there is a stream.

        Raises:
            ConfigurationError: If the server can't keep anything.
        """
        prefix, keeping = self._keeping.stream.prefix, self._keeping
        names = {_INBOX: f"{self._inbox}.*", _EPOCH: f"{prefix}.epoch", _FORGOTTEN: f"{prefix}.forgotten.>"}
        if keeping.rules is None:
            names[_RULES] = f"{prefix}.rules"
        self._talk.send([sub(name, sid) for sid, name in names.items()])
        # If the stream is gone, the first node with rules makes it again. Until then appends are refused.
        if keeping.rules is not None or await self._upkeep.learn():
            keeping.stream.check_version(version, keeping.who)
            try:
                await self._upkeep.open()
            except Refused as refused:
                raise keeping.stream.refusal(refused, keeping.who) from refused

    async def watch(self, inlet: Inlet) -> None:
        """Look after the stream until the connection is lost."""
        await self._upkeep.watch(inlet)

    # Receiving.

    def hear(self, subject: bytes, sid: bytes, answer: Answer) -> None:
        """Take a message that didn't come under the name of an audience."""
        if sid == _INBOX:
            self._answers.take(subject, answer)
        elif self._sign not in answer.headers:  # it isn't from the stream: somebody has published it directly
            pass
        elif sid == _FORGOTTEN:
            self._upkeep.take_forgotten(answer)
        elif sid == _EPOCH:
            # The first epoch is taken elsewhere, together with all else that has to be known of the stream.
            if self._upkeep.epoch is not None and (mark := Mark.of(answer.record)) is not None:
                self._upkeep.take_epoch(mark)
        else:
            self._keeping.learn(answer.payload)
            self._upkeep.alarm()

    def deny(self, subject: str) -> bool:
        """Take note that the server refused what was published to a name; return whether the name is one of these."""
        if not subject.startswith(("$JS.API.", self._subject(""))):
            return False
        self._answers.deny(subject)
        return True

    def place(self, name: str, headers: bytes) -> Place:
        """Return the place of an envelope, by the headers that it came with."""
        numbers = chain(headers, self._sign)
        if numbers is None or self._upkeep.epoch is None:
            return NOWHERE
        offset, previous = numbers
        keeping = self._keeping
        if offset > keeping.top:
            keeping.note(offset, headers)
        elif Answer(b"", headers).time > keeping.time:  # an older number, and a younger message
            self._upkeep.alarm()
        begin = self._upkeep.begin_of(name[self._cut :])
        return Place(self._position(name, offset), 0 if previous < begin <= offset else previous)

    def _position(self, name: str, offset: int) -> Position:
        rest = name[self._cut :]
        epoch = self._upkeep.epoch_of(rest)
        # What was kept before the history was removed may arrive or be confirmed after this node knows of the removal.
        return Position(f"{epoch}{_FORMER}" if 0 < offset < self._upkeep.begin_of(rest) else epoch, offset)

    # Appending.

    async def publish(
        self, parcels: Sequence[Parcel], limit: int, ask: Callable[[Sequence[bytes]], Awaitable[None]]
    ) -> list[_Result]:
        """Publish in this order, in one write; return once the stream has taken what is to be kept.

        Args:
            parcels: The parcels; some are to be kept, others not.
            limit: The largest message that the server takes, in bytes.
            ask: Sends commands, and returns once the server has processed them.
        """
        top = self._keeping.top
        results = await self._publish(parcels, limit, ask)
        for _ in range(_KEY_TRIES):  # if another node appends the same key just now, the result isn't known yet
            again = [number for number, result in enumerate(results) if getattr(result, "number", 0) == IN_PROCESS]
            if not again:
                break
            await asyncio.sleep(_PAUSE)
            later = await self._publish([parcels[number] for number in again], limit, ask)
            for number, result in zip(again, later, strict=True):
                results[number] = result
        if any(isinstance(result, Appended) and _is_former(result, top) for result in results):
            return await self._placed_anew(parcels, results)
        return results

    async def _placed_anew(self, parcels: Sequence[Parcel], results: Sequence[_Result]) -> list[_Result]:
        # The stream has given such numbers before, so it is another one, and its epoch isn't known here yet.
        try:
            await self._upkeep.settle(*await self._api.records("epoch"))
        except (EngineError, ConfigurationError):
            self._upkeep.alarm()  # what was appended is in the stream; its position will mean nothing to anybody
        return [
            Appended(self._position(parcel.name, result.position.offset), result.is_repeat)
            if isinstance(result, Appended)
            else result
            for parcel, result in zip(parcels, results, strict=True)
        ]

    async def _publish(
        self, parcels: Sequence[Parcel], limit: int, ask: Callable[[Sequence[bytes]], Awaitable[None]]
    ) -> list[_Result]:
        results: list[_Result] = [None] * len(parcels)
        round_, commands, kept = Round(), [], []
        for number, parcel in enumerate(parcels):
            is_kept = isinstance(parcel, KeptParcel)
            command = self._append(parcel, limit, round_) if isinstance(parcel, KeptParcel) else _plain(parcel, limit)
            if isinstance(command, Exception):
                results[number] = command
                continue
            commands.append(command)
            if is_kept:
                kept.append(number)
        try:
            if len(kept) < len(commands):
                await ask(commands)
            else:  # if the server refuses a kept one, it says so without being asked
                self._talk.send(commands)
            if kept:
                await round_.ended(self._keeping.ack_timeout)
        finally:
            self._answers.drop(round_)
        for place, number in enumerate(kept):
            results[number] = self._result(parcels[number].name, round_, place)
        return results

    def _append(self, parcel: KeptParcel, limit: int, round_: Round) -> bytes | Exception:
        name, envelope = parcel
        rest = name[self._cut :]
        if self._upkeep.epoch is None:
            self._upkeep.alarm()
            return self._api.refused("there is no stream yet; nothing was sent", 503)
        head = b"" if parcel.keep.key is None else self._head(name, parcel.keep.key)
        if len(head) + len(envelope) > limit:
            return MessageTooLarge(len(head) + len(envelope), limit)
        subject = self._subject(rest)
        reply = self._answers.expect(round_, subject)
        command = request_with(subject, reply, head, envelope) if head else request(subject, reply, envelope)
        mark = self._upkeep.forgotten(rest)
        return command if mark is None or not self._upkeep.is_old(mark) else self._again(rest, mark) + command

    def _head(self, name: str, key: str) -> bytes:
        # The stream remembers all keys in one place. So each has its epoch and name before it, which contain no "=".
        if not _PLAIN_KEY.fullmatch(key):
            key = f"={sha256(key.encode(errors='surrogatepass')).hexdigest()}"
        return head_of({"Nats-Msg-Id": f"{self._upkeep.epoch_of(name[self._cut :])} {name}={key}"})

    def _again(self, rest: str, mark: Mark) -> bytes:
        # After its history was removed, an audience has its epoch in a record, which must outlive what comes after it.
        head = head_of({EXPECTED: str(mark.sequence)})
        return request_with(self._subject(f"forgotten.{rest}"), b"", head, f"{mark.value}~".encode())

    def _result(self, name: str, round_: Round, number: int) -> Exception | Appended:
        if number in round_.errors:
            return round_.errors[number]
        if not round_.answers[number]:
            seconds = self._keeping.ack_timeout
            why = f"{self._keeping.who}: JetStream hasn't answered within {seconds:.1f} s whether it keeps the message"
            return EngineUnavailable(why, may_have_been_sent=True)
        (answer,) = round_.answers[number]
        if answer.status:
            self._upkeep.alarm()
            return self._api.refused("no stream takes it; nothing was sent", answer.status)
        ack = self._api.ack(answer)
        if isinstance(ack, Exception):
            return ack
        sequence, is_repeat = ack
        self._upkeep.note_append(sequence)
        return Appended(self._position(name, sequence), is_repeat)

    # Reading.

    async def read_kept(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what the stream keeps of an audience."""
        subject, start = self._subject(name[self._cut :]), since or 1
        while True:
            query = {"seq": start, "next_by_subj": subject}
            tops, found = await self._read([name], query, newest=history.messages + 1)
            last = found[-1].sequence if found else 0
            top = max(tops.get(subject, 0), last)
            if top < start and start > 1:
                start = 1  # this offset was never given, so everything is read
            elif last == top:
                break
            else:
                await asyncio.sleep(_PAUSE)  # another replica has answered, or something came in between
        begin = self._upkeep.begin_of(name[self._cut :])
        former = sum(each.sequence < begin for each in found)  # of a removed history, but not deleted yet
        found, top = found[former:], 0 if top < begin else top
        now = self._upkeep.now()
        entries = [Entry(each.payload, each.sequence, max(0, now - each.time) / 10**9) for each in found]
        # From the first one on, nothing is missing. Before it, nothing is missing only if there can't have been any.
        is_all = former > 0 or (start == 1 and len(found) <= history.messages and self._is_all(name, len(found)))
        return Stretch(self._position(name, top), entries, 0 if is_all or not found else found[0].sequence)

    def _is_all(self, name: str, count: int) -> bool:
        # The stream doesn't say whether an audience had messages before the first one that it still has. It has dropped
        # none because of their number, if it has fewer. It has dropped none because it is full, if it still has the
        # record with which the epoch began, since the oldest are dropped first. It has dropped none because of their
        # age, if that record is younger.
        mark, limit = self._upkeep.mark_of(name[self._cut :]), self._upkeep.max_messages
        return (limit <= 0 or count < limit) and mark.is_first and not self._upkeep.is_over(mark)

    async def read_positions(self, names: Sequence[str], limit: int) -> list[Position]:
        """Read the newest positions of audiences. No question is larger than the limit, in bytes."""
        tops: dict[str, int] = {}
        for some in _parts(names, limit // 4):
            tops |= (await self._read(some))[0]
        return [self._top(name, tops) for name in names]

    def _top(self, name: str, tops: Mapping[str, int]) -> Position:
        rest = name[self._cut :]
        top = tops.get(self._subject(rest), 0)
        return self._position(name, 0 if top < self._upkeep.begin_of(rest) else top)

    async def forget(self, name: str) -> None:
        """Give an audience a new epoch of its own, then remove what came before it."""
        rest = name[self._cut :]
        sequence = await self._api.put(f"forgotten.{rest}", new_epoch().encode(), {})
        await self._api.call("PURGE", {"filter": self._subject(rest), "seq": sequence})

    async def _read(
        self, names: Sequence[str], *queries: Mapping[str, Any], newest: int = 0
    ) -> tuple[dict[str, int], list[Answer]]:
        # Reads the newest numbers of audiences and their epochs, and sends the queries in the same write. Any replica
        # may answer, so an answer is taken only if it isn't older than what the leader has.
        upkeep, subjects = self._upkeep, [self._subject("epoch")]
        for name in names:
            subjects += [self._subject(name[self._cut :]), self._subject(f"forgotten.{name[self._cut :]}")]
        while True:
            least = await upkeep.newest() if upkeep.replicas > 1 else 0
            (marks, *found), up_to = await self._api.fetch({"multi_last": subjects}, *queries, newest=newest)
            by_subject = {mark.subject: mark for mark in marks}
            epoch = by_subject.pop(subjects[0], None)
            if epoch is None or (mark := Mark.of(epoch.record)) is None:
                await upkeep.settle(*await self._api.records("epoch"))
            elif up_to < least:
                await asyncio.sleep(_PAUSE)
            else:
                upkeep.take_epoch(mark)
                return self._tops(by_subject), found[0] if found else []

    def _tops(self, marks: Mapping[str, Answer]) -> dict[str, int]:
        tops: dict[str, int] = {}
        for subject, mark in marks.items():
            if subject.startswith(self._subject("forgotten.")):
                self._upkeep.take_forgotten(mark)
            else:
                tops[subject] = mark.sequence
                self._keeping.note(mark.sequence, mark.headers)
        return tops


def _is_former(appended: Appended, top: int) -> bool:
    return appended.position.offset <= top and not appended.is_repeat


def _plain(parcel: Parcel, limit: int) -> bytes | Exception:
    size = len(parcel.envelope)
    return pub(*parcel) if size <= limit else MessageTooLarge(size, limit)


def _parts(names: Sequence[str], limit: int) -> Iterator[Sequence[str]]:
    start = size = 0
    for number, name in enumerate(names):
        size += len(name)
        if number > start and (number - start >= _AUDIENCES or size > limit):
            yield names[start:number]
            start, size = number, len(name)
    yield names[start:]
