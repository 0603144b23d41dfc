"""JetStream, as far as the engine needs it: questions and answers over one connection."""

from __future__ import annotations

import asyncio
import itertools
import json
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pydantic_core import from_json

from wsbroadcast.engines.nats.protocol import Answer, Record, head_of, nanoseconds, request, request_with
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable

NO_STREAM, NAME_IN_USE, WRONG_LAST, IN_PROCESS = 10059, 10058, 10071, 10158
"""JetStream's error numbers: no such stream; the name of a stream is taken; another message came first; another node
appends the same key just now."""

WRONG_LAST_JUST_NOW = 10164
"""JetStream's error number: another message came first, and not all servers have it yet."""

_NO_MESSAGE = 10037

# How much is read at once.
_PAGE: dict[str, Any] = {"batch": 1000, "max_bytes": 4 * 1024 * 1024}

NOBODY = 503
"""The code of an error, and the status of an answer, if nobody takes the question."""

# The status after several answers: these were all, or there are none.
_ENDS = frozenset({204, 404})


class Refused(EngineUnavailable):
    """Raised when JetStream refuses a question."""

    def __init__(self, text: str, code: int, number: int = 0) -> None:
        super().__init__(text)
        self.code = code
        """The code, which is like an HTTP status."""
        self.number = number
        """JetStream's own number of the error."""


class Named(Protocol):
    """The part of a stream that questions need."""

    @property
    def name(self) -> str:
        """The name of the stream."""

    @property
    def root(self) -> str:
        """The beginning of the names under which it keeps messages."""


class Put(NamedTuple):
    """A message that a stream is to keep."""

    what: str
    """The message's name, without the root."""
    payload: bytes
    headers: Mapping[str, str]


class Question(NamedTuple):
    """A question to a server."""

    subject: str
    content: Mapping[str, Any] | None
    is_batch: bool = False
    """Whether the answer is several messages, and then an end."""


class _Slot(NamedTuple):
    round: Round
    number: int
    subject: str
    is_batch: bool


class Round:
    """Questions that are sent in one write, and their answers so far."""

    def __init__(self) -> None:
        self.answers: list[list[Answer]] = []
        """The answers to each question. If there are several, the last one is the end."""
        self.errors: dict[int, Exception] = {}
        """Why a question was refused, by its place in the round."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when all questions have their answers."""
        self.tokens: dict[bytes, int] = {}
        """The questions without answers, by the token that their answers come under."""

    def end(self, token: bytes, error: Exception | None = None) -> None:
        """Take note that a question has all its answers, or gets none."""
        number = self.tokens.pop(token)
        if error is not None:
            self.errors[number] = error
        if not self.tokens and not self.done.done():
            self.done.set_result(None)

    async def ended(self, seconds: float) -> None:
        """Wait until all questions have their answers, for at most so many seconds."""
        timer = asyncio.get_running_loop().call_later(seconds, self._give_up)
        try:
            await self.done
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Answers:
    """The answers that come to an inbox, and the rounds that wait for them.

    Args:
        inbox: The name that answers come under. Each question adds a word to it.
        denial: Makes the error for a name to which the server doesn't let this user publish.
    """

    def __init__(self, inbox: str, denial: Callable[[str], ConfigurationError]) -> None:
        self._inbox = f"{inbox}.".encode()
        self._denial = denial
        self._numbers = itertools.count(1)
        self._waiting: dict[bytes, _Slot] = {}

    def expect(self, round_: Round, subject: str, *, is_batch: bool = False) -> bytes:
        """Wait for the answers to one more question; return the name that they must come under."""
        token = b"%d" % next(self._numbers)
        number = len(round_.answers)
        round_.answers.append([])
        round_.tokens[token] = number
        self._waiting[token] = _Slot(round_, number, subject, is_batch)
        return self._inbox + token

    def take(self, subject: bytes, answer: Answer) -> None:
        """Take an answer. Perhaps nobody waits for it any more."""
        token = subject[len(self._inbox) :]
        slot = self._waiting.get(token)
        if slot is None:
            return
        slot.round.answers[slot.number].append(answer)
        if not slot.is_batch or answer.status:
            del self._waiting[token]
            slot.round.end(token)

    def deny(self, subject: str) -> None:
        """Take note that the server refused what was published to a name."""
        for token in [token for token, slot in self._waiting.items() if slot.subject == subject]:
            self._waiting.pop(token).round.end(token, self._denial(subject))

    def drop(self, round_: Round) -> None:
        """Wait no longer for the answers of a round."""
        for token in round_.tokens:
            self._waiting.pop(token, None)

    def lose(self, why: Exception) -> None:
        """Tell all waiting callers that no answers come any more."""
        rounds = {id(slot.round): slot.round for slot in self._waiting.values()}
        self._waiting.clear()
        for round_ in rounds.values():
            if not round_.done.done():
                round_.done.set_exception(why)
                round_.done.exception()  # marked as retrieved: the caller may be cancelled in this turn of the loop


class API:
    """Asks JetStream about one stream.

    Args:
        stream: The stream.
        who: What errors call the server.
        answers: Takes the answers.
        send: Writes commands.
    """

    def __init__(self, stream: Named, who: str, answers: Answers, send: Callable[[Sequence[bytes]], None]) -> None:
        self._stream = stream.name
        self._root = stream.root
        self._who = who
        self._answers = answers
        self._send = send

    def subject(self, what: str) -> str:
        """Return a full name in the stream."""
        return self._root + what

    async def ask(self, *questions: Question) -> list[list[Answer]]:
        """Ask all questions in one write, and return the answers to each.

        Raises:
            ConfigurationError: If the server doesn't let this user ask.
            EngineUnavailable: If nothing answers.
        """
        round_, commands = Round(), []
        for subject, content, is_batch in questions:
            reply = self._answers.expect(round_, subject, is_batch=is_batch)
            text = b"" if content is None else json.dumps(content, separators=(",", ":")).encode()
            commands.append(request(subject, reply, text))
        return await self._exchange(round_, commands)

    async def put(self, what: str, payload: bytes, headers: Mapping[str, str]) -> int:
        """Let the stream keep a message; return its number.

        Raises:
            Refused: If the stream doesn't keep it.
        """
        (sequence,) = await self.put_all([Put(what, payload, headers)])
        if isinstance(sequence, Refused):
            raise sequence
        return sequence

    async def put_all(self, puts: Sequence[Put], *, silent: int = 0) -> list[int | Refused]:
        """Let the stream keep messages, in this order and in one write; return each one's number, or why it isn't kept.

        Args:
            puts: The messages.
            silent: So many of the first messages aren't confirmed, and have no result.

        Raises:
            ConfigurationError: If the server doesn't let this user publish.
            EngineUnavailable: If no stream takes them.
        """
        round_, commands = Round(), []
        heads: dict[int, bytes] = {}  # many messages have the same
        for number, (what, payload, headers) in enumerate(puts):
            head = heads.get(id(headers)) or heads.setdefault(id(headers), head_of(headers))
            subject = self.subject(what)
            reply = b"" if number < silent else self._answers.expect(round_, subject)
            commands.append(request_with(subject, reply, head, payload))
        answers = await self._exchange(round_, commands)
        return [self.refusal(answer.payload) or int(_json(answer.payload).get("seq", 0)) for (answer,) in answers]

    def put_nowait(self, puts: Sequence[Put]) -> None:
        """Let the stream keep messages, without a confirmation."""
        self._send([request_with(self.subject(what), b"", head_of(headers), load) for what, load, headers in puts])

    async def _exchange(self, round_: Round, commands: Sequence[bytes]) -> list[list[Answer]]:
        try:
            self._send(commands)
            await round_.done
        finally:
            self._answers.drop(round_)
        for error in round_.errors.values():
            raise error
        if any(answers[-1].status == NOBODY for answers in round_.answers):
            raise self.refused("nobody answers for the stream", NOBODY)
        return round_.answers

    async def call(self, verb: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call JetStream's API for the stream as a whole.

        Raises:
            Refused: If JetStream refuses it.
        """
        (answers,) = await self.ask(Question(f"$JS.API.STREAM.{verb}.{self._stream}", content))
        return self._result(answers[0])

    async def records(self, *whats: str) -> list[Record | None]:
        """Read the newest message under each name from the leader; `None` for a name without any.

        Raises:
            Refused: If there is no stream.
        """
        return await self._messages(*({"last_by_subj": self.subject(what)} for what in whats))

    async def first_since(self, moment: str) -> Record | None:
        """Read the first message, under any name, that the leader has since a moment."""
        (record,) = await self._messages({"start_time": moment, "next_by_subj": self.subject(">")})
        return record

    async def _messages(self, *queries: Mapping[str, Any]) -> list[Record | None]:
        subject = f"$JS.API.STREAM.MSG.GET.{self._stream}"
        return [self._record(answer) for (answer,) in await self.ask(*(Question(subject, each) for each in queries))]

    async def fetch(
        self, *queries: Mapping[str, Any], newest: int = 0, is_some: bool = False
    ) -> tuple[list[list[Answer]], int]:
        """Read many messages from any of the servers that have them. All queries are sent at once.

        Args:
            queries: What to read.
            newest: How many of the newest messages are enough, for each query but the first; 0 for all.
            is_some: Whether the first messages of each are enough, as many as a server sends at once.

        Returns:
            The messages for each query, and the newest number in the stream that the server of the first query knew.

        Raises:
            Refused: If there is no stream.
        """
        subject = f"$JS.API.DIRECT.GET.{self._stream}"
        found: list[list[Answer]] = [[] for _ in queries]
        left = {number: {**_PAGE, **query} for number, query in enumerate(queries)}
        up_to = 0
        while left:  # a server sends a large result in parts
            answers = await self.ask(*(Question(subject, query, is_batch=True) for query in left.values()))
            for number, (*messages, end) in zip(list(left), answers, strict=True):
                if end.status not in _ENDS:
                    raise self.refused(f"{end.status} to a question for messages", end.status)
                found[number] += messages
                if number > 0:
                    del found[number][:-newest]
                elif end.up_to:
                    up_to = end.up_to
                if end.pending and messages and not is_some:
                    left[number] |= {"seq": end.last + 1} | ({"up_to_seq": end.up_to} if end.up_to else {})
                else:
                    del left[number]
        return found, up_to

    def ack(self, answer: Answer) -> tuple[int, bool] | EngineError:
        """Return the number of an appended message, and whether it was kept before; or why it isn't kept."""
        refusal = self.refusal(answer.payload)
        if refusal is None:
            ack = _json(answer.payload)
            if type(sequence := ack.get("seq")) is int and sequence > 0:
                return sequence, ack.get("duplicate") is True
            return EngineError(f"{self._who} answers {answer.payload!r:.200} to a message that it was to keep")
        # With code 400 this very message is wrong, and trying again doesn't help.
        return EngineError(str(refusal)) if refusal.code == 400 else refusal

    def refused(self, why: str, code: int, number: int = 0) -> Refused:
        """Make an error with JetStream's words."""
        return Refused(f"{self._who}: JetStream says {why:.200}", code, number)

    def refusal(self, payload: bytes) -> Refused | None:
        """Return JetStream's refusal; `None` if it has done what was asked."""
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
            raise self.refused("something that is no message", 500) from None


def _json(payload: bytes) -> dict[str, Any]:
    try:
        found = from_json(payload)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
