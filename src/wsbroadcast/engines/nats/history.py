"""History in NATS: a stream of JetStream keeps and numbers what is published, and sends it on under today's names.

What is to be kept is published under `prefix:keep.channel.news`. The stream takes it there and publishes it again as
`prefix.channel.news`, with its number and the number before it under this name in headers. The numbers are the offsets.
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
from wsbroadcast.engines.nats.jetstream import API, IN_PROCESS, Answers, Refused, Round, check_version
from wsbroadcast.engines.nats.protocol import Answer, chain, head_of, pub, request, request_with, sub
from wsbroadcast.engines.nats.upkeep import EXPECTED, Keeping, Mark, Upkeep
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable, MessageTooLarge
from wsbroadcast.history import Appended, History
from wsbroadcast.publication import Position

# The subscriptions, by what they are called on the wire; those of audiences are numbers.
_INBOX, _EPOCH, _FORGOTTEN, _RULES = b"inbox", b"epoch", b"forgotten", b"rules"

# Audiences in one question for positions: JetStream takes 1,024 names, and each audience needs two.
_AUDIENCES = 500

# Seconds until a replica that is behind is asked again, or a key that another node appends just now; how often that is.
_PAUSE = 0.01
_KEY_TRIES = 50

# Behind the epoch of an audience in the position of what was kept in the one before. No history has such an epoch.
_FORMER = "-former"

_PLAIN_KEY = re.compile(r"[!-~]{1,128}")

_Result = Exception | Appended | None


class Conversation(Protocol):
    """The connection."""

    lost: asyncio.Future[Exception]

    def send(self, commands: Sequence[bytes]) -> None:
        """Write commands; raises why the connection is lost, if it is."""


class Log:
    """The stream as one link uses it.

    Args:
        keeping: How the engine keeps.
        talk: The connection.
        denial: Makes the error for a name that the server doesn't let us publish to.
    """

    def __init__(self, keeping: Keeping, talk: Conversation, denial: Callable[[str], ConfigurationError]) -> None:
        self._keeping = keeping
        self._talk = talk
        prefix = keeping.stream.prefix
        self._cut = len(prefix) + 1
        # The line in the headers of whatever our stream sends on.
        self._sign = f"\r\nNats-Stream: {keeping.stream.name}\r\n".encode()
        self._inbox = f"{prefix}.inbox.{token_urlsafe(9)}"
        self._answers = Answers(self._inbox, denial)
        talk.lost.add_done_callback(lambda lost: self._answers.lose(lost.result()))
        self._api = API(keeping.stream, keeping.who, self._answers, talk.send)
        self._subject = self._api.subject
        self._upkeep = Upkeep(keeping, self._api, talk.lost)

    async def open(self, version: object) -> None:
        """Find the stream, or make it as the rules want it; who only publishes finds out whether there is one.

        Raises:
            ConfigurationError: If the server can't keep anything.
        """
        prefix, keeping = self._keeping.stream.prefix, self._keeping
        names = {_INBOX: f"{self._inbox}.*", _EPOCH: f"{prefix}.epoch", _FORGOTTEN: f"{prefix}.forgotten.>"}
        if keeping.rules is None:
            names[_RULES] = f"{prefix}.rules"
        self._talk.send([sub(name, sid) for sid, name in names.items()])
        # A stream that is gone comes back with the first node that keeps; until then what is appended is refused.
        if keeping.rules is not None or await self._upkeep.learn():
            check_version(version, keeping.who)
            try:
                await self._upkeep.open()
            except Refused as refused:
                raise keeping.stream.refusal(refused, keeping.who) from refused

    async def watch(self, inlet: Inlet) -> None:
        """Look after the stream until the connection is lost."""
        await self._upkeep.watch(inlet)

    # What comes.

    def hear(self, subject: bytes, sid: bytes, answer: Answer) -> None:
        """Take what comes under none of the names of audiences."""
        if sid == _INBOX:
            self._answers.take(subject, answer)
        elif self._sign not in answer.headers:  # somebody has published it straight to where the stream sends it on
            pass
        elif sid == _FORGOTTEN:
            self._upkeep.take_forgotten(answer)
        elif sid == _EPOCH:
            # The first one is taken with all else that has to be known of a stream.
            if self._upkeep.epoch is not None and (mark := Mark.of(answer.record)) is not None:
                self._upkeep.take_epoch(mark)
        else:
            self._keeping.learn(answer.payload)
            self._upkeep.alarm()

    def deny(self, subject: str) -> bool:
        """Take note that the server has not taken what was published to a name; return whether the name is ours."""
        if not subject.startswith(("$JS.API.", self._subject(""))):
            return False
        self._answers.deny(subject)
        return True

    def place(self, name: str, headers: bytes) -> Place:
        """Return where an envelope is kept, by the headers that it came with."""
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
        # What was kept before the history was forgotten may come to us, or be confirmed, after we know of that.
        return Position(f"{epoch}{_FORMER}" if 0 < offset < self._upkeep.begin_of(rest) else epoch, offset)

    # What is appended.

    async def publish(
        self, parcels: Sequence[Parcel], limit: int, ask: Callable[[Sequence[bytes]], Awaitable[None]]
    ) -> list[_Result]:
        """Publish in this order, in one write; return once the stream has taken what is to be kept.

        Args:
            parcels: What is kept, and what isn't.
            limit: The largest message that the server takes, in bytes.
            ask: Sends commands, and returns once the server has processed them.
        """
        results = await self._publish(parcels, limit, ask)
        for _ in range(_KEY_TRIES):  # of a key that somebody else appends just now the result isn't known yet
            again = [number for number, result in enumerate(results) if getattr(result, "number", 0) == IN_PROCESS]
            if not again:
                break
            await asyncio.sleep(_PAUSE)
            later = await self._publish([parcels[number] for number in again], limit, ask)
            for number, result in zip(again, later, strict=True):
                results[number] = result
        return results

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
            else:  # what it refuses of what is kept, the server says without being asked
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
        # The stream remembers all keys in one place. So each stands behind its epoch and its name, in which is no "=".
        if not _PLAIN_KEY.fullmatch(key):
            key = f"={sha256(key.encode(errors='surrogatepass')).hexdigest()}"
        return head_of({"Nats-Msg-Id": f"{self._upkeep.epoch_of(name[self._cut :])} {name}={key}"})

    def _again(self, rest: str, mark: Mark) -> bytes:
        # An audience that was forgotten has its epoch by a record, which has to outlive what comes after it.
        head = head_of({EXPECTED: str(mark.sequence)})
        return request_with(self._subject(f"forgotten.{rest}"), b"", head, f"{mark.value}~".encode())

    def _result(self, name: str, round_: Round, number: int) -> Exception | Appended:
        if number in round_.errors:
            return round_.errors[number]
        if not round_.answers[number]:
            seconds = self._keeping.ack_timeout
            why = f"{self._keeping.who}: JetStream hasn't said in {seconds:.1f} s whether it keeps the message"
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

    # What is read.

    async def read_kept(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what the stream keeps of an audience."""
        subject, start = self._subject(name[self._cut :]), since or 1
        while True:
            query = {"seq": start, "next_by_subj": subject}
            tops, found = await self._read([name], query, newest=history.messages + 1)
            last = found[-1].sequence if found else 0
            top = max(tops.get(subject, 0), last)
            if top < start and start > 1:
                start = 1  # such a number was never given: it gets all that there is
            elif last == top:
                break
            else:
                await asyncio.sleep(_PAUSE)  # another replica has answered, or something came in between
        begin = self._upkeep.begin_of(name[self._cut :])
        former = sum(each.sequence < begin for each in found)  # it is forgotten, and about to be removed
        found, top = found[former:], 0 if top < begin else top
        now = self._upkeep.now()
        entries = [Entry(each.payload, each.sequence, max(0, now - each.time) / 10**9) for each in found]
        # Everything is there after the first one that is, and before it only where nothing can have been.
        is_all = former > 0 or (start == 1 and len(found) <= history.messages and self._is_all(name, len(found)))
        return Stretch(self._position(name, top), entries, 0 if is_all or not found else found[0].sequence)

    def _is_all(self, name: str, count: int) -> bool:
        # The stream doesn't say whether there was anything before the first message of an audience that it has. It has
        # dropped none by number, if these are fewer; none because it is full, if the record is there with which the
        # epoch began, since the oldest go first; and none by age, if the record is younger than that.
        mark, limit = self._upkeep.mark_of(name[self._cut :]), self._upkeep.max_messages
        return (limit <= 0 or count < limit) and mark.is_first and not self._upkeep.is_over(mark)

    async def read_positions(self, names: Sequence[str], limit: int) -> list[Position]:
        """Read where audiences are, in questions of which none is larger than the limit."""
        tops: dict[str, int] = {}
        for some in _parts(names, limit // 4):
            tops |= (await self._read(some))[0]
        return [self._top(name, tops) for name in names]

    def _top(self, name: str, tops: Mapping[str, int]) -> Position:
        rest = name[self._cut :]
        top = tops.get(self._subject(rest), 0)
        return self._position(name, 0 if top < self._upkeep.begin_of(rest) else top)

    async def forget(self, name: str) -> None:
        """Give an audience an epoch of its own, then remove what came before it."""
        rest = name[self._cut :]
        sequence = await self._api.put(f"forgotten.{rest}", new_epoch().encode(), {})
        await self._api.call("PURGE", {"filter": self._subject(rest), "seq": sequence})

    async def _read(
        self, names: Sequence[str], *queries: Mapping[str, Any], newest: int = 0
    ) -> tuple[dict[str, int], list[Answer]]:
        # The tops of audiences, and their epochs; in the same write what is asked beside it. It isn't older than what
        # the leader has: the other replicas answer, too.
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
