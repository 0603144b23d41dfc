"""History in NATS: a stream of JetStream keeps and numbers what is published, and sends it on under today's names.

What is to be kept is published under `prefix:keep.channel.news`. The stream takes it there and publishes it again as
`prefix.channel.news`, with its number and the number before it under this name in headers. The numbers are the offsets;
the epoch is a record in the stream, so that it dies with the data.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import uniform
from secrets import token_urlsafe
from time import monotonic_ns
from typing import Any, NamedTuple, Protocol

from wsbroadcast.engines.broker.history import new_epoch
from wsbroadcast.engines.broker.link import NOWHERE, Entry, Inlet, KeptParcel, Parcel, Place, Stretch
from wsbroadcast.engines.nats.jetstream import (
    API,
    IN_PROCESS,
    NO_STREAM,
    WRONG_LAST,
    Answers,
    Question,
    Refused,
    Round,
    Stream,
    check_version,
    configuration_error,
    is_name_in_use,
)
from wsbroadcast.engines.nats.protocol import (
    Answer,
    Record,
    chain,
    head_of,
    moment_of,
    nanoseconds,
    pub,
    request,
    request_with,
    sub,
)
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable, MessageTooLarge
from wsbroadcast.history import Appended, History, HistoryRules
from wsbroadcast.logs import Throttle, logger
from wsbroadcast.publication import Position

# The subscriptions, by what they are called on the wire; those of audiences are numbers.
_INBOX, _EPOCH, _FORGOTTEN = b"inbox", b"epoch", b"forgotten"

# One page of a read.
_PAGE_MESSAGES = 1000
_PAGE_BYTES = 4 * 1024 * 1024

# Audiences in one question for positions: JetStream takes 1,024 names, and each audience needs two.
_AUDIENCES = 500

# How often something is tried again that another node may change at the same moment.
_TRIES = 5

# Seconds until a replica that is behind is asked again, or a key that another node appends just now.
_PAUSE = 0.01
_KEY_TRIES = 50

# Seconds until a stream is looked at again that could not be, or wasn't there.
_LOOK_AGAIN = 1.0

# How many times as long as one answer a look may last.
_LOOKS = 4

# What our idea of the stream's clock may be wrong by, in nanoseconds.
_SKEW = 10**8

_FOREVER = {"Nats-TTL": "never"}
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"

# What a record says, and whether it is written again: only the first one proves what came after it.
_VALUE = re.compile(rb"([A-Za-z0-9_-]{1,31})(~?)")
_PLAIN_KEY = re.compile(r"[!-~]{1,128}")


class Conversation(Protocol):
    """The connection."""

    lost: asyncio.Future[Exception]

    def send(self, commands: Sequence[bytes]) -> None:
        """Write commands; raises why the connection is lost, if it is."""


@dataclass(eq=False)
class Keeping:
    """How an engine keeps, and what it remembers from link to link."""

    stream: Stream
    rules: HistoryRules | None
    """What is kept; `None` for who learns it from others."""
    who: str
    """How errors call the server."""
    ack_timeout: float
    """Seconds after which nothing more is expected to be said of what was appended."""
    learned: HistoryRules | None = None
    """What others have said that they keep."""
    epoch: str = ""
    """The record that stood in the stream last."""
    top: int = 0
    """The largest number in the stream that is known to have been given under this epoch."""
    told: bytes = b""
    """The rules of others that the log was told of."""
    # When that message was taken, at the latest: in nanoseconds since 1970, or in the headers that say it.
    _time: int | bytes = 0

    def note(self, sequence: int, time: int | bytes) -> None:
        """Remember a message that the stream has, if it is the newest."""
        if sequence > self.top:
            self.top, self._time = sequence, time

    def begin(self, epoch: str) -> None:
        """Remember an epoch; what was seen under another one proves nothing."""
        if epoch != self.epoch:
            self.epoch, self.top, self._time = epoch, 0, 0

    @property
    def time(self) -> int:
        """When the newest message was taken, at the latest; in nanoseconds since 1970."""
        return self._time if isinstance(self._time, int) else Answer(b"", self._time).time


class Mark(NamedTuple):
    """A record that names an epoch: that of the stream, or that of an audience that was forgotten."""

    value: str
    is_first: bool
    """Whether it was written when the epoch began, not again later."""
    sequence: int
    time: int

    @classmethod
    def of(cls, record: Record | None) -> Mark | None:
        """Read a record; `None` if it says nothing."""
        found = None if record is None else _VALUE.fullmatch(record.payload)
        if record is None or found is None:
            return None
        return cls(found[1].decode(), not found[2], record.sequence, record.time)


class Log:
    """The stream as one link sees it.

    Args:
        keeping: How the engine keeps.
        talk: The connection.
        denial: Makes the error for a name that the server doesn't let us publish to.
    """

    def __init__(self, keeping: Keeping, talk: Conversation, denial: Callable[[str], ConfigurationError]) -> None:
        self.rules = keeping.rules
        """What is kept, as it was given or as others have said it."""
        # Is told when the stream isn't the one it was.
        self._inlet: Inlet | None = None
        # Done when the stream has to be looked at.
        self._alarm: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeping = keeping
        self._talk = talk
        stream = keeping.stream
        self._root = stream.root
        self._cut = len(stream.prefix) + 1
        # In the headers of whatever our stream sends on.
        self._sign = f"\r\nNats-Stream: {stream.name}\r\n".encode()
        self._inbox = f"{stream.prefix}.inbox.{token_urlsafe(9)}"
        self._answers = Answers(self._inbox, denial)
        self._api = API(stream.name, keeping.who, self._answers, talk.send)
        talk.lost.add_done_callback(lambda lost: self._answers.lose(lost.result()))
        self._epoch: Mark | None = None
        # Audiences whose history was removed, by their names; they have an epoch of their own.
        self._forgotten: dict[str, Mark] = {}
        self._replicas = 1
        # How long a message is kept, and the stream's clock, compared with our monotonic one; both in nanoseconds.
        self._max_age = 0
        self._clock = 0
        # The largest number of messages of one audience; -1 without an end.
        self._max_messages = -1
        self._throttle = Throttle()

    # The stream.

    async def open(self, version: object) -> None:
        """Find the stream, or make it as the rules want it.

        Raises:
            ConfigurationError: If the server can't keep anything.
        """
        prefix = self._keeping.stream.prefix
        self._talk.send(
            [
                sub(f"{self._inbox}.*", _INBOX),
                sub(f"{prefix}.epoch", _EPOCH),
                sub(f"{prefix}.forgotten.>", _FORGOTTEN),
            ]
        )
        try:
            if self.rules is None and not await self._learn():
                return
            check_version(version, self._keeping.who)
            await self._stand()
            await self._settle(await self._record("epoch"))
            await self._say_rules()
            await self._read_forgotten()
        except Refused as refused:
            raise configuration_error(refused, self._keeping.stream, self._keeping.who) from refused

    async def _read_forgotten(self) -> None:
        (found,), _ = await self._fetch({"seq": 1, "next_by_subj": f"{self._root}forgotten.>"})
        for answer in found:
            self._take_forgotten(answer)

    async def _learn(self) -> bool:
        # What others keep. Who only publishes needs nothing else, if nobody keeps anything.
        try:
            record = await self._record("rules")
        except (ConfigurationError, EngineUnavailable):  # no JetStream, no stream, or it is none of our business
            record = None
        if record is not None:
            try:
                self._keeping.learned = HistoryRules.from_json(record.payload)
            except ConfigurationError as error:
                logger.warning("%s: %s", self._keeping.who, error)
        # A stream that is gone comes back with the first node that keeps; until then what is appended is refused.
        self.rules = self._keeping.learned
        return record is not None

    async def _stand(self) -> None:
        """Find the stream as it has to be, or make it so; then look again, because others may do the same."""
        stream, rules = self._keeping.stream, self._keeping.rules
        for _ in range(_TRIES):
            try:
                info = await self._api.call("INFO")
            except Refused as refused:
                if refused.number != NO_STREAM or rules is None:
                    raise
                await self._change("CREATE", stream.new(rules))
                continue
            config = info["config"]
            changes = {} if rules is None else stream.changes(config, rules)
            if not changes:
                self._replicas, self._max_age = config.get("num_replicas", 1), config.get("max_age", 0)
                self._max_messages = config.get("max_msgs_per_subject", -1)
                self._set_clock(info)
                return
            await self._change("UPDATE", config | changes)
        raise EngineUnavailable(f"{self._keeping.who}: the stream {stream.name} doesn't become what it has to be")

    async def _change(self, verb: str, config: Mapping[str, Any]) -> None:
        try:
            await self._api.call(verb, config)
        except Refused as refused:
            if not is_name_in_use(refused):
                raise

    async def _say_rules(self) -> None:
        # Beside the data, for who only publishes. The last one wins.
        rules = self._keeping.rules
        if rules is None:
            return
        record = await self._record("rules")
        text = rules.to_json()
        if record is None or record.payload != text:
            if record is not None and record.payload != self._keeping.told:
                self._keeping.told = record.payload
                logger.warning(
                    "%s: another node keeps other histories, %.500s; this one keeps %.500s",
                    *(self._keeping.who, record.payload.decode(errors="replace"), text.decode()),
                )
            await self._put("rules", text, _FOREVER)

    # Looked at again.

    @property
    def _seconds_left(self) -> float | None:
        # Until the records of the stream have to be written again; `None` if there are none.
        if self._epoch is None or not self._max_age:
            return None
        return max(0.0, (self._epoch.time + self._max_age // 5 - self._now()) / 10**9) * uniform(1, 1.2)  # noqa: S311

    async def watch(self, inlet: Inlet) -> None:
        """Look after the stream until the connection is lost."""
        self._inlet = inlet
        lost = self._talk.lost
        while not lost.done():
            ends: set[asyncio.Future[Any]] = {lost, self._alarm}
            await asyncio.wait(ends, timeout=self._seconds_left, return_when=asyncio.FIRST_COMPLETED)
            if not lost.done():
                await self._look()

    async def _look(self) -> None:
        if self._alarm.done():
            self._alarm = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_LOOKS * self._keeping.ack_timeout):
                await self._stand()
                await self._settle(await self._record("epoch"))
                await self._read_forgotten()
                if self._seconds_left == 0:
                    await self._write_again()
        except (EngineError, ConfigurationError, TimeoutError) as error:
            if self._throttle.is_due("renew"):
                logger.warning("%s: its history can't be looked after: %s", self._keeping.who, error)
            await asyncio.wait([self._talk.lost], timeout=_LOOK_AGAIN)

    async def _write_again(self) -> None:
        # A full stream drops its oldest messages, also those that outlive all others.
        mark = self._epoch
        assert mark is not None, "it is settled"
        try:
            await self._put("epoch", f"{mark.value}~".encode(), _FOREVER | {_EXPECTED: str(mark.sequence)})
        except Refused as refused:
            if refused.number != WRONG_LAST:  # else another node was first
                raise
        if self._keeping.rules is not None:
            await self._put("rules", self._keeping.rules.to_json(), _FOREVER)

    def _raise_alarm(self) -> None:
        if not self._alarm.done():
            self._alarm.set_result(None)

    # Epochs.

    def epoch_of(self, name: str) -> str:
        """Return the epoch of an audience; empty while none is known."""
        if self._epoch is None:
            return ""
        mark = self._mark_of(name)
        return self._epoch.value if mark is self._epoch else f"{self._epoch.value}-{mark.value}"

    def _mark_of(self, name: str) -> Mark:
        assert self._epoch is not None, "it is known"
        mark = self._forgotten.get(name) if self._forgotten else None
        if mark is None:
            return self._epoch
        if self._is_over(mark):
            del self._forgotten[name]
            return self._epoch
        return mark

    def _is_over(self, mark: Mark) -> bool:
        return 0 < self._max_age < self._now() - mark.time

    async def _settle(self, record: Record | None) -> None:
        """Take the epoch that stands in the stream; write one if there is none, or another if messages were lost."""
        known, disproved = self._keeping.epoch, ""
        mark = Mark.of(record)
        if known and (mark is None or mark.value == known) and not await self._is_intact():
            disproved = known
        for _ in range(_TRIES):
            if mark is not None and mark.value != disproved:
                self._take_epoch(mark)
                return
            # A full stream drops its oldest messages, and this one may be among them. Then it is the same epoch.
            text = f"{known}~" if record is None and known and not disproved else new_epoch()
            expected = 0 if record is None else record.sequence
            try:
                await self._put("epoch", text.encode(), _FOREVER | {_EXPECTED: str(expected)})
            except Refused as refused:
                if refused.number != WRONG_LAST:  # else another node was first
                    raise
            record = await self._record("epoch")
            mark = Mark.of(record)
        raise EngineUnavailable(f"{self._keeping.who}: the nodes don't agree on an epoch")

    async def _is_intact(self) -> bool:
        """Tell whether the stream still has all that is known of it, but for what it has dropped by its limits.

        A stream that was set back to an earlier copy gives the same numbers to other messages. Those are younger.
        """
        top = self._keeping.top
        if await self._newest() < top:
            return False
        query = {"start_time": moment_of(self._keeping.time + 1), "next_by_subj": f"{self._root}>"}
        (younger,) = await self._api.records(query)
        return younger is None or younger.sequence > top

    def _take_epoch(self, mark: Mark) -> None:
        before = self._epoch
        if before is not None and mark.time <= before.time:
            return
        self._epoch = mark
        self._keeping.begin(mark.value)
        self._keeping.note(mark.sequence, mark.time)
        if before is not None and before.value != mark.value:
            self._forgotten.clear()  # they are read again
            self._raise_alarm()
            if self._inlet is not None:
                self._inlet.missed("the history at the broker isn't the one that it was")

    def _take_forgotten(self, answer: Answer) -> None:
        name = self._keeping.stream.prefix + answer.subject.removeprefix(f"{self._root}forgotten")
        before, mark = self._forgotten.get(name), Mark.of(answer.record)
        if mark is not None and (before is None or mark.time > before.time):
            self._forgotten[name] = mark

    # What comes.

    def hear(self, subject: bytes, sid: bytes, answer: Answer) -> None:
        """Take what comes under none of the names of audiences."""
        if sid == _INBOX:
            self._answers.take(subject, answer)
        elif self._sign not in answer.headers:  # somebody has published it straight to where the stream sends it on
            pass
        elif sid == _EPOCH:
            if (mark := Mark.of(answer.record)) is not None:
                self._take_epoch(mark)
        elif sid == _FORGOTTEN:
            self._take_forgotten(answer)

    def deny(self, subject: str) -> bool:
        """Take note that the server has not taken what was published to a name; return whether the name is ours."""
        if not subject.startswith(("$JS.API.", self._root)):
            return False
        self._answers.deny(subject)
        return True

    def place(self, name: str, headers: bytes) -> Place:
        """Return where an envelope is kept, by the headers that it came with."""
        numbers = chain(headers, self._sign)
        if numbers is None or self._epoch is None:
            return NOWHERE
        offset, previous = numbers
        keeping = self._keeping
        if offset > keeping.top:
            keeping.note(offset, headers)
        elif Answer(b"", headers).time > keeping.time:  # an older number, and a younger message
            self._raise_alarm()
        return Place(Position(self.epoch_of(name), offset), previous)

    # What is appended.

    def kept(self, name: str) -> str:
        """Return the name under which the stream takes what is to come under this one."""
        return self._root + name[self._cut :]

    async def publish(
        self,
        parcels: Sequence[Parcel],
        limit: int,
        ask: Callable[[Sequence[bytes]], Awaitable[None]],
        tries: int = _KEY_TRIES,
    ) -> list[Exception | Appended | None]:
        """Publish in this order, in one write; return once the stream has taken what is to be kept.

        Args:
            parcels: What is kept, and what isn't.
            limit: The largest message that the server takes, in bytes.
            ask: Sends commands, and returns once the server has processed them.
            tries: How often to wait for others who append the same key just now.
        """
        results: list[Exception | Appended | None] = [None] * len(parcels)
        round_, commands, kept = Round(), [], []
        for number, parcel in enumerate(parcels):
            if not isinstance(parcel, KeptParcel):
                commands.append(pub(*parcel))
            elif self._epoch is None:
                self._raise_alarm()
                results[number] = self._api.refused("there is no stream yet; nothing was sent", 503)
            elif (head := self._head(parcel)) is not None and len(head) + len(parcel.envelope) > limit:
                results[number] = MessageTooLarge(len(head) + len(parcel.envelope), limit)
            else:
                commands.append(self._append(parcel, head, round_))
                kept.append(number)
        try:
            # Whatever the server refuses of what is kept, it says without being asked.
            if len(kept) == len(commands):
                self._talk.send(commands)
            else:
                await ask(commands)
            if kept:
                await round_.ended(self._keeping.ack_timeout)
        finally:
            self._answers.drop(round_)
        for number, index in enumerate(kept):
            result = results[index] = self._result(parcels[index].name, round_, number)
            if isinstance(result, Appended):
                self._keeping.note(result.position.offset, self._now() + _SKEW)
        again = [index for index in kept if getattr(results[index], "number", 0) == IN_PROCESS]
        if again and tries:
            await asyncio.sleep(_PAUSE)
            later = await self.publish([parcels[index] for index in again], limit, ask, tries - 1)
            for index, appended in zip(again, later, strict=True):
                results[index] = appended
        return results

    def _head(self, parcel: KeptParcel) -> bytes | None:
        # The stream remembers keys for two minutes, all in one place: so each stands behind its epoch and its name, in
        # which there is no "=".
        key = parcel.keep.key
        if key is None:
            return None
        if not _PLAIN_KEY.fullmatch(key):
            key = f"={sha256(key.encode(errors='surrogatepass')).hexdigest()}"
        return head_of({"Nats-Msg-Id": f"{self.epoch_of(parcel.name)} {parcel.name}={key}"})

    def _append(self, parcel: KeptParcel, head: bytes | None, round_: Round) -> bytes:
        name, envelope = parcel
        subject = self._root + name[self._cut :]
        reply = self._answers.expect(round_, subject)
        command = request(subject, reply, envelope) if head is None else request_with(subject, reply, head, envelope)
        return command if not self._forgotten else self._remembered(name) + command

    def _remembered(self, name: str) -> bytes:
        # An audience that was forgotten has its epoch by a record, which has to outlive what comes after it.
        mark = self._forgotten.get(name)
        if mark is None or not self._max_age or mark.time + self._max_age // 5 > self._now():
            return b""
        head = head_of({_EXPECTED: str(mark.sequence)})
        return request_with(f"{self._root}forgotten.{name[self._cut :]}", b"", head, f"{mark.value}~".encode())

    def _result(self, name: str, round_: Round, number: int) -> Exception | Appended:
        if number in round_.errors:
            return round_.errors[number]
        if not round_.answers[number]:
            seconds = self._keeping.ack_timeout
            why = f"{self._keeping.who} hasn't said in {seconds} s whether it keeps the message"
            return EngineUnavailable(why, may_have_been_sent=True)
        answer = round_.answers[number][0]
        if answer.status:
            self._raise_alarm()
            return self._api.refused("no stream takes it; nothing was sent", answer.status)
        ack = self._api.ack(answer)
        if isinstance(ack, Exception):
            return ack
        return Appended(Position(self.epoch_of(name), ack[0]), is_repeat=ack[1])

    # What is read.

    async def read_kept(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what the stream keeps of an audience."""
        subject, start = self._root + name[self._cut :], since or 1
        while True:
            query = {"seq": start, "next_by_subj": subject}
            marks, (found,) = await self._read([name], query, newest=history.messages + 1)
            top = marks.get(subject, found[-1].sequence if found else 0)
            if top < start and start > 1:
                start = 1  # it is of another epoch, and it may be asked what there is instead
                continue
            if top == 0 or (found and found[-1].sequence >= top):
                break
            await asyncio.sleep(_PAUSE)  # another replica has answered, or something came in between
        top = max(top, found[-1].sequence if found else 0)
        now = self._now()
        entries = [Entry(each.payload, each.sequence, max(0, now - each.time) / 10**9) for each in found]
        base = found[0].sequence if found else top
        if start == 1 and len(found) <= history.messages and self._has_all(name, len(found)):
            base = 0
        return Stretch(Position(self.epoch_of(name), top), entries, base)

    def _has_all(self, name: str, count: int) -> bool:
        # The stream doesn't say whether there was anything before the first message of an audience that it has. It has
        # dropped none by number, if these are fewer; none because it is full, if the record is there with which the
        # epoch began, since the oldest go first; and none by age, if the record is younger than that.
        mark = self._mark_of(name)
        has_room = self._max_messages <= 0 or count < self._max_messages
        return not count or (has_room and mark.is_first and not self._is_over(mark))

    async def read_positions(self, names: Sequence[str]) -> list[Position]:
        """Read where audiences are."""
        tops: dict[str, int] = {}
        for some in self._parts(names):
            tops |= (await self._read(some))[0]
        return [Position(self.epoch_of(name), tops.get(self._root + name[self._cut :], 0)) for name in names]

    async def forget(self, name: str) -> None:
        """Give an audience an epoch of its own, then remove what came before it."""
        rest = name[self._cut :]
        sequence = await self._put(f"forgotten.{rest}", new_epoch().encode(), {})
        await self._api.call("PURGE", {"filter": self._root + rest, "seq": sequence})

    def _parts(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        for start in range(0, len(names), _AUDIENCES):
            yield names[start : start + _AUDIENCES]

    async def _read(
        self, names: Sequence[str], *queries: Mapping[str, Any], newest: int = 0
    ) -> tuple[dict[str, int], list[list[Answer]]]:
        """Read the tops of audiences, after their epochs; and what is asked beside it, in the same write.

        It isn't older than the leader was before: followers answer, too.
        """
        rests = [name[self._cut :] for name in names]
        subjects = [f"{self._root}epoch"]
        subjects += [f"{self._root}{kind}{rest}" for rest in rests for kind in ("", "forgotten.")]
        while True:
            least = await self._newest() if self._replicas > 1 else 0
            (marks, *found), up_to = await self._fetch({"multi_last": subjects}, *queries, newest=newest)
            tops: dict[str, int] = {}
            has_epoch = False
            for mark in marks:
                subject = mark.subject
                if subject == subjects[0]:
                    if (epoch := Mark.of(mark.record)) is not None:
                        self._take_epoch(epoch)
                        has_epoch = True
                elif subject.startswith(f"{self._root}forgotten."):
                    self._take_forgotten(mark)
                else:
                    tops[subject] = mark.sequence
                    self._keeping.note(mark.sequence, mark.headers)
            if not has_epoch:
                await self._settle(await self._record("epoch"))
            elif up_to >= least:
                return tops, found
            await asyncio.sleep(_PAUSE)

    async def _fetch(self, *queries: Mapping[str, Any], newest: int = 0) -> tuple[list[list[Answer]], int]:
        """Ask all in one write, and go on where the server cut; return the messages, and what the first one knew."""
        found: list[list[Answer]] = [[] for _ in queries]
        left = {number: dict(query) for number, query in enumerate(queries)}
        up_to = 0
        while left:
            page = {"batch": _PAGE_MESSAGES, "max_bytes": _PAGE_BYTES}
            rounds = await self._api.ask(*(Question(self._api.direct, each | page, True) for each in left.values()))
            for number, (*messages, end) in zip(list(left), rounds, strict=True):
                found[number] += messages
                if number > 0:
                    del found[number][:-newest]
                if number == 0 and end.up_to:
                    up_to = end.up_to
                if end.pending and messages:
                    left[number] = {**left[number], "seq": end.last + 1} | (
                        {"up_to_seq": end.up_to} if end.up_to else {}
                    )
                else:
                    del left[number]
        return found, up_to

    async def _newest(self) -> int:
        info = await self._api.call("INFO")
        self._set_clock(info)
        return int(info["state"]["last_seq"])

    # The rest.

    async def _record(self, what: str) -> Record | None:
        (record,) = await self._api.records({"last_by_subj": self._root + what})
        return record

    async def _put(self, what: str, payload: bytes, headers: Mapping[str, str]) -> int:
        return await self._api.put(self._root + what, payload, headers)

    def _set_clock(self, info: Mapping[str, Any]) -> None:
        if (now := nanoseconds(str(info.get("ts")))) > 0:
            self._clock = now - monotonic_ns()

    def _now(self) -> int:
        # By the stream's clock.
        return monotonic_ns() + self._clock
