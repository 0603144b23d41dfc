"""JetStream, as far as an engine needs it: questions and answers over one connection, and the stream of an app."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from pydantic_core import from_json

from wsbroadcast.engines.nats.protocol import Answer, Record, head_of, nanoseconds, request, request_with
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable
from wsbroadcast.history import HistoryRules

StorageKind = Literal["memory", "file"]
"""Where JetStream keeps a stream."""

MAX_REPLICAS = 5
"""The largest number of servers that JetStream keeps one stream on."""

NO_STREAM, NAME_IN_USE, WRONG_LAST, IN_PROCESS = 10059, 10058, 10071, 10158
"""JetStream's numbers for what isn't there, for who comes second, and for a key that somebody appends just now."""

# What trying again may mend: no leader yet, a cluster that isn't complete.
_PASSING = frozenset({10004, 10007, 10008, 10009, 10164})

# Not enabled, for this account or at all.
_OFF = frozenset({10039, 10076})
_NO_MESSAGE = 10037

# What is read at once.
_PAGE: dict[str, Any] = {"batch": 1000, "max_bytes": 4 * 1024 * 1024}

# The code, and the status of an answer, where nobody is there to take it.
_NOBODY = 503

_NANOSECONDS = 10**9

# The shortest age and window that JetStream takes, and the window that it has by default, in seconds.
_LEAST_AGE = 0.1
_WINDOW = 120.0

_NEEDED_VERSION = (2, 11)


class Refused(EngineUnavailable):
    """Raised when JetStream doesn't do what it was asked."""

    def __init__(self, text: str, code: int, number: int = 0) -> None:
        super().__init__(text)
        self.code = code
        """Like a status of HTTP."""
        self.number = number
        """JetStream's own."""


class Question(NamedTuple):
    """What a server is asked."""

    subject: str
    content: Mapping[str, Any] | None
    is_batch: bool = False
    """Whether several messages answer, and then an end."""


class _Slot(NamedTuple):
    round: Round
    number: int
    subject: str
    is_batch: bool


class Round:
    """Questions that go out in one write, and what came back for each so far."""

    def __init__(self) -> None:
        self.answers: list[list[Answer]] = []
        """For each question its answers; of several the last is the end."""
        self.errors: dict[int, Exception] = {}
        """Why a question was not taken."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when each has its answers."""
        self.tokens: dict[bytes, int] = {}
        """Those that have none yet, by what their answers come under."""

    def end(self, token: bytes, error: Exception | None = None) -> None:
        """Take note that a question has its answers, or gets none."""
        number = self.tokens.pop(token)
        if error is not None:
            self.errors[number] = error
        if not self.tokens and not self.done.done():
            self.done.set_result(None)

    async def ended(self, seconds: float) -> None:
        """Wait until each has its answers, but not longer than so many seconds."""
        timer = asyncio.get_running_loop().call_later(seconds, self._give_up)
        try:
            await self.done
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Answers:
    """What comes to an inbox of ours, and who waits for it.

    Args:
        inbox: The name that answers come under, with a further word each.
        denial: Makes the error for a name that the server doesn't let us publish to.
    """

    def __init__(self, inbox: str, denial: Callable[[str], ConfigurationError]) -> None:
        self._inbox = f"{inbox}.".encode()
        self._denial = denial
        self._numbers = itertools.count(1)
        self._waiting: dict[bytes, _Slot] = {}

    def expect(self, round_: Round, subject: str, *, is_batch: bool = False) -> bytes:
        """Wait for the answers to one more question; return where they have to come."""
        token = b"%d" % next(self._numbers)
        number = len(round_.answers)
        round_.answers.append([])
        round_.tokens[token] = number
        self._waiting[token] = _Slot(round_, number, subject, is_batch)
        return self._inbox + token

    def take(self, subject: bytes, answer: Answer) -> None:
        """Take what has come; nobody may wait for it any more."""
        token = subject[len(self._inbox) :]
        slot = self._waiting.get(token)
        if slot is None:
            return
        slot.round.answers[slot.number].append(answer)
        if not slot.is_batch or answer.status:
            del self._waiting[token]
            slot.round.end(token)

    def deny(self, subject: str) -> None:
        """Take note that the server has not taken what was published to a name."""
        for token in [token for token, slot in self._waiting.items() if slot.subject == subject]:
            self._waiting.pop(token).round.end(token, self._denial(subject))

    def drop(self, round_: Round) -> None:
        """Wait no longer for what hasn't come."""
        for token in round_.tokens:
            self._waiting.pop(token, None)

    def lose(self, why: Exception) -> None:
        """Tell everybody who waits that nothing comes any more."""
        rounds = {id(slot.round): slot.round for slot in self._waiting.values()}
        self._waiting.clear()
        for round_ in rounds.values():
            if not round_.done.done():
                round_.done.set_exception(why)
                round_.done.exception()  # looked at: who waits may be cancelled in this turn of the loop


class API:
    """Asks JetStream about one stream.

    Args:
        stream: The stream.
        who: How errors call the server.
        answers: Where answers come.
        send: Writes commands.
    """

    def __init__(self, stream: Stream, who: str, answers: Answers, send: Callable[[Sequence[bytes]], None]) -> None:
        self._stream = stream.name
        self._root = stream.root
        self._who = who
        self._answers = answers
        self._send = send

    def subject(self, what: str) -> str:
        """Return the name under which the stream keeps something."""
        return self._root + what

    async def ask(self, *questions: Question) -> list[list[Answer]]:
        """Ask everything in one write, and return the answers to each.

        Raises:
            ConfigurationError: If the server doesn't let us ask.
            EngineUnavailable: If nobody is there who could answer.
        """
        round_, commands = Round(), []
        for subject, content, is_batch in questions:
            reply = self._answers.expect(round_, subject, is_batch=is_batch)
            text = b"" if content is None else json.dumps(content, separators=(",", ":")).encode()
            commands.append(request(subject, reply, text))
        return await self._exchange(round_, commands)

    async def put(self, what: str, payload: bytes, headers: Mapping[str, str]) -> int:
        """Let the stream keep something; return its number.

        Raises:
            Refused: If it doesn't.
        """
        subject, round_ = self.subject(what), Round()
        reply = self._answers.expect(round_, subject)
        (answers,) = await self._exchange(round_, [request_with(subject, reply, head_of(headers), payload)])
        return int(self._result(answers[0]).get("seq", 0))

    async def _exchange(self, round_: Round, commands: Sequence[bytes]) -> list[list[Answer]]:
        try:
            self._send(commands)
            await round_.done
        finally:
            self._answers.drop(round_)
        for error in round_.errors.values():
            raise error
        if any(answers[-1].status == _NOBODY for answers in round_.answers):
            raise self.refused("nobody answers for the stream", _NOBODY)
        return round_.answers

    async def call(self, verb: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask what concerns the stream as a whole.

        Raises:
            Refused: If it is refused.
        """
        (answers,) = await self.ask(Question(f"$JS.API.STREAM.{verb}.{self._stream}", content))
        return self._result(answers[0])

    async def records(self, *whats: str) -> list[Record | None]:
        """Read the newest message under each name from the leader; `None` where there is none.

        Raises:
            Refused: If there is no stream.
        """
        return await self._messages(*({"last_by_subj": self.subject(what)} for what in whats))

    async def first_since(self, moment: str) -> Record | None:
        """Read the first message that the leader has since a moment, whatever its name."""
        (record,) = await self._messages({"start_time": moment, "next_by_subj": self.subject(">")})
        return record

    async def _messages(self, *queries: Mapping[str, Any]) -> list[Record | None]:
        subject = f"$JS.API.STREAM.MSG.GET.{self._stream}"
        return [self._record(answer) for (answer,) in await self.ask(*(Question(subject, each) for each in queries))]

    async def fetch(self, *queries: Mapping[str, Any], newest: int = 0) -> tuple[list[list[Answer]], int]:
        """Read many messages from any of the servers that have them; all queries go out at once.

        Args:
            queries: What to read.
            newest: How many of each are enough, of all but the first query; 0 for all.

        Returns:
            The messages for each query, and the newest number in the stream that the server of the first one knew.

        Raises:
            Refused: If there is no stream.
        """
        subject = f"$JS.API.DIRECT.GET.{self._stream}"
        found: list[list[Answer]] = [[] for _ in queries]
        left = {number: {**_PAGE, **query} for number, query in enumerate(queries)}
        up_to = 0
        while left:  # a server cuts what is large
            answers = await self.ask(*(Question(subject, query, is_batch=True) for query in left.values()))
            for number, (*messages, end) in zip(list(left), answers, strict=True):
                found[number] += messages
                if number > 0:
                    del found[number][:-newest]
                elif end.up_to:
                    up_to = end.up_to
                if end.pending and messages:
                    left[number] |= {"seq": end.last + 1} | ({"up_to_seq": end.up_to} if end.up_to else {})
                else:
                    del left[number]
        return found, up_to

    def ack(self, answer: Answer) -> tuple[int, bool] | EngineError:
        """Return the number of what was appended and whether it was there before, or why it isn't kept."""
        refusal = self.refusal(answer.payload)
        if refusal is None:
            ack = _json(answer.payload)
            if type(sequence := ack.get("seq")) is int and sequence > 0:
                return sequence, ack.get("duplicate") is True
            return EngineError(f"{self._who} says {answer.payload!r:.200} of a message that it was to keep")
        # To try again doesn't help against what is wrong with this very message.
        return EngineError(str(refusal)) if refusal.code == 400 else refusal

    def refused(self, why: str, code: int, number: int = 0) -> Refused:
        """Make an error of what JetStream says."""
        return Refused(f"{self._who}: JetStream says {why:.200}", code, number)

    def refusal(self, payload: bytes) -> Refused | None:
        """Return what JetStream says against it; `None` if it has done it."""
        error = _json(payload).get("error")
        if not isinstance(error, dict):
            return None
        code, number = error.get("code"), error.get("err_code")
        return self.refused(
            str(error.get("description")), code if type(code) is int else 500, number if type(number) is int else 0
        )

    def _result(self, answer: Answer) -> dict[str, Any]:
        refusal = self.refusal(answer.payload)
        if refusal is not None:
            raise refusal
        return _json(answer.payload)

    def _record(self, answer: Answer) -> Record | None:
        try:
            found = self._result(answer)["message"]
            return Record(int(found["seq"]), nanoseconds(found["time"]), b64decode(found.get("data", "")))
        except Refused as refused:
            if refused.number == _NO_MESSAGE:
                return None
            raise
        except (LookupError, TypeError, ValueError):
            raise self.refused("what it says is no message", 500) from None


def _json(payload: bytes) -> dict[str, Any]:
    try:
        found = from_json(payload)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The stream of an app: where it is made, and what it has to be like.

    Args:
        prefix: What the names of the app begin with.
        storage: Where a stream is kept that doesn't exist yet.
        replicas: On how many servers.

    Raises:
        ConfigurationError: If storage or replicas make no sense.
    """

    prefix: str
    storage: StorageKind
    replicas: int

    def __post_init__(self) -> None:
        if self.storage not in get_args(StorageKind):
            raise ConfigurationError(f"history_storage of NATS is memory or file, not {self.storage!r:.80}")
        if type(self.replicas) is not int or not 1 <= self.replicas <= MAX_REPLICAS:
            raise ConfigurationError(f"history_replicas of NATS is 1 to {MAX_REPLICAS}, not {self.replicas!r:.80}")

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.prefix}-history"

    @property
    def root(self) -> str:
        """What the names begin with under which it keeps; no prefix of another app is like this."""
        return f"{self.prefix}:keep."

    def new(self, rules: HistoryRules) -> dict[str, Any]:
        """Return the configuration of a new one."""
        kept = self._least(rules)
        return {
            "name": self.name,
            "subjects": [f"{self.root}>"],
            "retention": "limits",
            "discard": "old",
            "storage": self.storage,
            "num_replicas": self.replicas,
            **self._fixed(),
            **kept,
            "duplicate_window": min(kept["max_age"], int(_WINDOW * _NANOSECONDS)),
        }

    def changes(self, config: Mapping[str, Any], rules: HistoryRules) -> dict[str, Any]:
        """Return what has to change in one that exists; its limits only ever grow.

        Raises:
            ConfigurationError: If it can't become what it has to be.
        """
        unfit = [
            what
            for what, is_unfit in (
                (f"doesn't take {self.root}>", f"{self.root}>" not in config.get("subjects", ())),
                ("hasn't the retention limits", config.get("retention") != "limits"),
                ("is sealed", config.get("sealed")),
                ("acknowledges nothing", config.get("no_ack")),
                ("refuses what is more than it keeps of a subject", config.get("discard_new_per_subject")),
                ("forbids to purge it, so that nothing can be forgotten", config.get("deny_purge")),
            )
            if is_unfit
        ]
        if unfit:
            raise ConfigurationError(
                f"the stream {self.name} of JetStream {unfit[0]}: remove it, so that it is made anew, or change it"
            )
        wanted = self._fixed() | {
            limit: least
            for limit, least in self._least(rules).items()
            if 0 < config.get(limit, 0) < least  # else it has no such limit
        }
        return {key: value for key, value in wanted.items() if config.get(key) != value}

    def shortfall(self, config: Mapping[str, Any]) -> str:
        """Say what one that exists has less than a new one would have; empty if nothing."""
        if self.storage == "file" and config.get("storage") != "file":
            return "it is kept in memory, not in files"
        replicas = config.get("num_replicas", 1)
        return f"it is kept on {replicas} servers, not on {self.replicas}" if replicas < self.replicas else ""

    def denial(self, who: str, user: str, subject: str) -> ConfigurationError:
        """Make the error for who may not ask JetStream."""
        return ConfigurationError(
            f"{who} doesn't let {user} publish to {subject!r:.120}: a history needs publish on '{self.root}>', "
            f"'$JS.API.STREAM.*.{self.name}', '$JS.API.STREAM.MSG.GET.{self.name}' and "
            f"'$JS.API.DIRECT.GET.{self.name}'"
        )

    def refusal(self, refused: Refused, who: str) -> Exception:
        """Return what is wrong with a server that refuses the stream; the error itself if it may pass."""
        if refused.number in _PASSING:
            return refused
        if refused.code == _NOBODY or refused.number in _OFF:
            return ConfigurationError(
                f"{who} can't keep a history, because JetStream is off: write jetstream {{}} into the server's "
                "configuration, enable it for the account, or leave history= out"
            )
        return ConfigurationError(
            f"{who} refuses the stream {self.name}, which is to be kept in {self.storage} on {self.replicas} of its "
            f"servers: {refused} (error {refused.number})"
        )

    def _fixed(self) -> dict[str, Any]:
        republish = {"src": f"{self.root}>", "dest": f"{self.prefix}.>"}
        return {"republish": republish, "allow_direct": True, "allow_msg_ttl": True}

    def _least(self, rules: HistoryRules) -> dict[str, int]:
        # One message more than is replayed, because a position is proven by the message that has it. A quarter longer
        # than a position is remembered, because a record that is written again every quarter must outlive it.
        messages = max((each.messages for each in rules.all), default=0) + 1
        seconds = max(_LEAST_AGE, *(1.25 * each.remember for each in rules.all), _LEAST_AGE)
        return {"max_msgs_per_subject": messages, "max_age": int(seconds * _NANOSECONDS)}


def check_version(version: object, who: str) -> None:
    """Check that a server can do what a history needs: to read many messages at once, and to keep some for ever.

    Raises:
        ConfigurationError: If it is too old.
    """
    found = re.match(r"v?(\d+)\.(\d+)", str(version))
    if found is not None and (int(found[1]), int(found[2])) < _NEEDED_VERSION:
        raise ConfigurationError(
            f"{who} is a nats-server {version!s:.20}, and a history needs 2.11: update it, or leave history= out"
        )
