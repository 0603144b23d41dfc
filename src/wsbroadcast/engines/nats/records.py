"""The stream of presence, as one link uses it: it is found or made, written to, and read.

The record `prefix:present.epoch` names the data. All other names contain its value. So nothing is confused with the
data of another stream, which has given the same numbers. A record replaces the one before it under its name. A record
that is over says so for a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from secrets import token_urlsafe
from typing import Any, Final, Protocol

from wsbroadcast.engines.broker.history import new_epoch
from wsbroadcast.engines.nats.jetstream import (
    API,
    NAME_IN_USE,
    NO_STREAM,
    NOBODY,
    WRONG_LAST,
    WRONG_LAST_JUST_NOW,
    Answers,
    Put,
    Refused,
)
from wsbroadcast.engines.nats.protocol import Answer, sub
from wsbroadcast.engines.nats.streams import PresenceStream
from wsbroadcast.engines.nats.upkeep import EXPECTED, Mark
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable

INBOX = b"present"
"""The id of the subscription for answers on the wire."""

YES, OVER, SWEPT = b"", b"-", b"~"
"""The values of records: it is so; it is over; it is over and was swept."""

RECORD: Final[dict[str, str]] = {"Nats-Rollup": "sub"}
"""The headers of a record."""

GONE: Final[dict[str, str]] = RECORD | {"Nats-TTL": "1s"}
"""The headers of a record that is over."""

# The status of an answer if the question is for more than JetStream reads at once.
_TOO_MANY = 413

# Seconds until a replica that is behind is asked again; and how often something is tried that another node may change.
_PAUSE = 0.01
_TRIES = 5


class Conversation(Protocol):
    """The connection."""

    lost: asyncio.Future[Exception]

    def send(self, commands: Sequence[bytes]) -> None:
        """Write commands. If the connection is lost, raise the reason."""


class Replaced(Refused):
    """Raised when the stream was replaced by another one, so that its data is gone."""


class Records:
    """The stream, as one link uses it. Nothing is sent before it is used.

    Args:
        stream: The stream.
        who: What errors call the server.
        denial: Makes the error for a name to which the server doesn't let this user publish.
    """

    def __init__(self, stream: PresenceStream, who: str, denial: Callable[[str], ConfigurationError]) -> None:
        self.epoch: Mark | None = None
        """The record that names the data; `None` while no stream is known."""
        self.who = who
        """What errors call the server."""
        self._stream = stream
        inbox = f"{stream.prefix}.inbox.{token_urlsafe(9)}"
        self._inbox = sub(f"{inbox}.*", INBOX)
        self.answers = Answers(inbox, denial)
        """The answers to this link's questions."""
        self._talk: Conversation | None = None
        self._version: object = None
        self._api: API | None = None
        self._replicas = 1
        self._opening = asyncio.Lock()

    # The beginning.

    def use(self, talk: Conversation, version: object) -> None:
        """Use a connection to a server of this version."""
        self._talk, self._version = talk, version
        talk.lost.add_done_callback(lambda lost: self.answers.lose(lost.result()))

    async def ready(self) -> Mark:
        """Find the stream and the record that names its data, or make them; return the record.

        Raises:
            ConfigurationError: If the server can't keep presence, or forbids it.
            EngineUnavailable: If the server can't do it now.
        """
        if self.epoch is None:
            async with self._opening:
                return self.epoch or await self._open()
        return self.epoch

    async def _open(self) -> Mark:
        self._stream.check_version(self._version, self.who)
        if self._api is None:
            assert self._talk is not None, "the link is open"
            self._talk.send([self._inbox])
            self._api = API(self._stream, self.who, self.answers, self._talk.send)
        try:
            self._replicas = await self._stand(self._api)
            self.epoch = await self._settle(self._api)
        except Refused as refused:
            raise self._stream.refusal(refused, self.who) from refused
        return self.epoch

    async def _stand(self, api: API) -> int:
        # Returns on how many servers the stream is.
        for _ in range(_TRIES):
            try:
                config = (await api.call("INFO"))["config"]
            except Refused as refused:
                if refused.number != NO_STREAM:
                    raise
                config = None
            changes = self._stream.new() if config is None else self._stream.changes(config)
            if config is not None and not changes:
                return int(config.get("num_replicas", 1))
            try:
                await api.call("CREATE" if config is None else "UPDATE", (config or {}) | changes)
            except Refused as refused:
                if refused.number != NAME_IN_USE:  # else another node has made the stream just now
                    raise
        raise EngineUnavailable(
            f"{self.who}: the stream {self._stream.name} can't be configured now, because others change it too"
        )

    async def _settle(self, api: API) -> Mark:
        # A node that finds no epoch writes one. The stream takes the first.
        for _ in range(_TRIES):
            (found,), _ = await api.fetch({"multi_last": [api.subject("epoch")]})
            mark = Mark.of(found[0].record) if found else None
            if mark is not None:
                return mark
            headers = {EXPECTED: str(found[0].sequence if found else 0)}
            (result,) = await api.put_all([Put("epoch", new_epoch().encode(), headers)])
            if not is_second(result):
                number_of(result)
        raise EngineUnavailable(f"{self.who}: the nodes don't agree on an epoch")

    @property
    def api(self) -> API:
        """Asks JetStream, once the stream is known."""
        if self._api is None or self.epoch is None:
            raise self._replaced()
        return self._api

    def name(self, kind: str, *words: str) -> str:
        """Return a name in the stream, without the root.

        Raises:
            Replaced: If the stream has to be found again.
        """
        if self.epoch is None:
            raise self._replaced()
        return ".".join((self.epoch.value, kind, *words))

    def check(self, epoch: Mark) -> None:
        """Check that the stream still has the data of this epoch.

        Raises:
            Replaced: If it has other data.
        """
        if epoch is not self.epoch:
            raise self._replaced()

    def _replaced(self) -> Replaced:
        self.epoch = None
        return Replaced(f"{self.who}: the stream {self._stream.name} is no longer the same one", NOBODY)

    # Writing.

    async def put(self, *puts: Put) -> list[int | Refused]:
        """Write messages in this order; return for each its number, or why it wasn't taken."""
        try:
            return await self.api.put_all(puts)
        except Refused as refused:
            self._notice(refused)
            raise

    async def put_behind(self, put: Put, before: Sequence[Put]) -> int:
        """Write other messages and then this one; return its number, 0 if it wasn't the next one.

        If it is there, the others are too. One server takes messages one after the other, so only the last one has to
        be confirmed. With several servers all are, because the leader may change in between.
        """
        silent = len(before) if self._replicas == 1 else 0
        try:
            *others, result = await self.api.put_all([*before, put], silent=silent)
        except Refused as refused:
            self._notice(refused)
            raise
        for each in others:
            number_of(each)
        return 0 if is_second(result) else number_of(result)

    async def put_next(self, put: Put, sequence: int) -> int:
        """Write a message if the last one under its name has the number `sequence`; return its number, 0 if not."""
        return await self.put_behind(put._replace(headers={**put.headers, EXPECTED: str(sequence)}), ())

    def _notice(self, refused: Refused) -> None:
        if (refused.code, refused.number) == (NOBODY, 0):  # the stream doesn't exist any more
            self.epoch = None

    # Reading.

    async def newest(
        self, names: Iterable[str], query: Mapping[str, Any] | None = None, *, is_some: bool = False
    ) -> tuple[dict[str, Answer], list[Answer]]:
        """Read the newest message under some names, and in the same write what a query asks for.

        All that was written before the call is seen by it.

        Returns:
            tuple[dict[str, Answer], list[Answer]]: The newest messages, by their names after the epoch; and the
            answers to the query.

        Raises:
            Replaced: If the stream is another one now.
        """
        api = self.api
        subjects = [api.subject("epoch"), *(api.subject(self.name(each)) for each in names)]
        start = len(api.subject(self.name("")))
        try:
            while True:
                # Other replicas may answer, and may be behind.
                least = int((await api.call("INFO"))["state"]["last_seq"]) if self._replicas > 1 else 0
                (marks, *found), up_to = await api.fetch(
                    {"multi_last": subjects}, *([query] if query else ()), is_some=is_some
                )
                if up_to >= least:
                    break
                await asyncio.sleep(_PAUSE)
        except Refused as refused:
            self._notice(refused)
            raise
        by_subject = {each.subject: each for each in marks}
        epoch = by_subject.pop(subjects[0], None)
        if self.epoch is None or epoch is None or epoch.payload != self.epoch.value.encode():
            raise self._replaced()
        return {subject[start:]: each for subject, each in by_subject.items()}, found[0] if found else []

    async def read(self, *kinds: str, is_some: bool = False) -> dict[str, Answer]:
        """Read all records of some kinds, by their names, without those that are over.

        Args:
            kinds: Patterns of names, such as `lease.*`.
            is_some: Whether some of them are enough, if there are very many.
        """
        await self.ready()
        try:
            found, _ = await self.newest(kinds)
        except Refused as refused:
            if refused.code != _TOO_MANY:
                raise
            found = {}
            start = len(self.api.subject(self.name("")))
            for kind in kinds:
                query = {"seq": 1, "next_by_subj": self.api.subject(self.name(kind))}
                found |= {each.subject[start:]: each for each in (await self.newest((), query, is_some=is_some))[1]}
        return {name: each for name, each in found.items() if each.payload != OVER}


def is_second(result: int | Refused) -> bool:
    """Tell whether a message wasn't taken because another one came first."""
    return isinstance(result, Refused) and result.number in (WRONG_LAST, WRONG_LAST_JUST_NOW)


def number_of(result: int | Refused) -> int:
    """Return the number of a message that was written.

    Raises:
        Refused: If it wasn't taken.
    """
    if isinstance(result, Refused):
        raise result
    return result
